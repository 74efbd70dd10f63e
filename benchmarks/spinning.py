"""What do threads that spin between calls cost and gain? ONNX Runtime on a CPU with and without, in turns on one machine.

python benchmarks/spinning.py BUNDLE --out benchmarks/results/spinning_2-core-cpu_DATE     # of sjepa-export --variant contextual
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from machine import describe_machine, write_result

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows

HERTZ = 10


def measure(session: Any, windows: Any, seconds: float, hertz: float | None) -> dict[str, float]:
    """Call `session` for some seconds, paced or back to back, and return what it took."""
    name, took = session.get_inputs()[0].name, []
    session.run(None, {name: windows})
    began, processor = time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < began + seconds:
        session.run(None, {name: windows})
        took.append(time.perf_counter() - now)
        if hertz is not None:
            time.sleep(max(0.0, now + 1 / hertz - time.perf_counter()))
    lasted = time.perf_counter() - began
    return {
        "median_ms": 1e3 * float(np.median(took)),
        "windows_per_s": len(took) * len(windows) / lasted,
        "processor_s_per_s": (time.process_time() - processor) / lasted,
    }


def main() -> None:
    """Measure both ways in turns, and write medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine, bundle = describe_machine(), Bundle.open(arguments.bundle)
    spec, content = bundle.spec, bundle.graph_path("fp32").read_bytes()
    sessions = {}
    for spins in ("spinning", "not spinning"):
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins == "spinning")))
        sessions[spins] = ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    windows = eeg_windows(16, spec.n_chans, spec.n_times, spec.sfreq, np.random.default_rng(0))
    kinds = {f"{HERTZ} Hz, batch 1": (1, HERTZ), "back to back, batch 1": (1, None), "back to back, batch 16": (16, None)}
    blocks: list[dict[str, Any]] = []
    for i in range(arguments.rounds):
        for kind, (batch, hertz) in kinds.items():
            for spins in sorted(sessions, reverse=bool(i % 2)):
                load = os.getloadavg()[0]
                found = measure(sessions[spins], windows[:batch], arguments.seconds, hertz)
                blocks.append({"threads": spins, "calls": kind, "load": load, **found})
    head = ("calls", "threads", "median ms", "windows/s", "processor s/s", "load")
    rows = []
    for kind in kinds:
        for spins in sessions:
            own = [block for block in blocks if (block["calls"], block["threads"]) == (kind, spins)]
            median = {
                name: float(np.median([block[name] for block in own])) for name in own[0] if name not in ("threads", "calls")
            }
            figures = ("median_ms", "windows_per_s", "processor_s_per_s", "load")
            rows.append((kind, spins, *(f"{median[name]:.3g}" for name in figures)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)) + "\n"
    note = ""
    if machine["load_before"] > 1:
        note = (
            "\nOther work shared the cores. Both ways were measured in turns; idle cores may give another order of the medians.\n"
        )
    write_result(arguments.out, {"machine": machine, "blocks": blocks}, table + note)


if __name__ == "__main__":
    main()
