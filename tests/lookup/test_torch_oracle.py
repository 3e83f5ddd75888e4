"""Lookups against torch itself, in float64. Skipped where torch is not installed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_embed as se

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64():
    """Rounding out of the way: torch and we add in different orders."""
    with jax.enable_x64(True):
        yield


def in_torch(function, weight, ids, cotangent_seed=0, psw=None, **kwargs):
    """Output, gradient of the table, table as renormed in place, gradient of the weights."""
    weight = torch.tensor(np.array(weight), requires_grad=True)
    if psw is not None:
        psw = torch.tensor(np.array(psw), requires_grad=True)
        kwargs["per_sample_weights"] = psw
    out = function(torch.as_tensor(np.array(ids)), weight, **kwargs)
    cotangent = np.random.default_rng(cotangent_seed).normal(size=out.shape)
    out.backward(torch.tensor(cotangent))
    grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    arrays = (out.detach(), grad, weight.detach(), None if psw is None else psw.grad)
    return tuple(None if x is None else x.numpy() for x in arrays), cotangent


def in_jax(bag, weight, psw, cotangent):
    out, vjp = jax.vjp(bag, jnp.asarray(weight), None if psw is None else jnp.asarray(psw))
    return out, *vjp(jnp.asarray(cotangent))


# --- torch's own samples ------------------------------------------------------------------


def samples(name):
    """The inputs that torch tests its operator with (they come with its wheel)."""
    methods = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", exc_type=ImportError
    )
    (op,) = (op for op in methods.op_db if op.name == name)
    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", torch.float64))
    assert len(found) >= 10
    for sample in found:
        kwargs = dict(sample.kwargs)
        if kwargs.get("scale_grad_by_freq"):
            kwargs.pop("sparse", None)  # torch has no derivative for the two together
        # The operator's samples give the table first.
        yield sample.input.numpy(), sample.args[0].numpy(), kwargs


def to_numpy(x):
    return None if x is None else x.numpy()


@pytest.mark.filterwarnings("ignore")
def test_embedding_samples():
    for weight, ids, kwargs in samples("nn.functional.embedding"):
        expected, cotangent = in_torch(torch.nn.functional.embedding, weight, ids, **kwargs)
        table = weight
        if max_norm := kwargs.get("max_norm"):
            table = se.renorm(table, ids, max_norm, kwargs.get("norm_type", 2.0))
            np.testing.assert_allclose(table, expected[2], **CLOSE, err_msg=str(kwargs))

        def rows(table, _, ids=ids, kwargs=kwargs):
            return se.lookup(
                table,
                ids,
                padding_idx=kwargs.get("padding_idx"),
                scale_grad_by_freq=kwargs.get("scale_grad_by_freq", False),
            )

        out, grad, _ = in_jax(rows, table, None, cotangent)
        np.testing.assert_allclose(out, expected[0], **CLOSE, err_msg=str(kwargs))
        np.testing.assert_allclose(grad, expected[1], **CLOSE, err_msg=str(kwargs))


@pytest.mark.filterwarnings("ignore")
def test_embedding_bag_samples():
    compared = 0
    for weight, ids, kwargs in samples("nn.functional.embedding_bag"):
        psw = to_numpy(kwargs.pop("per_sample_weights", None))
        offsets = to_numpy(kwargs.pop("offsets", None))
        csr = kwargs.get("include_last_offset", False)
        if csr and offsets[-1] != len(ids):
            continue  # undefined in torch
        given = {} if offsets is None else {"offsets": torch.tensor(offsets)}
        expected, cotangent = in_torch(
            torch.nn.functional.embedding_bag, weight, ids, psw=psw, **given, **kwargs
        )
        table = weight
        if max_norm := kwargs.get("max_norm"):
            table = se.renorm(table, ids, max_norm, kwargs.get("norm_type", 2.0))
            np.testing.assert_allclose(table, expected[2], **CLOSE, err_msg=str(kwargs))

        def bag(table, psw, ids=ids, offsets=offsets, csr=csr, kwargs=kwargs):
            return se.lookup_bag(
                table,
                ids,
                weights=psw,
                combiner=kwargs.get("mode", "mean"),
                offsets=offsets,
                num_segments=len(offsets) - 1 if csr else None,
                padding_idx=kwargs.get("padding_idx"),
            )

        out, grad, psw_grad = in_jax(bag, table, psw, cotangent)
        np.testing.assert_allclose(out, expected[0], **CLOSE, err_msg=str(kwargs))
        compared += 1
        if kwargs.get("scale_grad_by_freq"):
            continue  # not an option of bags here, and wrong in torch's bags (pytorch#190063)
        np.testing.assert_allclose(grad, expected[1], **CLOSE, err_msg=str(kwargs))
        if psw is not None:
            np.testing.assert_allclose(psw_grad, expected[3], **CLOSE, err_msg=str(kwargs))
    assert compared >= 40


# --- cases of our own ---------------------------------------------------------------------

# Few different values: ties, repeats and all-padding bags are frequent.
RNG = np.random.default_rng(7)
BAGS = [
    (RNG.integers(-2, 3, (4, 3)) / 2, np.sort(RNG.integers(0, 9, 5)), RNG.integers(0, 4, 8))
    for _ in range(6)
]


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_ragged_bags(mode, padding_idx):
    for table, starts, ids in BAGS:
        offsets = np.concatenate([[0], starts])
        expected, cotangent = in_torch(
            torch.nn.functional.embedding_bag,
            table,
            ids,
            offsets=torch.tensor(offsets),
            mode=mode,
            padding_idx=padding_idx,
        )

        def bag(table, _, ids=ids, offsets=offsets):
            return se.lookup_bag(
                table, ids, offsets=offsets, combiner=mode, padding_idx=padding_idx
            )

        out, grad, _ = in_jax(bag, table, None, cotangent)
        np.testing.assert_allclose(out, expected[0], **CLOSE)
        np.testing.assert_allclose(grad, expected[1], **CLOSE)


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_dense_bags(mode, padding_idx):
    for table, _, ids in BAGS:
        ids = ids.reshape(4, 2)
        expected, cotangent = in_torch(
            torch.nn.functional.embedding_bag, table, ids, mode=mode, padding_idx=padding_idx
        )

        def bag(table, _, ids=ids):
            return se.lookup_bag(table, ids, combiner=mode, padding_idx=padding_idx)

        out, grad, _ = in_jax(bag, table, None, cotangent)
        np.testing.assert_allclose(out, expected[0], **CLOSE)
        np.testing.assert_allclose(grad, expected[1], **CLOSE)


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_per_sample_weights(padding_idx):
    for seed, (table, starts, ids) in enumerate(BAGS):
        psw = np.random.default_rng(seed).normal(size=ids.shape)
        offsets = np.concatenate([[0], starts])
        expected, cotangent = in_torch(
            torch.nn.functional.embedding_bag,
            table,
            ids,
            psw=psw,
            offsets=torch.tensor(offsets),
            mode="sum",
            padding_idx=padding_idx,
        )

        def bag(table, psw, ids=ids, offsets=offsets):
            return se.lookup_bag(table, ids, weights=psw, offsets=offsets, padding_idx=padding_idx)

        found = in_jax(bag, table, psw, cotangent)
        for x, y in zip(found, (expected[0], expected[1], expected[3]), strict=True):
            np.testing.assert_allclose(x, y, **CLOSE)


@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("freq", [False, True])
def test_embedding(padding_idx, freq):
    for table, _, ids in BAGS:
        for shaped in (ids, ids.reshape(2, 2, 2), ids[0]):
            expected, cotangent = in_torch(
                torch.nn.functional.embedding,
                table,
                shaped,
                padding_idx=padding_idx,
                scale_grad_by_freq=freq,
            )

            def rows(table, _, ids=shaped):
                return se.lookup(table, ids, padding_idx=padding_idx, scale_grad_by_freq=freq)

            out, grad, _ = in_jax(rows, table, None, cotangent)
            np.testing.assert_allclose(out, expected[0], **CLOSE)
            np.testing.assert_allclose(grad, expected[1], **CLOSE)


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, float("inf")])
def test_max_norm(norm_type, max_norm):
    for table, _, ids in BAGS[:3]:
        expected, _ = in_torch(
            torch.nn.functional.embedding,
            table,
            ids,
            max_norm=max_norm,
            norm_type=norm_type,
        )
        new = se.renorm(jnp.asarray(table), ids, max_norm, norm_type)
        np.testing.assert_allclose(new, expected[2], **CLOSE)
