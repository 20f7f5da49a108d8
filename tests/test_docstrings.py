"""What a public name says of itself: purpose, every argument, shapes and dtypes of arrays, result, errors, an example (which `test_readme.py` runs)."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from jax import Array
from support import ROOT

import parscan
from parscan import jacobians, testing

EXTENDING = ("Evidence", "Form", "Index", "Jacobian", "balanced_columns", "kind", "register")  # what docs/kinds.md builds a kind from
PUBLIC = {f"parscan.{name}": getattr(parscan, name) for name in parscan.__all__ if name != "testing"}
PUBLIC |= {f"parscan.testing.{name}": getattr(testing, name) for name in testing.__all__}
PUBLIC |= {f"parscan.jacobians.{name}": getattr(jacobians, name) for name in EXTENDING}

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.MULTILINE)
HOLDS_ARRAYS = re.compile(r"(?<!type\[)\b(Array|Any|Carry|X|Y|State|Params|Jacobian|Pattern|Index|np\.ndarray|Gradients)\b")
SHAPE = re.compile(r"\((?:[\w.…₁₂·+ ]+,)+[\w.…₁₂·+* ]*\)|\bscalar\b|\bpytrees?\b|\bof length \w|\bone a column\b")
DTYPE = re.compile(r"\bdtypes?\b|\bfloating-point\b|\bint32\b|\bintegers?\b|\bbooleans?\b|\breal\b")
NO_ARRAY = re.compile(r'^"\w+"|\bclaim\b|\bprefix of\b|\bAxes\b|\bJacobians\b|\bhashable\b|->|\bcallable\b')
REFERENCE = re.compile(r"\b(?:as for|like) `?(\w+)`?")
CHECKS = re.compile(r"^(parse_|_?check_|_check$|_checked$|integer$|read$)")  # the package's functions that raise for their callers


class Text(NamedTuple):
    """A docstring: what stands before its sections; of Args and Attributes what is said of each name; the other sections."""

    purpose: str
    entries: dict[str, str]
    sections: dict[str, str]


def read(doc: str) -> Text:
    purpose, *rest = SECTION.split(doc)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    entries = {}
    for section in ("Args", "Attributes"):
        _, *found = ENTRY.split(sections.get(section, ""))
        entries |= {name: said.strip() for names, said in zip(found[::2], found[1::2], strict=True) for name in names.split(", ")}
    return Text(purpose, entries, sections)


def parameters(one: Any) -> dict[str, str]:
    """Names and annotations of what a caller gives, or, of a class, of what its objects hold."""
    if dataclasses.is_dataclass(one):
        return {field.name: str(field.type) for field in dataclasses.fields(one) if not field.name.startswith("_")}
    if hasattr(one, "_fields"):
        return {name: str(one.__annotations__[name]) for name in one._fields}
    if isinstance(one, type) and (one.__init__ is object.__init__ or issubclass(one, Exception)):
        return {}
    found = inspect.signature(one).parameters.values()
    return {parameter.name: str(parameter.annotation) for parameter in found if parameter.name != "self"}


def describes_arrays(said: str, among: set[str]) -> bool:
    """Whether shape and dtype of what may hold arrays are said, or that it is none, or what else it is like."""
    like = [name for name in REFERENCE.findall(said) if name in among or hasattr(parscan, name)]
    return bool(NO_ARRAY.search(said) or like or (SHAPE.search(said) and DTYPE.search(said)))


def raised(one: Any) -> set[str]:
    """Errors of a function, of a class when made: its own, and of what it calls and does not guard: of any module directly, of its own or a check's at any depth."""
    makers = [vars(c)["__post_init__"] for c in one.__mro__ if "__post_init__" in vars(c)] if isinstance(one, type) else [inspect.unwrap(one)]
    names, first, seen = set(), set(makers), set()
    while makers:
        maker = makers.pop()
        seen.add(maker)
        for node in unguarded(ast.parse(textwrap.dedent(inspect.getsource(maker)))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error = named(node.exc.func, maker)
                names |= {error.__name__} if isinstance(error, type) else set()
            elif isinstance(node, ast.Call) and inspect.isfunction(called := named(node.func, maker)):
                followed = maker in first or called.__module__ == maker.__module__ or CHECKS.match(called.__name__)
                makers += [called] if followed and called not in seen else []
    return names


def unguarded(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but for what stands in a `try`, whose errors may be caught."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Try) and node.handlers and child in node.body):
            yield from unguarded(child)


def named(expression: ast.expr, caller: Any) -> Any:
    """The function of parscan, or the error, that a name, or one of a module, stands for within a function; None if it is none."""
    module, _, name = ast.unparse(expression).rpartition(".")
    within = caller.__globals__.get(module) if module else caller
    names = vars(within) if inspect.ismodule(within) else {} if module else vars(builtins) | caller.__globals__
    found = inspect.unwrap(one) if callable(one := names.get(name)) else None
    ours = inspect.isfunction(found) and found.__module__.partition(".")[0] in ("parscan", __name__)
    return found if ours or (isinstance(found, type) and issubclass(found, Exception)) else None


def missing(one: Any) -> Iterator[str]:
    """What the docstring of a public function or class leaves out."""
    doc = inspect.cleandoc(vars(one).get("__doc__") or "") if isinstance(one, type) else inspect.getdoc(one) or ""
    text, wanted = read(doc), parameters(one)
    first = doc.partition("\n")[0]
    if len(first.split()) < 4 or not first.endswith((".", ":")):
        yield "a first line that is a sentence"
    if set(text.entries) != set(wanted):
        yield f"an entry for each of {sorted(wanted)}; there are {sorted(text.entries)}"
    for name in sorted(set(text.entries) & set(wanted)):
        if len(text.entries[name].split()) < 2 and "`" not in text.entries[name]:
            yield f"what `{name}` is"
        if HOLDS_ARRAYS.search(wanted[name]) and not describes_arrays(text.entries[name], set(wanted) - {name}):
            yield f"shape and dtype of `{name}`"
    if not isinstance(one, type):
        result = str(inspect.signature(one).return_annotation)
        if "Iterator" not in result and result != "None":
            returns = text.sections.get("Returns", "").strip()
            if not returns:
                yield "Returns"
            if ": " in returns.partition("\n")[0]:
                yield "Returns without a colon in its first line, before which the site would see a type"
            if len({len(line) - len(line.lstrip()) for line in text.sections.get("Returns", "").splitlines() if line}) > 1:
                yield "Returns with all its lines indented alike"
            of_several = result.startswith("tuple[") and not (SHAPE.search(returns) and DTYPE.search(returns))  # of which one may be like an argument
            if returns and HOLDS_ARRAYS.search(result) and (of_several or not describes_arrays(returns, set(wanted))):
                yield "shape and dtype of what is returned"
    said = re.findall(r"^ {4}([\w.]+): ", text.sections.get("Raises", ""), re.MULTILINE)
    if unsaid := raised(one) - {name.rpartition(".")[2] for name in said}:
        yield f"Raises: {sorted(unsaid)}"
    if not any(re.search(rf"\b{one.__name__}\b", example.source + example.want, re.IGNORECASE) for example in doctest.DocTestParser().get_examples(doc)):
        yield "an example of it"


def members(one: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a class, by their full names: where a class of parscan first has them, and not where another only overrides them."""
    owners = [owner for owner in one.__mro__ if owner.__module__.startswith("parscan")]
    for name in {name for owner in owners for name in vars(owner) if not name.startswith(("_", "tree_"))}:
        value = next(vars(owner)[name] for owner in reversed(owners) if name in vars(owner))
        called = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
        if inspect.isfunction(called):
            yield f"{called.__module__}.{called.__qualname__}", called


def missing_in_member(called: Any) -> Iterator[str]:
    """What the docstring of a method or property leaves out: a sentence of purpose; every parameter by name; of an array its shape."""
    doc, signature = inspect.getdoc(called) or "", inspect.signature(called)
    if not doc.partition("\n\n")[0].endswith("."):
        yield "a sentence of purpose"
    if len(signature.parameters) == 1 and ": " in doc.partition("\n")[0]:
        yield "a first line without a colon, before which the site would see a property's type"
    for name, parameter in list(signature.parameters.items())[1:]:
        if not re.search(rf"\b{name}\b", doc):
            yield f"what `{name}` is"
        elif "Array" in str(parameter.annotation) and not re.search(rf"\b{name}\b[^;]*?\(.*?\)", doc):
            yield f"the shape of `{name}`"
    if signature.return_annotation == "Array" and not SHAPE.search(doc):
        yield "the shape of the result"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_all_of_itself(name):
    assert list(missing(PUBLIC[name])) == []


def test_the_package_lists_every_public_name():
    assert [name for name in parscan.__all__ if f"`{name}`" not in (parscan.__doc__ or "")] == []


def test_what_citation_names_is_a_source_of_something_public():
    sources = [line for one in PUBLIC.values() for line in (one.__doc__ or "").splitlines() if line.strip().startswith("Source: ")]
    cited = re.findall(r"^      - family-names: (\w+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and not [name for name in cited if not any(name in line for line in sources)]


MEMBERS = dict(sorted({name: called for one in PUBLIC.values() if isinstance(one, type) for name, called in members(one)}.items()))


@pytest.mark.parametrize("name", MEMBERS)
def test_so_does_what_a_class_has(name):
    assert list(missing_in_member(MEMBERS[name])) == []


# --- the rule itself ------------------------------------------------------------------------------------------------------


def says_all(A: Any, h: Any, steps: int, f: Any) -> Any:
    """Applies a matrix several times, and f at the end.

    Args:
        A: floating-point array of shape (n, n).
        h: (n,), of any dtype.
        steps: how often.
        f: h -> h.

    Returns:
        (n,) in the dtype of `h`.

    Raises:
        ValueError: `steps` is negative.

    Example:
        >>> says_all(jnp.eye(2), jnp.ones(2), 3, jnp.sum)
        2
    """
    if steps < 0:
        raise ValueError("steps")


def says_little(A: Any, h: Any, steps: int, f: Any) -> Any:
    """Applies."""
    if steps < 0:
        raise ValueError("steps")


def says_nothing_of_arrays(A: Any, h: Any, steps: int, f: Any) -> Any:
    """Applies a matrix several times.

    Args:
        A: the matrix, as it is.
        h: array of shape (n,).
        steps: number.
        f: as for `nowhere`.

    Returns:
        Array: the result,
            as it is.

    Raises:
        TypeError: never.

    Example:
        says_nothing_of_arrays(A, h, 3, f)
    """
    if steps < 0:
        raise ValueError("steps")


@dataclasses.dataclass
class Toy:
    """The state of something.

    Args:
        h: the state, floating-point.
        other: what is not there.
    """

    h: Any

    def __post_init__(self) -> None:
        check_state(self.h)

    def moved(self, by: Array, times) -> Array:
        """Moved by `by`"""
        return self.h + by


def check_state(h: Any) -> None:
    if h is None:
        raise TypeError("no state")


def test_a_docstring_that_leaves_something_out_is_told():
    assert list(missing(says_all)) == []
    assert list(missing(says_little)) == [
        "a first line that is a sentence",
        "an entry for each of ['A', 'f', 'h', 'steps']; there are []",
        "Returns",
        "Raises: ['ValueError']",
        "an example of it",
    ]
    assert list(missing(says_nothing_of_arrays)) == [
        "shape and dtype of `A`",
        "shape and dtype of `f`",
        "shape and dtype of `h`",
        "what `steps` is",
        "Returns without a colon in its first line, before which the site would see a type",
        "Returns with all its lines indented alike",
        "shape and dtype of what is returned",
        "Raises: ['ValueError']",
        "an example of it",
    ]
    assert list(missing(Toy)) == [
        "an entry for each of ['h']; there are ['h', 'other']",
        "shape and dtype of `h`",
        "Raises: ['TypeError']",
        "an example of it",
    ]
    assert list(missing_in_member(Toy.moved)) == ["a sentence of purpose", "the shape of `by`", "what `times` is", "the shape of the result"]
