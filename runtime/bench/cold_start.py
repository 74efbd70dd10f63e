"""Times new processes from their start until they decode.

`measure` starts a process, which notes the time at every step and prints these times. Both processes read the same monotonic
clock. The files are in the page cache of the system, as after any earlier run.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BackendOptions, open_backend
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import RunPrecision

CALLS = 60
"""Calls of a child; the second half of them is the steady state."""

TIMEOUT_S = 300.0

_CHILD = "import time; t = time.perf_counter(); from sjepa_deploy.runtime.bench.cold_start import child; child(t)"


@dataclass(frozen=True, kw_only=True)
class Started:
    """Holds the times of one cold start, in seconds.

    Attributes
    ----------
    phases : dict of str to float
        "process" (until the interpreter runs our first line), "import", "open bundle" (its hashes are verified),
        "open backend", "first call", "steady call"; "engine build" where it was built before and its record says how long.
    calls_to_steady : int
        Calls until one takes at most 1.5 times the steady call.
    peak_bytes : int or None
        Largest resident memory of the process; None where the system does not tell.
    engine : str or None
        "built" or "cached", None where the backend has none.
    """

    phases: dict[str, float]
    calls_to_steady: int
    peak_bytes: int | None
    engine: str | None = None


def measure(
    bundle: Path, backend: str, precision: RunPrecision, options: BackendOptions | None = None, *, cache: Path | None = None
) -> Started:
    """Start a process that opens `bundle` on `backend` and calls it.

    Parameters
    ----------
    bundle : Path
        A bundle.
    backend, precision : str
        What runs it.
    options : BackendOptions or None
        What is asked of it.
    cache : Path or None
        Where ``torch.compile`` keeps what it compiled; None takes its own place.

    Raises
    ------
    BackendError
        If the process fails. The message ends with the last line that it printed.
    """
    asked = encode(options or BackendOptions())
    request = {"bundle": str(bundle), "backend": backend, "precision": precision, "options": asked}
    env = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {})
    started = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired as e:
        raise BackendError(f"{backend} took more than {TIMEOUT_S:g} s to start.", "Look at the machine.") from e
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        phases = {"process": answer.pop("began") - started} | answer.pop("phases")
        return decode(Started, {"phases": phases, **answer})
    except (ValueError, IndexError, KeyError, DecodeError) as e:
        mend = "Open it with sjepa_deploy.load to see why."
        raise BackendError(f"A new process could not decode with {backend}: {lines[-1]}.", mend) from e


def child(began: float) -> None:
    """Open the backend of `measure` in this process, call it, and print the time at which each step was done."""
    from sjepa_deploy.bundle import Bundle
    from sjepa_deploy.runtime.bench.baselines import ALL_BACKENDS, import_braindecode
    from sjepa_deploy.runtime.bench.contenders import example_windows

    request = json.loads(sys.argv[1])
    entry = ALL_BACKENDS[request["backend"]]
    if entry.package == "braindecode":
        import_braindecode()
    else:
        importlib.import_module(entry.package)
    importlib.import_module(entry.target.partition(":")[0])
    imported = time.perf_counter()
    bundle = Bundle.open(request["bundle"])
    opened_bundle = time.perf_counter()
    options = decode(BackendOptions, request["options"])
    backend = open_backend(bundle, request["backend"], request["precision"], options, ALL_BACKENDS)
    opened_backend = time.perf_counter()
    batch = bundle.graph(request["precision"]).static_batch or 1
    eeg = example_windows(bundle.spec, batch, seed=0)
    latencies = []
    for _ in range(CALLS):
        start = time.perf_counter()
        backend.run(eeg)
        latencies.append(time.perf_counter() - start)
    steady = median(latencies[CALLS // 2 :])
    phases = {
        "import": imported - began,
        "open bundle": opened_bundle - imported,
        "open backend": opened_backend - opened_bundle,
        "first call": latencies[0],
        "steady call": steady,
    }
    if backend.build_seconds is not None:
        phases = {"engine build": backend.build_seconds} | phases
    answer = Started(
        phases=phases,
        calls_to_steady=next(i for i, latency in enumerate([*latencies, steady], 1) if latency <= 1.5 * steady),
        peak_bytes=_peak_bytes(),
        engine=backend.engine,
    )
    sys.stdout.write(json.dumps({"began": began, **encode(answer)}) + "\n")
    sys.stdout.flush()
    backend.close()


def _peak_bytes() -> int | None:
    """Return the high-water mark of this program: that of getrusage counts what stood here before it was executed."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
