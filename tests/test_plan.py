"""What a plan says: costs worked out by hand, depth counted on spans, sentences, a line, a table, a picture; and that none of it costs who does not ask."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax import lax
from test_prefix import Counter, Spans, scan, start, steps, walk

import parscan
from parscan import costs, drawing, order, prefix, report
from parscan.jacobians import BlockDiagonal, Dense, DirectSum, Identity, Jacobian
from parscan.jacobians.base import kind
from parscan.jaxprs import flops_on
from parscan.planning import plan_chain
from parscan.structure import structures_of

RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.standard_normal((3, 3)))
WIDE = jnp.asarray(RANDOM.standard_normal((40, 40)))
SCALES = jnp.asarray(RANDOM.standard_normal((2, 3)))
B, N, L = 2, 3, 5  # blocks, their side, steps
START, XS = jnp.zeros((B, N)), jnp.ones((L, B, N))
ITEM = 8  # bytes of a float64
MATRIX, VECTOR = B * N * N * ITEM, B * N * ITEM
APPLY, PRODUCT = 2 * B * N**2, 2 * B * N**3 + 2 * B * N**2  # a product carries an offset along
PUSH = 2 * B * N**2 + B * N  # a product with W, a product with x


def step(h, x):
    return (h @ W) * x, None


def fixed(h, x):
    return (h * SCALES) @ W + x, None


def elementwise(h, x):
    return h * x, None


def by(method, f=step, init=START, xs=XS, **options):
    return parscan.plan(f, init, xs, method=method, **options)


# --- costs, by hand -----------------------------------------------------------------------------------------------------------

BY_HAND = {
    # method: (depth, FLOPs of forming, up-sweep, down-sweep, bytes of them)
    "sequential": (parscan.Sequential(), L, (0, 0, L * PUSH), (0, 0, L * VECTOR)),
    "lax": (parscan.Lax(), L, (0, 0, L * PUSH), (0, 0, L * VECTOR)),
    # segments of 2 and 2, each formed, then walked; one step that is left is crossed as it is
    "walk": (parscan.Walk(2), 2 + L, ((L - 1) * N * PUSH, 0, (L - 1) * APPLY + PUSH), (2 * MATRIX, 0, L * VECTOR)),
    "one segment": (parscan.Walk(100), 1 + L, (L * N * PUSH, 0, L * APPLY), (L * MATRIX, 0, L * VECTOR)),
    # 5 maps make 2, make 1. Formed, joined, joined, applied; then to the maps 1 … 2, to the last
    "tree": (parscan.Tree(), 5, (L * N * PUSH, 3 * PRODUCT, L * APPLY), (L * MATRIX, 3 * MATRIX, L * VECTOR)),
    # pairs (2), their prefix (1), the others (2); all applied
    "associative": (parscan.Associative(), 5, (L * N * PUSH, 5 * PRODUCT, L * APPLY), (L * MATRIX, 5 * MATRIX, L * VECTOR)),
    # one step, then two chunks of 2, of which one has a map that is needed; an offset is pushed beside N columns
    "chunked": (parscan.Chunked(2), 5, (4 * (N + 1) * PUSH, 0, APPLY + L * PUSH), (2 * N * VECTOR, 0, L * VECTOR)),
    "one chunk": (parscan.Chunked(L), L, (L * (N + 1) * PUSH, 0, L * PUSH), (N * VECTOR, 0, L * VECTOR)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_costs(name):
    method, depth, flops, sizes = BY_HAND[name]
    plan = by(method)
    assert plan.depth == depth
    stages = ("forming", "up-sweep", "down-sweep")
    assert plan.flops == dict(zip(stages, flops, strict=True)) | {"total": sum(flops), "sequential": L * PUSH}
    assert plan.bytes == dict(zip(stages, sizes, strict=True)) | {"total": sum(sizes), "sequential": L * VECTOR}


def test_a_linear_layer_with_fixed_weights_is_formed_and_squared_once():
    plan = by("tree", fixed)
    assert plan.flops["forming"] == N * PUSH and plan.bytes["forming"] == MATRIX
    assert plan.flops["up-sweep"] == 2 * 2 * B * N**3 + 3 * APPLY and plan.bytes["up-sweep"] == 2 * MATRIX  # two squarings, three offsets
    assert by("walk", fixed).bytes["forming"] == MATRIX and by("walk", fixed).depth == 1 + L


def test_forming_from_factors_is_counted():
    """I − k kᵀ for all columns of a matrix state: k is pulled, not sixteen vectors pushed."""
    step = lambda h, k: (h - jnp.outer(k, k @ h), None)
    found, dense = (by("tree", step, jnp.zeros((16, 9)), jnp.zeros((L, 16)), structure=claim) for claim in ("auto", parscan.Blocks(axis=1)))
    assert found.kind == "LowRank" and 0 < 2 * found.flops["forming"] < dense.flops["forming"] and found.bytes["forming"] == L * 3 * 16 * ITEM


def test_a_bottleneck_that_is_divided_is_one():
    down, up = RANDOM.standard_normal((12, 2)), RANDOM.standard_normal((2, 12))
    assert by("walk", lambda h, _: (h + jnp.tanh(h @ down) @ up / 4, None), jnp.zeros((3, 12)), None, length=4).kind == "LowRank"


def test_an_elementwise_step_is_one_push():
    plan = by("tree", elementwise)
    n = B * N
    assert plan.flops == {"forming": L * n, "up-sweep": 3 * 2 * n, "down-sweep": L * n, "total": 2 * L * n + 6 * n, "sequential": L * n}


def test_a_single_step_is_crossed_without_forming_anything():
    for method in ("tree", "walk", "chunked", "associative"):
        plan = by(method, xs=XS[:1])
        assert (plan.depth, plan.flops["total"], plan.flops["forming"]) == (1, PUSH, 0)


def test_chains_of_nothing():
    assert by("tree", xs=XS[:0]).depth == 0 and by("tree", xs=XS[:0]).flops["total"] == 0
    assert parscan.plan([], [], [START]).bytes == dict.fromkeys(("forming", "up-sweep", "down-sweep", "total", "sequential"), 0)


def test_what_does_not_depend_on_the_tangent_is_not_counted():
    closed = jax.make_jaxpr(lambda t, x: jax.jit(lambda t, x: t * jnp.sin(x) + 1)(t, x) * jnp.cos(x))(jnp.ones(7), jnp.ones(7))
    assert flops_on(closed, [0]) == 3 * 7
    assert flops_on(closed, [1]) == 5 * 7
    assert flops_on(closed, []) == 0


def test_a_step_without_a_derivative_costs_what_it_computes():
    @jax.custom_vjp
    def clipped(h):
        return jnp.tanh(h)

    clipped.defvjp(lambda h: (clipped(h), h), lambda h, g: (jnp.clip(g, -1, 1),))
    plan = parscan.plan(lambda h, x: (clipped(h) + x, None), START, XS)
    assert (plan.depth, plan.flops["sequential"], plan.flops["total"]) == (L, L * 2 * B * N, L * 2 * B * N)
    assert plan.why == () and plan.bytes["total"] == L * VECTOR


# --- depth, counted -------------------------------------------------------------------------------------------------------------


def formed(length, depth=1):
    return steps(length, True)._replace(depth=np.full(length, depth))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100, 256])
def test_depth_is_that_of_the_schedule_on_spans(length):
    xs, counter = jnp.ones((length, B, N)), Counter()
    found = prefix.tree(formed(length), start(), counter.apply, counter.then, reverse=True, walk=walk)[1].max()
    assert by("tree", xs=xs).depth == found <= order.depth_bound(length) + 1

    depth = jnp.ones(length, int)
    prefixes = lax.associative_scan(lambda a, b: jnp.maximum(a, b) + 1, depth)
    assert by("associative", xs=xs).depth == int(prefixes.max()) + 1

    for size, levels in itertools.product((2, 3, 8), (None, 0, 1)):

        def through(maps, value, levels=levels):
            return prefix.tree(maps, value, counter.apply, counter.then, reverse=True, levels=levels, walk=walk)

        def identity(chunks, size=size):
            lo = np.arange(chunks)[::-1] * size + length - chunks * size
            return Spans(lo, lo, np.zeros(chunks, int))

        found = prefix.chunked(
            steps(length, True), start(), size=size, identity=identity, extend=counter.then, cross=counter.apply, through=through, reverse=True, scan=scan
        )[1].max()
        assert by(parscan.Chunked(size, levels), xs=xs).depth == found


def test_work_is_that_of_the_schedule_on_spans():
    for length in range(2, 40):
        counter = Counter()
        prefix.tree(formed(length), start(), counter.apply, counter.then, reverse=True, walk=walk)
        plan = by("tree", xs=jnp.ones((length, B, N)))
        assert plan.flops["up-sweep"] == counter.joins * PRODUCT and plan.bytes["up-sweep"] == counter.joins * MATRIX
        assert plan.flops["down-sweep"] == counter.applications * APPLY


def linear(w, hidden):
    return hidden @ w


def network(*widths, batch=2):
    return [linear] * (len(widths) - 1), [jnp.asarray(RANDOM.standard_normal(ends)) for ends in itertools.pairwise(widths)], [jnp.ones((batch, widths[0]))]


@pytest.mark.parametrize("widths", [(4, 4, 4, 2), (5, 3, 7, 2), (16, *[8] * 20, 3), (2, *[4] * 9, *[6] * 9, 1), (64, 64, 1, 64, 64)])
def test_different_layers_cost_what_their_order_says(widths):
    plan = parscan.plan(*network(*widths), method="tree")
    said = re.search(r"(\d+) FLOPs where", plan.reason)
    assert said is not None
    assert plan.flops["up-sweep"] + plan.flops["down-sweep"] == int(said[1])  # of a layer h @ w, a push costs what a product with its matrix does
    assert 1 < plan.depth <= order.depth_bound(len(widths) - 1) + 1
    assert plan.bytes["down-sweep"] == sum(2 * ITEM * width for width in widths[:-1]) == plan.bytes["sequential"]
    assert plan.flops["sequential"] == sum(2 * 2 * a * b for a, b in itertools.pairwise(widths))


def test_two_layers_are_crossed_without_a_product():
    """Against the chain: the last one's Jacobian meets the cotangent, which is then pulled through the first."""
    plan = parscan.plan(*network(5, 3, 7), method="tree")
    assert (plan.depth, plan.flops["forming"], plan.flops["up-sweep"]) == (3, 7 * 2 * 2 * 3 * 7, 0)


def test_chunks_of_different_layers():
    """Against the chain: a layer, of the nine equal ones a chunk of one and two of 4, a layer. The maps of all but the last are made, and none multiplied."""
    plan = parscan.plan(*network(5, *[3] * 10, 7), method=parscan.Chunked(4))
    last, push, first = 2 * 2 * 7 * 3, 2 * 2 * 3 * 3, 2 * 2 * 3 * 5
    assert plan.flops["forming"] == 7 * last + 3 * push + 8 * (3 + 1) * push and plan.flops["up-sweep"] == 0
    assert plan.flops["down-sweep"] == last + push + 2 * push + first + 8 * push
    assert plan.depth == 4 + 1 + 4  # a chunk's map is made and applied, the next chunk is unfolded
    walked = parscan.plan(*network(5, *[3] * 10, 7), method=parscan.Walk(9))
    assert walked.depth == 1 + (9 + 1) + 1 and walked.flops["forming"] == 9 * 3 * push


def interrupted(*widths, batch):
    """A network with a layer in its middle that only JAX may differentiate."""
    layers, params, states = network(*widths, batch=batch)
    clipped = jax.custom_vjp(lambda h: h)
    clipped.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -1, 1),))
    middle = len(layers) // 2
    return [*layers[:middle], lambda _, h: clipped(h), *layers[middle:]], [*params[:middle], None, *params[middle:]], states[:1]


def test_stretches_add_up():
    plan = parscan.plan(*interrupted(16, *[8] * 20, 3, batch=4))
    assert len(plan.stretches) == 3
    for total, parts in ((plan.flops, [p.flops for p in plan.stretches]), (plan.bytes, [p.bytes for p in plan.stretches])):
        assert total == {stage: sum(part[stage] for part in parts) for stage in total}
    assert plan.depth == sum(p.depth for p in plan.stretches)


def test_nothing_travels_through_a_layer_whose_output_is_integer():
    layers = [lambda w, h: h @ w, lambda _, h: jnp.argmax(h, -1), lambda w, i: w[i]]
    plan = parscan.plan(layers, [W, None, WIDE], [START], method="tree")
    assert plan.flops["forming"] == plan.flops["up-sweep"] == 0 and plan.depth <= 1


# --- kinds, level by level ------------------------------------------------------------------------------------------------------


@kind()
class Growing(Jacobian):
    """Fills in with its first product."""

    values: jax.Array

    @property
    def size(self):
        return self.values.shape[-1]

    @property
    def product_flops(self):
        return 5

    @property
    def apply_flops(self):
        return 3

    def after(self, first):
        return Dense(self.values[..., None] * first.values[..., None, :])


def test_levels_of_closed_kinds():
    assert by("tree").levels() == [(level, "BlockDiagonal", MATRIX) for level in range(3)]
    assert by("tree", elementwise).levels() == [(level, "Diagonal", VECTOR) for level in range(3)]
    assert by("tree", structure="dense").levels() == [(level, "Dense", (B * N) ** 2 * ITEM) for level in range(3)]
    assert by("tree", lambda h, x: (h + x, None)).levels() == [(level, "Identity", 0) for level in range(3)]
    assert len(by("sequential", xs=jnp.ones((1000, B, N))).levels()) == 10  # 999 maps, 499, … 1
    assert len(by(parscan.Chunked(8), xs=jnp.ones((1000, B, N))).levels()) == 7  # 124 chunks, without the last 123, … 1


def test_a_growing_kind_is_followed_to_what_it_becomes():
    one = Growing(jax.ShapeDtypeStruct((4,), np.float32))
    found = costs.level_by_level(one, 4)
    assert [costs.name_of(m) for m in found] == ["Growing", "Dense", "Dense", "Dense"]
    assert [m.nbytes for m in found] == [16, 64, 64, 64]
    blocks = BlockDiagonal(Growing(jax.ShapeDtypeStruct((5, 4), np.float32)), (5,))
    assert [costs.name_of(m) for m in costs.level_by_level(blocks, 2)] == ["Growing", "BlockDiagonal"]
    assert costs.name_of(DirectSum((Identity(3), one))) == "Growing"
    assert costs.name_of(DirectSum((Dense(jnp.ones((2, 2))), Dense(jnp.ones((3, 3)))))) == "BlockDiagonal"


def test_the_tree_is_counted_as_what_its_kinds_become(monkeypatch):
    """4 of the 5 maps join to 2 dense ones, these to one."""
    monkeypatch.setattr(costs, "abstract", lambda forms, dtype: Growing(jax.ShapeDtypeStruct((4,), np.float32)))
    plan = by("tree")
    assert plan.flops["up-sweep"] == 2 * (5 + 3) + 1 * (2 * 4**3 + 2 * 4**2)
    assert plan.bytes["up-sweep"] == 3 * 64 and plan.bytes["forming"] == L * 16
    assert plan.flops["down-sweep"] == 3 * 3 + 2 * 2 * 4**2


def test_levels_are_of_equal_steps():
    with pytest.raises(ValueError, match="one run of equal steps"):
        parscan.plan(*network(4, 3, 2), method="tree").levels()
    with pytest.raises(ValueError, match="one run of equal steps"):
        by("lax").levels()


# --- words ------------------------------------------------------------------------------------------------------------------------


def line_of(f, offset):
    return f"{__file__.rsplit('/')[-1]}:{inspect.getsourcelines(f)[1] + offset}"


def test_why_names_the_equation_the_leaf_and_the_axis():
    assert by("tree").why == (f"`dot_general` at {line_of(step, 1)} mixes the last axis of `h`",)


def test_the_line_is_that_of_the_users_own_function():
    """An equal program from elsewhere in the file is another function to its user."""

    def other(h, x):
        return (h @ W) * x, None

    assert by("tree").why[0] != by("tree", other).why[0] == f"`dot_general` at {line_of(other, 1)} mixes the last axis of `h`"


def test_leaves_have_the_names_that_the_user_writes():
    def nested(carry, x):
        return {"c": jnp.tanh(carry["c"]) @ W + carry["n"][0][0], "n": [carry["n"][0], carry["n"][1] + 1]}, None

    state = {"c": START, "n": [jnp.zeros((1, N)), jnp.zeros((), int)]}
    said = parscan.plan(nested, state, XS, method="tree").why
    assert any(re.fullmatch(r"`dot_general` at test_plan.py:\d+ mixes the last axis of `carry\['c'\]`", one) for one in said), said

    def swapped(state, x):
        return (state[1] * x, state[0] + state[1]), None

    assert parscan.plan(swapped, (START, START), XS, method="tree").why == (
        "no equation mixes entries along an axis, but `state[0]` and `state[1]` depend on one another",
    )
    mixed = lambda state, x: ((state[0] + 1, state[1] * 0.5 @ W), None)
    assert parscan.plan(mixed, (0, START), XS, method="tree").why[0].endswith("of `state[1]`")  # integers have no derivative
    promoted = lambda state, x: ((state[0] * 0.5, state[1] @ W), None)
    assert parscan.plan(promoted, (0, START), XS, method="tree").why[0].endswith("of `state[1]`")  # but this becomes a float
    assert by("tree", lambda *args: (args[0] @ W, None)).why[0].endswith("of `h`")  # a function that has no name for it


def test_axes_in_words():
    found = by("tree", lambda h, x: (h * 0.5 + h.sum(0), None)).why
    assert len(found) == 1 and found[0].endswith("mixes axis 0 of `h`") and "`reduce_sum`" in found[0]
    assert by("tree", lambda h, x: (h @ W * x, None), init=jnp.zeros(N), xs=XS[:, 0]).why[0].endswith("mixes the only axis of `h`")
    assert by("tree", lambda h, x: (jnp.zeros((B, N)) + h.sum(), None)).why[0].endswith("mixes axis 0 and the last axis of `h`")
    assert by("tree", elementwise).why == ("no equation mixes coordinates",)


def test_why_of_layers_names_what_each_calls_its_state():
    layers, params, states = network(4, 3, 2)
    assert parscan.plan(layers, params, states, method="tree").why == (f"`dot_general` at {line_of(linear, 1)} mixes the last axis of `hidden`",)


def test_a_claim_is_said_to_be_one():
    assert by("tree", structure=parscan.Blocks(axis=0)).why == ("claimed: structure=Blocks(axis=0), taken at its word",)
    assert len(by("tree", lambda h, x: (h @ WIDE, None), init=jnp.zeros(40), structure="dense").why) == 1


def test_a_wide_dense_block_gets_advice():
    wide = by("tree", lambda h, x: (h @ WIDE, None), init=jnp.zeros((B, 40)))
    assert wide.why[-1].startswith("a block of 40 is dense") and "heads or groups" in wide.why[-1]
    assert not any("heads or groups" in said for said in by("tree").why)
    assert not any("heads or groups" in said for said in by("tree", elementwise, init=jnp.zeros((B, 100)), xs=jnp.ones((L, B, 100))).why)


def test_plans_without_names_say_the_state():
    read = parscan.network.read_sequence(*network(4, 3, 2))
    plan, _ = plan_chain(read.steps, parscan.Tree(), None, fallback=parscan.Sequential())
    assert plan.why[0].endswith("mixes the last axis of the state")


# --- a line, a table ----------------------------------------------------------------------------------------------------------------


def test_repr_is_one_line():
    assert repr(by("walk", xs=jnp.ones((1000, B, N)))) == "Plan(BlockDiagonal, {3: 2}, Walk(segment=1000), length 1000)"
    layered = parscan.plan(*interrupted(16, *[8] * 20, 3, batch=4))
    assert repr(layered) == f"Plan(BlockDiagonal, {{8: 4}}, {layered.method}, length 22, in 3 stretches)"


TABLE = """\
method      Tree(), length 5
reason      asked for
structure   BlockDiagonal, 2 blocks of 3
why         `dot_general` at {where} mixes the last axis of `h`
depth       5 operations one after another; 5 steps
                FLOPs      bytes
forming         630       720 B
up-sweep        432       432 B
down-sweep      180       240 B
total          1.24 k    1.39 kB
sequential      210       240 B"""


def test_the_table():
    table, told = str(by("tree")).split("\ngradient by      told      holds\n")
    assert table == TABLE.format(where=line_of(step, 1))
    assert [re.fullmatch(r"(\w+) +[\d.]+ [µm]?s +[\d.]+ k?B", line)[1] for line in told.splitlines()] == list(by("tree").seconds)
    assert f"{by('tree')}" == str(by("tree"))


def test_tables_fit_a_terminal():
    a_rather_long_name = {"a key of some length": {"and another one, nested": jnp.zeros((B, 40))}}

    def f(the_state_of_a_recurrence, x):
        return jax.tree.map(lambda h: jnp.tanh(h @ WIDE), the_state_of_a_recurrence), None

    plans = [
        parscan.plan(f, a_rather_long_name, XS, method=parscan.Chunked(3)),
        parscan.plan(*interrupted(16, *[8] * 20, 3, *range(4, 20), batch=4)),
        parscan.plan(*network(16, *[8] * 20, 3, *range(4, 20), batch=4), method="tree"),
        parscan.plan([], [], [START]),
        by("lax"),
    ]
    for plan in plans:
        lines = str(plan).splitlines()
        assert max(map(len, lines)) <= 100 and len(lines) < 60, plan
        assert all(line.rstrip() == line and line for line in lines)
    assert sum(line.startswith("stretch") for line in str(plans[1]).splitlines()) == len(plans[1].stretches)


def test_human_units():
    assert [costs.human(n) for n in (0, 7, 999, 1000, 1234, 56789, 999_499, 999_999, 2 * 10**9, 10**15)] == [
        *(("0", ""), ("7", ""), ("999", ""), ("1", "k"), ("1.23", "k"), ("56.8", "k"), ("999", "k"), ("1", "M"), ("2", "G"), ("1", "P"))
    ]


# --- a picture ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield lambda: pyplot.subplots()[1]
    pyplot.close("all")


def structure_of(f, init=START, claim=None):
    plan = parscan.plan(f, init, XS, method="tree", structure="auto" if claim is None else claim)
    (step,) = plan._given.steps
    return structures_of([(step.program, True)], claim)[0]


def test_spy_draws_the_blocks(axes):
    ax = by("tree").spy(axes())
    assert ax.get_title() == "BlockDiagonal: 2 blocks of 3"
    (collection,) = ax.collections
    corners = [path.get_extents().get_points().tolist() for path in collection.get_paths()]
    assert corners == [[[-0.5, -0.5], [2.5, 2.5]], [[2.5, 2.5], [5.5, 5.5]]]
    assert ax.get_xlim() == (-0.5, 5.5) and ax.get_ylim() == (5.5, -0.5)
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"h[{i}, {j}]" for i in range(B) for j in range(N)]
    ax.figure.canvas.draw()


def test_spy_makes_axes_of_its_own(axes):
    assert by("tree").spy().get_title() == by("tree").spy(axes()).get_title()


def test_entries_are_drawn_in_the_order_of_the_blocks(axes):
    """Along axis 1 nothing mixes: the coordinates of a column go together, entries outside of the blocks are black."""
    structure = structure_of(lambda h, x: (h * x + h.sum(0), None))
    order, n = structure.before.order(), B * N
    assert list(order) == [0, 3, 1, 4, 2, 5]
    pattern = np.kron(np.ones((B, B)), np.eye(N))
    ax = drawing.spy(structure, scipy.sparse.csr_array(pattern), (["h"], ["h"]), axes())
    (image,) = ax.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), 2 * np.kron(np.eye(N), np.ones((B, B))))
    wrong = pattern.copy()
    wrong[0, 5] = 1  # what leaves at place 0 depends on what enters at place 5
    (image,) = drawing.spy(structure, scipy.sparse.csr_array(wrong), (["h"], ["h"]), axes()).images
    assert np.argwhere(np.asarray(image.get_array()) == 1).tolist() == [[0, n - 1]]


def test_large_states_are_drawn_by_their_blocks_alone(axes):
    size = drawing.MOST_DRAWN + 2
    structure = structure_of(lambda h, x: (h * 0.5, None), jnp.zeros(size))
    ax = drawing.spy(structure, scipy.sparse.eye_array(size), (["h"], ["h"]), axes())
    assert not ax.images and not ax.collections and len(ax.lines) == 1
    assert len(ax.get_xticks()) <= drawing.MOST_LABELS and ax.get_title() == f"Diagonal: {size} blocks of 1"


def test_spy_of_layers_and_of_stretches(axes):
    ax = parscan.plan(*network(5, 3), method="tree").spy(axes())
    assert ax.get_title() == "BlockDiagonal: 2 blocks of 3 × 5"
    assert ax.get_xlim() == (-0.5, 9.5) and ax.get_ylim() == (5.5, -0.5)
    assert ax.get_xticklabels()[-1].get_text() == "hidden[1, 4]"
    assert parscan.plan(*network(16, *[8] * 20, 3, batch=4)).spy(axes()).get_title() == "BlockDiagonal: 4 blocks of 8"


def test_spy_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"no Jacobian to draw in Plan\(none.*asked for"):
        by("lax").spy()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        by("tree").spy()


# --- and who does not ask ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_unless_somebody_asks(monkeypatch):
    """Plans are made at each trace; their costs and words are not."""
    calls = []
    original = costs.costs
    monkeypatch.setattr(costs, "costs", lambda *args: calls.append("costs") or original(*args))
    monkeypatch.setattr(report, "_mixings", lambda program: calls.append("why") or [])
    for method in ("tree", "walk", "auto"):
        jax.grad(lambda h, method=method: parscan.scan(step, h, XS, method=method)[0].sum())(START)
        grads = parscan.parallel_backward(lambda w, h: jnp.tanh(h @ w), jnp.ones((L, N, N)), jnp.ones((L + 1, B, N)), START, method=method)
        hash(grads.plan)
        jax.tree.map(lambda g: g + 1, grads)
        jax.jit(lambda g: g)(grads)
    plan = by("tree")
    assert repr(plan) and plan == by("tree") and plan.named([START, START], "other") == plan and hash(plan) == hash(by("tree"))
    assert not calls
    assert plan.flops and plan.bytes and plan.depth and plan.flops and plan.why == plan.why and str(plan)
    assert calls == ["costs", "why"]


def test_what_a_caller_does_to_a_dict_stays_with_the_caller():
    plan = by("tree")
    plan.flops["total"] = 0
    assert plan.flops["total"] > 0


@pytest.mark.parametrize("made", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_copies_say_the_same(made):
    for plan in (by("tree"), parscan.plan(*network(16, *[8] * 20, 3, batch=4))):
        other = made(plan)
        assert other == plan and str(other) == str(plan)
        with pytest.raises(ValueError, match="no Jacobian to draw"):
            (other.stretches or [other])[0].spy()


def test_a_plan_may_be_asked_while_something_is_traced():
    found = []

    @jax.jit
    def traced(h):
        plan = by("tree", init=h)
        found.append((plan.depth, plan.flops["total"], plan.levels(), str(plan)))
        return h

    traced(START)
    assert found == [(by("tree").depth, by("tree").flops["total"], by("tree").levels(), str(by("tree")))]


def test_a_cell_of_a_notebook_is_named_by_its_line():
    """Whose file is one of the kernel's, with a number for a name."""
    namespace = {"jnp": jnp}
    exec(compile("\ndef step(h, x):\n    return jnp.tanh(h @ jnp.ones((3, 3)) + x), None\n", "/tmp/ipykernel_17/3578801198.py", "exec"), namespace)
    plan = parscan.plan(namespace["step"], jnp.zeros(3), jnp.ones((8, 3)), method="tree")
    assert plan.why == ("`dot_general` in line 3 of a cell mixes the only axis of `h`",)


def test_a_number_that_ties_a_state_is_named():
    def step(h, x):
        return (h[0] + 1.0, jnp.tanh(h[1] @ W + jnp.cos(h[0]) * x)), None

    why = parscan.plan(step, (0.0, jnp.zeros((2, 3))), jnp.ones((8, 3)), method="tree").why
    assert any("[0]`, a single number, is in one block with 6 others: as an integer" in said for said in why)
    count = lambda h, x: ((h[0] + 1, step((h[0].astype(float), h[1]), x)[0][1]), None)
    assert not any("single number" in said for said in parscan.plan(count, (0, jnp.zeros((2, 3))), jnp.ones((8, 3)), method="tree").why)


def test_what_only_moves_an_axis_is_not_said_to_mix_it():
    heads = jnp.ones((2, 3, 3))
    step = lambda h, x: (jnp.tanh(jnp.einsum("hi,hij->hj", h.reshape(2, 3), heads).reshape(6) + x), None)
    (said,) = parscan.plan(step, jnp.zeros(6), jnp.ones((8, 6)), method="tree").why
    assert said.startswith("`reshape` at test_plan.py:") and said.endswith("moves entries of the only axis of `h`, and what follows mixes them")
