"""Check the distributions in a folder: ``python tests/check_wheel.py dist`` (run by ``make package``)."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"sjepa_deploy": "sjepa_deploy", "export": "sjepa_deploy/export", "runtime": "sjepa_deploy/runtime"}


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


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = wanted_files()
    assert files == wanted, f"missing {sorted(wanted - files)}, unexpected {sorted(files - wanted)}"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "pyproject.toml", "export/rewrite.py", "runtime/backend.py"):
        assert name in names, f"the source distribution lacks {name}"
    sys.stdout.write(f"{wheel.name}: {len(files)} files\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
