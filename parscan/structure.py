"""The Jacobians of a chain before any number is: the order of coordinates in which they fall into blocks, and the kind of each block."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parscan import jacobians
from parscan.claims import Claim, claimed
from parscan.factored import Bottleneck, Sides, bottleneck, sides
from parscan.jacobians import KINDS, BlockDiagonal, Dense, Diagonal, DirectSum, Evidence, Form, Identity, Index, Jacobian, Kronecker, LowRank, recognised
from parscan.jaxprs import Program
from parscan.layout import Group, Layout, Order
from parscan.proof import Derivative, Steps, derivative, proved, states_of

SMALLEST_FACTORED = 4  # blocks of this width on are looked into for factors


@dataclass(frozen=True)
class Forms:
    """How the Jacobians of a run are formed, in one direction of travel.

    before, after: the groups of the vectors that enter and leave it. each: the form of a block of every group. shared: for every group, along
    which of its axes all blocks are the same.
    """

    before: tuple[Group, ...]
    after: tuple[Group, ...]
    each: tuple[Form, ...]
    shared: tuple[tuple[bool, ...], ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Lengths of the vectors before and after."""
        return sum(group.size for group in self.before), sum(group.size for group in self.after)

    @property
    def pushes(self) -> int:
        """How many vectors are pushed through a step: as many as the widest group needs, since groups do not meet."""
        return max((form.pushes for form in self.each), default=0)

    def seeds(self, dtype: Any) -> Array:
        """The vectors to push, (pushes, n): in every block of a group the seeds of its form."""
        columns = []
        for group, form in zip(self.before, self.each, strict=True):
            one = np.zeros((self.pushes, group.width))
            one[: form.pushes] = form.seeds()
            columns.append(np.tile(one, (1, math.prod(group.counts))))
        return jnp.asarray(np.concatenate(columns, axis=1), dtype)

    def jacobian(self, images: Array) -> Any:
        """From the images of the seeds, (..., pushes, p), the Jacobians."""
        blocks = []
        some = jacobians.split(images, [group.size for group in self.after])
        for own, group, form, shared in zip(some, self.after, self.each, self.shared, strict=True):
            own = own[..., : form.pushes, :].reshape(*own.shape[:-2], form.pushes, *group.counts, group.width)
            own = own[(..., *(slice(0, 1) if same else slice(None) for same in shared), slice(None))]
            own = jnp.moveaxis(own, -2 - len(shared), -2)
            blocks.append(form.kind.from_images(own, form))
        return self.of_blocks(blocks)

    def of_blocks(self, blocks: Sequence[Any]) -> Any:
        """The whole, from the blocks of every group, stacked along leading axes."""
        parts = [BlockDiagonal(inner, group.counts) if group.counts else inner for inner, group in zip(blocks, self.after, strict=True)]
        return parts[0] if len(parts) == 1 else DirectSum(tuple(parts))

    def around(self, inner: Any) -> Any:
        """Of a single group, from its blocks with leading axes (L, *counts)."""
        (shared,) = self.shared
        places = (slice(None), *(slice(0, 1) if same else slice(None) for same in shared))
        return self.of_blocks([jax.tree.map(lambda x: x[places], inner)])

    def lasting(self, dtype: Any) -> Forms:
        """The same with full matrices in the place of blocks whose products soon are."""
        return replace(self, each=tuple(form if _lasts(form, dtype) else Dense.recognised(Evidence(form.shape)) for form in self.each))

    def closed(self) -> Forms:
        """The same with kinds whose products are of that kind: elementwise groups are diagonal, blocks of all others dense, none of them shared."""
        each = []
        for group, form in zip(self.before, self.each, strict=True):
            each.append(_elementwise(form.shape[1], False) if group.elementwise else Dense.recognised(Evidence(form.shape)))
        return Forms(self.before, self.after, tuple(each), tuple((False,) * len(shared) for shared in self.shared))


@dataclass(frozen=True)
class Structure:
    """The Jacobians of a run: of equal layers, or steps of a recurrence.

    before, after: the layouts of the states entering and leaving it.
    along, against: how they are formed for tangents, and their transposes for cotangents.
    same: whether all steps are one linear map.
    factored: how blocks that are not pushed a basis through are formed.
    """

    before: Layout
    after: Layout
    along: Forms
    against: Forms
    same: bool
    factored: Bottleneck | Sides | None = None

    def forms(self, *, transposed: bool) -> Forms:
        return self.against if transposed else self.along

    def multiplied(self) -> Structure:
        """As a tree wants it: what its first products would turn into full matrices anyway is formed as such."""
        along, against = (forms.lasting(self.before.dtype) for forms in (self.along, self.against))
        return replace(self, along=along, against=against, factored=self.factored if _are_factored(along) else None)

    @property
    def kind(self) -> str:
        """The name of the Jacobians' kind: that of the blocks, where all that mix are of one special kind."""
        names = {form.kind.__name__ for group, form in zip(self.before.groups, self.along.each, strict=True) if group.size}
        return kind_name(names, sum(self.before.blocks.values()))


@functools.lru_cache(maxsize=1024)
def _lasts(form: Form, dtype: Any) -> bool:
    """Whether products of blocks of this form are anything better than full matrices, for as many levels as it takes to pay."""
    if form.kind is Dense or form.shape[0] != form.shape[1] or 0 in form.shape:
        return True
    one = form.abstract(dtype)
    for _ in range(form.kind.must_last):
        one = jax.eval_shape(jacobians.product, one, one)
    return not isinstance(one, Dense)


def _are_factored(forms: Forms) -> bool:
    return any(form.kind in (LowRank, Kronecker) for form in forms.each)


def kind_name(names: set[str], blocks: int) -> str:
    """What so many blocks of these kinds are called together: as those that mix, where they are of one special kind."""
    mixing = names - {"Identity", "Diagonal"} or (names - {"Identity"} if len(names) > 1 else names)
    if len(mixing) != 1 or mixing == {"Dense"}:
        return "Dense" if blocks == 1 else "BlockDiagonal"
    return next(iter(mixing))


def structures_of(steps: Sequence[tuple[Program, bool]], claim: Claim | None) -> list[Structure]:
    """The structure of every step of a chain: proved, or as claimed.

    Args:
        steps: the layers' programs; whether each is followed by its like, so that its states must share a layout.

    Raises:
        ValueError: the claim does not fit the state.
    """
    return list(_structures(tuple(steps), claim, tuple(KINDS)))


@functools.lru_cache(maxsize=4096)
def _structures(steps: Steps, claim: Claim | None, _kinds: tuple[type[Jacobian], ...]) -> list[Structure]:
    """The same, remembered: a kind that is registered is recognised from then on, also in what has been planned before."""
    states = states_of(steps)
    wide = any(jnp.dtype(a.dtype).itemsize == 8 for state in states for a in state)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    proof = proved(tuple(steps)) if claim is None else None
    orders, evidence = (proof.orders, proof.evidence) if proof is not None else claimed(claim, states)  # pyright: ignore[reportArgumentType]
    layouts = [
        Layout(tuple(tuple(a.shape) for a in state), tuple(a.dtype for a in state), dtype, parts, groups)
        for state, (parts, groups) in zip(states, orders, strict=True)
    ]
    found = []
    for i, (before, after) in enumerate(itertools.pairwise(layouts)):
        one, factored = evidence[i], None
        if proof is not None:
            one, factored = _with_factors(derivative(steps[i][0]), one, orders[i], orders[i + 1])
        shared = proof.shared[i] if proof is not None else tuple((False,) * len(group.counts) for group in before.groups)
        along = _forms(before.groups, after.groups, one, shared)
        against = _forms(after.groups, before.groups, tuple(some.transpose() for some in one), shared)
        found.append(Structure(before, after, along, against, proof is not None and proof.same[i], factored if _are_factored(along) else None))
    return found


def _with_factors(proof: Derivative, evidence: tuple[Evidence, ...], before: Order, after: Order) -> tuple[tuple[Evidence, ...], Bottleneck | Sides | None]:
    """The evidence, and with what is found of factors where the state is one group of blocks."""
    if len(evidence) != 1 or min(evidence[0].shape) < SMALLEST_FACTORED or before[1][0].elementwise:
        return evidence, None
    passing = bottleneck(proof, before, after)
    if passing is not None:
        return (replace(evidence[0], rank=passing.rank),), passing
    acting = sides(proof, before, after)
    if acting is not None:
        return (replace(evidence[0], factors=acting.factors, scaled=acting.scaled),), acting
    return evidence, None


def _forms(before: tuple[Group, ...], after: tuple[Group, ...], evidence: Sequence[Evidence], shared: tuple[tuple[bool, ...], ...]) -> Forms:
    each = [_elementwise(group.width, one.moves) if group.elementwise else recognised(one) for group, one in zip(before, evidence, strict=True)]
    return Forms(before, after, tuple(each), shared)


def _elementwise(width: int, moves: bool) -> Form:
    return Form(Identity, (width, width), None) if moves else Form(Diagonal, (width, width), Index(np.zeros(width)))


def forms_of(one: Jacobian) -> Forms:
    """Of maps that are given: what pushing a basis through them needs to know."""
    if isinstance(one, Diagonal):
        group, form = Group((), one.size, True), _elementwise(one.size, False)
    else:
        blocks = math.prod(one.along) if isinstance(one, BlockDiagonal) else 1
        group = Group((blocks,) if blocks > 1 else (), one.size // blocks)
        form = Dense.recognised(Evidence((group.width, group.width)))
    return Forms((group,), (group,), (form,), ((False,) * len(group.counts),))


def kind_of(structures: Sequence[Structure]) -> str:
    """One name for the Jacobians of a chain."""
    names = {structure.kind for structure in structures if structure.before.size or structure.after.size}
    plain = names - {"Identity", "Diagonal"} or names
    return plain.pop() if len(plain) == 1 else "BlockDiagonal" if any(sum(s.before.blocks.values()) > 1 for s in structures) else "Dense"


def blocks_of(structures: Sequence[Structure]) -> dict[int, int]:
    """From block size to how many, each group being taken where it is widest."""
    layouts = [structures[0].before, *(structure.after for structure in structures)]
    found: dict[int, int] = {}
    for groups in zip(*(layout.groups for layout in layouts), strict=True):
        widest = max(groups, key=lambda group: group.side)
        if widest.size:
            found[widest.side] = found.get(widest.side, 0) + widest.blocks
    return dict(sorted(found.items()))
