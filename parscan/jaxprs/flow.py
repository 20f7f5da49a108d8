"""Following a fact about every value through a program's equations: what calls, branches and loops do to it, whatever the fact is.

A fact says something of a value's dimensions, numbered from 0. Inside a loop over rows, an array's leading dimension becomes the loop
itself: it has a negative number, -1 for the outermost loop, -2 for one inside it. Whatever is computed within one trip stays within it, so
negative dimensions pass through every equation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jax.extend import core

from parscan.jaxprs.axes import Place, axes, has_rule
from parscan.jaxprs.program import AnyJaxpr, open_jaxpr, sub_jaxprs

Fact = TypeVar("Fact")


class Flow(ABC, Generic[Fact]):
    """A kind of fact. The least one is reached from below: joins only add to a fact, and must come to an end."""

    @abstractmethod
    def unknown(self, aval: Any) -> Fact:
        """Of a constant, whose values are not looked at."""

    @abstractmethod
    def join(self, eqn: Any, facts: Sequence[Fact]) -> Fact:
        """What holds of a value that is computed entry by entry from, or is one of, values with these facts."""

    @abstractmethod
    def moved(self, eqn: Any, fact: Fact, move: Callable[[int], int | None]) -> Fact:
        """Every dimension d has become `move(d)`; `None` if it is no dimension of the result, whose entries may depend on all indices along it."""

    def through(self, eqn: Any, ins: list[Fact]) -> list[Fact]:
        """After an equation that the table of `axes` describes."""
        out = self.join(eqn, [self._placed(eqn, fact, place) for fact, place in zip(ins, axes(eqn).places, strict=True)])
        return [out for _ in eqn.outvars]

    def trimmed(self, fact: Fact, shape: tuple[int, ...]) -> Fact:
        """What is left to say of an array of this shape."""
        return fact

    def in_trip(self, fact: Fact, loop: int) -> Fact:
        """Of a carry as it is at the beginning of any trip."""
        return fact

    def evaluate(self, jaxpr: AnyJaxpr, inputs: Sequence[Fact], loops: int = 0) -> list[Fact]:
        """Of the outputs, given those of the inputs, within so many loops."""
        body = open_jaxpr(jaxpr)
        known: dict[Any, Fact] = dict(zip(body.invars, inputs, strict=True))

        def read(atom):
            return self.unknown(atom.aval) if isinstance(atom, core.Literal) or atom not in known else known[atom]

        for eqn in body.eqns:
            outs = self.equation(eqn, [read(a) for a in eqn.invars], loops)
            known.update((v, self.trimmed(out, getattr(v.aval, "shape", ()))) for v, out in zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in body.outvars]

    def equation(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        """Of the outputs of one equation."""
        name = eqn.primitive.name
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, ins, loops)
        body = None if has_rule(eqn) else inlined(eqn)
        return self.through(eqn, ins) if body is None else self.evaluate(body, ins, loops)

    def _placed(self, eqn: Any, fact: Fact, place: Place) -> Fact:
        return self.moved(eqn, fact, lambda d: d if d < 0 else place.get(d))

    def _decided(self, eqn: Any, outs: Sequence[Fact], by: Sequence[Fact]) -> list[Fact]:
        """Outputs that depend on all of these values as a whole."""
        whole = [self._placed(eqn, fact, {}) for fact in by]
        return [self.join(eqn, [out, *whole]) for out in outs]

    def _fixed_point(self, eqn: Any, carry: list[Fact], body: Callable[[list[Fact]], list[Fact]]) -> list[Fact]:
        """The smallest carry that holds for every trip."""
        while True:
            after = [self.join(eqn, [a, b]) for a, b in zip(carry, body(carry), strict=True)]
            if after == carry:
                return carry
            carry = after

    def _each(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        return ins

    def _cond(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        branches = [self.evaluate(branch, ins[1:], loops) for branch in eqn.params["branches"]]
        return self._decided(eqn, [self.join(eqn, outs) for outs in zip(*branches, strict=True)], ins[:1])

    def _scan(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        """Trip t reads row t of xs and writes row t of ys."""
        num_consts, num_carry = scan_counts(eqn.params)
        loop = -1 - loops
        consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
        xs = [self.moved(eqn, x, lambda d: d if d < 0 else d - 1 if d else loop) for x in ins[num_consts + num_carry :]]

        def body(carry):
            return self.evaluate(eqn.params["jaxpr"], [*consts, *(self.in_trip(c, loop) for c in carry), *xs], loops + 1)

        def new_carry(carry):  # handed on to other trips
            return [self.moved(eqn, c, lambda d: None if d == loop else d) for c in body(carry)[:num_carry]]

        carry = self._fixed_point(eqn, carry, new_carry)
        return [*carry, *(self.moved(eqn, y, lambda d: 0 if d == loop else d if d < 0 else d + 1) for y in body(carry)[num_carry:])]

    def _while(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        """A batched predicate has the first dimensions of every carry, and each index along them goes on for as long as it says."""
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts = ins[num_cond : num_cond + num_body]
        carry = self._fixed_point(eqn, ins[num_cond + num_body :], lambda c: self.evaluate(eqn.params["body_jaxpr"], [*consts, *c], loops))
        (going_on,) = self.evaluate(eqn.params["cond_jaxpr"], [*ins[:num_cond], *carry], loops)
        return [self.join(eqn, [c, going_on]) for c in carry]

    def _linear_solve(self, eqn: Any, ins: list[Fact], loops: int) -> list[Fact]:
        """x with A x = b: a polynomial in A applied to b, so what b has and A keeps, x has."""
        lengths, matvec = eqn.params["const_lengths"], eqn.params["jaxprs"].matvec
        if len(ins) - sum(lengths) != len(eqn.outvars):  # auxiliary outputs
            return self.through(eqn, ins)
        consts = ins[: sum(lengths)]
        solution = self._fixed_point(eqn, ins[sum(lengths) :], lambda x: self.evaluate(matvec, [*consts[: lengths.matvec], *x], loops))
        return self._decided(eqn, solution, consts)


_CONTROL: dict[str, Callable[..., list[Any]]] = {
    "cond": Flow._cond,
    "custom_linear_solve": Flow._linear_solve,
    "optimization_barrier": Flow._each,
    "scan": Flow._scan,
    "while": Flow._while,
}


def inlined(eqn: Any) -> AnyJaxpr | None:
    """The body of a call (jit, remat, custom_jvp, …): one sub-jaxpr with the equation's own inputs and outputs."""
    inner = list(sub_jaxprs(list(eqn.params.values())))
    if len(inner) != 1:
        return None
    body = open_jaxpr(inner[0])
    same = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return inner[0] if same and all(a.aval.shape == b.aval.shape for a, b in zip(body.invars, eqn.invars, strict=True)) else None


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of consts and carries: two parameters up to jax 0.11, the groups of `ft_in` from 0.12 on."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
