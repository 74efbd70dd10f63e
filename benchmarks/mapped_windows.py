"""Windows that do not fit into memory: 20 GB in a saved file are trained on, and the anonymous memory of the process is watched.

    python benchmarks/mapped_windows.py --out benchmarks/results/mapped_windows_HARDWARE_DATE

The file is a sparse ``.npz``: all windows are zero but those of the second class, which have a 2 Hz wave in one channel. A
PreLocal sees every window once. Refused is a run that takes 4 GiB of anonymous memory (RssAnon of Linux), or that does not
find the wave.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import subprocess
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from sjepa_deploy.learning.data import DataConfig, Target
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.spec import Preprocessing

N_CHANS, N_TIMES, SFREQ = 129, 2000, 100.0
N_SUBJECTS = 20
LIMIT = 4 * 2**30


def write_sparse(path: Path, n_windows: int) -> None:
    """Write windows whose zeros take no space on the disk."""
    target = np.random.default_rng(0).integers(0, 2, n_windows)
    shape = (n_windows, N_CHANS, N_TIMES)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in {
            "ch_names": np.array([f"E{i}" for i in range(N_CHANS)]),
            "sfreq": np.array(SFREQ),
            "subject": np.sort(np.arange(n_windows) % N_SUBJECTS).astype(str),
            "targets": np.array(["nothing", "wave"])[target],
        }.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        info, file = zipfile.ZipInfo("eeg.npy"), archive.fp
        assert file is not None
        file.seek(archive.start_dir)
        info.header_offset = file.tell()
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
        info.CRC = 0  # of 20 GB, which nobody checks in a file that is mapped
        info.file_size = info.compress_size = head.tell() + 4 * int(np.prod(shape))
        file.write(info.FileHeader(zip64=True) + head.getvalue())
        begin = file.tell()
        file.seek(begin + 4 * int(np.prod(shape)))
        archive.start_dir = file.tell()
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
    eeg = np.memmap(path, np.float32, "r+", offset=begin, shape=shape)
    wave = (20 * np.sin(2 * np.pi * 2 * np.arange(N_TIMES) / SFREQ)).astype(np.float32)
    for i in np.flatnonzero(target):
        eeg[i, i % 3] = wave
    eeg.flush()


class Watched(threading.Thread):
    """Notes the largest anonymous memory of the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        while not self.done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.peak = max(self.peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))


def main() -> None:
    """Write the file, train on it, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, help="where the file is written  [default: the folder for temporary files]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_windows = int(args.gigabytes * 1e9 / (4 * N_CHANS * N_TIMES))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "windows.npz"
        write_sparse(path, n_windows)
        data = DataConfig(
            source=(str(path),),
            n_times=N_TIMES,
            preprocessing=Preprocessing(reference="none", l_freq=None, h_freq=None),
            target=Target(kind="column", task="classification"),
            check_unit=False,  # most of the windows are flat
        )
        config = FinetuneConfig(variant="prelocal", data=data, engine=Engine(max_epochs=1, batch_size=64, accelerator="cpu"))
        watched, start = Watched(), time.monotonic()
        watched.start()
        result = finetune(config, Path(folder) / "model", tell_epoch=print)
        watched.done.set()
        seconds, size, disk = time.monotonic() - start, path.stat().st_size, path.stat().st_blocks * 512
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    found = {
        "hardware": f"{platform.machine()}, 1 thread",
        "commit": commit,
        "command": f"python benchmarks/mapped_windows.py --out {args.out}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "file_bytes": size,
        "bytes_on_disk": disk,
        "n_windows": n_windows,
        "steps": result.fitted.steps,
        "seconds": seconds,
        "peak_anonymous_bytes": watched.peak,
        "balanced_accuracy": result.test["balanced_accuracy"].value,
        "auc": result.test["auc"].value,
    }
    line = (
        f"{n_windows} windows, {size / 1e9:.1f} GB ({disk / 1e9:.2f} on the disk), {found['steps']} steps in {seconds:.0f} s: "
        f"at most {watched.peak / 2**30:.2f} GiB of anonymous memory; AUC {found['auc']:.3f}"
    )
    print(line)
    assert watched.peak < LIMIT, line
    assert result.test["auc"].value > 0.95, line
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(f"# mapped_windows\n\n`{found['command']}`, commit {commit}\n\n{line}.\n")


if __name__ == "__main__":
    main()
