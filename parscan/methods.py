"""The algorithms, as values: points of the space (segment, chunk size, tree levels).

A chain of `L` affine maps is cut into segments, a segment into chunks, and the maps of the chunks are combined by some
levels of a tree; what is left is walked one map after another.

| method         | segment unless asked for | chunk size | tree levels                                    |
|----------------|--------------------------|------------|------------------------------------------------|
| `Sequential()` | L                        | L          | none: a loop of VJPs (or JVPs) of the layer    |
| `Walk()`       | what stays in cache      | 1          | none: a loop of matrix-vector products         |
| `Chunked(K)`   | L                        | K          | all, or as many as asked for                   |
| `Tree()`       | L                        | 1          | all                                            |
| `Associative()`| L                        | 1          | all, by `lax.associative_scan`, for comparison |

Segments follow one another, and each has the memory of the one before. `Lax()` leaves the whole differentiation to JAX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from parscan.checks import integer


def _check(method: Any, name: str, least: int, none: str) -> None:
    """That a size is an integer of at least `least`, or None, which means `none`."""
    value = getattr(method, name)
    if value is not None:
        object.__setattr__(method, name, integer(f"{type(method).__name__}({name}=...)", value, least, f", or None {none}"))


@dataclass(frozen=True)
class Method:
    """An algorithm for the backward pass; see the subclasses.

    Example:
        >>> isinstance(parscan.Tree(), parscan.Method), parscan.Tree().is_parallel, parscan.Lax().is_parallel
        (True, True, False)
    """

    @property
    def is_parallel(self) -> bool:
        """Whether it forms Jacobians, which not every layer allows."""
        return isinstance(self, Parallel)


@dataclass(frozen=True, repr=False)
class Travelling(Method):
    """A method that takes the chain's linear maps, rather than JAX's own way back.

    Args:
        segment: steps that are linearised, crossed and pulled back to parameters and inputs at once, which bounds memory: beside the states that the
            forward pass stores, that of one segment. `None` for all steps, or for as many as the device has memory for.
    """

    segment: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check(self, "segment", 1, "to have it chosen")

    def cuts(self, counts: Iterable[int]) -> bool:
        """Whether runs of so many steps, their `counts`, are crossed run by run, segment by segment; else all at once."""
        return self.segment is not None and any(count > self.segment for count in counts)

    def __repr__(self) -> str:
        always = [one.name for one in fields(self) if not one.kw_only]
        shown = always + [one.name for one in fields(self) if one.kw_only and getattr(self, one.name) != one.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


@dataclass(frozen=True, repr=False)
class Parallel(Travelling):
    """A method that forms Jacobians.

    Args:
        guard: check on the device that what was found is finite and what one step after another gives, to half the digits, and take that where it is
            not: `parscan.guard`. What it leaves and what it costs: docs/explanation, guard and memory; where a batch is sharded over devices, a
            collective of one byte.
    """

    guard: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.guard, bool):
            raise TypeError(f"`{type(self).__name__}(guard=...)` must be True or False; got {self.guard!r}.")


@dataclass(frozen=True)
class Lax(Method):
    """Leave it to JAX: the backward pass of `jax.lax.scan`, one whole VJP after another.

    Example:
        >>> parscan.scan(f, init, xs, method=parscan.Lax())[0].shape == init.shape
        True
    """


@dataclass(frozen=True, repr=False)
class Sequential(Travelling):
    """A loop for the cotangents of the state alone, then one batched pull-back to the parameters: the oracle.

    Args:
        segment: steps that are linearised, crossed and pulled back at once, which bounds memory; None to have it chosen.

    Raises:
        ValueError: `segment` is no integer of at least 1.

    Example:
        >>> parscan.parallel_backward(layer, params, activations, c, method="sequential").input.shape == c.shape
        True
    """


@dataclass(frozen=True, repr=False)
class Walk(Parallel):
    """Jacobians formed in parallel, a segment at a time, then walked with bare matrix-vector products.

    Depth L, but what waits is one matrix-vector product a step, where a loop of VJPs has the whole layer.

    Args:
        segment: steps whose Jacobians are formed at once; None lets the planner choose what stays in cache, L or more is one segment.
        guard: check the result on the device, and take the sequential pass's where it is unsound.

    Raises:
        ValueError: `segment` is no integer of at least 1.
        TypeError: `guard` is no bool.

    Example:
        >>> parscan.Walk(segment=64)
        Walk(segment=64)
    """

    segment: int | None = None


@dataclass(frozen=True, repr=False)
class Associative(Parallel):
    """`jax.lax.associative_scan` over explicit Jacobians: every prefix product, twice the matrix products of `Tree`.

    Args:
        segment: steps that are linearised, crossed and pulled back at once, which bounds memory; None to have it chosen.
        guard: check the result on the device, and take the sequential pass's where it is unsound.

    Raises:
        ValueError: `segment` is no integer of at least 1.
        TypeError: `guard` is no bool.

    Example:
        >>> parscan.Associative()
        Associative()
    """


@dataclass(frozen=True, repr=False)
class Tree(Parallel):
    """Work-efficient prefix tree over explicit Jacobians: matrix products on the way up, only vectors on the way down.

    Depth at most `2 ceil(log2 L) + 2`, fewer than `L` matrix products. On a CPU, where depth costs nothing and a program of many rounds is slow to
    compile, more than 64 maps whose products are no larger than they are joined 64 at a time: at most `128 ceil(log64 L)`.

    Source: G. E. Blelloch, Prefix sums and their applications (1990); S. Wang, Y. Bai, G. Pekhimenko, BPPSA (MLSys 2020).

    Args:
        segment: steps that are linearised, crossed and pulled back at once, which bounds memory; None to have it chosen.
        guard: check the result on the device, and take the sequential pass's where it is unsound.

    Raises:
        ValueError: `segment` is no integer of at least 1.
        TypeError: `guard` is no bool.

    Example:
        >>> parscan.scan(f, init, xs, method=parscan.Tree())[0].shape == init.shape
        True
    """


@dataclass(frozen=True, repr=False)
class Chunked(Parallel):
    """fold -> scan -> unfold: chunks of `size` steps become one matrix each, the chunk matrices go through a tree.

    No step's own Jacobian is ever stored. Depth `2 size + 2 log2(L / size)`; on a CPU as with `Tree`, unless `levels` are asked for.

    Args:
        size: steps a chunk; `None` lets the planner choose from the block size.
        levels: tree levels before the remaining maps are walked one by one; `None` for all.
        segment: steps that are linearised, crossed and pulled back at once, which bounds memory; None to have it chosen.
        guard: check the result on the device, and take the sequential pass's where it is unsound.

    Raises:
        ValueError: `size` or `segment` is no integer of at least 1, `levels` none of at least 0.
        TypeError: `guard` is no bool.

    Example:
        >>> parscan.Chunked(size=16)
        Chunked(size=16, levels=None)
    """

    size: int | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "size", 1, "to have it chosen")
        _check(self, "levels", 0, "for all")


BY_NAME: dict[str, type[Method]] = {kind.__name__.lower(): kind for kind in (Lax, Sequential, Walk, Associative, Tree, Chunked)}


def parse_method(method: Any) -> Method | None:
    """A method from a value or a lower-case name; `None` for `"auto"`.

    Raises:
        ValueError: the name is unknown. TypeError: neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if method == "auto":
        return None
    if isinstance(method, str) and method in BY_NAME:
        return BY_NAME[method]()
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"`method` must be a value, not a class: write `{method.__name__}()`.")
    known = ", ".join(repr(name) for name in ("auto", *BY_NAME))
    kind = ValueError if isinstance(method, str) else TypeError
    raise kind(f"`method` must be one of {known}, or a value such as parscan.Chunked(size=16); got {method!r}.")


SEGMENT_ENTRIES = 2**17  # numbers in the Jacobians that a walk forms at once: they stay in cache


def sized(method: Method, length: int, blocks: dict[int, int]) -> Method:
    """The method with every size that was left open chosen; blocks: from size to how many."""
    match method:
        case Walk(segment=None):
            entries = sum(count * width**2 for width, count in blocks.items())
            return replace(method, segment=_divisor_near(length, max(1, min(length, max(32, SEGMENT_ENTRIES // max(1, entries))))))
        case Chunked(size=None):
            return replace(method, size=max(1, min(8 if max(blocks) < 48 else 32, length)))
    return method


def _divisor_near(length: int, target: int) -> int:
    """A divisor of `length` between half the target and twice it, the nearest by ratio; else the target: the rest goes apart."""
    fitting = [d for d in range(max(1, target // 2), 2 * target + 1) if length % d == 0]
    return min(fitting, key=lambda d: max(d / target, target / d), default=min(target, max(length, 1)))
