"""Sphinx: docstrings here are reStructuredText (``Equivalent to::``), pages are Markdown by MyST."""

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
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes are in the text
autodoc_default_options = {"members": True}
add_module_names = False
exclude_patterns = ["_build"]
# A cell's or a layer's docstring speaks for it; torch's own members are in torch's documentation.
autodoc_inherit_docstrings = False
