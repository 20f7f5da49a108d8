"""FLOPs and bytes of a compiled program, read from its text, every loop counted as often as it turns.

XLA's own `cost_analysis` counts the body of a loop once, whatever the number of turns; a scan's figures would be wrong by its length. Here
a loop's body is multiplied by the count that XLA has found. A loop without one counts once: that is the guard's, which turns once unless it falls
back. Of a conditional, the branches that are parscan's fallback are left out, since it is not taken where the guard is content.

FLOPs are those of products (2 a multiply-add), sums and elementwise operations on floating-point numbers, a tanh counting as one. Bytes are what every kernel
reads and writes, as if nothing stayed in a cache; of an array that is sliced or updated in place, the slice alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from parscan.guard import FALLBACK

FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "iota",
    "while",
    "conditional",
    "call",
}  # read or write nothing of their own
MOVES = {"copy", "broadcast", "transpose", "reshape", "slice", "concatenate", "pad", "select", "dynamic-slice", "dynamic-update-slice", "gather", "reverse"}
BITS = re.compile(r"(pred|bf|[a-z]+?)(\d*)[a-z0-9]*\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s*(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<kind>[a-z][a-z-]*)\((?P<rest>.*)")
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([^}\]]*)[}\]]')


class Costs(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flops: float = 0
    bytes: float = 0

    def plus(self, other: Costs, times: int = 1) -> Costs:
        return Costs(self.flops + times * other.flops, self.bytes + times * other.bytes)


class Array(NamedTuple):
    floating: bool
    dims: tuple[int, ...]
    bytes: float

    @property
    def size(self) -> int:
        return math.prod(self.dims)


class Instruction(NamedTuple):
    name: str
    kind: str
    made: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.made)

    def called(self, attribute: str) -> list[str]:
        found = re.search(rf"{attribute}=\{{?((?:%[\w.-]+(?:, )?)+)", self.text)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


Program = dict[str, dict[str, Instruction]]  # computation, instruction


def _arrays(shape: str) -> Iterator[Array]:
    for kind, bits, dims in BITS.findall(shape):
        lengths = tuple(int(d) for d in dims.split(",") if d)
        yield Array(kind in ("f", "bf"), lengths, math.prod(lengths) * int(bits or 8) / 8)


def _parsed(text: str) -> tuple[Program, str]:
    """The computations, and the name of the entry."""
    program: Program = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%([\w.-]+) ", line)):
            current = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", found["rest"].split(")")[0])
            current[found["name"]] = Instruction(
                found["name"], found["kind"], tuple(_arrays(found["shape"])), tuple(operands), found["rest"], bool(found["root"])
            )
    return program, entry


def _flops(one: Instruction, inside: dict[str, Instruction]) -> float:
    """Of an instruction alone."""
    if one.kind in ("dot", "custom-call"):
        contracted = CONTRACTED.search(one.text)
        if contracted is None:
            return 0
        left = inside[one.operands[0]].made[0].dims
        return 2 * one.made[0].size * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))
    if one.kind == "reduce":
        return sum(a.size for name in one.operands[: len(one.operands) // 2] for a in inside[name].made if a.floating)
    return 0 if one.kind in FREE | MOVES | {"fusion"} else sum(a.size for a in one.made if a.floating)


def _source(name: str, inside: dict[str, Instruction]) -> str:
    """Where a value comes from, through bitcasts."""
    while inside[name].kind == "bitcast":
        name = inside[name].operands[0]
    return name


def _traffic(one: Instruction, inside: dict[str, Instruction], program: Program) -> float:
    """Bytes that a kernel reads and writes."""
    if one.kind in FREE:
        return 0
    if one.kind in ("dynamic-slice", "gather"):
        return 2 * one.bytes
    if one.kind == "dynamic-update-slice":
        return 2 * inside[one.operands[1]].bytes
    if one.kind != "fusion":
        return one.bytes + sum(inside[name].bytes for name in one.operands)
    body = program[one.called("calls")[0]]
    updates = [i for i in body.values() if i.kind == "dynamic-update-slice"]
    in_place = {_source(i.operands[0], body) for i in updates}
    total = one.bytes - sum(i.bytes - body[i.operands[1]].bytes for i in updates if body[_source(i.operands[0], body)].kind == "parameter")
    for name, parameter in body.items():
        if parameter.kind != "parameter":
            continue
        users = [i for i in body.values() if i.kind != "bitcast" and name in (_source(o, body) for o in i.operands)]
        sliced = users and all(i.kind in ("dynamic-slice", "gather") and _source(i.operands[0], body) == name for i in users)
        total += 0 if name in in_place else sum(i.bytes for i in users) if sliced else parameter.bytes
    return total


def costs(text: str) -> Costs:
    """Of the text of a compiled program, `compiled.as_text()`."""
    program, entry = _parsed(text)
    known: dict[str, Costs] = {}

    def falls_back(name: str) -> bool:
        return any(FALLBACK in i.text for i in program[name].values())

    def of(name: str) -> Costs:
        if name not in known:
            total = Costs()
            for one in program[name].values():
                total = total.plus(Costs(_flops(one, program[name]), _traffic(one, program[name], program)))
                if one.kind == "fusion":
                    total = total.plus(Costs(of(one.called("calls")[0]).flops))
                elif one.kind == "call":
                    total = total.plus(of(one.called("to_apply")[0]))
                elif one.kind == "while":
                    turns = re.search(r'known_trip_count":\{"n":"(\d+)"', one.text)
                    total = total.plus(of(one.called("body")[0]), int(turns[1]) if turns else 1)
                elif one.kind == "conditional":
                    branches = one.called("branch_computations") or one.called("true_computation") + one.called("false_computation")
                    taken = [of(b) for b in branches if not falls_back(b)] or [of(b) for b in branches]
                    total = total.plus(max(taken))
            known[name] = total
        return known[name]

    return of(entry) if entry else Costs()
