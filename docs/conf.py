"""Sphinx: docstrings here are reStructuredText (``Equivalent to::``), pages are Markdown by MyST."""

import sys
from pathlib import Path

import pyseqnet

project = "pyseqnet"
release = pyseqnet.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
]
html_theme = "furo"
html_title = "pyseqnet"
default_role = "code"  # `name` in a docstring
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes are in the text
autodoc_default_options = {"members": True}
add_module_names = False
exclude_patterns = ["_build"]
# A cell's or a layer's docstring speaks for it; torch's own members are in torch's documentation.
autodoc_inherit_docstrings = False


sys.path.insert(0, str(Path(__file__).parent))
import pictures  # noqa: E402 - of this folder

pictures.draw(Path(__file__).parent / "_pictures")
