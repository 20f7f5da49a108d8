"""The examples run, at tiny sizes, and do what their texts say."""

from __future__ import annotations

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from support import ROOT, assert_close

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def single_precision():
    """As for anyone who runs them: only this suite asks for double precision."""
    with jax.enable_x64(False):
        yield


def run(main, *arguments):
    done = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_says_how_it_is_run_and_is_short(path):
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text))
    assert f"python examples/{path.name}" in said and 'pip install -e ".[examples]"' in said
    assert len(text.splitlines()) <= 200


def test_both_backward_passes_give_the_same_gradient_of_a_classifier(single_precision):
    from flax import nnx
    from sensor_series import Classifier, load, mean_loss_by

    seen, unseen = load(every=40)
    assert (len(seen.labels), len(unseen.labels)) == (98, 42) and int(seen.lengths.min()) >= 23
    batch = seen.take(np.arange(0, 98, 14))
    gradients = [nnx.grad(mean_loss_by(backward))(Classifier(4, nnx.Rngs(0)), batch) for backward in ("lax", "parscan")]
    assert_close(gradients[1], gradients[0], 1e-4)


def test_what_pads_a_series_changes_nothing(single_precision):
    from flax import nnx
    from sensor_series import Classifier, load

    seen, _ = load(every=40)
    few, model = seen.take(np.arange(5)), Classifier(4, nnx.Rngs(0))
    assert_close(model(few.features + 9.0 * (jnp.arange(few.features.shape[1])[:, None] >= few.lengths[:, None, None]), few.lengths), model(*few[:2]), 1e-5)


def test_a_classifier_learns(single_precision, tmp_path):
    from sensor_series import main

    said = run(main, "--quick", "--width", 4, "--learning-rate", 0.05, "--out", tmp_path)
    right, of = (int(said.split(" series of unseen people")[0].split()[place]) for place in (-3, -1))
    assert of == 42 and right >= 12, said  # by chance 6
    assert (tmp_path / "sensor_series_parscan.png").stat().st_size > 10_000


def test_both_scans_give_the_same_derivatives_of_a_simulation(single_precision):
    from oscillator_identification import SCANS, gradient_by, guess, linearised_by, observe

    truth, experiment = observe(3, 300, seed=1)
    assert truth.shape == guess(3).shape == (7,)
    for derivative in (gradient_by, linearised_by):
        by_lax, by_parscan = (derivative(scan, experiment)(guess(3), 200) for scan in SCANS.values())
        assert_close(by_parscan, by_lax, 1e-4)
    derivatives, values = linearised_by(SCANS["parscan"], experiment)(guess(3), 200)
    assert values.shape == (1800,) and not values[1200:].any()
    assert_close(2 * derivatives.T @ values / 1200, gradient_by(SCANS["parscan"], experiment)(guess(3), 200), 1e-3)


def test_springs_and_dampers_are_found(single_precision, tmp_path):
    from oscillator_identification import main

    said = run(main, "--quick", "--out", tmp_path)
    rows = [line.split() for line in said.splitlines() if line[:1] in "kc" and "±" in line]
    assert [row[0] for row in rows] == ["k0", "k1", "k2", "c1", "c2"]
    for name, truth, adam, newton, _, error in rows:
        truth, adam, newton, error = (float(number) for number in (truth, adam, newton, error))
        assert abs(newton / truth - 1) < 0.02 and abs(newton - truth) < 4 * error + 1e-5, (name, said)
        assert abs(adam / truth - 1) < (0.1 if name[0] == "k" else 0.4), (name, said)
    assert 0.9 < float(said.split("mean square left ")[1].split(",")[0]) < 1.1
    assert (tmp_path / "oscillator_identification.png").stat().st_size > 10_000
