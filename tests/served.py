"""A real `tritonserver` for tests, and what they do to it."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.serving.server import INSTALL, Server

ROOT = Path(__file__).parents[1]


def provide_tritonserver(folder: Path) -> None:
    """Install the server into `folder` where the environment has none: no extra can name it (see `INSTALL`)."""
    if importlib.util.find_spec("pytriton") is not None:
        return
    if not (folder / "pytriton").is_dir():
        pip = [sys.executable, "-m", *INSTALL.split(), "--quiet", "--target", str(folder)]
        subprocess.run(pip, check=True, timeout=240)
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))  # of commands


def windows_of(spec, subject: int, n: int) -> np.ndarray:
    """Return windows in microvolts, shape (n, n_chans, n_times), that only this subject has."""
    return eeg_windows(n, *spec.input_shape, spec.sfreq, np.random.default_rng(1000 + subject)).astype(np.float32)


def windows_and_runs(server: Server, model: str) -> tuple[int, int]:
    """Return how many windows the server has decoded with `model`, and in how many runs."""
    with server._client() as (client, _):
        statistics = client.get_inference_statistics(model).model_stats
    return sum(each.inference_count for each in statistics), sum(each.execution_count for each in statistics)


class Subject:
    """One subject whose windows are decoded one after another in a thread, with the outcome of each."""

    def __init__(self, client, number: int, n_windows: int = 64) -> None:
        self.client, self.number = client, number
        self.windows = windows_of(client.spec, number, n_windows)
        self.outcomes: list[object] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._decode, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def window(self, i: int) -> np.ndarray:
        i %= len(self.windows)
        return self.windows[i : i + 1]

    def _decode(self) -> None:
        while not self._stop.is_set():
            try:
                outcome = self.client.infer(self.window(len(self.outcomes)))
            except SjepaError as e:
                outcome = e
            self.outcomes.append(outcome)

    def wait_for(self, n: int) -> None:
        """Wait until `n` more windows have an outcome. A hang is one window that has none for a minute."""
        until = len(self.outcomes) + n
        known, since = -1, time.monotonic()
        while len(self.outcomes) < until:
            if known != len(self.outcomes):
                known, since = len(self.outcomes), time.monotonic()
            assert time.monotonic() < since + 60, f"subject {self.number} does not get on after {known} windows"
            assert self._thread.is_alive(), f"the thread of subject {self.number} ended after {known} windows"
            time.sleep(0.01)
