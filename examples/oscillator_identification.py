"""Finds the springs and dampers of a chain of oscillators from noisy observations of two of its masses, through tens of thousands of time steps.

    wall ~ k0 ~ mass 1 ~ k1 ~ mass 2 ~ … ~ mass N ~ kN ~ wall        tension: k (stretch + 0.2 stretch³), friction: c · velocity

In N experiments, simulated side by side, one mass each is driven by a known random force; the first and the last are observed. The logarithms of the N + 1
stiffnesses and N frictions are found by least squares, twice: by Adam (Optax), and by Gauss-Newton, which wants the sensitivity of every observation to
every unknown. Both differentiate one simulation, in reverse mode (`jax.grad`) and in forward mode (`jax.jacfwd`). A model with wrong springs is soon
out of phase with what was observed, and least squares then has many minima: so the first steps are fitted first, then ever more.

    pip install -e ".[examples]"
    python examples/oscillator_identification.py                                  # a minute or so on two CPU cores
    python examples/oscillator_identification.py --steps 100000 --scan parscan

It prints how long both derivatives take by `jax.lax.scan` and by `parscan.scan`, and what was found beside the truth, with standard errors; and draws
the fit, the errors on the way and at the end, and the sensitivities over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import trange

import parscan

STEP, HARDENING, NOISE = 0.05, 0.2, 0.05  # of time, where the masses are 1; of the tension; of the observations' own size
COLOURS = {"Adam": "#E69F00", "Gauss-Newton": "#0072B2"}
Scan = Callable[..., Any]
Derivative = Callable[[Any, int], Any]  # of the unknowns and the horizon
Fit = list[tuple[float, np.ndarray]]  # after every update the seconds that had gone by, without compilation, and the unknowns
SCANS: dict[str, Scan] = {"lax": lax.scan, "parscan": parscan.scan}


class Experiment(NamedTuple):
    """The forces on the driven masses (T, N), what was seen of the first and the last mass (T, N, 2), and the standard deviation of its noise."""

    force: Array
    seen: Array
    noise: Array


def move(unknowns: Array, state: tuple[Array, Array], force: Array) -> tuple[tuple[Array, Array], Array]:
    """One step of the symplectic Euler method on displacements and velocities (experiment, mass). Puts out the first and the last mass' displacement."""
    (x, v), masses = state, len(force)
    stretch = jnp.diff(x, prepend=0.0, append=0.0)
    tension = jnp.exp(unknowns[: masses + 1]) * (stretch + HARDENING * stretch**3)
    v = v + STEP * (jnp.diff(tension) - jnp.exp(unknowns[masses + 1 :]) * v + jnp.diag(force))
    x = x + STEP * v
    return (x, v), x[:, :: masses - 1]


def simulate(scan: Scan, unknowns: Array, force: Array) -> Array:
    """What is to be seen (T, N, 2), from rest. Unknown are the logarithms of the stiffnesses, then of the frictions (2 N + 1,)."""
    rest = jnp.zeros((force.shape[1],) * 2, force.dtype)
    return scan(lambda state, force: move(unknowns, state, force), (rest, rest), force)[1]


def observe(masses: int, steps: int, seed: int) -> tuple[Array, Experiment]:
    """The truth, and what is observed of it."""
    rng = np.random.default_rng(seed)
    truth = jnp.log(jnp.asarray([*rng.uniform(1.0, 3.0, masses + 1), *rng.uniform(0.03, 0.12, masses)], jnp.float32))
    force = jnp.asarray(np.repeat(rng.normal(size=(steps // 10 + 1, masses)), 10, axis=0)[:steps], jnp.float32)
    exact = simulate(lax.scan, truth, force)
    noise = NOISE * exact.std()
    return truth, Experiment(force, exact + noise * jnp.asarray(rng.normal(size=exact.shape), jnp.float32), noise)


def guess(masses: int) -> Array:
    """The middle of the range."""
    return jnp.log(jnp.asarray([1.7] * (masses + 1) + [0.06] * masses, jnp.float32))


def residuals(scan: Scan, experiment: Experiment, unknowns: Array, horizon: int) -> Array:
    """What the model misses (2 N T,), in standard deviations of the noise; 0 after the horizon."""
    missed = (simulate(scan, unknowns, experiment.force) - experiment.seen) / experiment.noise
    return jnp.where(jnp.arange(len(missed))[:, None, None] < horizon, missed, 0.0).ravel()


def gradient_by(scan: Scan, experiment: Experiment) -> Derivative:
    """Of the mean square of the residuals up to the horizon, by every unknown."""
    size = experiment.seen[0].size
    return jax.jit(jax.grad(lambda at, horizon: jnp.sum(residuals(scan, experiment, at, horizon) ** 2) / (size * horizon)))


def linearised_by(scan: Scan, experiment: Experiment) -> Derivative:
    """The derivatives of the residuals by every unknown (2 N T, 2 N + 1), and the residuals."""
    return jax.jit(jax.jacfwd(lambda at, horizon: (residuals(scan, experiment, at, horizon),) * 2, has_aux=True))


def by_adam(gradient: Derivative, at: Any, horizons: list[int], updates: int = 60) -> Fit:
    """So many updates for every horizon, ever smaller ones."""
    optimizer, fit, start = optax.adam(optax.cosine_decay_schedule(0.1, updates)), [], time.perf_counter()
    for horizon in horizons:
        state = optimizer.init(at)
        for _ in trange(updates, desc=f"Adam, the first {horizon} steps"):
            change, state = optimizer.update(gradient(at, horizon), state)
            at = optax.apply_updates(at, change)
            fit.append((time.perf_counter() - start, np.asarray(at)))
    return fit


def by_gauss_newton(linearised: Derivative, at: Array, horizons: list[int], updates: int = 6) -> Fit:
    """So many updates for every horizon, none of which changes an unknown by more than a factor of e^(1/2)."""
    fit, start = [], time.perf_counter()
    for horizon in horizons:
        for _ in trange(updates, desc=f"Gauss-Newton, the first {horizon} steps"):
            derivatives, values = (np.asarray(part, np.float64) for part in linearised(at, horizon))
            change = np.linalg.lstsq(derivatives, -values)[0]
            at = at + jnp.asarray(change * min(1.0, 0.5 / np.abs(change).max()), at.dtype)
            fit.append((time.perf_counter() - start, np.asarray(at)))
    return fit


def compare(what: str, functions: dict[str, Derivative], at: Array, horizon: int, rounds: int) -> str:
    """Says how long a derivative takes by each scan, interleaved, the median, and how far apart they are. Returns the quicker scan's name."""
    values = {name: ravel_pytree(function(at, horizon))[0] for name, function in functions.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in [*functions] * rounds:
        start = time.perf_counter()
        jax.block_until_ready(functions[name](at, horizon))
        seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(some)) for name, some in seconds.items()}
    apart = jnp.linalg.norm(values["lax"] - values["parscan"]) / jnp.linalg.norm(values["lax"])
    said = ", ".join(f"{name}.scan {1e3 * some:.1f} ms" for name, some in median.items())
    click.echo(f"{what}: {said}, a ratio of {median['lax'] / median['parscan']:.2f}; they differ by {apart:.0e} of their size")
    return min(median, key=median.__getitem__)


def draw(experiment: Experiment, modelled: dict[str, Array], fits: dict[str, Fit], exact: np.ndarray, errors: np.ndarray, moved: Array, path: Path) -> None:
    """The fit, errors on the way and at the end, and how far each unknown moves the last mass, `moved` (T, 2 N + 1), in the first experiment."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    (fitted, way), (end, sensitive) = figure.subplots(2, 2)
    steps, masses = len(experiment.force), len(exact) // 2
    names = [f"k{i}" for i in range(masses + 1)] + [f"c{i + 1}" for i in range(masses)]
    some = np.arange(steps)[-600:]
    fitted.plot(some * STEP, experiment.seen[some, 0, 1], ".", color="0.6", ms=3, label="observed")
    for (name, what), style in zip(modelled.items(), (":", "-"), strict=True):
        fitted.plot(some * STEP, what[some, 0, 1], style, color="black", lw=1, label=name)
    for shift, (name, fit) in zip((-0.15, 0.15), fits.items(), strict=True):
        way.plot([at for at, _ in fit], [np.abs(np.expm1(unknowns - exact)).max() for _, unknowns in fit], ".-", color=COLOURS[name], label=name)
        end.errorbar(np.arange(len(names)) + shift, 100 * np.expm1(fit[-1][1] - exact), 200 * errors, fmt="o", capsize=3, color=COLOURS[name], label=name)
    end.axhline(0, color="0.7", lw=1)
    window = max(steps // 100, 1)
    sizes = np.sqrt(np.mean(np.asarray(moved)[: steps // window * window].reshape(-1, window, len(names)) ** 2, axis=1))
    shades = [*colormaps["Blues"](np.linspace(0.4, 1, masses + 1)), *colormaps["Oranges"](np.linspace(0.4, 1, masses))]
    for name, size, shade in zip(names, sizes.T, shades, strict=True):
        sensitive.plot(np.arange(len(size)) * window * STEP, size, color=shade, label=name)
    fitted.set(xlabel="time", ylabel="displacement of the last mass", title="the last steps")
    way.set(xlabel="seconds, without compilation", ylabel="largest relative error of an unknown", yscale="log", title="on the way")
    end.set(xticks=range(len(names)), xticklabels=names, ylabel="error, %", title="at the end, with two standard errors")
    sensitive.set(xlabel="time", ylabel="root mean square displacement", yscale="log", title="how far 1 % of an unknown moves the last mass")
    for axes in (fitted, way, end, sensitive):
        axes.legend(ncols=max(1, len(axes.get_legend_handles_labels()[1]) // 3), fontsize=9)
    figure.savefig(path, dpi=110)


@click.command(context_settings={"show_default": True})
@click.option("--scan", type=click.Choice(["quicker", *SCANS]), default="quicker", help="Which scan to fit by; for each derivative the quicker one.")
@click.option("--masses", type=click.IntRange(min=2), default=4, help="How many oscillators.")
@click.option("--steps", type=click.IntRange(min=200), default=20_000, help="Time steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Draws the truth, the force and the noise.")
@click.option("--quick", is_flag=True, help="Two masses, 1000 steps: to see that it runs.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/examples"), help="Folder of the figure.")
def main(scan: str, masses: int, steps: int, seed: int, quick: bool, out: Path) -> None:
    """Identify a chain of oscillators by Adam and by Gauss-Newton, and time the derivatives of both scans."""
    masses, steps = (2, 1000) if quick else (masses, steps)
    truth, experiment = observe(masses, steps, seed)
    start, horizons = guess(masses), [int(h) for h in np.geomspace(200, steps, 5)]
    gradients = {name: gradient_by(some, experiment) for name, some in SCANS.items()}
    linearised = {name: linearised_by(some, experiment) for name, some in SCANS.items()}
    quickest = [compare("gradient", gradients, start, steps, 11), compare("sensitivities", linearised, start, steps, 5)]
    first, second = quickest if scan == "quicker" else (scan, scan)
    fits = {"Adam": by_adam(gradients[first], start, horizons), "Gauss-Newton": by_gauss_newton(linearised[second], start, horizons)}
    best = jnp.asarray(fits["Gauss-Newton"][-1][1])
    derivatives, values = (np.asarray(part, np.float64) for part in linearised[second](best, steps))
    errors = np.sqrt(np.diag(np.linalg.inv(derivatives.T @ derivatives)))
    click.echo(f"{steps} steps; mean square left {np.mean(values**2):.3f}, by noise alone 1\n\nunknown  truth    Adam     Gauss-Newton")
    for i, (true, adam, newton) in enumerate(np.exp([truth, fits["Adam"][-1][1], best]).T):
        click.echo(f"{f'k{i}' if i <= masses else f'c{i - masses}':7}  {true:.5f}  {adam:.5f}  {newton:.5f} ± {newton * errors[i]:.5f}")
    out.mkdir(parents=True, exist_ok=True)
    modelled = {name: simulate(lax.scan, at, experiment.force) for name, at in (("first guess", start), ("Gauss-Newton", best))}
    moved = 0.01 * experiment.noise * derivatives.reshape(steps, masses, 2, -1)[:, 0, 1]
    draw(experiment, modelled, fits, np.asarray(truth), errors, moved, out / "oscillator_identification.png")
    click.echo(f"drawn to {out / 'oscillator_identification.png'}")


if __name__ == "__main__":
    main()
