"""How many streams does one process hold on a GPU, and how many does the harness itself offer?

    python benchmarks/gpu_streams.py BUNDLE OUT.json [--precision fp16,fp32] [--rate 10] [--deadline 0.1] [--duration 1]

Runs the scenario "streams" of `sjepa-bench` on the backend "cuda", and on one that does nothing: the ceiling of the harness.
Windows are ordinary arrays, as they come from a network. Throughput on such windows, back to back, stands beside the streams.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.parity import Reference, check_parity
from sjepa_deploy.runtime.backend import Backend, BackendOptions, open_backend
from sjepa_deploy.runtime.bench import loops
from sjepa_deploy.runtime.bench.contenders import Contender, NothingBackend
from sjepa_deploy.runtime.bench.measurement import Bench
from sjepa_deploy.runtime.bench.scenarios import Streams
from sjepa_deploy.runtime.keep_warm import Clock
from sjepa_deploy.runtime.machine import commit

ROOT = Path(__file__).parents[1]
SIZES = (1, 64, 256, 1024)


def ceiling(bundle: Bundle, rate: float, deadline: float, seconds: float, most: int) -> dict[str, Any]:
    """Return whether the harness itself holds `most` streams, with a backend that does nothing."""
    contender = Contender("nothing", bundle, NothingBackend(bundle.spec), seed=0)
    due = loops.streams(most, rate, seconds, np.random.default_rng(0))
    batches = {size: contender.inputs(size) for size in (2**i for i in range(11))}
    served = loops.open_loop(contender.backend.run, batches, due.tolist(), Clock(), period=1 / rate)
    held = loops.held([served]) and float(np.percentile(served.latency, 99)) <= deadline
    return {"streams": most, "held": held, "p99 ms": 1e3 * float(np.percentile(served.latency, 99))}


def search(backend: Backend, bundle: Bundle, rate: float, deadline: float, seconds: float) -> dict[str, Any]:
    """Return the most streams held, each probe, and the throughput back to back."""
    contender = Contender("contextual", bundle, backend, seed=0)
    clock = Clock()
    streams = Streams(Bench(clock=clock, nvml=None, began=clock.now(), seconds=seconds, seed=0), contender, 12, rate, deadline)
    back_to_back = {}
    for size in SIZES:
        inputs = contender.inputs(size)
        loops.closed_loop(backend.run, inputs, clock, 0.2)
        back_to_back[str(size)] = size / float(np.median(loops.closed_loop(backend.run, inputs, clock, 0.3)))
    while not streams.finished:
        streams.block()
    probes = [
        {"streams": n, "p50 ms": 1e3 * float(np.median(s.latency)), "p99 ms": 1e3 * float(np.percentile(s.latency, 99)),
         "windows a call": float(len(s.batch) / (1 / s.batch).sum()), "utilization": loops.utilization([s]), "n": len(s.due)}
        for n, _, s in streams.probes
    ]  # fmt: skip
    return {"held": streams.n_held, "refused": streams.n_refused, "probes": probes, "windows/s back to back": back_to_back}


def judged(backend: Backend, reference: Reference, precision: Any) -> dict[str, Any]:
    """Return parity at a few sizes."""
    found = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(1, 3, 64, 1024))
    return {"passed": found.passed, "error": found.max_error}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", default="fp16,fp32")
    parser.add_argument("--rate", type=float, default=10)
    parser.add_argument("--deadline", type=float, default=0.1)
    parser.add_argument("--duration", type=float, default=1)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    result: dict[str, Any] = {"gpu": gpu, "python": platform.python_version(), "numpy": np.__version__, "commit": commit(ROOT)}
    how = (arguments.rate, arguments.deadline, arguments.duration)
    result["harness"] = [ceiling(bundle, *how, most) for most in (8000, 15000, 30000, 60000)]
    print(json.dumps(result), flush=True)
    for precision in arguments.precision.split(","):
        backend = open_backend(bundle, "cuda", precision, BackendOptions())
        result[precision] = search(backend, bundle, *how) | {"parity": judged(backend, bundle.reference(), precision)}
        backend.close()
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(precision, json.dumps(result[precision]), flush=True)


if __name__ == "__main__":
    main()
