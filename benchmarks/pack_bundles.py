"""Export the bundles that `benchmarks/gpu_engines.py` runs: python benchmarks/pack_bundles.py .gpu/bundles.

Three variants at 129 channels x 200 samples, 100 Hz, random weights, batch 1..64: 37 MB in all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for variant in ("prelocal", "postlocal", "contextual"):
        contract = ["--variant", variant, "--montage", "GSN-HydroCel-129", "--n-times", "200", "--sfreq", "100"]
        flags = ["--out", str(folder / variant), "--engine", "none", "--precision", "fp32,fp16", "--force"]
        if status := run_command(export, "sjepa-export", contract + flags):
            sys.exit(status)
