"""How Sphinx builds these pages: ``python -m nox -s docs``, without a network."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from emitter_anyio import __version__

project = "emitter_anyio"
author = "The emitter_anyio developers"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore = [
    ("py:class", "emitter_anyio._streams.receive.T_co"),  # whatever the stream is of
    ("py:class", "emitter_anyio.testing._virtual_time.T"),  # whatever the function returns
    # In generic aliases that were made before the class got its public name.
    ("py:class", "emitter_anyio._streams.receive.EventStream"),
    ("py:class", "emitter_anyio.testing._broker.Shared"),  # only handed to another Broker
]

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

html_theme = "furo"
html_title = f"emitter_anyio {release}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["output.css"]

# The inventories are ours: inventories/make.py makes them, so that no network is needed.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "anyio": ("https://anyio.readthedocs.io/en/stable", "inventories/anyio.inv"),
    "trio": ("https://trio.readthedocs.io/en/stable", "inventories/trio.inv"),
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

# What users see is called by the names that they import, and signatures by the words that the
# reference explains below its heading "Words in the signatures".
autodoc_type_aliases = {
    "Key": "Key",
    "Payload": "Payload",
    "Overflow": "Overflow",
    "Timeout": "Timeout",
}


def public_bases(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Leave out the classes by which our own are put together."""
    bases[:] = [base for base in bases if not base.__module__.startswith("emitter_anyio._")]


def use_written_signatures(app: Any) -> None:
    """Show overloaded methods with the signatures that the reference gives them."""
    # Not by an import statement: Sphinx is not installed where types are checked.
    pycode = import_module("sphinx.pycode")
    analyzer = pycode.ModuleAnalyzer.for_module("emitter_anyio._client")
    analyzer.analyze()
    analyzer.overloads.clear()


def setup(app: Any) -> None:
    app.connect("builder-inited", use_written_signatures)
    app.connect("autodoc-process-bases", public_bases)
