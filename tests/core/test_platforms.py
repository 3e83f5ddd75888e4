"""The way a step takes is that of the platform where its arrays are."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import sparse_embed as se
from sparse_embed._core import made_for, platform, platform_of

IDS = jnp.arange(5000) % 1700
STEP = importlib.import_module("sparse_embed._step.train_step")


def new_params():
    return {"table": jnp.ones((4000, 4)), "w": jnp.ones(4)}


def loss(params, ids):
    return jnp.mean(jnp.tanh(params["table"][ids] @ params["w"]))


def test_where_arrays_are():
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    abstract = NamedSharding(mesh, PartitionSpec("x"))
    assert platform_of({"a": 1.0, "b": jnp.ones(3)}) == "cpu"
    assert platform_of(jax.ShapeDtypeStruct((3,), float, sharding=cpu)) == "cpu"
    assert platform_of(jax.ShapeDtypeStruct((3,), float)) is None
    assert platform_of(jax.ShapeDtypeStruct((4,), float, sharding=abstract)) is None
    assert platform_of((np.ones(3), 2)) is None
    jax.eval_shape(lambda x: platform_of(x) and pytest.fail("a tracer is nowhere yet"), jnp.ones(3))


def test_what_a_function_is_made_for():
    assert platform() == "cpu"
    assert made_for("tpu", lambda: (platform(), made_for("gpu", platform)()))() == ("tpu", "gpu")
    assert platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform() == "cpu"


@pytest.mark.parametrize("name", ["lazy", "exact"])
def test_a_step_made_for_an_accelerator(name, monkeypatch):
    """It sorts ids and has no loop over blocks; its numbers are those of a CPU's."""
    tx = se.lazy(optax.adam(0.1)) if name == "lazy" else se.exact.sgd(0.1, momentum=0.9)
    found = {}
    for target in ("cpu", "gpu"):
        monkeypatch.setattr(STEP, "platform_of", lambda tree, t=target: t)
        step, params = se.train_step(loss, tx), new_params()
        text = step.lower(params, tx.init(params), IDS).as_text()
        assert ("stablehlo.sort" in text) == (target == "gpu")
        if name == "lazy":
            assert ("stablehlo.while" in text) == (target == "cpu")
        found[target] = step(params, tx.init(params), IDS)
    for a, b in zip(jax.tree.leaves(found["cpu"]), jax.tree.leaves(found["gpu"]), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def test_a_step_is_traced_once_for_each_platform(monkeypatch):
    targets, traced = iter(["cpu", "gpu", "cpu", "gpu"]), []
    monkeypatch.setattr(STEP, "platform_of", lambda tree: next(targets))

    def seen(params, ids):
        traced.append(platform())
        return loss(params, ids)

    tx = se.lazy(optax.sgd(0.1))
    step, params = se.train_step(seen, tx), new_params()
    state = tx.init(params)
    for _ in range(4):
        params, state, _ = step(params, state, IDS)
    assert traced == ["cpu", "gpu"]
