"""The structure of a chain's Jacobians: what the user claims, what is proved, and the order of coordinates that shows it.

A `Layout` is an order of the state's coordinates in which every Jacobian of the chain is block-diagonal: vectors of length
n = blocks · width, block after block. Batch axes, heads and elementwise recurrences are all such blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parscan.checks import describe, integer, is_inexact
from parscan.jaxprs import Dependence, Program, dependence


@dataclass(frozen=True)
class Blocks:
    """A claim: the state falls into equal blocks that never mix. Taken at its word; a wrong claim is a wrong gradient.

    Args:
        axis: every leaf of the state has this axis, and an entry of the new state depends only on entries of the old one with the same
            index along it (a batch axis). Negative counts from the end.
        size: the state, raveled leaf after leaf, falls into consecutive blocks of this size.

    Example:
        >>> parscan.Blocks(axis=0)
        Blocks(axis=0, size=None)
    """

    axis: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.axis is None) == (self.size is None):
            raise ValueError(f"`Blocks` needs exactly one of `axis` and `size`; got axis={self.axis!r}, size={self.size!r}.")
        if self.size is not None:
            object.__setattr__(self, "size", integer("Blocks(size=...)", self.size, 1))
        elif isinstance(self.axis, bool) or not isinstance(self.axis, Integral):
            raise ValueError(f"`Blocks(axis=...)` must be an integer; got {self.axis!r}.")


Claim = Blocks | str


def parse_structure(structure: Any) -> Claim | None:
    """A claim from a value or a name; `None` for `"auto"`.

    Raises:
        ValueError: the name is unknown. TypeError: neither a name nor a claim.
    """
    if isinstance(structure, Blocks):
        return structure
    if isinstance(structure, str):
        if structure in ("dense", "diagonal"):
            return structure
        if structure == "auto":
            return None
    kind = ValueError if isinstance(structure, str) else TypeError
    raise kind(f"`structure` must be 'auto', 'dense', 'diagonal', parscan.Blocks(axis=...) or parscan.Blocks(size=...); got {structure!r}.")


@dataclass(frozen=True)
class Part:
    """Leaves that share their blocks: leaf `leaves[i]`, its axes permuted by `orders[i]`, is (blocks, widths[i])."""

    leaves: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    blocks: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Layout:
    """An order of coordinates: parts one after another, every block padded with zeros to the widest part's width.

    shapes, dtypes: the leaves. `block_size` cuts the vector of all parts into blocks of that size instead (a claim in
    raveled order, whose blocks may straddle leaves).
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    parts: tuple[Part, ...]
    block_size: int | None = None

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return sum(part.blocks * part.width for part in self.parts) // self.block_size if self.block_size else sum(part.blocks for part in self.parts)

    @property
    def width(self) -> int:
        """Side of a block."""
        return self.block_size or self._padded

    @property
    def _padded(self) -> int:
        return max((part.width for part in self.parts), default=0)

    @property
    def size(self) -> int:
        """Length of a vector."""
        return self.blocks * self.width

    @property
    def dtype(self) -> Any:
        """The one floating-point dtype in which vectors are held: at least float32."""
        return jnp.dtype(jnp.float64 if any(jnp.dtype(d).itemsize == 8 for d in self.dtypes) else jnp.float32)

    def to_vector(self, leaves: Sequence[Array]) -> Array:
        """State leaves (..., *shape) as vectors (..., n)."""
        pieces = []
        for part in self.parts:
            columns = []
            for leaf, order, width in zip(part.leaves, part.orders, part.widths, strict=True):
                x = leaves[leaf]
                lead = x.ndim - len(order)
                x = x.transpose(*range(lead), *(lead + axis for axis in order))
                columns.append(x.reshape(*x.shape[:lead], part.blocks, width).astype(self.dtype))
            whole = columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)
            missing = self._padded - part.width
            whole = whole if missing == 0 else jnp.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, missing)])
            pieces.append(whole.reshape(*whole.shape[:-2], part.blocks * self._padded))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

    def from_vector(self, vector: Array) -> list[Array]:
        """Vectors (..., n) as state leaves (..., *shape), each in its own dtype."""
        lead, block = vector.shape[:-1], 0
        leaves: list[Any] = [jnp.zeros((*lead, *shape), dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        blocks = vector.reshape(*lead, sum(part.blocks for part in self.parts), self._padded)
        for part in self.parts:
            whole, start = blocks[..., block : block + part.blocks, :], 0
            for leaf, order, width in zip(part.leaves, part.orders, part.widths, strict=True):
                shape = [self.shapes[leaf][axis] for axis in order]
                x = whole[..., start : start + width].reshape(*lead, *shape)
                back = sorted(range(len(order)), key=order.__getitem__)
                leaves[leaf] = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in back)).astype(self.dtypes[leaf])
                start += width
            block += part.blocks
        return leaves


def layout_of(program: Program, structure: Claim | None) -> Layout:
    """The layout of a program's differentiable carry: proved, or as claimed.

    Raises:
        ValueError: the claim's size or axis does not fit the state.
    """
    carry = [aval for aval in program.avals[1] if is_inexact(aval)]
    shapes, dtypes = tuple(tuple(a.shape) for a in carry), tuple(a.dtype for a in carry)
    if structure is None:
        return Layout(shapes, dtypes, _proved(program))
    if isinstance(structure, Blocks) and structure.axis is not None:
        return Layout(shapes, dtypes, _claimed_axis(structure.axis, carry))
    sizes = [math.prod(shape) for shape in shapes]
    width = structure.size if isinstance(structure, Blocks) else 1 if structure == "diagonal" else max(sum(sizes), 1)
    assert width is not None
    if sum(sizes) % width:
        raise ValueError(
            f"`structure=Blocks(size={width})` does not fit: the state has {sum(sizes)} coordinates ({_listed(carry)}), not a multiple of {width}."
        )
    raveled = tuple(Part((i,), (tuple(range(len(shapes[i]))),), size, (1,)) for i, size in enumerate(sizes) if size)
    return Layout(shapes, dtypes, raveled, width)


# --- claims ----------------------------------------------------------------------------------------------------------


def _claimed_axis(axis: int, carry: Sequence[Any]) -> tuple[Part, ...]:
    orders, sizes, widths = [], set(), []
    for aval in carry:
        rank = len(aval.shape)
        if not -rank <= axis < rank:
            raise ValueError(f"`structure=Blocks(axis={axis})` does not fit: every leaf of the state needs that axis; got {_listed(carry)}.")
        place = axis % rank
        orders.append((place, *(a for a in range(rank) if a != place)))
        sizes.add(aval.shape[place])
        widths.append(math.prod(aval.shape[:place] + aval.shape[place + 1 :]))
    if len(sizes) > 1:
        raise ValueError(f"`structure=Blocks(axis={axis})` does not fit: that axis needs one length in every leaf of the state; got {_listed(carry)}.")
    return (Part(tuple(range(len(carry))), tuple(orders), sizes.pop(), tuple(widths)),) if carry and 0 not in sizes else ()


def _listed(carry: Sequence[Any]) -> str:
    return ", ".join(map(describe, carry))


# --- proof -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _proved(program: Program) -> tuple[Part, ...]:
    """The parts and blocks that the jaxpr of the derivative proves, for every input."""
    outs = _derivative_dependence(program)
    shapes = [tuple(a.shape) for a in program.avals[1] if is_inexact(a)]
    parts = [_part(members, shapes, outs) for members in _components(len(shapes), outs)]
    return _merged([part for part in parts if part.blocks * part.width])


def _derivative_dependence(program: Program) -> list[Dependence]:
    consts, carry, x = program.avals
    floats = [i for i, aval in enumerate(carry) if is_inexact(aval)]

    def derivative(tangents, consts, carry, x):
        def new_carry(some):
            full = list(carry)
            for i, value in zip(floats, some, strict=True):
                full[i] = value
            new = program(consts, full, x)[0]
            return [new[i] for i in floats]

        return jax.jvp(new_carry, ([carry[i] for i in floats],), (list(tangents),))[1]

    closed = jax.make_jaxpr(derivative)([carry[i] for i in floats], consts, carry, x)
    return dependence(closed, range(len(floats)))


def active_leaves(program: Program, consts: Sequence[int], carry: Sequence[int], xs: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leaves of the carry and of y that have a derivative, given the leaves of consts, first carry and xs that have one.

    As `lax.scan` finds them: by following the derivative around the loop until nothing is added.
    """
    before, count = len(program.avals[0]), program.num_carry
    influences = _influences(program)
    active = {*consts, *(before + i for i in carry), *(before + count + i for i in xs)}
    while new := {before + i for i in range(count) if influences[i] & active} - active:
        active |= new
    moving = tuple(i for i in range(count) if before + i in active)
    return moving, tuple(i for i, inputs in enumerate(influences[count:]) if inputs & active)


@functools.lru_cache(maxsize=256)
def _influences(program: Program) -> list[frozenset[int]]:
    """For every leaf of the new carry, then of y: the inputs, counted through consts, carry and x, on which its derivative depends."""
    inputs = [aval for part in program.avals for aval in part]
    before, count = len(program.avals[0]), program.num_carry
    floats = [i for i, aval in enumerate(inputs) if is_inexact(aval)]
    outs = [aval for part in program.out_avals for aval in part]

    def derivative(tangents, inputs):
        def of_floats(some):
            full = list(inputs)
            for i, value in zip(floats, some, strict=True):
                full[i] = value
            new, ys = program(full[:before], full[before : before + count], full[before + count :])
            return [leaf for leaf in (*new, *ys) if is_inexact(leaf)]

        return jax.jvp(of_floats, ([inputs[i] for i in floats],), (list(tangents),))[1]

    closed = jax.make_jaxpr(derivative)([inputs[i] for i in floats], inputs)
    found = iter(dependence(closed, range(len(floats))))
    return [frozenset(floats[leaf] for leaf in next(found)) if is_inexact(aval) else frozenset() for aval in outs]


def _components(count: int, outs: Sequence[Dependence]) -> list[list[int]]:
    """Leaves that influence one another, directly or not."""
    label = list(range(count))
    for new, depends in enumerate(outs):
        for old in depends:
            a, b = label[new], label[old]
            label = [min(a, b) if x in (a, b) else x for x in label]
    return [[i for i in range(count) if label[i] == root] for root in sorted(set(label))]


def _part(members: list[int], shapes: Sequence[tuple[int, ...]], outs: Sequence[Dependence]) -> Part:
    """The axes along which nothing in these leaves mixes become the blocks."""
    first = members[0]
    groups = [group for axis in range(len(shapes[first])) if (group := _group(first, axis, members, shapes, outs)) is not None]
    blocks = math.prod(shapes[first][group[first]] for group in groups)
    orders, widths = [], []
    for leaf in members:
        lead = [group[leaf] for group in groups]
        rest = [axis for axis in range(len(shapes[leaf])) if axis not in lead]
        orders.append((*lead, *rest))
        widths.append(math.prod(shapes[leaf][axis] for axis in rest))
    return Part(tuple(members), tuple(orders), blocks, tuple(widths))


def _group(first: int, axis: int, members: list[int], shapes: Sequence[tuple[int, ...]], outs: Sequence[Dependence]) -> dict[int, int] | None:
    """The axis of each leaf that corresponds to `axis` of the first leaf, if no dependence mixes along them."""
    group, pending = {first: axis}, True
    while pending:
        pending = False
        for new in members:
            for old, dims in outs[new].items():
                moved = dims[group[old]] if old in group else None
                if new not in group and moved is not None:  # not `MIXED`
                    group[new], pending = moved, True
                if new in group and old not in group and group[new] in dims:
                    group[old], pending = dims.index(group[new]), True
    if set(group) != set(members):
        return None
    kept = all(dims[group[old]] == group[new] for new in members for old, dims in outs[new].items())
    equal = len({shapes[leaf][a] for leaf, a in group.items()}) == 1
    return group if kept and equal else None


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Parts side by side, or joined into wider blocks where padding every block to the widest would cost more."""
    if len(parts) <= 1:
        return tuple(parts)
    cost: dict[tuple[Part, ...], int] = {tuple(parts): sum(part.blocks for part in parts) * max(part.width for part in parts) ** 2}
    if len({part.blocks for part in parts}) == 1:
        joined = _joined(parts, parts[0].blocks, [part.widths for part in parts])
        cost[(joined,)] = joined.blocks * joined.width**2
    dense = _joined(parts, 1, [tuple(part.blocks * width for width in part.widths) for part in parts])
    cost[(dense,)] = dense.width**2
    return min(cost, key=cost.__getitem__)


def _joined(parts: list[Part], blocks: int, widths: list[tuple[int, ...]]) -> Part:
    leaves = tuple(leaf for part in parts for leaf in part.leaves)
    orders = tuple(order for part in parts for order in part.orders)
    return Part(leaves, orders, blocks, tuple(width for some in widths for width in some))
