"""Check the distributions in a folder: ``python tests/check_wheel.py dist`` (run by ``make package``)."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"sjepa_deploy": "sjepa_deploy", "export": "sjepa_deploy/export", "runtime": "sjepa_deploy/runtime"}

# Run where neither the checkout nor an editable install of it is on the path: what it imports is the wheel's.
IMPORT_ALL = """
import importlib, pathlib, sys
here, root = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).casefold()]
sys.path[:] = [str(here), *(entry for entry in sys.path if entry and not pathlib.Path(entry).resolve() in (root, root / "tests"))]
for name in sys.argv[3:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).resolve().is_relative_to(here), f"{name} is {module.__file__}, not the wheel's"
"""


def wanted_files() -> set[str]:
    """Return where every tracked source and data file must stand in the wheel."""
    wanted = set()
    for folder, target in SOURCES.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if folder == "sjepa_deploy" and inside.parts[0] in ("export", "runtime"):
                continue  # the symlinks
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(f"{target}/{inside.as_posix()}")
    return wanted


def import_all(wheel: Path) -> int:
    """Import every module of `wheel`, unpacked into a folder of its own, and return how many there are."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        files = [Path(name) for name in archive.namelist() if name.endswith(".py")]
        modules = sorted(".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files)
        subprocess.run([sys.executable, "-c", IMPORT_ALL, folder, ROOT, *modules], cwd=folder, check=True)
    return len(modules)


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = wanted_files()
    assert files == wanted, f"missing {sorted(wanted - files)}, unexpected {sorted(files - wanted)}"
    described = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    metadata = zipfile.ZipFile(wheel).read(described).decode()
    assert "\n# sjepa-deploy\n" in metadata, "the wheel has no README"
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert not (inside := [link for link in links if not link.startswith("https://")]), f"links that lead nowhere: {inside}"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "pyproject.toml", "export/rewrite.py", "runtime/backend.py"):
        assert name in names, f"the source distribution lacks {name}"
    sys.stdout.write(f"{wheel.name}: {len(files)} files, {import_all(wheel)} modules\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
