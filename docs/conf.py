"""Settings of the site: `python -m sphinx -W -b html docs docs/_build/html` builds it.

With DOCS_INTERSPHINX=1 it links to the pages of PyTorch, TorchRL and others, which takes a network.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from api_pages import write_pages  # noqa: E402
from sphinx.util import inspect  # noqa: E402

import torchrl_amago  # noqa: E402

project = html_title = "torchrl_amago"
author = "The torchrl_amago authors"
copyright = author
version = release = torchrl_amago.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "figures"]
html_theme = "furo"
html_show_sourcelink = False
templates_path = []

# Headings get the anchors that they have on GitHub, so that links work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
# Code is copied without prompts.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

default_role = "code"  # docstrings quote code with single backticks
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True

if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        name: (f"https://{place}/", None)
        for name, place in {
            "python": "docs.python.org/3",
            "numpy": "numpy.org/doc/stable",
            "torch": "docs.pytorch.org/docs/stable",
            "torchrl": "docs.pytorch.org/rl/stable",
            "tensordict": "docs.pytorch.org/tensordict/stable",
            "gymnasium": "gymnasium.farama.org",
        }.items()
    }

write_pages(HERE / "api")


def show_init(app, what, name, value, options, signature, annotation):
    """Show the arguments of `__init__` where a base class hides them behind `__new__`."""
    if what == "class" and signature == "(*args, **kwargs)":
        found = inspect.signature(value.__init__, bound_method=True)
        signature = inspect.stringify_signature(found, unqualified_typehints=True)
    return signature, annotation


def setup(app):
    """Connect the function above."""
    app.connect("autodoc-process-signature", show_init)
