"""What a notebook shows of a plan, and what is printed of gradients."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest

import parscan
from parscan import drawing, notebook

W = jnp.ones((3, 3))
SVG = "{http://www.w3.org/2000/svg}"


def step(h, _):
    return jnp.tanh(h @ W), None


def by(method, f=step, init=None, **options):
    return parscan.plan(f, jnp.zeros((2, 3)) if init is None else init, None, 5, method=method, **options)


def still(h, _):
    return h * 0.5, None


def picture(plan):
    """Its elements; there is nothing in it that is no XML."""
    return ElementTree.fromstring(re.search("<svg.*</svg>", plan._repr_html_())[0])


def network():
    layers = [lambda w, h: jnp.tanh(h @ w), lambda w, h: jnp.tanh(h @ w)]
    return layers, [jnp.ones((4, 4)), jnp.ones((4, 2))], [jnp.ones((2, 4))]


class Read(HTMLParser):
    """The texts of a page's cells; that what is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.mark.parametrize(
    "plan", [lambda: by("tree"), lambda: by("auto"), lambda: by("lax"), lambda: parscan.plan(*network()), lambda: by("walk", init=jnp.zeros((2, 0, 3)))]
)
def test_the_table_says_what_the_printed_plan_says(plan):
    cells = Read(plan()._repr_html_()).cells
    assert "".join("".join(cells).split()) == "".join(str(plan()).split())


def test_there_is_a_picture_where_jacobians_are_formed():
    for plan in (by("tree"), by("sequential"), parscan.plan(*network(), method="tree")):
        assert picture(plan).find(SVG + "title").text == plan.spy().get_title()
    assert "<svg" not in by("lax")._repr_html_()


def test_text_is_escaped():
    page = notebook.page([("<b>", "a & <script>")], [(("", "<i>"), [("x", "<")])], "")
    assert Read(page).cells == ["<b>", "a & <script>", "", "<i>", "x", "<"]
    assert "<script>" not in page and "<b>" not in page


def test_blocks_stand_where_they_are():
    """Two of three coordinates each, in a square of six."""
    svg = picture(by("tree"))
    blocks, entries = [path.get("d") for path in svg.iter(SVG + "path")]
    half = notebook.SIDE / 2
    assert blocks == f"M0.5 0.5h{half:.4g}v{half:.4g}h-{half:.4g}zM{half + 0.5:.4g} {half + 0.5:.4g}h{half:.4g}v{half:.4g}h-{half:.4g}z"
    assert entries.count("M") == 6 and entries.count(f"h{half:.4g}") == 6  # each row of cells one run


def test_layers_that_change_the_width_are_drawn_in_proportion():
    layers, params, start = network()
    svg = picture(parscan.plan(layers[1:], params[1:], start, method="tree"))
    assert float(svg.get("height")) - 1 == (float(svg.get("width")) - 1) / 2


def test_what_a_claim_leaves_out_has_the_colour_of_text():
    wrong = picture(by("tree", structure="diagonal"))
    assert [path.get("fill") for path in wrong.iter(SVG + "path")][1:] == ["currentColor", notebook.COLOURS[0]]


@pytest.mark.parametrize("size", [10, 1000, drawing.MOST_DRAWN + 2])
def test_pictures_are_small(size):
    page = by("walk", still, jnp.zeros(size))._repr_html_()
    assert len(page) < 12_000
    outlined, drawn = size <= notebook.MOST_OUTLINED, size <= drawing.MOST_DRAWN
    assert len(list(picture(by("walk", still, jnp.zeros(size))).iter(SVG + "path"))) == 1 + drawn
    assert ('fill-opacity="0.25"' in page) == outlined


def test_no_library_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<svg" in by("tree")._repr_html_()


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4) for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


@pytest.mark.parametrize("colour", notebook.COLOURS)
def test_colours_stand_out_from_light_and_from_dark(colour):
    """3 : 1, what WCAG 2.1 asks of graphics, on white and on a dark theme's ground."""
    ratios = [(max(pair) + 0.05) / (min(pair) + 0.05) for pair in ((luminance(colour), luminance(ground)) for ground in ("#ffffff", "#1e1e1e"))]
    assert min(ratios) >= 3


# --- gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_print_shapes_and_dtypes():
    layer = lambda p, h: jnp.tanh(h @ p["w"]) * p["n"].sum().astype(h.dtype)
    params = {"w": jnp.ones((5, 3, 3), "float32"), "n": jnp.ones((5, 2), "int32")}
    y, activations = parscan.forward(layer, params, jnp.ones(3, "float32"))
    grads = parscan.parallel_backward(layer, params, activations, y, method="tree")
    assert repr(grads) == f"Gradients(params={{'n': float0[5,2], 'w': float32[5,3,3]}}, activations=float32[6,3], plan={grads.plan!r})"
    said = []
    jax.jit(lambda g: said.append(repr(g)))(parscan.parallel_backward(layer, params | {"n": jnp.ones((5, 2))}, activations, y, method="tree"))
    assert "'w': float32[5,3,3]" in said[0]
    assert "activations=None" in repr(jax.tree.map(lambda _: None, grads)) and repr(jax.eval_shape(lambda: grads)) == repr(grads)


def test_of_long_lists_the_beginning_is_printed():
    layers, params = [lambda w, h: h * w] * 50, [jnp.ones(3)] * 50
    y, activations = parscan.forward(layers, params, jnp.ones(3))
    said = repr(parscan.parallel_backward(layers, params, activations, y, method="tree"))
    assert len(said) < 300 and "float64[3], ...]" in said
