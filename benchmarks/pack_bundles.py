"""Export the bundles of the GPU benchmarks: python benchmarks/pack_bundles.py .gpu/bundles [--wide].

Three variants at 129 channels x 200 samples, 100 Hz, random weights, batch 1..64: 37 MB in all. With --wide also the same models
for batches of up to 1024, as prelocal-1024, postlocal-1024 and contextual-1024: as much again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export


def pack(bundle: Path, *flags: str) -> None:
    """Export one bundle without engines, or end the process."""
    common = ["--out", str(bundle), "--engine", "none", "--precision", "fp32,fp16", "--force"]
    if status := run_command(export, "sjepa-export", [*flags, *common]):
        sys.exit(status)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for variant in ("prelocal", "postlocal", "contextual"):
        pack(folder / variant, "--variant", variant, "--montage", "GSN-HydroCel-129", "--n-times", "200", "--sfreq", "100")
        if "--wide" in sys.argv[2:]:
            pack(folder / f"{variant}-1024", "--checkpoint", str(folder / variant / "checkpoint"), "--max-batch", "1024")
