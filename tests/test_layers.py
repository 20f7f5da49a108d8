"""The house plan of the package is drawn from its imports, and the one in docs is today's."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
from support import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def draw_layers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import draw_layers

    return draw_layers


def reach(edges, name):
    return {name}.union(*(reach(edges, other) for other in edges[name]))


def test_the_picture_is_todays(draw_layers):
    assert (ROOT / "docs" / "layers.svg").read_text() == draw_layers.drawing(), "python scripts/draw_layers.py draws it anew"


def test_every_module_is_drawn_once_with_what_it_is_for(draw_layers):
    tree = ElementTree.fromstring(draw_layers.drawing())
    drawn = [text.text for text in tree.iter(SVG + "text")]
    home = ROOT / "parscan"
    there = {path.stem for path in home.glob("*.py")} | {path.parent.name for path in home.glob("*/__init__.py")}
    assert sorted(drawn) == sorted(there - {"__init__"})
    assert all(group.find(SVG + "title").text for group in tree.iter(SVG + "g"))


def test_what_is_left_out_follows_from_what_is_drawn(draw_layers):
    floors = draw_layers.floors()
    depth = {name: i for i, floor in enumerate(floors) for name in floor}
    edges = {name: draw_layers.imports(name) for name in depth}
    assert edges["scanning"] >= {"planning", "recurrence", "checks", "jaxprs"} and "checks" not in edges["machines"]
    assert all(depth[other] > depth[name] for name, others in edges.items() for other in others)
    drawn = draw_layers.reduced(edges)
    assert sum(map(len, drawn.values())) < sum(map(len, edges.values())) / 2
    for name in edges:
        assert reach(drawn, name) == reach(edges, name) and drawn[name] <= edges[name]


def test_boxes_and_lanes_do_not_overlap(draw_layers):
    house = draw_layers.House.of(
        draw_layers.floors(), draw_layers.reduced({name: draw_layers.imports(name) for floor in draw_layers.floors() for name in floor})
    )
    for floor in house.floors:
        ends = [(house.at[node] - draw_layers._width(node) / 2, house.at[node] + draw_layers._width(node) / 2) for node in floor]
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(ends))


def test_places_are_the_nearest_without_overlap(draw_layers):
    gap = draw_layers.GAP
    assert draw_layers._apart([0, 100], [10, 10]) == [0, 100]
    assert draw_layers._apart([0, 0], [10, 10]) == [-(10 + gap) / 2, (10 + gap) / 2]
