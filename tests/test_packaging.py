"""The package list in pyproject.toml is written by hand; these tests keep it true."""

import importlib
import sys
from pathlib import Path

import sjepa_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed():
    folders = {"sjepa_deploy": "sjepa_deploy", "export": "sjepa_deploy.export", "runtime": "sjepa_deploy.runtime"}
    found = set()
    for folder, package in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            if not (folder == "sjepa_deploy" and inside[:1] in (("export",), ("runtime",))):
                found.add(".".join((package, *inside)))
    found |= {"sjepa_deploy.configs", "sjepa_deploy.assets"}  # files without code
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_no_foreign_top_level_name_is_importable_from_the_package():
    assert sorted(PROJECT["tool"]["setuptools"]["package-dir"]) == sorted(
        ["sjepa_deploy", "sjepa_deploy.export", "sjepa_deploy.runtime"]
    )


def test_every_console_script_exists():
    for name, target in PROJECT["project"]["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_public_names():
    assert sorted(sjepa_deploy.__all__) == sorted(
        [
            "load",
            "BackendOptions",
            "Predictor",
            "Decoder",
            "StreamConfig",
            "Decision",
            "DecisionLayer",
            "Bundle",
            "ModelSpec",
            "EncoderSpec",
            "Preprocessing",
            "SjepaError",
        ]
    )
    assert all(hasattr(sjepa_deploy, name) for name in sjepa_deploy.__all__)
