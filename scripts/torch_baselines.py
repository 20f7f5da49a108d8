"""The tanh RNN of problems.py in PyTorch, if it is installed: `torch.nn.RNN`, which is cuDNN's on a GPU, and a compiled loop."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import Run, gap
from problems import Problem

STEPS = 32  # of a compiled piece of the loop: compiling takes as long as the piece is long
RATE = 1e-3


@dataclass(frozen=True)
class Pending:
    """What `jax.block_until_ready` waits for, as for an array of JAX's."""

    value: Any
    wait: Callable[[], None]

    def block_until_ready(self) -> Pending:
        self.wait()
        return self


class Contender(NamedTuple):
    """forward: the loss. leaves: what the gradient is taken in: U, W, b, the initial state. turned: whether U and W are kept as PyTorch keeps them."""

    forward: Callable[[], Any]
    leaves: list[Any]
    turned: bool


def _runs(torch: Any, contender: Contender) -> dict[str, Run]:
    """From what is timed to a call, which is not waited for."""
    forward, leaves, _ = contender
    wait = torch.cuda.synchronize if leaves[-1].is_cuda else lambda: None
    loss = forward()

    def step() -> Any:
        grads = torch.autograd.grad(forward(), leaves)
        with torch.no_grad():
            return [leaf - RATE * grad for leaf, grad in zip(leaves, grads, strict=True)]

    def silent() -> Any:
        with torch.no_grad():
            return forward()

    calls = {
        "forward": silent,
        "backward": lambda: torch.autograd.grad(loss, leaves, retain_graph=True),
        "gradient": lambda: torch.autograd.grad(forward(), leaves),
        "step": step,
    }
    return {name: Run(lambda call=call: Pending(call(), wait), 0, 0.0) for name, call in calls.items()}


def _contenders(torch: Any, problem: Problem, device: str) -> dict[str, Contender]:
    """Two ways to the loss, each with weights of its own."""
    put = lambda array: torch.tensor(np.asarray(array), device=device)  # noqa: E731
    u, w, b = (put(problem.weights[name]).requires_grad_() for name in "UWb")
    start, inputs = put(problem.start).requires_grad_(), put(problem.inputs)
    layer = torch.nn.RNN(inputs.shape[-1], start.shape[-1], device=device)
    theirs = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]
    with torch.no_grad():
        for parameter, value in zip([*theirs, layer.bias_hh_l0], (u.T, w.T, b, torch.zeros_like(b)), strict=True):
            parameter.copy_(value)

    def steps(h: Any, xs: Any, w: Any, u: Any, b: Any) -> Any:
        states = []
        for x in xs:
            h = torch.tanh(h @ w + x @ u + b)
            states.append(h)
        return torch.stack(states)

    with contextlib.suppress(AttributeError, ImportError):  # a backward pass alone is called many times from one forward pass
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False
    piece = torch.compile(steps, dynamic=False)

    def looped() -> Any:
        h, states = start, []
        for xs in inputs.split(STEPS):
            states.append(piece(h, xs, w, u, b))
            h = states[-1][-1]
        return (torch.cat(states) ** 2).mean() + h.mean()

    def fused() -> Any:
        states, final = layer(inputs, start[None])
        return (states**2).mean() + final.mean()

    return {"cuDNN": Contender(fused, [*theirs, start], True), "torch loop": Contender(looped, [u, w, b, start], False)}


def entrants(problem: Problem, device: str, want: Any) -> tuple[dict[str, dict[str, Run]], list[str]]:
    """Programs by what is timed and by contender, and a line on what is missing.

    want: the gradients in weights and initial state, which must be near.
    """
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded, {str(error).splitlines()[0]}"
        return {}, [f"torch: {reason}"]
    if device == "cuda" and not torch.cuda.is_available():
        return {}, ["torch: installed without CUDA"]
    found: dict[str, dict[str, Run]] = {}
    notes = []
    for name, contender in _contenders(torch, problem, device).items():
        try:
            some = _runs(torch, contender)
            for run in some.values():
                jax.block_until_ready(run.call())
            grads = [jnp.asarray(grad.cpu().numpy()) for grad in some["gradient"].call().value]
            far = gap([grad.T if contender.turned and i < 2 else grad for i, grad in enumerate(grads)], jax.tree.leaves(want))
        except Exception as error:  # of a compiler that is another project's: the row goes on without it
            notes.append(f"{name}: {type(error).__name__}, {' '.join(str(error).split())}"[:150])
            continue
        if not far <= 1e-2:
            notes.append(f"{name}: its gradients differ, {far:.1e}")
            continue
        for quantity, run in some.items():
            found.setdefault(quantity, {})[name] = run
    return found, notes
