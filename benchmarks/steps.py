"""What do the steps of a signal cost live, each alone and five in one chain, beside the model?

A stream of 129 channels at 500 Hz comes in chunks of 10 samples, the model decodes windows of 2 s at 100 Hz, and one thread does
everything. Time is that of the thread's own CPU, so that other programs count less; wall time stands beside it. Cases take turns.

    python benchmarks/steps.py --out benchmarks/results/steps_MACHINE_DATE
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.eeg.chain import Chain, finish_windows
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.steps import (
    Alignment,
    BandPass,
    Baseline,
    Channels,
    Clip,
    ExponentialStandardise,
    Notch,
    Reference,
    Resample,
    RunningAlignment,
    Scale,
    Step,
    StreamStep,
    WindowStep,
    ZScore,
)
from sjepa_deploy.eeg.steps.base import Flow
from sjepa_deploy.spec import EventWindow, SignalSpec

SFREQ, CHUNK = 500.0, 10
NAMES = read_montage("GSN-HydroCel-129").ch_names
FIVE = (
    Notch(),
    BandPass(l_freq=0.5, h_freq=40.0),
    Resample(),
    Channels(),
    Reference(),
    ExponentialStandardise(),
    Clip(limit=10.0),
)
"""Five steps beside the rate and the channels, which stand in every chain."""

SIGNAL = SignalSpec(n_chans=129, n_times=200, sfreq=100.0, ch_names=NAMES, steps=FIVE, event_window=EventWindow(start=-0.2))

Call = Callable[[], object]


def stream(n_samples: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(0, 2, (n_samples, 129)), axis=0) + rng.uniform(-2e4, 2e4, 129)


def in_chunks(samples: np.ndarray, run: Callable[[np.ndarray], object]) -> Call:
    """Return a call that takes the next chunk."""
    chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
    at = 0

    def call() -> None:
        nonlocal at
        run(chunks[at])
        at = (at + 1) % len(chunks)

    return call


def call_of(step: Step, samples: np.ndarray) -> Call:
    if isinstance(step, WindowStep):
        windows = np.random.default_rng(0).normal(0, 20, (1, 129, 200))
        return lambda: step.on_windows(windows, SIGNAL.goal)
    assert isinstance(step, StreamStep)
    running = step.causal(Flow(ch_names=NAMES, sfreq=SFREQ, goal=SIGNAL.goal))
    running.start(samples[0])
    return in_chunks(samples, running)


def cases(samples: np.ndarray) -> dict[str, tuple[str, Call]]:
    """Return what is timed: a name, what one call takes, and the call."""
    calibration = np.random.default_rng(1).normal(0, 20, (30, 129, 200))
    steps: dict[str, Step] = {
        "notch (4 frequencies)": Notch(),
        "band-pass": BandPass(),
        "resample, 500 to 100 Hz": Resample(),
        "average reference": Reference(),
        "exponential-standardise": ExponentialStandardise(),
        "clip": Clip(limit=10.0),
        "scale": Scale(factors=(1e-6,)),
        "alignment": Alignment.fit(calibration, NAMES),
        "running-alignment": RunningAlignment(),
        "z-score": ZScore(),
        "baseline": Baseline(),
    }
    found = {
        name: ("window" if isinstance(step, WindowStep) else "chunk", call_of(step, samples)) for name, step in steps.items()
    }
    chain = Chain(SIGNAL, NAMES, SFREQ, np.eye(129))
    chain.start(samples[0])
    found["chain of the five"] = "chunk", in_chunks(samples, chain)
    window = np.random.default_rng(0).normal(0, 1, (1, 129, 200)).astype(np.float32)
    with_z = SIGNAL.replace(steps=(*FIVE, ZScore()))
    found["z-score at the end of a chain"] = "window", lambda: finish_windows(with_z, window)
    return found


def model_cases(variants: list[str], folder: Path) -> dict[str, tuple[str, Call]]:
    from sjepa_deploy.bundle import Provenance
    from sjepa_deploy.export.to_bundle import to_bundle
    from sjepa_deploy.models.networks import build_model
    from sjepa_deploy.runtime.predictor import load
    from sjepa_deploy.spec import ModelSpec

    positions = tuple(tuple(map(float, place)) for place in read_montage("GSN-HydroCel-129").positions)
    window = np.random.default_rng(0).normal(0, 1, (1, 129, 200)).astype(np.float32)
    found: dict[str, tuple[str, Call]] = {}
    for variant in variants:
        spec = ModelSpec(variant=variant, signal=SIGNAL.replace(positions=positions))  # type: ignore[arg-type]
        weights = Provenance(source="random", format="initialisation", seed=0)
        bundle = to_bundle(build_model(spec, seed=0), folder / variant, weights=weights, precisions=("fp32",))
        predictor = load(bundle, n_threads=1, check_unit=False)
        found[f"model, {variant}"] = "window", lambda predictor=predictor: predictor(window)  # type: ignore[misc]
    return found


def measure(found: dict[str, tuple[str, Call]], rounds: int, calls: int) -> list[dict[str, object]]:
    cpu: dict[str, list[int]] = {name: [] for name in found}
    wall: dict[str, list[int]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, (_, call) in found.items():
            for _ in range(5):
                call()
            for _ in range(calls):
                before, start = time.thread_time_ns(), time.perf_counter_ns()
                call()
                wall[name].append(time.perf_counter_ns() - start)
                cpu[name].append(time.thread_time_ns() - before)
    rows: list[dict[str, object]] = []
    for name, (what, _) in found.items():
        own, all_of = np.array(cpu[name]) / 1e3, np.array(wall[name]) / 1e3
        rows.append(
            {
                "case": name,
                "of": what,
                "n": len(own),
                **{f"cpu_p{q}_us": float(np.percentile(own, q)) for q in (50, 99)},
                "cpu_max_us": float(own.max()),
                "wall_p50_us": float(np.percentile(all_of, 50)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200, help="of each case in each round; 20 rounds of 200 are 80 s of stream")
    parser.add_argument("--models", nargs="*", default=["prelocal", "postlocal", "contextual"], help="timed beside the steps")
    args = parser.parse_args()
    machine = describe_machine()
    found = cases(stream(round(20 * SFREQ)))
    with tempfile.TemporaryDirectory() as folder:
        found |= model_cases(args.models, Path(folder))
        rows = measure(found, args.rounds, args.calls)
    lines = [
        f"129 channels, {SFREQ:g} Hz, chunks of {CHUNK} samples (20 ms), one thread; CPU time of the thread in us.",
        "",
        "| case | one call takes a | p50 | p99 | max | wall p50 |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['case']} | {r['of']} | "
            + " | ".join(f"{r[key]:.0f}" for key in ("cpu_p50_us", "cpu_p99_us", "cpu_max_us", "wall_p50_us"))
            + " |"
            for r in rows
        ),
    ]
    write_result(args.out, {"machine": machine, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
