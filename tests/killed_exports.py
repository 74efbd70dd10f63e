"""Kills exports (SIGKILL), and loads bundles while they are replaced.

``kill_exports`` kills ``sjepa-export --force`` at random moments, every fourth time as soon as the hidden folder holds a
manifest. ``load_while_replaced`` loads a bundle again and again while another process replaces the bundle.
"""

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
from torch.onnx._internal.exporter._registration import ONNXRegistry

import sjepa_deploy
import sjepa_deploy.export.to_bundle
from sjepa_deploy.bundle import Bundle, new_bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export
from sjepa_deploy.errors import BundleError

MODEL = ("--variant", "prelocal", "--channels", "4", "--n-times", "152", "--precision", "fp32", "--engine", "none", "--force")


def start_export(out: Path, seed: int) -> int:
    """Start an export of a model with random weights, and return its process."""
    child = os.fork()
    if not child:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(run_command(export, "sjepa-export", [*MODEL, "--seed", str(seed), "--out", str(out)]))
    return child


def export_whole(out: Path, seed: int) -> None:
    """Export a model, and fail if the status is not 0."""
    _, status = os.waitpid(start_export(out, seed), 0)
    assert status == 0, f"the export to {out} ended with status {os.waitstatus_to_exitcode(status)}"


def contents(out: Path) -> dict[str, str] | None:
    """Return the hashes of the files of the bundle at `out`, or None if nothing is there. Another bundle is an error."""
    return Bundle.open(out).manifest.files if out.exists() else None


def hidden(out: Path) -> list[Path]:
    """Return what stands hidden beside the place `out`."""
    return [entry for entry in out.parent.iterdir() if entry.name.startswith(f".{out.name}.")]


def kill_exports(n_kills: int, folder: Path) -> Counter[str]:
    """Kill exports, and fail if a place holds anything but nothing, the old bundle whole or the new one whole.

    Each second place holds a bundle before. Up to four kills hit a place; then an export of the place that is not killed must
    clean up.
    """
    share = functools.cache(ONNXRegistry.from_torchlib)  # each export would build it anew, in two thirds of its time
    ONNXRegistry.from_torchlib = staticmethod(share)
    share()
    export_whole(folder / "old", seed=1)
    began = time.monotonic()
    export_whole(folder / "new", seed=2)
    lasts = time.monotonic() - began
    old, new = contents(folder / "old"), contents(folder / "new")
    assert old != new
    draw, found = random.Random(0), Counter(kills=0, places=0)
    while found["kills"] < n_kills:
        out = folder / f"place{found['places']}"
        before = None
        if found["places"] % 2:
            shutil.copytree(folder / "old", out)
            before = old
        found["places"] += 1
        for _ in range(min(4, n_kills - found["kills"])):
            child = start_export(out, seed=2)
            if found["kills"] % 4 == 3:  # as near to the move as can be seen, and up to 4 ms later
                while not list(out.parent.glob(f".{out.name}.partial-*/manifest.json")) and not os.waitpid(child, os.WNOHANG)[0]:
                    pass
                time.sleep(draw.uniform(0, 0.004))
            else:
                time.sleep(draw.uniform(0, lasts))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(child, 0)
                found["kills"] += os.WIFSIGNALED(status)
            there, left = contents(out), hidden(out)
            assert there in (before, new), f"{out} holds another bundle"
            assert len(left) <= 1, "what a killed export left was not deleted by the next one"
            found["nothing there" if there is None else "old bundle" if there == old else "new bundle"] += 1
            found["hidden folders left"] += len(left)
            before = there
        export_whole(out, seed=2)
        assert contents(out) == new
        assert not hidden(out)
    found["hidden folders left by the next export"] = 0
    return found


def load_while_replaced(seconds: float, folder: Path) -> Counter[str]:
    """Load a bundle in two processes while another one replaces it, and fail if a loaded bundle gives the outputs of the other.

    `folder` must hold the bundles ``old`` and ``new``.
    """
    wanted = {}
    windows = np.float32(np.random.default_rng(0).normal(0, 20, (4, 4, 152)))
    for name in ("old", "new"):
        with sjepa_deploy.load(folder / name) as predict:
            wanted[predict.bundle.manifest.digest] = predict.predict(windows)
    out = folder / "replaced"
    shutil.copytree(folder / "old", out)
    context = multiprocessing.get_context("spawn")
    ends, counts = time.time() + seconds, context.Queue()
    loaders = [context.Process(target=_load_until, args=(ends, out, windows, wanted, counts)) for _ in range(2)]
    for loader in loaders:
        loader.start()
    found, names = Counter(replacements=0), ("new", "old")
    while time.time() < ends:
        with new_bundle(out, force=True) as partial:
            shutil.copytree(folder / names[found["replacements"] % 2], partial, dirs_exist_ok=True)
        found["replacements"] += 1
    for loader in loaders:
        found.update(counts.get(timeout=60))
        loader.join()
        assert loader.exitcode == 0
    return found


def _load_until(ends, out, windows, wanted, counts) -> None:
    found = Counter(loads=0, refused=0, mixed=0)
    while time.time() < ends or not found["loads"]:
        try:
            with sjepa_deploy.load(out) as predict:
                outputs = predict.predict(windows)
                found["loads"] += 1
                found["mixed"] += not np.allclose(outputs, wanted[predict.bundle.manifest.digest], atol=1e-6)
        except BundleError as e:
            if "was replaced" not in str(e):
                raise
            found["refused"] += 1
    counts.put(found)
