"""What does a decision layer cost a window, and how near does a fit come to what was asked for?

Times `DecisionLayer.step` for several chains, in processor time of blocks of 1,000 windows: other processes of the machine count
less there than in wall time. Then fits layers on planted events and counts what they do on others.

    python benchmarks/decision_layer.py --out benchmarks/results/decision_layer_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.runtime.decisions.accumulate import Accumulate
from sjepa_deploy.runtime.decisions.calibrate import calibration_error
from sjepa_deploy.runtime.decisions.chain import FitRequest
from sjepa_deploy.runtime.decisions.data import CalibrationData
from sjepa_deploy.runtime.decisions.description import LayerDescription, LayerFacts
from sjepa_deploy.runtime.decisions.fit import fit
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.pauses import Dwell, Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.smoothing import Exponential
from sjepa_deploy.runtime.decisions.threshold import Threshold

CHAINS = {
    "probabilities, threshold": (Probabilities(), Threshold(enter=0.8)),
    "and smoothing, refractory, hysteresis, dwell": (
        Probabilities(),
        Exponential(seconds=0.5),
        Refractory(seconds=1.0),
        Threshold(enter=0.8, leave=0.6),
        Dwell(seconds=0.2),
    ),
    "probabilities, added evidence of 20 windows": (
        Probabilities(),
        Accumulate(rule="probability", most=20, thresholds=(0.95,) * 20),
    ),
}
N_BLOCKS, N_STEPS = 50, 1000
N_PAIRS, N_EVENTS = 20, 5000


def cost(steps: tuple[Any, ...], n_classes: int) -> dict[str, float]:
    """Return the processor time of a step in microseconds, and the memory that 10,000 steps leave behind in bytes."""
    layer = DecisionLayer(
        LayerDescription(
            name="timed",
            bundle="",
            output_name="prediction",
            n_outputs=n_classes,
            class_names=tuple(f"class {i}" for i in range(n_classes)),
            steps=steps,
        )
    )
    outputs = np.random.default_rng(0).normal(0, 2, (N_STEPS, n_classes)).astype(np.float32)
    windows = [(row, i / 10, ()) for i, row in enumerate(outputs)]
    blocks = []
    for _ in range(N_BLOCKS):
        layer.restart()
        start = time.thread_time_ns()
        for window in windows:
            layer.step(*window)
        blocks.append((time.thread_time_ns() - start) / N_STEPS / 1000)
    tracemalloc.start()
    layer.run(outputs, np.arange(N_STEPS) / 10)
    before = tracemalloc.get_traced_memory()[0]
    for i in range(10):
        for window in windows:
            layer.step(window[0], window[1] + 100 * (i + 1), ())
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return {"median_us": float(np.median(blocks)), "p99_us": float(np.quantile(blocks, 0.99)), "kept_bytes": kept}


def planted(seed: int) -> CalibrationData:
    """Return Gaussian scores of three classes, whose probabilities are known, too certain by a factor of two."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=N_EVENTS)
    scores = rng.normal(size=(N_EVENTS, 3))
    scores[np.arange(N_EVENTS), labels] += 1
    return CalibrationData(
        outputs=2 * scores,
        labels=labels,
        targets=None,
        times=2.0 * np.arange(N_EVENTS),
        events=np.arange(N_EVENTS),
        recordings=np.zeros(N_EVENTS, np.intp),
        flags=((),) * N_EVENTS,
        minutes=N_EVENTS / 30,
        names=("planted",),
    )


def held_out(accept_rate: float) -> dict[str, Any]:
    """Return what layers that were fitted to `accept_rate` do on other events."""
    facts = LayerFacts(name="planted", bundle="", output_name="prediction", n_outputs=3, class_names=("a", "b", "c"))
    rates, errors = [], []
    for pair in range(N_PAIRS):
        layer = fit(planted(2 * pair), facts, FitRequest(asked="accept-rate", wanted=accept_rate)).layer
        other = planted(2 * pair + 1)
        states = DecisionLayer(layer).run(other.outputs, other.times)
        rates.append(float(np.mean([state.class_name is not None for state in states])))
        likely = np.array([np.argmax(state.probabilities) for state in states])
        errors.append(calibration_error(np.array([state.probability for state in states]), likely == other.labels))
    off = np.abs(np.array(rates) - accept_rate)
    return {
        "asked": accept_rate,
        "mean": float(np.mean(rates)),
        "largest_difference": float(off.max()),
        "within_2_points": int((off <= 0.02).sum()),
        "n": N_PAIRS,
        "largest_calibration_error": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    machine = describe_machine()
    costs = [{"chain": name, "n_classes": n} | cost(steps, n) for name, steps in CHAINS.items() for n in (2, 3, 36)]
    fits = [held_out(rate) for rate in (0.3, 0.8, 0.95)]
    lines = [
        "| chain | classes | step, median us | p99 of blocks us | kept bytes after 10,000 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['chain']} | {r['n_classes']} | {r['median_us']:.2f} | {r['p99_us']:.2f} | {r['kept_bytes']} |" for r in costs
    ]
    lines += ["", f"{N_PAIRS} fits on {N_EVENTS} planted events, each judged on {N_EVENTS} others:", ""]
    lines += ["| asked | mean accept rate | largest difference | within 2 points | largest calibration error |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['asked']} | {r['mean']:.4f} | {r['largest_difference']:.4f} | {r['within_2_points']} of {r['n']} "
        f"| {r['largest_calibration_error']:.4f} |"
        for r in fits
    ]
    write_result(args.out, {"machine": machine, "costs": costs, "fits": fits}, "\n".join(lines))


if __name__ == "__main__":
    main()
