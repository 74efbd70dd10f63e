"""What does `Predictor` cost a call beyond its backend?

Times `Predictor.__call__` over a backend that does nothing, for several window sizes and batches.

    python benchmarks/call_overhead.py --out benchmarks/results/call_overhead_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.backend import Backend
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.spec import ModelSpec


class NoBackend(Backend):
    name = "nothing"
    precision = "fp32"

    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def run(self, eeg: np.ndarray) -> np.ndarray:
        return self.output

    def close(self) -> None:
        pass


def open_bundle(n_chans: int, n_times: int, folder: Path) -> Bundle:
    spec = ModelSpec.of(variant="prelocal", n_chans=n_chans, n_times=n_times, sfreq=100.0)
    weights = Provenance(source="random", format="initialisation", seed=0)
    return to_bundle(build_model(spec, seed=0), folder, weights=weights, precisions=("fp32",))


def median_us(call: Any, eeg: np.ndarray, n: int = 20_000) -> float:
    samples = np.empty(n)
    for i in range(n):
        start = time.perf_counter_ns()
        call(eeg)
        samples[i] = time.perf_counter_ns() - start
    return float(np.median(samples)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for n_chans, n_times in ((8, 200), (32, 200), (129, 200), (62, 2048)):
            bundle = open_bundle(n_chans, n_times, Path(name) / f"{n_chans}x{n_times}")
            for batch in (1, 8):
                backend = NoBackend(np.zeros((batch, 1), np.float32))
                eeg = np.random.default_rng(0).normal(0, 20, (batch, n_chans, n_times)).astype(np.float32)
                bare, checked = median_us(backend.run, eeg), median_us(Predictor(bundle, backend), eeg)
                rows.append(
                    {"shape": [batch, n_chans, n_times], "backend_us": bare, "call_us": checked, "cost_us": checked - bare}
                )
    result = {"machine": describe_machine(), "rows": rows}
    lines = ["| batch x channels x samples | cost of a call us |", "| --- | --- |"]
    lines += [f"| {' x '.join(map(str, r['shape']))} | {r['cost_us']:.2f} |" for r in rows]
    write_result(args.out, result, "\n".join(lines))


if __name__ == "__main__":
    main()
