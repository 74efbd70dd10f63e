"""How many streams of 10 windows a second does one Triton server answer on a GPU, with our backend in its Python model?

    python benchmarks/gpu_triton.py BUNDLES OUT.json [--precision fp16] [--instances 1,2,4] [--deadline 0.1]

BUNDLES holds one bundle a folder (`pack_bundles.py`). Single calls of one client come first: in this process, over the wire and
through shared memory, with a comparison of the bits. Then streams with random phases send open loop, each over a connection of
its own on loopback, as in `serving.py`; their number grows until a window is refused or p99 passes the deadline. The generator
shares the processor with the server; how late it is stands beside the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from serving import SETTLE, Load

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.export.to_triton import to_triton
from sjepa_deploy.runtime.machine import commit
from sjepa_deploy.serving import Client, Server

STREAMS = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000)


def one_client(bundle: Bundle, address: str, backend: str, precision: Any, n: int = 300) -> dict[str, Any]:
    """Time single windows back to back, and compare what comes back with this process to the bit."""
    window, rows = bundle.reference().inputs[:1], {}
    with (
        sjepa_deploy.load(bundle, backend=backend, precision=precision) as local,
        Client(address) as wire,
        Client(address, shared_memory=True) as shared,
    ):
        want = local(window).copy()
        for name, call in (("here", local), ("triton", wire), ("triton-shm", shared)):
            took = []
            for _ in range(n + 50):
                start = time.perf_counter()
                got = call(window)
                took.append(1e6 * (time.perf_counter() - start))
            median, p99 = np.percentile(took[50:], (50, 99))
            rows[name] = {
                "p50_us": float(median),
                "p99_us": float(p99),
                "same bits": bool(np.array_equal(got, want, equal_nan=True)),
            }
    return rows


def measure(bundle: Bundle, backend: str, precision: Any, instances: int, deadline: float, seconds: float) -> dict[str, Any]:
    """Serve `bundle`, and send more and more streams."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        served = to_triton(
            bundle, repository, name="m", backend=backend, precision=precision, instances=instances, deadline=deadline
        )
        with Server(repository) as server:
            result = {
                "batching": vars(served.batching),
                "one client": one_client(bundle, f"{server.endpoints['grpc']}/m", backend, precision),
            }
            load = Load(server, "m", bundle.spec)
            load.run([(16, 1.0)])
            held, trials = 0, []
            for n in STREAMS:
                found = load.run([(n, seconds)], seed=n).summary(begin=SETTLE)
                trials.append({"streams": n, **found})
                print(json.dumps(trials[-1]), flush=True)
                if found["refused"] or found["p99_ms"] > deadline * 1e3:
                    break
                held = n
            return result | {"held": held, "trials": trials}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", default="contextual-1024")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--instances", default="1,2,4", help="copies of the model, separated by commas")
    parser.add_argument("--deadline", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=2.5, help="of a trial")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundles / arguments.variant)
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu_triton.py BUNDLES OUT.json",
        "gpu": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        "commit": commit(Path(__file__).parents[1]),
    }
    for instances in map(int, arguments.instances.split(",")):
        how = (arguments.backend, arguments.precision, instances, arguments.deadline, arguments.seconds)
        result[f"{arguments.variant} {arguments.precision}, {instances} instances"] = measure(bundle, *how)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
