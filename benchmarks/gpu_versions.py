"""Do engines of one version of TensorRT run on a later one? Version-compatible engines, on both, on one NVIDIA GPU.

    python benchmarks/gpu_versions.py BUNDLES OUT.json        # in a Python with TensorRT 8.6: builds engines and keeps outputs
    python benchmarks/gpu_versions.py BUNDLES OUT.json        # in a Python with a later TensorRT, or its lean runtime: compares

BUNDLES holds one bundle a folder (`pack_bundles.py`). The first call builds for each model a version-compatible engine, and one
for its own version alone. The later call opens the same bundles; parity judges each engine at its first load there. Both tell
the latency at batch 1, window in place.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.export.to_tensorrt import build_engine
from sjepa_deploy.runtime.backend import open_backend
from sjepa_deploy.runtime.backends.engines import BuildSettings
from sjepa_deploy.runtime.backends.proofs import engine_states
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.machine import commit
from sjepa_deploy.spec import RunPrecision

MODELS: tuple[tuple[str, RunPrecision], ...] = (
    ("prelocal", "fp32"), ("postlocal", "fp32"), ("contextual", "fp16"), ("contextual", "fp32")
)  # fmt: skip
SIZES = (1, 3, 8, 64)


def outputs_and_latency(bundle: Bundle, precision: RunPrecision, n_calls: int = 2000) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the outputs at each of SIZES, and how long opening and a call at batch 1 take."""
    windows, took = bundle.reference().inputs, []
    began = time.monotonic()
    with closing(open_backend(bundle, "tensorrt", precision)) as backend:
        opened = time.monotonic() - began
        outputs = {str(n): backend.run(np.ascontiguousarray(np.resize(windows, (n, *windows.shape[1:])))).copy() for n in SIZES}
        buffer = backend.input_buffer(1)
        assert buffer is not None
        buffer[...] = windows[:1]
        for _ in range(n_calls + 200):
            start = time.perf_counter_ns()
            backend.run(buffer)
            took.append((time.perf_counter_ns() - start) / 1e3)
    median, p99 = np.percentile(took[200:], (50, 99))
    return outputs, {"opened s": round(opened, 2), "us": {"median": float(median), "p99": float(p99)}}


def main() -> None:
    """Build or compare, whichever there is to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    api = TensorRT("tensorrt", runs_only=True)
    command = "python benchmarks/gpu_versions.py BUNDLES OUT.json"
    result: dict[str, Any] = {"command": command, "commit": commit(Path(__file__).parents[1])}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text())
    for variant, precision in MODELS:
        bundle, kept = Bundle.open(arguments.bundles / variant), arguments.out.with_name(f"{variant}-{precision}.npz")
        entry: dict[str, Any] = {}
        if not kept.is_file():
            build_engine(bundle, precision)
            entry["engine of this version alone"] = outputs_and_latency(bundle, precision)[1]
            record = build_engine(bundle, precision, settings=BuildSettings(max_batch=64, version_compatible=True))
            entry |= {"built s": record.build_seconds, "bytes": record.plan_bytes, "parity": record.parity[-1].max_error}
            np.savez(kept, **outputs_and_latency(bundle, precision)[0])
        else:
            outputs, entry["version compatible"] = outputs_and_latency(bundle, precision)
            with np.load(kept) as before:
                same = {n: np.array_equal(outputs[n], before[n], equal_nan=True) for n in before}
            proofs = [proof for state in engine_states(bundle) for proof in state.proofs if proof.machine.version == api.version]
            entry |= {"same bits at batch": same, "parity": proofs[0].parity.max_error}
        result.setdefault(f"{variant} {precision}", {})[api.version] = entry
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(variant, precision, api.version, json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
