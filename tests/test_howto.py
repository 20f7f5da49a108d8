"""Of the recipes in docs/howto: what the run of the pages, in `test_readme.py`, and the look at links, in `test_site.py`, leave open."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from support import ROOT
from test_readme import blocks, sections, with_output

HOWTO = ROOT / "docs" / "howto"
RECIPES = [page for page in sorted(HOWTO.glob("*.md")) if page.name != "index.md"]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


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


def test_on_eight_devices():
    text = (HOWTO / "several-devices.md").read_text()
    (flag,) = re.findall(r"XLA_FLAGS=(\S+)", text)
    code = "\n".join(code for some in sections(text).values() for _, code in some) + "\nprint(jax.device_count(), sent)"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, sent = done.stdout.splitlines()[-1].split(" ", 1)
    assert count == "8" and "all-reduce" in sent
