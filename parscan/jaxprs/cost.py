"""Arithmetic of a program, read off its equations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from parscan.jaxprs.program import AnyJaxpr, equations, open_jaxpr, sub_jaxprs


class Work(NamedTuple):
    """What a program computes.

    calls: products of two matrices, each of several rows and columns, and convolutions: compilers call a library for them.
    batched: the single products in those that are batched.
    kernels: other parts that run one after another: every other product, every reduction, and what is computed entry by entry between two of these.
    products: floating-point operations of products, two a multiply-add.
    elements: entries that anything else computes.
    functions: those of transcendental functions among them, a sine four times: XLA computes it by so much more on a CPU.
    alone: those of the kernels that no compiler makes one with others: sorting, factorising, adding to places.
    apart: the single products in those of the calls that are batched, beyond the first of each.
    """

    calls: int = 0
    batched: int = 0
    kernels: int = 0
    products: int = 0
    elements: int = 0
    functions: int = 0
    alone: int = 0
    apart: int = 0

    def __add__(self, other: Any) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Work:
        """So many times that."""
        return Work(*(count * a for a in self))

    @property
    def flops(self) -> int:
        """Floating-point operations, one for each element of anything but a product."""
        return self.products + self.elements


def work(jaxpr: AnyJaxpr) -> Work:
    """Of all of a program; of branches the most expensive one, of a loop every round."""
    groups: set[int] = set()
    found, _ = _followed(jaxpr, [0] * len(open_jaxpr(jaxpr).invars), groups, whole=True)
    return found + Work(kernels=len(groups))


def work_on(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> Work:
    """Of the equations alone that depend on the inputs at these positions; a loop or branch that does counts whole.

    Of a derivative, asked about its tangents: what pushing one more vector costs, all else being at hand.
    """
    groups: set[int] = set()
    found, _ = _followed(jaxpr, [0 if i in inputs else None for i in range(len(open_jaxpr(jaxpr).invars))], groups, whole=False)
    return found + Work(kernels=len(groups))


def work_of(eqn: Any) -> Work:
    """Of one equation; see `work`."""
    inner = [] if eqn.primitive.name.startswith(_BY_A_RULE) else list(sub_jaxprs(list(eqn.params.values())))
    return max(map(work, inner), key=lambda some: some.flops).times(eqn.params.get("length", 1)) if inner else _of(eqn)


def repeated(jaxpr: AnyJaxpr) -> int:
    """Of the functions that `work` counts those that are taken of the same a second time, as the derivative of a sine asks for a cosine that is there.

    In a loop they are computed once; where all steps are computed together, XLA puts them into every kernel that asks for them.
    """
    found, numbers, seen = 0, {}, {}
    for eqn in open_jaxpr(jaxpr).eqns:
        operands = tuple(numbers.get(a, id(a)) if isinstance(a, core.Var) else str(a) for a in eqn.invars)
        first = seen.setdefault((eqn.primitive.name, operands, str(sorted(eqn.params.items()))), eqn)
        if first is not eqn:  # what is moved alike is the same, too
            found += _of(eqn).functions
            numbers.update((v, numbers.get(old, id(old))) for v, old in zip(eqn.outvars, first.outvars, strict=True))
    return found


def flops(jaxpr: AnyJaxpr) -> int:
    """Floating-point operations: two for each multiply-add of a product, one for each element of anything else that computes."""
    return work(jaxpr).flops


def flops_on(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> int:
    """As `flops`, of what depends on these inputs; see `work_on`."""
    return work_on(jaxpr, inputs).flops


def _followed(jaxpr: AnyJaxpr, entering: Sequence[int | None], groups: set[int], whole: bool) -> tuple[Work, list[int | None]]:
    """The work that depends on what enters, and at what level every output is: how many kernels of their own lie before it.

    Args:
        entering: the levels of the inputs, None for those that are not asked about.
        groups: the levels at which anything is computed entry by entry, one kernel each; added to.
        whole: count what depends on no input, too.
    """
    body, found = open_jaxpr(jaxpr), Work()
    level = {v: at for v, at in zip(body.invars, entering, strict=True) if at is not None}
    for eqn in body.eqns:
        ins = [level.get(a) if isinstance(a, core.Var) else None for a in eqn.invars]
        at = max((i for i in ins if i is not None), default=0 if whole else None)
        if at is None:
            continue
        inner = list(sub_jaxprs(list(eqn.params.values())))
        if len(inner) == 1 and "length" not in eqn.params and len(open_jaxpr(inner[0]).invars) == len(ins):  # a call
            one, outs = _followed(inner[0], ins, groups, whole)
        else:
            one = work_of(eqn)
            if one.calls or one.kernels:
                at += 1
            elif one.flops:
                groups.add(at)
            outs = [at] * len(eqn.outvars)
        found += one
        level.update((v, to) for v, to in zip(eqn.outvars, outs, strict=True) if to is not None)
    return found, [level.get(v) if isinstance(v, core.Var) else None for v in body.outvars]


_MOVES = frozenset("broadcast_in_dim reshape transpose squeeze slice concatenate convert_element_type copy copy_p pad rev iota".split())
_FUNCTIONS = dict.fromkeys("exp exp2 expm1 log log1p tanh logistic pow cbrt erf erfc erf_inv lgamma digamma asin acos atan atan2 sinh cosh".split(), 1)
_FUNCTIONS |= dict.fromkeys("sin cos tan".split(), 4)
_ALONE = frozenset("sort cumsum cumprod cummax cummin cumlogsumexp cholesky triangular_solve lu qr eigh svd fft top_k".split())
_BY_A_RULE = ("scatter", "reduce", "select_and", "cum", "arg")  # what they hold says how two numbers become one


def _of(eqn: Any) -> Work:
    """Of one equation that calls nothing."""
    name, size = eqn.primitive.name, sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
    if name == "dot_general":
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        inner, outer = (math.prod(shape[d] for d in dims) for dims in (contracted, batched))
        free = math.prod(shape) // max(inner * outer, 1)
        if inner == 1:  # compilers make a multiplication of it
            return Work(products=2 * size)
        call = int(1 < free < size // max(outer, 1))
        return Work(call, outer if batched else 0, 1 - call, products=2 * size * inner, apart=call * (outer - 1))
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return Work(1, products=2 * size * math.prod(kernel) // max(kernel[eqn.params["dimension_numbers"].rhs_spec[0]], 1))
    if name in _MOVES:
        return Work()
    if name in _FUNCTIONS:
        return Work(elements=size, functions=_FUNCTIONS[name] * size)
    places = math.prod(eqn.invars[1].aval.shape[:-1]) if name.startswith("scatter") else 0  # to a single one it is an update
    alone = int(name in _ALONE or places > 1)
    return Work(kernels=alone or int(name.startswith(("reduce", "arg"))), elements=size, alone=alone)


def has_products(jaxpr: AnyJaxpr) -> bool:
    """Whether there is a matrix product or a convolution in it."""
    return any(eqn.primitive.name in ("dot_general", "conv_general_dilated") for eqn in equations(jaxpr))


def bytes_of_variables(jaxpr: AnyJaxpr) -> int:
    """Of everything that a program is given and computes, inside of what it calls, too; of branches the largest, of a loop every round."""
    body = open_jaxpr(jaxpr)
    inner = ((list(sub_jaxprs(list(eqn.params.values()))), eqn.params.get("length", 1)) for eqn in body.eqns)
    called = sum(length * max(bytes_of_variables(one) - _bytes_of(open_jaxpr(one).invars) for one in some) for some, length in inner if some)
    return _bytes_of([*body.invars, *(v for eqn in body.eqns for v in eqn.outvars), *body.outvars]) + called


def _bytes_of(variables: Sequence[Any]) -> int:
    avals = [v.aval for v in variables]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals if hasattr(aval, "shape"))


def _touched(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> Iterator[tuple[Any, list[int]]]:
    """The equations that depend on these inputs, and which of their operands do."""
    body = open_jaxpr(jaxpr)
    reached = {body.invars[i] for i in inputs}
    for eqn in body.eqns:
        touched = [i for i, a in enumerate(eqn.invars) if isinstance(a, core.Var) and a in reached]
        if touched:
            reached.update(eqn.outvars)
            yield eqn, touched


def residuals(jaxpr: AnyJaxpr, inputs: Sequence[int], shared: Sequence[int] = ()) -> tuple[int, int]:
    """What is known without these inputs and read by what depends on them, but for the `shared` inputs: how many arrays, and their entries.

    Of a pull-back, asked about the cotangents: what a loop keeps for it of every step.
    """
    body = open_jaxpr(jaxpr)
    apart = {body.invars[i] for i in (*inputs, *shared)}
    read: set[Any] = {a for eqn, touched in _touched(jaxpr, inputs) for i, a in enumerate(eqn.invars) if isinstance(a, core.Var) and i not in touched}
    return len(read - apart), sum(math.prod(v.aval.shape) for v in read - apart)


def made_by_products(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> int:
    """Entries of the matrix products that these inputs have a part in."""
    made = [eqn.outvars[0] for eqn, _ in _touched(jaxpr, inputs) if eqn.primitive.name == "dot_general"]
    return sum(math.prod(v.aval.shape) for v in made)


_LINEAR = _MOVES | frozenset("add add_any sub neg mul div dot_general reduce_sum split stack unstack conv_general_dilated rev jit pjit".split())


def masks_nothing(jaxpr: AnyJaxpr, inputs: Sequence[int] | None = None) -> bool:
    """Whether a linear program only adds, multiplies and moves: no part of it decides what may pass. With `inputs`: what becomes of these."""
    touched = open_jaxpr(jaxpr).eqns if inputs is None else [eqn for eqn, _ in _touched(jaxpr, inputs)]
    every = [one for eqn in touched for one in (eqn, *(e for inner in sub_jaxprs(list(eqn.params.values())) for e in equations(inner)))]
    return all(eqn.primitive.name in _LINEAR for eqn in every)


_PLACES = _MOVES - {"pad", "iota", "convert_element_type"} | {"gather", "split", "stack", "unstack", "expand_dims"}


def moves_only(jaxpr: AnyJaxpr, inputs: Sequence[int]) -> bool:
    """Whether these inputs are only moved and copied on their way to the outputs."""
    for eqn, touched in _touched(jaxpr, inputs):
        inner = list(sub_jaxprs(list(eqn.params.values())))
        called = len(inner) == 1 and eqn.primitive.name in ("jit", "pjit") and moves_only(inner[0], touched)
        by_value = eqn.primitive.name == "gather" and touched != [0]
        if by_value or not (called or eqn.primitive.name in _PLACES):
            return False
    return True
