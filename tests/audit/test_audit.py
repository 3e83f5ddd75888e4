"""`audit` against steps whose faults are known, each with its line."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import sparse_embed as se

ROWS, WIDTH = 6000, 8
PARAMS = {
    "table": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    "w": jax.ShapeDtypeStruct((WIDTH, 3), jnp.float32),
}
IDS = jax.ShapeDtypeStruct((5,), jnp.int32)
TX = se.lazy(optax.adam(0.1))


def loss_fn(params, ids):
    return jnp.sum(jnp.tanh(params["table"][ids] @ params["w"]))


def sparse_step(params, opt_state, ids):
    loss, grads = se.value_and_grad(loss_fn)(params, ids)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def guarded_step(params, opt_state, ids):
    new, opt_state, loss = sparse_step(params, opt_state, ids)
    return jax.tree.map(lambda a, b: jnp.where(loss > 0, a, b), new, params), opt_state, loss


def dense_step(params, opt_state, ids):
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    updates, opt_state = optax.adam(0.1).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def late_read_step(params, opt_state, ids):
    new, opt_state, loss = sparse_step(params, opt_state, ids)
    return new, opt_state, jnp.sum(params["table"])


def scanned_steps(params, opt_state, ids):
    def body(carry, ids):
        *carry, loss = sparse_step(*carry, ids)
        return tuple(carry), loss

    carry, loss = jax.lax.scan(body, (params, opt_state), jnp.stack([ids, ids + 1]))
    return *carry, loss


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return f"test_audit.py:{first + next(i for i, line in enumerate(lines) if text in line)}"


def state(tx=TX):
    return jax.eval_shape(tx.init, PARAMS)


def donated(step):
    return jax.jit(step, donate_argnums=(0, 1))


@pytest.mark.parametrize("step", [sparse_step, scanned_steps])
def test_a_sparse_step_is_in_place(step):
    report = se.audit(donated(step), PARAMS, state(), IDS)
    assert report.ok, report
    assert [a.status for a in report.arrays] == ["in place"] * 3
    assert [a.name for a in report.arrays] == [
        "params['table']",
        "opt_state.inner_state[0].mu['table']",
        "opt_state.inner_state[0].nu['table']",
    ]
    assert report.temp_bytes < ROWS * WIDTH
    se.assert_row_sparse(donated(step), PARAMS, state(), IDS)


def test_not_donated():
    report = se.audit(jax.jit(sparse_step), PARAMS, state(), IDS)
    assert not report.ok
    assert {a.status for a in report.arrays} == {"copied"}
    assert all("donate_argnums" in a.reason for a in report.arrays)
    with pytest.raises(AssertionError, match="copied.*params"):
        se.assert_row_sparse(jax.jit(sparse_step), PARAMS, state(), IDS)


def test_a_dense_gradient_is_told_of_with_its_line():
    report = se.audit(donated(dense_step), PARAMS, state(optax.adam(0.1)), IDS)
    assert not report.ok
    assert any(o.line.endswith(line_of(loss_fn, "params[")) for o in report.operations)
    assert all(o.array == f"f32[{ROWS},{WIDTH}]" for o in report.operations)


def test_where_over_whole_tables():
    report = se.audit(donated(guarded_step), PARAMS, state(), IDS)
    assert not report.ok
    assert any(o.line.endswith(line_of(guarded_step, "jnp.where")) for o in report.operations)


def test_a_read_that_does_not_feed_the_update():
    report = se.audit(donated(late_read_step), PARAMS, state(), IDS)
    (copied,) = (a for a in report.arrays if a.status == "copied")
    assert copied.name == "params['table']"
    assert line_of(late_read_step, "jnp.sum") in copied.reason


@pytest.mark.parametrize(
    "read",
    [
        lambda table, ids: jnp.sum(jax.lax.stop_gradient(table)[ids + 7]),
        lambda table, ids: table[ids + 7],
        lambda table, ids: jnp.argmax(table[ids], axis=1),
    ],
)
def test_reads_that_only_feed_aux_are_tied_to_the_update(read):
    step = se.train_step(lambda p, ids: (loss_fn(p, ids), read(p["table"], ids)), TX, has_aux=True)
    se.assert_row_sparse(step, PARAMS, state(), IDS)


def test_a_gradient_that_does_not_need_the_rows():
    step = se.train_step(lambda p, ids: jnp.sum(p["table"][ids]), TX)
    se.assert_row_sparse(step, PARAMS, state(), IDS)


def test_work_on_every_row_of_another_shape():
    def sorts_norms(params, opt_state, ids):
        norms = jnp.sort(jnp.sum(params["table"] ** 2, axis=1))
        return *sparse_step(params, opt_state, ids), norms[0]

    report = se.audit(donated(sorts_norms), PARAMS, state(), IDS)
    assert any(o.array == f"f32[{ROWS}]" for o in report.operations), report


def test_evaluation_reads_only():
    report = se.audit(lambda params, ids: loss_fn(params, ids), PARAMS, IDS)
    assert report.ok and [a.status for a in report.arrays] == ["read only"]


def test_small_tables_are_skipped_by_name():
    report = se.audit(
        donated(sparse_step), PARAMS, state(), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    )
    assert report.arrays == [] and "params['table']" in report.skipped[0]
    assert "skipped" in str(report) and "row-sparse: yes, as far as can be told" in str(report)


def test_nothing_is_read_by_row():
    with pytest.raises(ValueError, match="(?s)reads no leaf.*got: .*write: se.audit"):
        se.audit(lambda params: jnp.sum(params["w"]), PARAMS)


def tied_loss(params, ids):
    hidden = params["table"][ids]
    logits = hidden @ params["table"].T  # the whole table
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def tied_step(params, opt_state, ids):
    loss, grads = se.value_and_grad(tied_loss)(params, ids)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@pytest.mark.filterwarnings("ignore:the gradient of params..table.. is dense:UserWarning")
@pytest.mark.parametrize("how", ["train_step", "by hand"])
def test_a_tied_softmax_is_named_with_its_line(how):
    step = jax.jit(tied_step, donate_argnums=(0, 1))
    if how == "train_step":
        step = se.train_step(tied_loss, TX)
    report = se.audit(step, PARAMS, jax.eval_shape(TX.init, PARAMS), IDS)
    assert not report.ok
    made = {o.array: o.line for o in report.operations if "dot" in o.operation}
    assert made[f"f32[{ROWS},{WIDTH}]"].endswith(line_of(tied_loss, "# the whole table"))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_stack_in_the_carry_of_a_scan(sparse):
    params, optimizer = {"stack": jnp.ones((26, 1000, 4))}, optax.adam(0.1)
    tx = se.lazy(optimizer) if sparse else optimizer
    take = jax.vmap(lambda table, ids: table[ids], in_axes=(0, 1))
    loss = lambda params, ids: jnp.sum(jnp.tanh(take(params["stack"], ids)))  # noqa: E731

    def body(carry, ids):
        params, state = carry
        grads = (se.grad if sparse else jax.grad)(loss)(params, ids)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(params, state, batches):
        return jax.lax.scan(body, (params, state), batches)[0]

    step = jax.jit(epoch, donate_argnums=(0, 1))
    report = se.audit(step, params, tx.init(params), jnp.zeros((3, 8, 26), int))
    assert not report.skipped and bool(report.operations) != sparse
