"""How Sphinx builds these pages: ``sphinx-build -W -b html docs OUT``, without a network."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

# argparse breaks the lines of --help at this width, and Matplotlib needs no screen.
os.environ["COLUMNS"] = "80"
os.environ["MPLBACKEND"] = "Agg"

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import fastadam

project = "fastadam"
author = "The fastadam developers"
copyright = "2026, the fastadam developers"  # noqa: A001
release = version = fastadam.__version__

extensions = [
    "execute",  # _ext/execute.py: the pages' own code, run while they are built
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_ext", "generated"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings are numpydoc's. They state types themselves, so signatures need not.
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_mock_imports = [] if find_spec("torch") else ["torch"]
default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"

doctest_global_setup = "from fastadam.schedules import *"

html_theme = "furo"
html_title = f"fastadam {release}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["fastadam.css"]


def list_references(app, what, name, obj, options, lines):  # noqa: ARG001
    """Make a list of numpydoc's numbered references, whose numbers would clash on a page."""
    lines[:] = [re.sub(r"^\.\. \[\d+\] ?", "*  ", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", list_references)
