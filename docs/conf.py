"""The documentation's site: `make docs`. Pages are Markdown; those in reference/ are made from the code."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from generate import write_pages  # noqa: E402

write_pages(HERE / "reference")

project = "curate"
author = "The curate maintainers"
copyright = author  # noqa: A001 Sphinx's own name for it
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
autodoc_typehints = "signature"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "curate"
html_copy_source = False
