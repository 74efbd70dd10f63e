"""Configures the site: ``make docs`` builds it offline, and every warning is an error."""

import importlib.metadata
import logging
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "sjepa-deploy"
author = "The sjepa-deploy developers"
copyright = "The sjepa-deploy developers"
release = importlib.metadata.version("sjepa-deploy")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "reference",  # of this folder's _ext: pages that are made from the code
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_built", "gallery", "**/__pycache__"]
nitpicky = False
default_role = None

html_theme = "furo"
html_title = f"sjepa-deploy {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/sjepa-deploy/sjepa-deploy/",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_copy_source = False
html_show_sphinx = False
highlight_language = "none"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_validation_checks = set()

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

from sjepa_deploy.runtime.bench.baselines import import_braindecode  # noqa: E402

import_braindecode()  # also where its torchaudio does not load

sys.path.insert(0, str(HERE / "gallery"))
import tutorial_bundle  # noqa: E402

tutorial_bundle.FOLDER = HERE / "_made" / "tutorial"

for name in ("onnxscript", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.WARNING)

sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["_made/gallery"],
    "filename_pattern": r"/\d\d_.*\.py",
    "ignore_pattern": r"tutorial_bundle\.py",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "min_reported_time": 0,
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "plot_gallery": "True",
    "remove_config_comments": True,
    "copyfile_regex": r"tutorial_bundle\.py$",  # examples import it: readers download it beside them
    "capture_repr": (),
    "reset_modules": ("matplotlib",),
    "first_notebook_cell": None,
}
suppress_warnings = ["config.cache"]
