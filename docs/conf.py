"""The site, from the whole repository: `python -m sphinx -W --keep-going -c docs . out/site`. Nothing is fetched, to build it or to read it.

The source folder is the root of the repository, so that pages, notebooks, README.md and their links to one another are what they are on GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from docutils import nodes
from docutils.utils import unescape
from math_core import LatexError, LatexToMathML
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.matching import patfilter
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

import parscan

project, author, release = "parscan", "The parscan authors", parscan.__version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]

root_doc = "docs/index"
include_patterns = ["docs/**.md", "docs/**.rst", "notebooks/*.ipynb", "notebooks/*.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "out", "dist", "build", "docs/results", "docs/_*"]

# Markdown and notebooks, which are shown as they are stored.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables and formulas in outputs, too
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4

# Docstrings: what stands in backticks is a link where it names something public, else code.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", r"(?!parscan\.).*")]
autodoc_typehints = "none"  # pytrees: what a parameter may be is said beside its name, in shapes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, as of parameters
maximum_signature_line_length = 100
viewcode_line_numbers = True

html_theme = "furo"
html_title = f"parscan {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "to_index.html"}
html_math_renderer = "mathml"
html_show_search_summary = False  # it would be fetched, which browsers refuse to pages that are read from a disk
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_mathml = LatexToMathML(fancy_error=False).convert_with_local_state


def _math(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas become MathML here, so that no script has to set them where they are read."""
    block = isinstance(node, nodes.math_block)
    try:
        converted = _mathml(unescape(node.astext()), displaystyle=block)
    except LatexError as error:
        raise ExtensionError(f"{node.astext()!r} is no formula: {error}") from None
    self.body.append(f'<div class="math">{converted}</div>' if block else converted)
    raise nodes.SkipNode


def _pages_there_are(app: Sphinx, docname: str, source: list[str]) -> None:
    """A pattern in the table of contents may match nothing, of which Sphinx would warn."""
    if docname == app.config.root_doc:
        found, here = app.env.found_docs, posixpath.dirname(docname)
        globs = re.findall(r"^\S*\*\S*$", source[0], re.MULTILINE)
        for glob in globs:
            if not patfilter(found, posixpath.normpath(posixpath.join("/", here, glob)).lstrip("/")):
                source[0] = source[0].replace(f"\n{glob}\n", "\n")


def _folders_are_text(app: Sphinx, doctree: nodes.document) -> None:
    """A link to a folder of the repository, of which the site has no page, is its text."""
    here = Path(app.srcdir, app.env.docname).parent
    for link in list(doctree.findall(pending_xref)):
        if link["reftype"] == "myst" and here.joinpath(link["reftarget"]).is_dir():
            link.replace_self(link.children)


def _no_way_back(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Listings of source lead back to the wrong anchor where a module's names are described under those of two packages: they need not lead back."""
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r'<a class="viewcode-back".*?</a>', "", context["body"])


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("source-read", _pages_there_are)
    app.connect("doctree-read", _folders_are_text)
    app.connect("html-page-context", _no_way_back)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
