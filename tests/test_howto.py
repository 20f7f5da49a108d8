"""Of the recipes in docs/howto: what the run of the pages, in `test_readme.py`, leaves open."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support import ROOT
from test_readme import blocks, sections, with_output

HOWTO = ROOT / "docs" / "howto"
RECIPES = [page for page in sorted(HOWTO.glob("*.md")) if page.name != "index.md"]
PAGES = [ROOT / "docs" / "tutorial.md", HOWTO / "index.md", *RECIPES]


def test_every_recipe_is_listed_says_how_to_and_is_run():
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (HOWTO / "index.md").read_text())
    assert sorted(listed) == [page.name for page in RECIPES]
    for page in RECIPES:
        assert page.read_text().startswith("# How to ") and sections(page.read_text())


def test_every_output_that_is_shown_is_compared():
    for page in PAGES:
        text = page.read_text()
        shown = [code for language, _, code in blocks(text) if language == "text"]
        assert shown == [printed for _, _, printed in with_output(text) if printed is not None], page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for name, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), name
        headings = [re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in to.read_text().splitlines() if line.startswith("#")]
        assert not heading or heading in headings, f"{name} has no heading #{heading}"


def test_on_eight_devices():
    text = (HOWTO / "several-devices.md").read_text()
    (flag,) = re.findall(r"XLA_FLAGS=(\S+)", text)
    code = "\n".join(code for some in sections(text).values() for _, code in some) + "\nprint(jax.device_count(), sent)"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, sent = done.stdout.splitlines()[-1].split(" ", 1)
    assert count == "8" and "all-reduce" in sent
