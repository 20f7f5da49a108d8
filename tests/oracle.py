"""What is proved of a step beside what its Jacobians show."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from programs import RandomProgram
from scipy.sparse import coo_array, csgraph
from support import labels_of_blocks

from parscan.jaxprs import Flat, Program, components, pattern, trace
from parscan.jaxprs.program import equations
from parscan.structure import structures_of

LIMIT = 10**7


class Proof(NamedTuple):
    """Of a step whose state has n coordinates, in raveled order, leaf after leaf."""

    pattern: np.ndarray  # (n, n): which new coordinate may depend on which old one
    blocks: np.ndarray  # (n,): coordinates that influence one another share a label; index by index
    layout: np.ndarray  # (n,): the same for the blocks that are used
    primitives: list[str]


def derivative(f: Callable, state: Sequence[Any], *rest: Any) -> Any:
    """The jaxpr `(tangents, state, *rest) -> tangents` of f(state, *rest); all but `rest` being flat lists."""
    return jax.make_jaxpr(lambda tangents, state, *rest: jax.jvp(lambda s: f(s, *rest), (state,), (tangents,))[1])(list(state), list(state), *rest)


def joined(tangents: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Labels of coordinates that influence one another over any number of steps, from labels of the old and of the new ones."""
    names = np.unique(np.concatenate([tangents, outputs]), return_inverse=True)[1]
    old, new = names[: len(tangents)], names[len(tangents) :]
    return csgraph.connected_components(coo_array((np.ones(len(old)), (old, new)), shape=(names.max() + 1,) * 2), directed=False)[1][old]


def blocks_of(nonzero: np.ndarray) -> np.ndarray:
    """Labels of coordinates that influence one another, from a square pattern."""
    return csgraph.connected_components(coo_array(nonzero), directed=False)[1]


def sizes(labels: np.ndarray) -> list[int]:
    return sorted(np.unique(labels, return_counts=True)[1].tolist())


def prove(program: Program, values: Sequence[Any], closed_over: int) -> Proof:
    """All that is proved; of the constants, the first `closed_over` ones are known by value."""
    consts, carry, _ = program.avals
    closed = derivative(lambda carry, *consts: program(consts, carry, [])[0], carry, *consts)
    assert not closed.consts
    known = {2 * len(carry) + i: np.asarray(value) for i, value in enumerate(values[:closed_over]) if np.asarray(value).dtype.kind in "iub"}
    tangents = range(len(carry))
    found, labels = pattern(closed, tangents, known, LIMIT), components(closed, tangents, known, LIMIT)
    assert found is not None and labels is not None
    layout = structures_of([(program, True)], None)[0].before
    used = np.zeros(sum(aval.size for aval in carry), int)
    used[layout.order()] = labels_of_blocks(layout)
    return Proof(found.toarray(), joined(*labels), used, [eqn.primitive.name for eqn in equations(program.jaxpr)])


def proof_of(program: RandomProgram) -> Proof:
    constants, state = program.point(np.random.default_rng(0))
    traced, values, _ = trace(lambda constants, state, x: program(constants, state), Flat.of(constants), Flat.of(state), Flat.of(None))
    return prove(traced, values, len(values) - len(constants))


def shown(program: RandomProgram, points: int, seed: int, reverse: bool = True) -> np.ndarray:
    """Where `jax.jacobian` is non-zero at any of some random points, each with constants of its own; what is not finite shows nothing.

    reverse: in reverse mode, which no `while` has.
    """
    random, found = np.random.default_rng(seed), np.zeros((), bool)
    of_state = jax.jit((jax.jacobian if reverse else jax.jacfwd)(lambda state, constants: program(constants, state)))
    for _ in range(points):
        constants, state = program.point(random)
        rows = [[np.asarray(x).reshape(-1, h.size) for x, h in zip(row, state, strict=True)] for row in of_state(state, constants)]
        one = np.concatenate([np.concatenate(row, 1) for row in rows])
        found = found | (np.isfinite(one) & (one != 0))
    return found


class Tally:
    """What random programs have shown so far."""

    def __init__(self, narrow: bool):
        self.narrow = narrow
        self.counts: collections.Counter[str] = collections.Counter()
        self.primitives: collections.Counter[str] = collections.Counter()
        self.violations: list[str] = []

    def add(self, program: RandomProgram) -> None:
        """Compares one program's proof with Jacobians at random points: two, and six where block sizes are compared."""
        proof = proof_of(program)
        nonzero = shown(program, 6 if self.narrow else 2, 1, reverse="while" not in proof.primitives)
        new, old = np.nonzero(nonzero)
        violated = {
            "labels": sizes(blocks_of(proof.pattern)) != sizes(proof.blocks),
            "pattern": not proof.pattern[new, old].all(),
            "blocks": not (proof.blocks[new] == proof.blocks[old]).all(),
            "layout": not (proof.layout[new] == proof.layout[old]).all(),
        }
        self.violations += [f"{kind}: {program!r}" for kind, is_violated in violated.items() if is_violated]
        self.primitives.update(set(proof.primitives))
        oracle = sizes(blocks_of(nonzero))
        self.counts["programs"] += 1
        self.counts["tight"] += sizes(proof.blocks) == oracle
        self.counts["tight layout"] += sizes(proof.layout) == oracle
        self.counts["dense"] += len(oracle) == 1

    def share(self, name: str) -> float:
        return self.counts[name] / max(1, self.counts["programs"])
