"""For tests of programs that use parscan: whether what they claim of their Jacobians is true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parscan.checks import coordinate, dtype_of, is_complex, is_inexact
from parscan.claims import Band, Blocks, Claim, parse_structure
from parscan.debug import StructureError, names_of
from parscan.jaxprs import Program, in_floats, obstacle
from parscan.layout import Layout
from parscan.network import is_sequence, read_sequence
from parscan.proof import derivative, proved
from parscan.structure import structures_of

__all__ = ["StructureError", "check_structure"]

ENTRIES = 2**24  # entries of a Jacobian up to which all are computed
AT_ONCE = 2**21  # entries of a Jacobian that are held at a time
NOISE = 16  # units of rounding of a row's largest entry up to which an entry is none
LISTED = 5


def check_structure(f: Any, params: Any, h: Any, *, structure: Any, vary_params: bool = True, seed: int = 0) -> None:
    """Checks a claim about the Jacobian of a layer: returns if it is right, and says what it overlooks if it is wrong.

    What the layer's program *proves* to respect the claim does so for every input. Where the proof cannot tell, derivatives are computed: at the given
    state and at random ones near it and further away. Up to 2²⁴ entries, all of the Jacobian; beyond that by random cotangents, so chosen that each pair
    of coordinates that the claim keeps apart is told apart by one of them. A dependence that none of these points shows, since it sets
    in elsewhere (a branch not taken, a unit that is saturated) or is weaker than rounding, is not found.

    Args:
        f: a layer (params_i, h) -> h; or a sequence of layers, each of which is checked at the state that it is given. A step of a scan is
            `lambda x, h: step(h, x)[0]`, with an x in the place of the parameters.
        params: pytree of arrays, any dtypes, of one layer, not stacked; a sequence of them for a sequence of layers.
        h: the state, pytree of arrays, any shapes and dtypes but complex.
        structure: the claim: `"diagonal"`, `Blocks(...)`, `Band(...)`; `"dense"` is always right.
        vary_params: whether to look at random parameters near the given ones, too. A weight that starts at zero hides what it will mix. Turn it off if
            `params` hold constants, such as a mask, on which the claim rests. Arrays that f closes over keep their values.
        seed: of the random states, parameters and cotangents.

    Raises:
        StructureError: the claim is wrong; the report names coordinates of the new state and those of the old one on which they depend.
        ValueError: the claim does not fit the state, or claims nothing; no derivative is finite.
        TypeError: a state is complex.

    Example:
        >>> rnn = lambda w, h: jnp.tanh(h @ w)
        >>> parscan.testing.check_structure(rnn, jnp.ones((3, 3)), jnp.ones((4, 3)), structure=parscan.Blocks(axis=0))
        >>> parscan.testing.check_structure(rnn, jnp.ones((3, 3)), jnp.zeros(3), structure="diagonal")
        Traceback (most recent call last):
            ...
        parscan.testing.StructureError: `h[0]` of the new state depends on `h[1]` of the old one (derivative 1), which `structure='diagonal'` denies...
    """
    claim = parse_structure(structure)
    if claim is None:
        raise ValueError("`structure='auto'` claims nothing that could be checked: give a claim, such as parscan.Blocks(axis=0).")
    layers, entries = (f, params) if is_sequence(f) else ([f], [params])
    network = read_sequence(layers, entries, [h])
    if not network.links:
        return
    states = [("h", leaf) for leaf in network.start] + [("the new state", leaf) for link in network.links for leaf in link.step.program.out_avals[0]]
    for what, leaf in states:
        if is_complex(leaf):
            raise TypeError(
                f"{what} must be real; got {dtype_of(leaf)}, whose chains are left to JAX and use no claim. Split it into real and imaginary parts."
            )
    structures = structures_of([(link.step.program, link.step.repeats) for link in network.links], claim)
    state, before = [jnp.asarray(leaf) for leaf in network.start], names_of("h", h)
    random = np.random.default_rng(seed)
    for link, one in zip(network.links, structures, strict=True):
        program = link.step.program
        after = names_of("h", jax.tree.unflatten(link.tree, program.out_avals[0]))
        check = _Check(program, claim, one.before, one.after, before, after)
        for i in range(link.step.count):
            point = _Point(link.consts, state, [leaf[i] for leaf in link.xs])
            where = f"Layer {link.lo + i} of the chain: " if is_sequence(f) else ""
            check.run(point, link.closed_over, vary_params, random, where)
            state = program(point.consts, point.state, point.x)[0]
        before = after


# --- what a claim allows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coordinates:
    """Of every coordinate of a state, its leaves raveled one after another: which block it is in, and where in there."""

    block: np.ndarray
    place: np.ndarray


def _coordinates(layouts: tuple[Layout, Layout]) -> tuple[_Coordinates, _Coordinates]:
    """Of two states; a block has one number in both."""
    found = []
    for layout in layouts:
        order, number, at = layout.order(), 0, 0
        block, place = np.zeros(layout.size, int), np.zeros(layout.size, int)
        for own, *both in zip(layout.groups, *(one.groups for one in layouts), strict=True):
            each = np.arange(own.size)
            block[order[at : at + own.size]], place[order[at : at + own.size]] = number + each // max(own.side, 1), each % max(own.side, 1)
            number, at = number + max(group.blocks for group in both), at + own.size
        found.append(_Coordinates(block, place))
    return found[0], found[1]


@dataclass(frozen=True)
class _Allowed:
    """Which coordinate of the new state may depend on which of the old one: on those in its block, at most `band` places away."""

    old: _Coordinates
    new: _Coordinates
    band: int | None

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether these entries may be other than zero; arrays that broadcast."""
        same = self.new.block[rows] == self.old.block[columns]
        return same if self.band is None else same & (abs(self.new.place[rows] - self.old.place[columns]) <= self.band)

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """The columns in which at least one of some rows may have an entry; both as masks."""
        band = self.band or 0
        width = (1 if self.band is None else int(self.old.place.max(initial=0)) + 1) + 2 * band
        at = [one.block * width + (0 if self.band is None else one.place + band) for one in (self.new, self.old)]
        taken = np.zeros(max(int(some.max(initial=-1)) for some in at) + 2 + band, int)
        taken[at[0][rows] + 1] = 1
        before = np.cumsum(taken)  # of how many places up to there
        return before[at[1] + band + 1] > before[at[1] - band]

    def sets(self) -> Iterator[np.ndarray]:
        """Sets of rows, as masks: for every entry that is denied there is one that has its row, and denies its column altogether.

        Two blocks differ in a bit of their numbers. Inside a block, places are cut into segments one longer than the band; a column may meet rows of
        three neighbouring segments, of which one is in each class modulo 3. So two that are not neighbours are told apart by their class and a
        bit of their number in it; rows of neighbouring segments, by taking them so far from one another that no column near one meets two.
        """
        for bit in range(int(self.new.block.max(initial=0)).bit_length()):
            for value in (0, 1):
                yield self.new.block >> bit & 1 == value
        if self.band is None:
            return
        length = self.band + 1
        segment = self.new.place // length
        for residue in range(3):
            for bit in range(int(segment.max(initial=0) // 3).bit_length()):
                for value in (0, 1):
                    yield (segment % 3 == residue) & (segment // 3 >> bit & 1 == value)
        for residue in range(min(4 * length, int(self.new.place.max(initial=0)) + 1)):
            yield self.new.place % (4 * length) == residue


# --- one layer --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Where a derivative is taken: the constants of a program, the leaves of its state, and of x."""

    consts: Sequence[Any]
    state: Sequence[Any]
    x: Sequence[Any]

    def near(self, random: np.random.Generator, distance: float, closed_over: int | None) -> _Point:
        """Another at random; with other parameters unless `closed_over`, the number of constants that are none, is None."""

        def move(leaf):
            if not is_inexact(leaf):
                return leaf
            value = np.asarray(leaf, np.float64)
            scale = np.sqrt(np.mean(value**2)) if value.size and np.any(value) else 1.0
            return jnp.asarray(value + distance * scale * random.standard_normal(value.shape), jnp.asarray(leaf).dtype)

        state = [move(leaf) for leaf in self.state]
        if closed_over is None:
            return _Point(self.consts, state, self.x)
        return _Point([*self.consts[:closed_over], *map(move, self.consts[closed_over:])], state, [move(leaf) for leaf in self.x])


@dataclass
class _Found:
    """Entries that the claim denies: how many, and the largest as (value, row, column)."""

    count: int = 0
    largest: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        self.count += len(values)
        top = np.argsort(-np.abs(values), kind="stable")[:LISTED]
        self.largest += [(float(values[i]), int(rows[i]), int(columns[i])) for i in top]
        self.largest = sorted(self.largest, key=lambda one: -abs(one[0]))[:LISTED]


@dataclass
class _Check:
    """A claim about one program. before, after: its states. names: of their leaves."""

    program: Program
    claim: Claim
    before: Layout
    after: Layout
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    def __post_init__(self) -> None:
        old, new = _coordinates((self.before, self.after))
        band = min(self.claim.bandwidth, int(old.place.max(initial=0))) if isinstance(self.claim, Band) else None
        self.allowed = _Allowed(old, new, band)
        self.rows = self._rows()
        self.pull = jax.jit(partial(_pulled, self.program, self.after))
        dtypes = (*self.before.dtypes, *self.after.dtypes)
        self.noise = NOISE * max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)

    def _rows(self) -> np.ndarray:
        """The coordinates of the new state for which the claim is not proved."""
        every = np.arange(self.after.size) if self.claim != "dense" and self.before.size else np.zeros(0, int)
        if not len(every) or obstacle(self.program) is not None:
            return every
        entries = derivative(self.program).pattern
        if entries is not None:
            rows, columns = entries.nonzero()
            return np.unique(rows[~self.allowed.entries(rows, columns)])
        return every if self.allowed.band is not None else every[self._apart()]

    def _apart(self) -> np.ndarray:
        """Which coordinates of the new state are in a proved block with some of the old one that the claim puts elsewhere; a mask."""
        before, after = proved(((self.program, False),)).orders
        old, new = _coordinates((Layout(self.before.shapes, (), None, *before), Layout(self.after.shapes, (), None, *after)))
        count = 1 + max(int(one.block.max(initial=-1)) for one in (old, new))
        low, high = np.full(count, np.iinfo(int).max), np.full(count, -1)
        np.minimum.at(low, old.block, self.allowed.old.block)
        np.maximum.at(high, old.block, self.allowed.old.block)
        return (high[new.block] >= 0) & ((low[new.block] != self.allowed.new.block) | (high[new.block] != self.allowed.new.block))

    # --- numbers --------------------------------------------------------------------------------------------------------

    def run(self, given: _Point, closed_over: int, vary_params: bool, random: np.random.Generator, where: str) -> None:
        """Raises a report if the claim is wrong at the given point or at one near it."""
        if not len(self.rows):
            return
        known = np.zeros(self.after.size, bool)
        for varied in (None, closed_over) if vary_params else (None,):
            for distance in (0.0, 0.1, 1.0):
                at = given.near(random, distance, varied) if distance else given
                if varied is not None and not distance:
                    continue
                found, finite = self._entries(at) if len(self.rows) * self.before.size <= ENTRIES else self._probed(at, random)
                known |= finite
                if found.count:
                    said = " This shows at a random state near the given one." if distance else ""
                    if varied is not None:
                        said = " This shows with random parameters near the given ones; `vary_params=False` leaves them alone."
                    raise StructureError(where + self._report(found) + said)
        if not known[self.rows].all():
            row = int(self.rows[np.argmin(known[self.rows])])
            raise ValueError(
                f"{where}`structure={self.claim!r}` cannot be checked: the derivative of `{self._name(row, new=True)}` of the new state is not finite, "
                "neither at the given state nor at random ones near it."
            )

    def _entries(self, at: _Point, rows: np.ndarray | None = None) -> tuple[_Found, np.ndarray]:
        """What the claim denies, from whole rows; and for which rows that could be told."""
        found, finite = _Found(), np.zeros(self.after.size, bool)
        columns, at_once = np.arange(self.before.size), max(1, AT_ONCE // self.before.size)
        rows = self.rows if rows is None else rows
        for lo in range(0, len(rows), at_once):
            some = rows[lo : lo + at_once]
            basis = np.zeros((at_once, self.after.size))  # as many each time: compiled once
            basis[np.arange(len(some)), some] = 1
            entries = np.asarray(self.pull(at.consts, at.state, at.x, basis))[: len(some)]
            finite[some] = np.isfinite(entries).all(1)
            size = np.abs(np.where(finite[some, None], entries, 0))
            wrong = (size > self.noise * size.max(1, keepdims=True)) & ~self.allowed.entries(some[:, None], columns)
            i, j = np.nonzero(wrong)
            found.add(entries[i, j], some[i], j)
        return found, finite

    def _probed(self, at: _Point, random: np.random.Generator) -> tuple[_Found, np.ndarray]:
        """What the claim denies, as far as random cotangents of sets of coordinates show it: the row of one entry."""
        finite = np.ones(self.after.size, bool)
        asked = np.zeros(self.after.size, bool)
        asked[self.rows] = True
        for some in self.allowed.sets():
            rows = some & asked
            if not rows.any():
                continue
            cotangent = np.where(rows, random.standard_normal(self.after.size), 0)
            image = self._image(at, cotangent)
            finite[rows] &= bool(np.isfinite(image).all())
            size = np.where(np.isfinite(image), np.abs(image), 0)
            denied = np.where(self.allowed.columns(rows), 0, size)
            if denied.max(initial=0) > self.noise * size.max():
                found, _ = self._entries(at, np.array([self._bisected(at, cotangent, int(denied.argmax()))]))
                if found.count:
                    return found, finite
        return _Found(), finite

    def _image(self, at: _Point, cotangent: np.ndarray) -> np.ndarray:
        return np.asarray(self.pull(at.consts, at.state, at.x, cotangent[None]))[0]

    def _bisected(self, at: _Point, cotangent: np.ndarray, column: int) -> int:
        """A row with an entry in that column, of those that the cotangent reaches."""
        rows = np.flatnonzero(cotangent)
        while len(rows) > 1:
            halves = [np.where(np.isin(np.arange(len(cotangent)), some), cotangent, 0) for some in np.array_split(rows, 2)]
            cotangent = max(halves, key=lambda half: abs(self._image(at, half)[column]))
            rows = np.flatnonzero(cotangent)
        return int(rows[0])

    # --- words ----------------------------------------------------------------------------------------------------------

    def _report(self, found: _Found) -> str:
        (value, row, column), *others = found.largest
        new, old = self._name(row, new=True), self._name(column, new=False)
        said = f"`{new}` of the new state depends on `{old}` of the old one (derivative {value:.3g}), "
        said += f"which `structure={self.claim!r}` denies: {self._reason(row, column)}."
        if others:
            listed = ", ".join(f"`{self._name(r, new=True)}` on `{self._name(c, new=False)}` ({v:.3g})" for v, r, c in found.largest)
            few = len(found.largest) < found.count
            said += f" {found.count} such pairs{f', the largest {len(found.largest)}' if few else ''}: {listed}."
        return said

    def _name(self, index: int, *, new: bool) -> str:
        return coordinate(self.names_after if new else self.names_before, (self.after if new else self.before).shapes, index)

    def _reason(self, row: int, column: int) -> str:
        """In the coordinates that the claim speaks of."""
        new, old = ((one.block[i], one.place[i]) for one, i in ((self.allowed.new, row), (self.allowed.old, column)))
        if isinstance(self.claim, (Blocks, Band)) and self.claim.axis is not None and new[0] != old[0]:
            return f"their indices along axis {self.claim.axis} are {new[0]} and {old[0]}"
        if isinstance(self.claim, Blocks):
            return f"in the raveled state they are coordinates {row} and {column}, in the blocks {new[0]} and {old[0]} of {self.claim.size}"
        if isinstance(self.claim, Band):
            return f"in the raveled {'state' if self.claim.axis is None else 'rest'} they are coordinates {new[1]} and {old[1]}, {abs(new[1] - old[1])} apart"
        return f"in the raveled state they are coordinates {row} and {column}"


def _pulled(program: Program, after: Layout, consts: Sequence[Any], state: Sequence[Any], x: Sequence[Any], cotangents: Any) -> Any:
    """Rows of the Jacobian, (k, old coordinates), combined by cotangents (k, new coordinates); both raveled leaf after leaf."""
    new_state, places = in_floats(lambda full: program(consts, full, x)[0], state)
    bounds = np.cumsum([int(np.prod(shape)) for shape in after.shapes])
    _, back = jax.vjp(new_state, [state[i] for i in places])

    def pull(cotangent):
        leaves = [leaf.reshape(shape).astype(dtype) for leaf, shape, dtype in zip(jnp.split(cotangent, bounds[:-1]), after.shapes, after.dtypes, strict=True)]
        return jnp.concatenate([leaf.ravel().astype(after.dtype) for leaf in back(leaves)[0]])

    return jax.vmap(pull)(jnp.asarray(cotangents, after.dtype))
