"""What does a page cost the decoder's thread, each chunk and each decision, with and without the traces of channels?

The calls that `watch` registers are timed in processor time of blocks of 1,000 calls: other processes of the machine count less
there than in wall time. The stream has 129 channels at 500 Hz. Thinning out is the work of another thread, four times a second.

    python benchmarks/watch_cost.py --out benchmarks/results/watch_cost_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.runtime.decisions.state import State
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.snapshot import StreamFacts
from sjepa_deploy.runtime.watch.traces import Traces

SFREQ, N_BLOCKS, N_CALLS = 500.0, 50, 1000
SIZES, TRACED = (1, 10, 50), (0, 8, 32)


def cost(call: Callable[[], object]) -> float:
    """Return the median processor time of a call in microseconds."""
    found = []
    for _ in range(N_BLOCKS):
        began = time.thread_time_ns()
        for _ in range(N_CALLS):
            call()
        found.append((time.thread_time_ns() - began) / N_CALLS / 1e3)
    return float(np.median(found))


def monitor_of(n_traced: int) -> Monitor:
    montage = read_montage("GSN-HydroCel-129")
    facts = StreamFacts(
        bundle="bundle", bundle_hash="0" * 64, backend="none", source="none", ch_names=montage.ch_names,
        positions=montage.positions, sfreq=SFREQ, unit="uV", hop=0.1, deadline=0.1, overdue=9.0,
        output_names=("left", "right", "rest"), layer="default", class_names=("left", "right", "rest"),
    )  # fmt: skip
    return Monitor(facts, Counters(), traces=Traces(np.linspace(0, 128, n_traced).round().astype(int).tolist()))


def chunk_cost(n_traced: int, size: int) -> float:
    """Return what a chunk costs the decoder's thread in microseconds."""
    monitor, stamps, samples = monitor_of(n_traced), np.arange(size) / SFREQ, np.ones((size, 129), np.float32)

    def call() -> None:
        monitor.received(1.0, paused=False)
        monitor.traces.take(stamps, samples, 0.0)

    return cost(call)


def thinning_cost(n_traced: int, size: int) -> float:
    """Return what the samples of 0.25 s cost the other thread in microseconds."""
    traces, n = Traces(list(range(n_traced))), round(SFREQ / 4 / size)
    samples, found = np.ones((size, 129), np.float32), []
    for turn in range(200):
        for k in range(n):
            traces.take((np.arange(size) + (turn * n + k) * size) / SFREQ, samples, 0.0)
        began = time.thread_time_ns()
        traces.thinned()
        found.append((time.thread_time_ns() - began) / 1e3)
    return float(np.median(found))


def decision_cost(state: State | None) -> float:
    monitor = monitor_of(0)
    decision = Decision(1, np.zeros((1, 3), np.float32), 1.0, 1.1, 1.0, 1.01, 0.001, False, False, (), state=state)
    return cost(lambda: monitor.decided(decision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    machine = describe_machine()
    rows = [
        {
            "samples": size,
            **{f"traced_{n}_us": chunk_cost(n, size) for n in TRACED},
            **{f"thinning_{n}_us": thinning_cost(n, size) for n in TRACED if n},
        }
        for size in SIZES
    ]
    undecided = State("undecided", "probability is below the threshold", None, 0.6, (0.6, 0.3, 0.1))
    decisions = {"without_layer_us": decision_cost(None), "with_layer_us": decision_cost(undecided)}
    lines = [
        "Processor time in microseconds; 129 channels at 500 Hz.",
        "",
        "| samples of a chunk | a chunk, no traces | 8 channels | 32 channels | thinning out 0.25 s, 8 channels | 32 channels |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['samples']} | {r['traced_0_us']:.1f} | {r['traced_8_us']:.1f} | {r['traced_32_us']:.1f} "
            f"| {r['thinning_8_us']:.0f} | {r['thinning_32_us']:.0f} |"
            for r in rows
        ),
        "",
        f"A decision: {decisions['without_layer_us']:.1f} without a decision layer, {decisions['with_layer_us']:.1f} with one.",
    ]
    write_result(args.out, {"machine": machine, "rows": rows, "decisions": decisions}, "\n".join(lines))


if __name__ == "__main__":
    main()
