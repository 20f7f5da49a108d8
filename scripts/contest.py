"""A gradient by every contender, each part of it timed alone: what the suites of recurrences and of deep networks do with a row.

A task is a loss that is written with a loop; a contender is what stands in for that loop:

\b
  lax U        jax.lax.scan with unroll=U; of {1, 2, 4, 8} the one whose whole gradient is fastest in these very rounds
  sequential   a sequential adjoint for the states alone, then one batched pull-back to the parameters
  associative  jax.lax.associative_scan over materialised Jacobians, without a guard; where these fit
  auto         what parscan chooses by itself

The backward pass alone is the function that `jax.vjp` returns, given what the forward pass has kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from bench import Run, compiled, gaps, interleaved, loss_through, seconds
from problems import FEW, layer, make, network
from results import too_large

import parscan

UNROLLS = (1, 2, 4, 8)
QUANTITIES = ("forward", "backward", "gradient", "step")
GROWTH = 3.0  # of the loop's time with twice the steps, above which it is no baseline
RATE = 1e-3  # of a training step by gradient descent
Loop = Callable[[Callable[..., Any], Any, Any], Any]
METHODS: dict[str, parscan.Method | str] = {"sequential": "sequential", "associative": parscan.Associative(guard=False), "auto": "auto"}


Programs = dict[str, dict[str, Run]]  # by what is timed, by contender
Others = Callable[[Any], tuple[Programs, list[str]]]


class Task(NamedTuple):
    """What is differentiated.

    loss: from a contender's name to the loss, a function of the arguments. wrt: which of them the gradient is taken in. stacked: which of them has
    one entry a step. jacobians: bytes of all steps' Jacobians. auto: what parscan chooses.
    """

    loss: Callable[[str], Callable[..., jax.Array]]
    arguments: tuple[Any, ...]
    wrt: tuple[int, ...]
    stacked: int
    jacobians: int
    auto: str

    @property
    def length(self) -> int:
        """Steps."""
        return len(jax.tree.leaves(self.arguments[self.stacked])[0])

    def halved(self) -> tuple[Any, ...]:
        """The arguments, of half the steps."""
        some = list(self.arguments)
        some[self.stacked] = jax.tree.map(lambda a: a[: (len(a) + 1) // 2], some[self.stacked])
        return tuple(some)


def loop(contender: str) -> Loop:
    """In place of `lax.scan`."""
    if contender.startswith("lax"):
        return functools.partial(jax.lax.scan, unroll=int(contender.split()[1]))
    return functools.partial(parscan.scan, method=METHODS[contender])


def _checked(row: str, limit: float, make: Callable[[], Any]) -> None:
    """That inputs and states are no larger than allowed, before any of them is made."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))
    if size > limit:
        raise click.ClickException(f"{row}: inputs and states take {size / 1e6:.0f} MB, more than the {limit / 1e6:.0f} MB allowed")


def recurrence(row: str, limit: float, seed: int) -> Task:
    """A row CELL:B:N:T of problems.py; every hidden state carries a cotangent."""
    name, b, n, length = row.split(":")

    def arrays():
        problem = make(row, 0, seed)
        return problem[1:], jax.tree.map(lambda h: jnp.zeros((int(length), *h.shape)), problem.start)

    _checked(row, limit, arrays)
    problem = make(row, 0, seed)
    plan = parscan.plan(lambda h, x: (problem.cell(problem.weights, h, x),) * 2, problem.start, problem.inputs)
    entries = int(length) * int(b) * int(n) * (1 if name in FEW else int(n))
    wrt = (0, 1) if problem.weights else (1, 2)
    return Task(lambda contender: loss_through(problem, loop(contender)), problem[1:], wrt, 2, 4 * entries, str(plan.method))


def deep(row: str, limit: float, seed: int) -> Task:
    """A row mlp:B:N:L: a residual network of L layers of width N, their parameters stacked, on B inputs."""
    _, b, n, length = row.split(":")
    build = functools.partial(network, int(length), int(n), int(b), seed)
    _checked(row, limit, lambda: (build(), jnp.zeros((int(length), int(b), int(n)))))
    params, start = build()
    f = lambda h, w: (layer(w, h), None)  # noqa: E731

    def loss(contender: str) -> Callable[..., jax.Array]:
        looped = contender.startswith("lax")
        apply = (lambda params, h: loop(contender)(f, h, params)[0]) if looped else parscan.chain(layer, method=METHODS[contender])
        return lambda params, h: jnp.mean(apply(params, h) ** 2)

    plan = parscan.plan(f, start, params)
    return Task(loss, (params, start), (0, 1), 0, 4 * int(length) * int(b) * int(n) ** 2, str(plan.method))


def program(task: Task, contender: str, quantity: str, arguments: tuple[Any, ...] | None = None) -> Run:
    """One part of the work, compiled."""
    loss, arguments = task.loss(contender), arguments or task.arguments
    gradient = jax.value_and_grad(loss, task.wrt)

    def step(*given):
        value, grads = gradient(*given)
        return value, jax.tree.map(lambda p, g: p - RATE * g, tuple(given[i] for i in task.wrt), grads)

    def pull_back(*given):
        def of(*some):
            changed = dict(zip(task.wrt, some, strict=True))
            return loss(*(changed.get(i, argument) for i, argument in enumerate(given)))

        return jax.vjp(of, *(given[i] for i in task.wrt))[1]

    if quantity == "backward":
        return compiled(lambda pull, c: pull(c), jax.jit(pull_back)(*arguments), jnp.ones(()))
    return compiled({"forward": loss, "gradient": gradient, "step": step}[quantity], *arguments)


def growth(task: Task, contender: str, run: Run) -> float:
    """How much longer a contender's gradient takes for twice the steps."""
    half = program(task, contender, "gradient", task.halved())
    long, short = (min(seconds(one.call) for _ in range(4)) for one in (run, half))
    return long / short


def _left_out(task: Task, limit: float, steps: int) -> str:
    """Why there is no associative scan, if there is a reason."""
    if task.length > steps:
        return "left out of a quick run, it takes long to compile"
    if 4 * task.jacobians > limit:  # two products a level, and the inputs of both
        return f"Jacobians of {task.jacobians / 1e6:.0f} MB, four times over, are more than the {limit / 1e6:.0f} MB allowed"
    return ""


def gradients(task: Task, limit: float, steps: int) -> tuple[dict[str, Run], list[str]]:
    """Whole gradients by every contender, and a line on each contender that is not there."""
    runs, notes = {f"lax {u}": program(task, f"lax {u}", "gradient") for u in UNROLLS}, []
    for contender in METHODS:
        reason = _left_out(task, limit, steps) if contender == "associative" else ""
        try:
            if not reason:
                runs[contender] = program(task, contender, "gradient")
                jax.block_until_ready(runs[contender].call())
        except Exception as error:
            if contender != "associative" or not too_large(error):
                raise
            runs.pop(contender, None)
            reason = "too large, no memory"
        if reason:
            notes.append(f"{contender}: {reason}")
    return runs, notes


def quartiles(values: Any) -> list[float]:
    """Median, and the quartiles around it."""
    return [float(q) for q in np.quantile(np.asarray(values), (0.5, 0.25, 0.75))]


def contest(row: str, task: Task, rounds: int, limit: float, steps: int, others: Others | None = None) -> dict[str, Any]:
    """All figures of a row: ms by what is timed and by contender, ratios to the loop, [median, lower, upper quartile] each.

    Args:
        limit: bytes that Jacobians may take; steps: up to which there is an associative scan.
        others: from the gradients that are wanted to contenders of other frameworks, and a line on each that is missing.
    """
    whole, notes = gradients(task, limit, steps)
    gap = max(gaps(row, whole, "lax 1").values())
    theirs: Programs = {}
    if others is not None:
        theirs, missing = others(whole["lax 1"].call()[1])
        notes += missing
    times = {"gradient": interleaved(whole | theirs.get("gradient", {}), rounds)}
    best = min((f"lax {u}" for u in UNROLLS), key=lambda name: float(np.median(times["gradient"][name])))
    grown = growth(task, best, whole[best])
    for unroll in UNROLLS:
        if best != f"lax {unroll}":
            del whole[f"lax {unroll}"], times["gradient"][f"lax {unroll}"]
    for quantity in ("forward", "backward", "step"):
        some = [contender for contender in (best, *METHODS) if contender in whole and (contender in (best, "auto") or quantity == "backward")]
        times[quantity] = interleaved({c: program(task, c, quantity) for c in some} | theirs.get(quantity, {}), rounds)
    named = lambda contender: "lax" if contender == best else contender  # noqa: E731
    return {
        "auto": task.auto,
        "unroll": int(best.split()[1]),
        "growth": grown,
        "ms": {q: {named(c): quartiles(1e3 * np.array(t)) for c, t in some.items()} for q, some in times.items()},
        "ratio": {}
        if grown > GROWTH
        else {q: {c: quartiles(np.array(some[best]) / np.array(t)) for c, t in some.items() if c != best} for q, some in times.items()},
        "temporary bytes": {named(c): run.temporary for c, run in whole.items()},
        "first call s": {named(c): run.first for c, run in whole.items()},
        "gap": gap,
        "notes": notes,
    }
