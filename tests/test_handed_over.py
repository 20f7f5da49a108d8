"""What cannot be differentiated in parallel is found in the program and left to the sequential pass; asked for, it is refused by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import assert_close

import parscan

XS = jnp.sin(jnp.arange(60.0)).reshape(20, 3)
START = jnp.array([0.3, -0.2, 0.5])
PARALLEL = ["walk", "tree", "associative", "chunked"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clip_gradient(x, limit):
    return x


clip_gradient.defvjp(lambda x, limit: (x, None), lambda limit, _, g: (jnp.clip(g, -limit, limit),))


def clipped(h, x):
    return clip_gradient(jnp.tanh(1.5 * h + x[::-1] * h.sum()), 0.05)


def deep_inside(h, x):
    return jax.jit(lambda h: lax.cond(x.sum() > 0, jax.checkpoint(functools.partial(clipped, x=x)), lambda h: h, h))(h)


def averaged(h, x):
    return jnp.tanh(h + lax.pmean(h * x, "batch"))


def indexed(h, x):
    return jnp.tanh(h * x + lax.axis_index("batch"))


def run(scan, step, **options):
    def loss(h, xs):
        final, ys = scan(lambda h, x: (step(h, x), jnp.sum(h**2)), h, xs, **options)
        return jnp.sum(final) + jnp.sum(ys)

    return jax.grad(loss, (0, 1))


def layer_of(step):
    return lambda p, h: step(h, p)


@pytest.mark.parametrize("step", [clipped, deep_inside])
def test_custom_vjp(step):
    want = run(lax.scan, step)(START, XS)
    assert_close(run(parscan.scan, step)(START, XS), want, 0)
    plan = parscan.plan(lambda h, x: (step(h, x), None), START, XS)
    assert plan.method == parscan.Lax()
    assert "`custom_vjp_call` at test_handed_over.py:" in plan.reason
    apply = parscan.chain(layer_of(step))
    assert_close(jax.grad(lambda p: apply(p, START).sum())(XS), jax.grad(lambda p: lax.scan(lambda h, p: (step(h, p), None), START, p)[0].sum())(XS), 0)


@pytest.mark.parametrize("method", PARALLEL)
def test_custom_vjp_is_refused_by_explicit_methods(method):
    with pytest.raises(ValueError, match=r"method=.*cannot be used for this function: `custom_vjp_call` at test_handed_over.py:\d+ has a custom VJP"):
        run(parscan.scan, clipped, method=method)(START, XS)
    with pytest.raises(ValueError, match="custom_vjp_call"):
        parscan.parallel_backward(layer_of(clipped), XS, jnp.ones((21, 3)), START, method=method)


def stored(step):
    states = [START]
    for x in XS:
        states.append(step(states[-1], x))
    return jnp.stack(states)


@pytest.mark.parametrize("method", ["auto", "sequential", "lax"])
def test_parallel_backward_of_a_custom_vjp_is_sequential(method):
    activations = stored(clipped)
    grads = parscan.parallel_backward(layer_of(clipped), XS, activations, jnp.ones(3), method=method)
    want = jax.grad(lambda h, xs: lax.scan(lambda h, x: (clipped(h, x), None), h, xs)[0].sum(), (0, 1))(START, XS)
    assert_close((grads.input, grads.params), want, 1e-12)
    assert isinstance(grads.plan.method, parscan.Lax if method == "lax" else parscan.Sequential)
    assert ("asked for" if method == "lax" else "custom VJP") in grads.plan.reason
    jitted = jax.jit(lambda a: parscan.parallel_backward(layer_of(clipped), XS, a, jnp.ones(3), method=method).params)(activations)
    assert_close(jitted, want[1], 1e-12)


@pytest.mark.parametrize("step", [averaged, indexed])
def test_collectives(step):
    batch = jnp.stack([XS, 2 * XS])
    both = [jax.vmap(run(scan, step), (None, 0), axis_name="batch")(START, batch) for scan in (parscan.scan, lax.scan)]
    assert_close(*both, 0)
    with pytest.raises(ValueError, match="collective over the named axis 'batch'"):
        jax.vmap(run(parscan.scan, step, method="tree"), (None, 0), axis_name="batch")(START, batch)


def test_parallel_backward_of_a_collective():
    batch = jnp.stack([XS, 2 * XS])

    def both(xs):
        activations = parscan.forward(layer_of(averaged), xs, START)[1]
        ours = parscan.parallel_backward(layer_of(averaged), xs, activations, jnp.ones(3))
        theirs = jax.vjp(lambda xs: lax.scan(lambda h, x: (averaged(h, x), None), START, xs)[0], xs)[1](jnp.ones(3))[0]
        assert isinstance(ours.plan.method, parscan.Sequential)
        return ours.params, theirs

    assert_close(*jax.vmap(both, axis_name="batch")(batch), 1e-12)


@pytest.mark.parametrize("ordered", [False, True])
def test_prints_as_often_as_lax_scan(ordered, capfd):
    def step(h, x):
        jax.debug.print("step {}", h[0], ordered=ordered)
        return jnp.tanh(h + x)

    printed = []
    for scan in (lax.scan, parscan.scan):
        jax.block_until_ready(run(scan, step)(START, XS))
        jax.effects_barrier()
        printed.append(sorted(capfd.readouterr().out.splitlines()))
    assert printed[0] == printed[1]
    assert len(printed[0]) >= 20
    with pytest.raises(ValueError, match=r"`debug_print` at test_handed_over\.py.*side effect"):
        parscan.scan(lambda h, x: (step(h, x), None), START, XS, method="tree")
    grads = parscan.parallel_backward(layer_of(step), XS, stored(lambda h, x: jnp.tanh(h + x)), jnp.ones(3))
    want = jax.grad(lambda xs: lax.scan(lambda h, x: (jnp.tanh(h + x), None), START, xs)[0].sum())(XS)
    assert_close(grads.params, want, 1e-12)
    assert isinstance(grads.plan.method, parscan.Sequential)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("carried", [False, True])
def test_numbers_that_come_out_differently_for_a_batch_of_steps(carried, implementation):
    """Linearised together, steps would be differentiated under another dropout mask than they ran with."""
    keys = jax.random.split(jax.random.key(2, impl=implementation), 20)
    keep = lambda key, h, x: jnp.tanh(h + x) * jax.random.bernoulli(key, 0.5, h.shape)

    def f(carry, xs):
        (h, key), (x, own) = carry, xs
        key, used = jax.random.split(key) if carried else (key, own)
        h = keep(used, h, x)
        return (h, key), h

    grad = lambda scan: jax.grad(lambda h: jnp.sum(scan(f, (h, keys[0]), (XS, keys))[1] ** 2))(START)
    assert_close(grad(parscan.scan), grad(lax.scan), 0)
    with pytest.raises(ValueError, match=r"`random_(bits|split)`.* draws other numbers for a batch of steps"):
        grad(functools.partial(parscan.scan, method="tree"))
    layer = lambda p, h: keep(p[1], h, p[0])
    _, activations = parscan.forward(layer, (XS, keys), START)
    grads = parscan.parallel_backward(layer, (XS, keys), activations, jnp.ones(3))
    want = jax.grad(lambda xs: lax.scan(lambda h, p: (layer(p, h), None), START, (xs, keys))[0].sum())(XS)
    assert_close(grads.params[0], want, 1e-12)
    assert "draws other numbers" in grads.plan.reason


def test_explicit_sharding():
    axis = jax.sharding.PartitionSpec("d", None)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    put = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    start, xs = put(jnp.ones((3, 4)), axis), put(jnp.ones((7, 3, 4)), jax.sharding.PartitionSpec(None, "d", None))
    weights = jnp.ones((4, 4)) / 4
    f = lambda h, x: (jnp.tanh(h @ weights + x), h)
    assert "sharded over an explicit mesh axis" in parscan.plan(f, start, xs).reason
    both = [jax.jit(jax.grad(lambda h, scan=scan: scan(f, h, xs)[1].sum()))(start) for scan in (parscan.scan, lax.scan)]
    assert_close(*both, 0)
    layer = lambda p, h: f(h, p)[0]
    grads = parscan.parallel_backward(layer, xs, parscan.forward(layer, xs, start)[1], jnp.ones_like(start))
    assert_close(grads.input, jax.grad(lambda h: lax.scan(f, h, xs)[0].sum())(start), 1e-12)


def test_symbolic_dimensions():
    (batch,) = jax.export.symbolic_shape("b")
    weights = jnp.ones((4, 4)) / 4
    start, xs = jax.ShapeDtypeStruct((batch, 4), "float32"), jax.ShapeDtypeStruct((10, batch, 4), "float32")
    f = lambda h, x: (jnp.tanh(h @ weights.astype("float32") + x), h)
    exported = jax.export.export(jax.jit(jax.grad(lambda h, x: parscan.scan(f, h, x)[1].sum())))(start, xs)
    assert exported.out_avals[0].shape == (batch, 4)
    assert "symbolic dimension" in parscan.plan(f, start, xs).reason


def test_symbolic_dimensions_inside_of_a_step():
    """Where none of its inputs and outputs has one."""
    (size,) = jax.export.symbolic_shape("b")

    def loss(w, v):
        step = lambda h, x: (jnp.tanh(h @ w + x + (jnp.ones(v.shape[0]) * h[0]).sum()),) * 2
        return (parscan.scan(step, jnp.ones(4), jnp.ones((20, 4)))[1] ** 2).sum()

    exported = jax.export.export(jax.jit(jax.grad(loss)))(jax.ShapeDtypeStruct((4, 4), "float32"), jax.ShapeDtypeStruct((size,), "float32"))
    assert exported.out_avals[0].shape == (4, 4)


def test_mutable_references():
    def total(scan):
        seen = jax.new_ref(jnp.zeros(3))

        def f(h, x):
            seen[...] += x
            return jnp.tanh(h + x), h

        return scan(f, START, XS), seen[...]

    assert_close(total(parscan.scan), total(lax.scan), 0)


def test_complex_carries():
    def loss(scan):
        def inner(h, xs):
            z = scan(lambda z, x: (z * jnp.exp(1j * x.sum()) * 0.9, jnp.abs(z)), h + 0j, xs)
            return jnp.abs(z[0]).sum() + z[1].sum()

        return jax.grad(inner, (0, 1))(START, XS)

    assert_close(loss(parscan.scan), loss(lax.scan), 0)
    with pytest.raises(ValueError, match="the carry is complex"):
        parscan.scan(lambda z, x: (z * x, None), START + 0j, XS, method="tree")


def test_a_while_loop_inside_keeps_its_forward_mode():
    def step(h, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] + x)), (0, h))[1]

    def push(scan):
        return jax.jvp(lambda h: scan(lambda h, x: (step(h, x), None), h, XS)[0], (START,), (START,))

    assert_close(push(parscan.scan), push(lax.scan), 0)
    with pytest.raises(ValueError, match="reverse-mode"):
        parscan.scan(lambda h, x: (step(h, x), None), START, XS, method="tree")


def test_a_branch_that_would_divide_by_zero_is_not_taken():
    """Batched steps turn a cond into a select: its untaken branch must not poison the gradient."""

    def step(h, x):
        return lax.cond(x[0] > 0, lambda: jnp.tanh(h * jnp.sqrt(x[0])), lambda: jnp.sin(h)) + 0.1 * h.sum()

    for method in ("walk", "tree", "chunked", "sequential"):
        assert_close(run(parscan.scan, step, method=method)(START, XS), run(lax.scan, step)(START, XS), 1e-10)
