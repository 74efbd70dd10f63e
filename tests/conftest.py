import functools
import json

import pytest
from bundles import export_small, small_spec

from sjepa_deploy.bundle import Bundle


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory):
    """Return a function that exports a small model, once for each set of arguments: make_bundle(variant, **spec).

    `model_seed` and the options of `to_bundle` may stand among the fields of the spec. Tests share what it returns, and alter
    copies of it only.
    """
    options = ("model_seed", "precisions", "max_batch", "static_batch", "parity_windows")

    @functools.cache
    def make(variant="prelocal", **fields) -> Bundle:
        chosen = {name: fields.pop(name) for name in options if name in fields}
        path = tmp_path_factory.mktemp(variant) / "bundle"
        return export_small(path, small_spec(variant, **fields), **chosen)

    return make


@pytest.fixture(scope="session")
def manifest_json(make_bundle):
    """Return the text of a real manifest with three precisions; parse it anew to alter it."""
    text = (make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path / "manifest.json").read_text()
    assert json.loads(text)["parity"]
    return text


@pytest.fixture(scope="module")
def browser():
    """Return a `browser.Browser`: Chromium without a window, shared by the tests of a module."""
    from browser import chromium  # most runs need no Selenium

    with chromium() as started:
        yield started
