"""Configuration of the documentation site: `make docs` builds it from the Markdown files as they are.

The source folder is the repository, so that links between README.md, CONTRIBUTING.md and docs/ are the same here as on
GitHub. What GitHub does not need is added by two extensions beside this file: the sidebar is made from the lists of
docs/index.md, and the API reference from the package's own tables of names. Nothing is fetched, neither by the build
nor by the built pages.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "longlens"
author = "the authors of longlens"
project_copyright = "the authors of longlens, Apache-2.0"
version = release = installed_version("longlens")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sidebar", "api_pages", "docstrings"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "examples/README.md", "src/**/README.md"]
exclude_patterns = ["docs/_extensions/**"]

myst_enable_extensions = ["deflist"]
# anchors of headings as GitHub makes them
myst_heading_anchors = 4

# notebooks are stored without outputs and run by each build; an error in one is an error of the build
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_in_temp = True
nb_merge_streams = True
# progress bars and the like
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# quotation marks of code and options stay as they are typed
smartquotes = False
# a word between single backticks is code, as in Markdown
default_role = "code"

html_theme = "furo"
# the pages are in a folder of their own, as their sources are; the first page leads there
html_extra_path = ["_root"]
html_title = f"longlens {release}"
html_static_path = ["_static"]
html_css_files = ["longlens.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
