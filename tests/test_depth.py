"""Depth, work, memory and compilations: properties of the program, counted."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import LOG_DEPTH, assert_close, equations, long_loops, make_chain, make_cotangents, rnn_problem, sub_jaxprs

import parscan
from parscan import affine, grouped, prefix, single
from parscan.timing import FUSES_LOOPS

CHUNK = max(8, grouped.SIDE)  # steps of the longest loop that does not grow with the chain
ONLY_THE_CARRY = ((3, 4), "float64")


def simple_loss(scan, weights, start, inputs):
    """A carry of two leaves, one of them an integer that rides along."""

    def f(carry, x):
        h, i = carry
        h = jnp.tanh(h @ weights + x)
        return (h, i + 1), jnp.sin(h)

    (h, _), ys = scan(f, (start, jnp.int32(0)), inputs)
    return jnp.sum(h**2) + jnp.sum(ys**3)


def derivative(order, scan):
    def loss(*arguments):
        return simple_loss(scan, *arguments)

    def along(f):
        return lambda *a: jax.jvp(f, a, a)[1]

    gradient = jax.grad(loss, (0, 1, 2))
    squared = lambda *a: sum(jnp.sum(g**2) for g in gradient(*a))
    return {
        "jvp": along(loss),
        "grad": gradient,
        "grad of grad": jax.grad(squared, (0, 1, 2)),
        "hessian": jax.hessian(loss, 1),
        "third": along(along(gradient)),
        "third in reverse": jax.grad(along(squared), 1),
    }[order]


def arguments(length):
    return rnn_problem(length)[1]


def forward_only(loops):
    """Whether every long loop carries the carry of f and nothing else."""
    return all(sorted(map(str, carried)) == sorted(map(str, (ONLY_THE_CARRY, ((), "int32")))) for _, carried in loops)


ORDERS = ["jvp", "grad", "grad of grad", "hessian", "third", "third in reverse"]


# All orders by a tree, whose pieces chunks are joined by, too; of the method that is there for comparison, whose programs are the largest by far, the first.
SOME = {"tree": ORDERS, "chunked": ["jvp", "grad", "third in reverse"], "associative": ["jvp", "grad"]}


def assert_grows_slowly(method, sizes):
    """Equations for chains each 16 times, or 4 times, as long as the one before: on a CPU as many for any that is joined by loops; for comparison, and in pairs, with the logarithm."""
    if method in ("associative", "pairs"):
        assert 0 < sizes[2] - sizes[1] <= 1.3 * (sizes[1] - sizes[0]), sizes  # as many doublings each
    else:
        assert sizes[2] <= 1.05 * sizes[1] <= 1.05 * 1.05 * sizes[0], sizes  # the first may be few enough for pairs


def in_pairs(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(single, "joins_by_loops", lambda maps: False)


@pytest.mark.parametrize("method, order", [(method, order) for method in LOG_DEPTH for order in SOME[method]] + [("pairs", "jvp"), ("pairs", "grad")])
def test_every_long_loop_is_a_forward_pass_and_equations_grow_slowly(method, order, monkeypatch):
    if method == "pairs":
        in_pairs(monkeypatch)
    scan, sizes = lambda *a: parscan.scan(*a, method=LOG_DEPTH.get(method, "tree")), []
    for length in (1024, 16384, 262144) if order in ("jvp", "grad") else (1024, 4096, 16384):
        program = jax.make_jaxpr(derivative(order, scan))(*arguments(length))
        loops = long_loops(program, CHUNK)
        assert loops, "the forward pass itself is a loop"
        assert forward_only(loops)
        sizes.append(sum(1 for _ in equations(program)))
    assert_grows_slowly(method, sizes)


@pytest.mark.parametrize("method", [*LOG_DEPTH, "pairs"])
def test_parallel_backward_has_no_long_loop(method, monkeypatch):
    if method == "pairs":
        in_pairs(monkeypatch)
    sizes = []
    for length in (1024, 4096, 16384):
        chain = make_chain("BlockDiagonal", length, "float64")
        end, _ = make_cotangents("BlockDiagonal", length, "float64", False)
        activations = jnp.zeros((length + 1, *chain.x.shape))

        def backward(params, activations, end, chain=chain):
            grads = parscan.parallel_backward(chain.layer, params, activations, end, params_axes=chain.params_axes, method=LOG_DEPTH.get(method, "tree"))
            return grads.params, grads.activations

        program = jax.make_jaxpr(backward)(chain.params, activations, end)
        assert not long_loops(program, CHUNK)
        sizes.append(sum(1 for _ in equations(program)))
    assert_grows_slowly(method, sizes)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 128, 129, 4159, 4160, 4161, 9000])
def test_groups_find_what_a_walk_finds_in_as_many_products_and_as_deep_as_said(length, reverse):
    """Whatever the rest, and again with other offsets; maps that do not commute."""
    keys = jax.random.split(jax.random.key(length), 4)
    maps = affine.Affine(parscan.Dense(jax.random.normal(keys[0], (length, 3, 3)) / 3), None, jax.random.normal(keys[1], (length, 3)))
    others, start = jax.random.normal(keys[2], (length, 3)), jax.random.normal(keys[3], (3,))

    @jax.jit
    def found(maps, others, start):
        made = grouped.upsweep(maps, reverse)
        return made.values(start), made.again(others).values(start)

    want = [prefix.walk(maps._replace(offset=offsets), start, affine.apply, reverse=reverse) for offsets in (maps.offset, others)]
    assert_close(found(maps, others, start), tuple(want), 1e-12)
    deep, products = in_turn(jax.make_jaxpr(found)(maps, others, start))
    rounds = math.ceil(math.log(length, grouped.SIDE) - 1e-9)
    assert products <= length * (1 + math.log(length, grouped.SIDE) / grouped.SIDE)
    assert deep <= 128 * rounds + 128 * rounds  # and the second way, up and down


def in_turn(program, times=1):
    """Steps of innermost loops, one after another, and products of two matrices."""
    deep = products = 0
    body = getattr(program, "jaxpr", program)
    for eqn in body.eqns:
        if eqn.primitive.name == "dot_general":
            products += times * math.prod(eqn.outvars[0].aval.shape) // 9
        again = times * eqn.params.get("length", 1)
        inner = [in_turn(some, again) for some in sub_jaxprs(eqn.params)]
        loops = eqn.primitive.name == "scan"
        deep += sum(max(steps, again if loops else 0) for steps, _ in inner)
        products += sum(some for _, some in inner)
    return deep, products


@pytest.mark.parametrize("method", ["tree", "chunked"])
def test_pairs_and_groups_give_the_same_gradients(method, monkeypatch):
    loss, args = rnn_problem(150)
    gradient = lambda: jax.grad(lambda *a: loss(lambda *s: parscan.scan(*s, method=LOG_DEPTH[method]), *a), (0, 1, 2))(*args)
    by_loops = gradient()
    in_pairs(monkeypatch)
    jax.clear_caches()
    assert_close(by_loops, gradient(), 1e-12)


def states_by_a_plain_scan(scan):
    """A deliberately wrong rule: right gradients, but the stored states come from a `lax.scan` of its own, not from the function
    whose rule this is, so that the second derivative is sequential again."""

    def wrong(f, init, xs):
        @jax.custom_jvp
        def run(init, xs):
            return lax.scan(f, init, xs)

        @run.defjvp
        def _(primals, tangents):
            (init, xs), (init_dot, xs_dot) = primals, tangents
            _, states = lax.scan(lambda h, x: (f(h, x)[0], h), init, xs)
            step_dot = jax.vmap(lambda h, x, h_dot, x_dot: jax.jvp(f, (h, x), (h_dot, x_dot))[1])
            floats_dot = init_dot[0]
            zero = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype) if jnp.issubdtype(s.dtype, jnp.floating) else jnp.zeros(s.shape, jax.dtypes.float0), states
            )
            offsets = step_dot(states, xs, zero, xs_dot)[0][0]
            push = lambda h, x, v: jax.jvp(lambda g: f((g, h[1]), x)[0][0], (h[0],), (v,))[1]
            n = floats_dot.size
            basis = jnp.eye(n).reshape(n, *floats_dot.shape)
            matrices = jax.vmap(lambda h, x: jax.vmap(lambda e: push(h, x, e).ravel())(basis).T)(states, xs)
            hs_dot = parscan.linear_scan(parscan.Dense(matrices), offsets.reshape(-1, n), floats_dot.ravel(), method="tree").reshape(-1, *floats_dot.shape)
            entering = jnp.concatenate([floats_dot[None], hs_dot[:-1]])
            ys_dot = step_dot(states, xs, (entering, zero[1]), xs_dot)[1]
            final, ys = run(init, xs)
            return (final, ys), ((hs_dot[-1], init_dot[1]), ys_dot)

        return run(init, xs)

    return wrong


def test_the_check_fails_for_states_stored_by_a_plain_scan():
    wrong = states_by_a_plain_scan(lax.scan)
    weights, start, inputs = arguments(2 * CHUNK)
    loss = lambda scan: lambda start: simple_loss(scan, weights, start, inputs)
    right, tried = jax.grad(loss(lax.scan))(start), jax.grad(loss(wrong))(start)
    assert jnp.allclose(right, tried)
    loops = long_loops(jax.make_jaxpr(jax.hessian(loss(wrong)))(start), CHUNK)
    assert not forward_only(loops)


@pytest.mark.parametrize("method", ["sequential", "walk", "lax", parscan.Walk(8), parscan.Chunked(8, 0), parscan.Chunked(8, 1)], ids=str)
def test_the_check_fails_for_sequential_methods(method):
    scan = lambda *a: parscan.scan(*a, method=method)
    assert not forward_only(long_loops(jax.make_jaxpr(derivative("grad", scan))(*arguments(4096)), CHUNK))


# --- work ----------------------------------------------------------------------------------------------------------------------


def matrix_products(program):
    """Batched products of two stacks of matrices, counted one by one."""
    total = 0
    for eqn in equations(program):
        if eqn.primitive.name == "dot_general":
            a, b = (v.aval.shape for v in eqn.invars)
            batch = eqn.params["dimension_numbers"][1][0]
            if len(batch) == 1 and len(a) == len(b) == 3 and a[-2:] == b[-2:] == (11, 11):
                total += a[batch[0]]
    return total


@pytest.mark.parametrize("method, most", [("tree", 63), ("chunked", 7)])
def test_matrix_products(method, most, monkeypatch):
    """In pairs, fewer than one a map; the way down multiplies vectors only."""
    in_pairs(monkeypatch)
    rotation = jnp.linalg.qr(jnp.sin(jnp.arange(121.0)).reshape(11, 11))[0]
    layer = lambda w, h: jnp.tanh(h @ rotation * w)
    backward = lambda w, a, c: parscan.parallel_backward(layer, w, a, c, method=method).params
    program = jax.make_jaxpr(backward)(jnp.ones(64), jnp.ones((65, 11)), jnp.ones(11))
    counted = matrix_products_of_solve(program)
    assert 0 < counted <= most


def matrix_products_of_solve(program):
    """Only the solve that runs: a linear solve also holds its transpose, and the system itself."""
    for eqn in equations(program):
        if eqn.primitive.name == "custom_linear_solve":
            return matrix_products(eqn.params["jaxprs"].solve)
    raise AssertionError("no linear solve")


# --- memory ---------------------------------------------------------------------------------------------------------------------


def temporary_bytes(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("method", ["walk", "tree", "chunked", "auto"])
def test_memory_grows_with_the_batch_and_not_with_its_square(method):
    def bytes_for(batch):
        loss, args = rnn_problem(128, batch, 4, "float32")
        return temporary_bytes(jax.grad(lambda *a: loss(lambda *s: parscan.scan(*s, method=method), *a), (0, 1, 2)), *args)

    small, large = bytes_for(8), bytes_for(32)
    assert large <= 5 * small


def test_a_walk_needs_little_more_memory_than_lax_scan():
    loss, args = rnn_problem(4096, 4, 8, "float32")
    ours = temporary_bytes(jax.grad(lambda *a: loss(parscan.scan, *a), (0, 1, 2)), *args)
    theirs = temporary_bytes(jax.grad(lambda *a: loss(lax.scan, *a), (0, 1, 2)), *args)
    assert ours <= 3 * theirs


# --- compilations ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """A list that grows with every compilation."""
    jax.clear_caches()  # another test may have compiled the same equations
    seen: list[str] = []
    active = [True]

    def listen(name, *_, **__):
        if active[0] and name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active[0] = False


@pytest.mark.parametrize("method", ["auto", "walk", "tree", "sequential", "chunked", "associative"])
def test_new_values_recompile_nothing(method, compilations):
    """Neither under jit nor without it, with a new function object of the same equations each time."""
    chain, turn = make_chain("BlockDiagonal", 16, "float64"), jnp.roll(jnp.eye(3), 1, 0)

    def once(scale):
        def f(h, x):
            h = jax.nn.relu(h @ turn + x) + jax.nn.sigmoid(h)  # a `custom_jvp` function, and one without
            return h, h

        h, xs = jnp.ones((4, 3)) * scale, jnp.full((20, 4, 3), 0.1) * scale
        parscan.scan(f, h, xs, method=method)
        jax.grad(lambda h: parscan.scan(f, h, xs, method=method)[1].sum())(h)
        layer = lambda p, h: chain.layer(p, h)
        params = jax.tree.map(lambda p: p * scale, chain.params)
        y, activations = parscan.forward(layer, params, chain.x, params_axes=chain.params_axes, method=method)
        parscan.parallel_backward(layer, params, activations, y, params_axes=chain.params_axes, method=method)

    assert_nothing_new_is_compiled(once, compilations)


def assert_nothing_new_is_compiled(once, compilations):
    once(1.0)
    once(0.5)
    before = len(compilations)
    assert before > 0, "the listener hears nothing"
    once(0.25)
    assert len(compilations) == before


@pytest.mark.parametrize("method", ["auto", "walk"])
def test_new_values_recompile_no_scan_inside_a_scan(method, compilations):
    turn = jnp.roll(jnp.eye(3), 1, 0)

    def once(scale):
        inner = lambda c, _: (jnp.tanh(c @ turn), None)
        f = lambda h, x: (parscan.scan(inner, h, None, length=3, method=method)[0] + x, None)
        h, xs = jnp.ones((4, 3)) * scale, jnp.full((12, 4, 3), 0.1) * scale
        jax.block_until_ready((parscan.scan(f, h, xs, method=method), jax.grad(lambda h: parscan.scan(f, h, xs, method=method)[0].sum())(h)))
        layers = [lambda w, h: f(h, w)[0]] * 4 + [lambda _, h: h.sum()]
        weights = [*(xs[i] for i in range(4)), None]
        _, activations = parscan.forward(layers, weights, h, method=method)
        jax.block_until_ready(parscan.parallel_backward(layers, weights, activations, scale, method=method))

    assert_nothing_new_is_compiled(once, compilations)


def test_f_is_traced_once():
    calls = []

    def f(h, x):
        calls.append(1)
        return jnp.tanh(h + x), h

    jax.grad(lambda h: parscan.scan(f, h, jnp.ones((20, 4, 3)), method="walk")[1].sum())(jnp.ones((4, 3)))
    assert len(calls) == 1


# --- the rule behind "auto" on a CPU ------------------------------------------------------------------------------------------------

WIDE = jnp.ones((8, 256))
CHOICES = {
    "small blocks": (lambda h, x: (jnp.tanh(h @ WIDE[:, :8] + x), h), (4, 8), parscan.Sequential),
    "one block": (lambda h, x: (jnp.tanh(h @ WIDE[:, :8] + x), h), (8,), parscan.Lax if FUSES_LOOPS else parscan.Sequential),
    "elementwise": (lambda h, x: (jnp.tanh(h + x), h), (4, 8), parscan.Lax if FUSES_LOOPS else parscan.Sequential),
    "a checkpoint": (lambda h, x: (jax.checkpoint(lambda h: jnp.tanh(h @ WIDE[:, :8] + x))(h), h), (4, 8), parscan.Lax),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_on_a_cpu(name):
    f, shape, method = CHOICES[name]
    plan = parscan.plan(f, jnp.ones(shape), jnp.ones((1000, 8)))
    assert isinstance(plan.method, method), plan
