"""The pages and their links are what they say, on GitHub and as a site. With PARSCAN_SITE=build in the environment the site is built, warnings being
errors, and every page of it looked through: links, anchors, and that nothing is loaded from the network.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import ROOT
from test_readme import blocks

import parscan

BUILD = "python -m sphinx -W --keep-going -c docs . out/site"
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- as files, on GitHub ------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    for _, _, code in blocks(text):
        text = text.replace(code, "\n", 1)
    return text


def links(page: Path) -> list[str]:
    """What a Markdown page names in parentheses behind brackets, pictures too; not in its code."""
    return re.findall(r"\]\(<?([^)\s>]+)", re.sub(r"(`+).+?\1", "", without_blocks(page.read_text())))


def anchors(page: Path) -> set[str]:
    """Of the headings of a Markdown page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", without_blocks(page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(next(name for i in range(100) if (name := slug + (f"-{i}" if i else "")) not in found))
    return found


def broken(page: Path) -> list[str]:
    """Links of a Markdown page to files that are not there, or to headings that they do not have."""
    found = []
    for link in links(page):
        parts = urlsplit(link)
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        missing = not target.exists() or (parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target))
        if parts.scheme not in ("http", "https", "mailto") and missing:
            found.append(link)
    return found


@each_page
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A `b`: c\n\n```bash\n# no heading\n```\n\n## Twice\n\n## Twice\n")
    good = "[x](other.md#a-b-c) [x](other.md#twice-1) [x](https://example.org/#y) [a b](<other.md>) `[x](in_code.md)`\n"
    page.write_text(good)
    assert broken(page) == []
    page.write_text(good + "[x](nowhere.md) [x](other.md#no-heading) ![x](other.png) [x](#here)\n")
    assert broken(page) == ["nowhere.md", "other.md#no-heading", "other.png", "#here"]


def test_every_page_is_in_the_table_of_contents():
    listed = [line for language, _, code in blocks((ROOT / "docs" / "index.md").read_text()) if language == "{toctree}" for line in code.splitlines()]
    patterns = [os.path.normpath(Path("/docs", re.sub(r"^.* <(.*)>$", r"\1", line))) for line in listed if line and not line.startswith(":")]
    names = ["/" + str(page.relative_to(ROOT).with_suffix("")) for page in [*PAGES, *ROOT.glob("docs/**/*.rst"), *ROOT.glob("notebooks/*.ipynb")]]
    assert sorted(name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)) == ["/docs/index"]


def test_the_command_that_builds_the_site_is_the_one_that_is_told():
    assert f"```bash\n{BUILD}\n```" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.rst"))
    described = set(re.findall(r"^\.\. auto(?:function|class|decorator|module):: ([\w.]+)", text, re.MULTILINE))
    assert {name for name in parscan.__all__ if name not in described} == {"testing"} and "parscan.testing" in described


# --- as a site --------------------------------------------------------------------------------------------------------------

LOADED = {"script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"], "video": ["src", "poster"], "audio": ["src"]}
LOADED |= {"embed": ["src"], "object": ["data"], "input": ["src"], "track": ["src"], "image": ["href", "xlink:href"], "use": ["href", "xlink:href"]}
WEB = re.compile(r"\s*(?:https?:)?//")


class Page(HTMLParser):
    """What a page refers to: `links` that may be followed, what is `loaded` with it; and the `anchors` it has."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {"", "top"}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loaded += [given[name] for name in LOADED.get(tag, []) if name in given]
        self.loaded += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))
        if tag == "link":
            (self.loaded if set(given.get("rel", "").split()) & {"stylesheet", "icon", "preload", "preconnect", "modulepreload"} else self.links).append(
                given["href"]
            )
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])


def faults(site: Path) -> Iterator[str]:
    """Links that lead nowhere, anchors that are not there, and whatever is loaded that does not lie within the site."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if link in page.loaded and WEB.match(link):
                yield f"{path.relative_to(site)} loads {link}"
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or not target.is_relative_to(site):
                yield f"{path.relative_to(site)} refers to {link}"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.relative_to(site)} refers to {link}, without such an anchor"
    for path in sorted(site.rglob("*.css")):
        for link in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")]+)", path.read_text()):
            if WEB.match(link):
                yield f"{path.relative_to(site)} loads {link}"


def test_faults_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a> <a href="https://example.org/x#y">web</a> <img src="a.png"><p id="x"></p><a href="#x">x</a>')
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1><link rel="stylesheet" href="b.css?v=1"><link rel="canonical" href="https://example.org/">')
    (tmp_path / "a.png").touch()
    (tmp_path / "b.css").write_text("a { background: url('data:image/png;base64,') }")
    assert list(faults(tmp_path)) == []
    (tmp_path / "b.html").write_text('<script src="https://example.org/x.js"></script><img src="//example.org/x.png"><a href="..">up</a><a href="c.html">c</a>')
    (tmp_path / "b.css").write_text("@import 'https://example.org/x.css'; a { background: url(http://example.org/x.png) }")
    assert list(faults(tmp_path)) == [
        "a.html refers to b.html#here, without such an anchor",
        "b.html refers to ..",
        "b.html refers to c.html",
        "b.html loads https://example.org/x.js",
        "b.html loads //example.org/x.png",
        "b.css loads https://example.org/x.css",
        "b.css loads http://example.org/x.png",
    ]


@pytest.mark.skipif(os.environ.get("PARSCAN_SITE") != "build", reason="takes half a minute: PARSCAN_SITE=build python -m pytest -n 0 tests/test_site.py")
def test_the_site_is_built_without_a_warning_and_is_complete(tmp_path):
    site = tmp_path / "site"
    import_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": import_path, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *BUILD.split()[1:-1], str(site)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(faults(site)) == []
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {"index.html", "search.html", "README.html", "docs/index.html", "docs/reference/scans.html", "notebooks/README.html"} <= pages
    index = (site / "searchindex.js").read_text()  # a script: what is read from a disk can load no other data
    assert index.startswith("Search.setIndex(") and "chunked" in index
    formulas = (site / "notebooks" / "01_can_the_backward_pass_be_parallelised.html").read_text()
    assert '<math display="block">' in formulas and "<mi>ℝ</mi>" in formulas and "\\mathbb" not in formulas
