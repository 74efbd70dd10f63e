"""The rooms of the house and the arrows between them: CONTRIBUTING.md says what must never be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"sjepa_deploy": "sjepa_deploy", "export": "sjepa_deploy.export", "runtime": "sjepa_deploy.runtime"}


def modules() -> dict[str, Path]:
    """Return the file of every module."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "sjepa_deploy" and inside[0] in ("export", "runtime"):
                continue  # the symlinks
            found[".".join((package, *(part for part in inside if part != "__init__")))] = path
    return found


MODULES = modules()


def module_of(name: str) -> str | None:
    """Return the module that `name` is or stands in, or None for a foreign one."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """Return (module, name) of every import below `tree`, also of those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found += [(node.module, alias.name) for alias in node.names]
    return found


def arrows() -> dict[str, set[str]]:
    """Return which modules each module imports, anywhere in it. A package's face hands names on and has no arrows."""
    found = {}
    for module, path in MODULES.items():
        targets = set()
        if path.name != "__init__.py":
            for source, name in imports(ast.parse(path.read_text())):
                if target := module_of(f"{source}.{name}" if f"{source}.{name}" in MODULES else source):
                    targets.add(target)
        found[module] = targets - {module}
    return found


ARROWS = arrows()


def room(module: str) -> str:
    """Return the package of a module; what stands directly in `sjepa_deploy` or `runtime` is a room of its own."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if package in ("sjepa_deploy", "sjepa_deploy.runtime") else package


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_the_arrows_that_are_known_are_found():
    """A reader that finds nothing would hold every rule."""
    assert len(MODULES) > 100
    assert "sjepa_deploy.spec" in ARROWS["sjepa_deploy.bundle"]
    assert "sjepa_deploy.runtime.backend" in ARROWS["sjepa_deploy.runtime.backends.ort"]
    assert room("sjepa_deploy.runtime.live.lsl") == "sjepa_deploy.runtime.live"
    assert room("sjepa_deploy.spec") == "sjepa_deploy.spec"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sjepa_deploy.runtime.backends", "sjepa_deploy.runtime.bench"),
        ("sjepa_deploy.runtime.live", "sjepa_deploy.runtime.watch"),
        ("sjepa_deploy.runtime.decisions", "sjepa_deploy.runtime.live"),
        ("sjepa_deploy.runtime.decisions", "sjepa_deploy.runtime.backends"),
        ("sjepa_deploy.bundle", "sjepa_deploy.runtime"),
        ("sjepa_deploy.learning", "sjepa_deploy.runtime"),
        ("sjepa_deploy.eeg", "sjepa_deploy.runtime"),
        ("sjepa_deploy.models", "sjepa_deploy.runtime"),
        ("sjepa_deploy.pages", "sjepa_deploy.runtime"),
        ("sjepa_deploy.runtime", "sjepa_deploy.cli"),
        ("sjepa_deploy.runtime", "sjepa_deploy.export"),
        ("sjepa_deploy.runtime", "sjepa_deploy.learning"),
        ("sjepa_deploy.runtime", "sjepa_deploy.evaluation"),
        ("sjepa_deploy.learning", "sjepa_deploy.evaluation"),
        ("sjepa_deploy.serving", "sjepa_deploy.evaluation"),
        ("sjepa_deploy.export", "sjepa_deploy.evaluation"),
        ("sjepa_deploy.eeg", "sjepa_deploy.learning"),
        ("sjepa_deploy.eeg.steps", "sjepa_deploy.spec"),
    ],
)
def test_an_arrow_that_must_never_be(source, target):
    def inside(module, room):
        return module == room or module.startswith(room + ".")

    assert any(inside(module, source) for module in MODULES)
    assert any(inside(module, target) for module in MODULES)
    wrong = [(a, b) for a, targets in ARROWS.items() for b in targets if inside(a, source) and inside(b, target)]
    assert wrong == []


def test_a_step_needs_nothing_of_the_signal_around_it():
    """`eeg.steps` imports nothing of `eeg`: the contract of a signal is made of steps."""
    steps = "sjepa_deploy.eeg.steps"
    targets = set().union(*(ARROWS[module] for module in MODULES if module.startswith(steps)))
    assert f"{steps}.base" in targets
    assert [name for name in targets if name.startswith("sjepa_deploy.eeg") and not name.startswith(steps)] == []


def test_no_module_imports_itself_through_others():
    assert circle(ARROWS) == []


def test_no_room_imports_itself_through_others():
    rooms: dict[str, set[str]] = {}
    for module, targets in ARROWS.items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets)
    assert circle({name: targets - {name} for name, targets in rooms.items()}) == []


def test_the_runtime_imports_without_pytorch():
    """Every module of the runtime half, in an interpreter in which an import of PyTorch is an error."""
    half = ("sjepa_deploy.runtime", "sjepa_deploy.serving", "sjepa_deploy.eeg")
    names = [name for name in MODULES if name.startswith(half) or name in ("sjepa_deploy.bundle", "sjepa_deploy.parity")]
    code = "import importlib, sys; sys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    subprocess.run([sys.executable, "-W", "error", "-c", code, *names], check=True)
