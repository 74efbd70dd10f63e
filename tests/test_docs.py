"""The pages: their commands exist, the tutorial runs line by line, and what is made from the code is complete."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sjepa_deploy.cli import COMMANDS, _command

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
SCRIPTS = Path(sys.executable).parent


def code(text):
    """Return the code of a page: fenced, indented, and between backticks."""
    fenced = re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (sjepa-.*)$", text, re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`(sjepa-[^`]+)`", text)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_options_that_commands_have(page):
    for line in code(page.read_text()).splitlines():
        for name, arguments in re.findall(r"\bsjepa[- ]([a-z]+)\b([^|#]*)", line):
            if name not in COMMANDS:
                continue
            known = {spelling for option in _command(name).params for spelling in (*option.opts, *option.secondary_opts)}
            known |= {"--help", "-h"}
            named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", arguments.partition("sjepa-")[0]))
            assert named <= known, f"{page.name}: {line.strip()}: {sorted(named - known)}"


def test_every_command_has_a_page_that_shows_it():
    pages = "\n".join(code(page.read_text()) for page in PAGES)
    for name in COMMANDS:
        assert re.search(rf"^ *sjepa-{name} ", pages, re.MULTILINE), name


def test_the_tutorial_runs_line_by_line(tmp_path):
    """Each block, as it stands, in an empty folder. The score at its end is better than chance, and the same live."""
    text = (ROOT / "docs/tutorial.md").read_text()
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    assert {line.split()[0] for kind, block in blocks if kind == "sh" for line in block.splitlines()} == {
        *("sjepa-finetune", "sjepa-export", "sjepa-verify", "sjepa-stream")
    }
    said = ""
    for kind, block in blocks:
        command = [sys.executable, "-W", "error", "-c", block] if kind == "python" else ["bash", "-euc", block]
        path = {"PATH": f"{SCRIPTS}:/usr/bin:/bin", "COLUMNS": "100"}
        done = subprocess.run(command, cwd=tmp_path, env=_environment() | path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        said = done.stdout
    scores = dict(re.findall(r"│ (PyTorch|offline|live) +│[^│]*│ +([0-9.]+) │", said))
    assert float(scores["PyTorch"]) > 0.75
    assert scores["live"] == scores["offline"] == scores["PyTorch"]
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) > 20


@pytest.mark.parametrize("example", sorted((ROOT / "docs/gallery").glob("[0-9]*.py")), ids=lambda file: file.stem)
def test_examples_import_what_a_reader_has(example):
    """What a downloaded example imports is installed, or its first lines say where to download it."""
    tree = ast.parse(example.read_text())
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    copied = re.search(r'"copyfile_regex": r"(.*?)"', (ROOT / "docs/conf.py").read_text())[1]
    for name in {name.partition(".")[0] for name in named} - sys.stdlib_module_names - {"sjepa_deploy"}:
        file = f"{name}.py"
        if (example.parent / file).exists():
            assert f"<{file}>`" in ast.get_docstring(tree), f"{example.name} does not say where {file} is"
            assert re.match(copied, file), f"the site does not ship {file}"
        else:
            distributions = importlib.metadata.packages_distributions().get(name, ())
            assert distributions, f"{example.name} imports {name}, which no package gives"
            required = (ROOT / "pyproject.toml").read_text().lower()
            assert any(d.lower() in required for d in distributions), f"{name} is in no extra"


def _environment():
    import os

    return dict(os.environ)


def test_options_of_every_command_are_in_the_reference(tmp_path, monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("numpydoc")
    monkeypatch.syspath_prepend(ROOT / "docs/_ext")
    import reference

    monkeypatch.setattr(reference, "MADE", tmp_path)
    reference.make_pages(None)
    for name in COMMANDS:
        page = (tmp_path / f"commands/{name}.md").read_text()
        for option in _command(name).params:
            assert not isinstance(option, click.Option) or f"{max(option.opts, key=len)}" in page
    errors = (tmp_path / "errors.md").read_text()
    assert errors.count("\n| ") > 200
    assert "## BundleError" in errors
    for page, words in (("configuration", "`bad_channels`"), ("manifest", "`parity`"), ("metrics", "balanced_accuracy")):
        assert words in (tmp_path / f"{page}.md").read_text()
