"""What of a step its state has no part in, and could be computed for all steps before the loop: projections of inputs, gates that inputs alone decide.

A loop makes a small product of every step's input; all steps together they are one large one. `cut_ahead` takes such equations out of a step: a product,
a reduction or a transcendental function of inputs and constants, what it is made of, and what is made of it, as long as it stays small. What only adds,
multiplies or moves costs nothing beside what is computed of the state, and stays in the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from parscan.jaxprs.cost import Work, work_of
from parscan.jaxprs.program import Program, open_jaxpr, part, piece, sub_jaxprs
from parscan.jaxprs.staging import needed_for, variables

FUSED = 64  # entries that a step of a loop reads up to which XLA makes one kernel of it on a CPU, whatever it does
MOST = 8  # times the entries of the state and the input of a step that what is computed ahead of it may have

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CUTS = ("slice", "split", "dynamic_slice", "gather")
_CONTROL = ("cond", "while", "scan")  # all branches would be taken, all trips made


class Hoisted(NamedTuple):
    """A step `(consts, carry, x)` in parts.

    known: constants of the step's calls. once: (consts, known) -> what depends on them alone. each: (consts, known, once, x) -> what is computed ahead of
    a step. rest: the jaxpr of (consts, known, once, ahead, carry, those leaves `kept` of x) -> (new carry, y).
    ahead: abstract values of what is computed ahead. work: of `each`.
    shared: entries of constants that the rest reads. num_new: leaves of the carry.
    """

    known: tuple[Any, ...]
    once: Callable[..., list[Any]]
    each: Callable[..., list[Any]]
    rest: Any
    kept: tuple[int, ...]
    ahead: tuple[Any, ...]
    work: Work
    shared: int
    num_new: int

    def constants(self, consts: Sequence[Any]) -> list[Any]:
        """What all steps share: consts, and what depends on them alone."""
        return [*consts, *self.known, *self.once(*consts, *self.known)]

    def of_all(self, constants: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What each step is given of its own, leading axis L: what is computed ahead, and the leaves of xs that are left."""
        made = jax.vmap(lambda x: self.each(*constants, *x))(list(xs))
        return made, [xs[i] for i in self.kept]

    def step(self, constants: Sequence[Any], carry: Sequence[Any], own: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        """The new carry and y, of `constants` and of a step's share of `of_all`."""
        outs = core.jaxpr_as_fun(self.rest)(*constants, *own[0], *carry, *own[1])
        return list(outs[: self.num_new]), list(outs[self.num_new :])


@functools.lru_cache(maxsize=1024)
def cut_ahead(program: Program, platform: str) -> Hoisted | None:
    """The step in parts; None if nothing is to be gained on this platform.

    On a CPU XLA reads what all steps are given inside of the kernel that computes with it. Where a function is taken of parts of that, cut out in the
    loop, the kernel goes on entry by entry, without vector instructions: gates that are one product, split and squashed.
    """
    consts, carry, x = (len(group) for group in program.avals)
    closed = _inlined(program.jaxpr, range(consts, consts + carry), range(consts + carry, consts + carry + x))
    body = open_jaxpr(closed)
    given, state, inputs = [*body.invars[:consts], *body.constvars], body.invars[consts : consts + carry], body.invars[consts + carry :]
    alone, own = _apart(body, set(state), set(inputs))
    taken, made = _worth(own)
    if not taken:
        return None
    before = made.union(*(eqn.outvars for eqn in alone))
    rest = needed_for([eqn for eqn in body.eqns if not before.intersection(eqn.outvars)], body.outvars)
    by_rest = {a for eqn in rest for a in variables(eqn.invars)}
    left = by_rest | variables(body.outvars)
    ahead = [v for eqn in taken for v in eqn.outvars if v in left & made]
    if sum(map(_size, ahead)) > MOST * sum(map(_size, (*state, *inputs))):
        return None
    if platform == "cpu" and sum(map(_size, (*state, *ahead))) > FUSED and _squashes_parts(rest, ahead):
        return None
    read = left.union(*(variables(eqn.invars) for eqn in taken))
    once = [v for eqn in alone for v in eqn.outvars if v in read]
    kept = [i for i, v in enumerate(inputs) if v in left]
    shared = [*given, *once]
    return Hoisted(
        tuple(closed.consts),
        part(body, given, alone, once),
        part(body, [*shared, *inputs], taken, ahead),
        piece(body, [*shared, *ahead, *state, *(inputs[i] for i in kept)], rest, body.outvars),
        tuple(kept),
        tuple(v.aval for v in ahead),
        sum(map(work_of, taken), Work()),
        sum(_size(v) for v in shared if v in by_rest),
        program.num_new,
    )


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _apart(body: Any, state: set[Any], inputs: set[Any]) -> tuple[list[Any], list[Any]]:
    """The equations that depend on constants alone; and those that depend on inputs, too, but on no state, and may be batched without more work."""
    shared, own = [], []
    for eqn in body.eqns:
        ins = variables(eqn.invars)
        if ins & state or (ins & inputs and eqn.primitive.name in _CONTROL) or eqn.effects:
            state.update(eqn.outvars)  # or what must stay with it
        elif ins & inputs:
            own.append(eqn)
            inputs = inputs | set(eqn.outvars)
        else:
            shared.append(eqn)
    return shared, own


def _worth(own: list[Any]) -> tuple[list[Any], set[Any]]:
    """Of equations that could be computed ahead those that should; and what is not computed in the loop then."""
    dear = {i for i, eqn in enumerate(own) if (found := work_of(eqn)).functions or found.calls or found.kernels}
    made, following = set(), set()
    for i, eqn in enumerate(own):  # what is made of the dear ones
        if i in dear or made.intersection(variables(eqn.invars)):
            following.add(i)
            made.update(eqn.outvars)
    needed, taken = set(), []
    for i, eqn in reversed(list(enumerate(own))):  # what they are made of; what only moves at the end stays in the loop
        if i in dear or needed.intersection(eqn.outvars) or (i in following and not _is_left(eqn)):
            taken.append(eqn)
            needed.update(variables(eqn.invars))
        else:
            made.difference_update(eqn.outvars)
    return taken[::-1], made


def _is_left(eqn: Any) -> bool:
    """Whether an equation of which nothing else taken is made is better left in the loop: it computes nothing, or makes more of less."""
    return not work_of(eqn).flops or sum(map(_size, eqn.outvars)) > max(map(_size, variables(eqn.invars)))


def _squashes_parts(eqns: Sequence[Any], ahead: Sequence[Any]) -> bool:
    """Whether a function is taken of parts of these variables, or of what is computed of them."""
    whole, parts = set(ahead), set()
    for eqn in eqns:
        ins = variables(eqn.invars)
        if ins & parts and work_of(eqn).functions:
            return True
        if ins & parts or (ins & whole and eqn.primitive.name in _CUTS):
            parts.update(eqn.outvars)
        elif ins & whole:
            whole.update(eqn.outvars)
    return False


def _inlined(closed: Any, state: Sequence[int], inputs: Sequence[int]) -> Any:
    """The same jaxpr without calls of which some operands depend on the state and others on inputs alone: what these compute could not be told apart."""
    body = open_jaxpr(closed)
    moving, own = {body.invars[i] for i in state}, {body.invars[i] for i in inputs}
    mixed = False
    for eqn in body.eqns:
        ins = variables(eqn.invars)
        mixed |= eqn.primitive.name in _CALLS and bool(ins & moving) and bool(ins & own)
        (moving if ins & moving else own if ins & own else set()).update(eqn.outvars)
    if not mixed:
        return closed
    return jax.make_jaxpr(functools.partial(_evaluated, closed))(*(v.aval for v in body.invars))


def _evaluated(closed: Any, *values: Any) -> list[Any]:
    """Equation by equation, those of calls, too."""
    body = open_jaxpr(closed)
    at = dict(zip(body.invars, values, strict=True)) | dict(zip(body.constvars, getattr(closed, "consts", ()), strict=True))
    read = lambda a: at[a] if isinstance(a, core.Var) else a.val  # noqa: E731
    for eqn in body.eqns:
        ins, inner = [read(a) for a in eqn.invars], list(sub_jaxprs(list(eqn.params.values())))
        if eqn.primitive.name in _CALLS and len(inner) == 1:
            outs = _evaluated(inner[0], *ins)
        else:
            outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
        at.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
    return [read(a) for a in body.outvars]
