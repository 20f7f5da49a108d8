"""The pages of docs: one reaches them all, and their pictures are today's. (That links lead somewhere: `test_site.py`.)"""

from __future__ import annotations

import re

import pytest
from support import ROOT
from test_site import links

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached and page.exists():
            reached.add(page)
            ahead += [(page.parent / link).resolve() for link in links(page) if link.endswith(".md")]
    assert set(PAGES) - {ROOT / "docs/index.md"} <= reached  # which is the site's own front page


def test_chunks_are_drawn_from_the_schedule_of_today(scripts_on_path):
    import draw_chunks

    assert (ROOT / "docs" / "explanation" / "chunks.svg").read_text() == draw_chunks.drawing(), "python scripts/draw_chunks.py draws it anew"


@pytest.mark.parametrize("count, size", [(4, 1), (8, 2), (16, 4), (32, 8), (24, 24)])
def test_chunks_are_as_deep_as_said(count, size, scripts_on_path):
    import draw_chunks

    schedule = draw_chunks.Schedule.of(count, size)
    assert {lo - 1 for _, lo, _, _ in schedule.hops} == set(range(count)), "every gradient is drawn"
    assert schedule.depth <= 2 * size + 2 * max(count // size - 1, 1).bit_length()


def test_every_picture_of_the_gallery_has_its_drawing(scripts_on_path):
    import draw_gallery

    assert set(re.findall(r"\((gallery_\w+)\.png\)", (ROOT / "docs" / "gallery.md").read_text())) == set(draw_gallery.PICTURES)
