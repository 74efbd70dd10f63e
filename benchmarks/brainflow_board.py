"""Does a decoder of BrainFlow's synthetic board lose nothing for an hour, and decide at every inserted marker?

python benchmarks/brainflow_board.py BUNDLE 3600 --out benchmarks/results/brainflow_board_hour_2-core-cpu_DATE

The bundle must be of channels that the board has: Fz, C3, Cz, C4, Pz, PO7, Oz, PO8, F5, F7, F3, F1, F2, F4, F6, F8.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import Chunk


def main() -> None:
    """Decode at markers that are inserted every second or so, and write what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = describe_machine()
    schedule, config = Events(start=0.0), StreamConfig(deadline=0.1)
    with Decoder.open(arguments.bundle, "brainflow:SYNTHETIC", config, schedule=schedule, markers=["board"]) as decoder:
        kinds: Counter[str] = Counter()
        behind, looked, inserted, rng, stopped = [], [-np.inf], 0, np.random.default_rng(0), threading.Event()

        def insert() -> None:
            nonlocal inserted
            while not stopped.wait(rng.uniform(0.5, 1.5)):
                inserted += 1
                decoder.source.insert_marker(inserted)

        def look(chunk: Chunk) -> None:
            if chunk.received > looked[-1] + 1.0:  # once a second, so that this script does not grow
                looked[0] = chunk.received
                behind.append(chunk.received - float(chunk.stamps[-1]))

        decoder.on_chunk(look)
        decoder.on_incident(lambda incident: kinds.update([incident.kind]))
        decoder.stop_after(arguments.seconds)
        inserting = threading.Thread(target=insert)
        inserting.start()
        memory, decisions = [], []
        for i, decision in enumerate(decoder):
            decisions.append((int(decision.event.description), decision.event.marker_delay, decision.age, decision.latency))
            if i == 30:
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        stopped.set()
        inserting.join()
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    numbers, delays, ages, latencies = np.array(decisions).T
    n = len(behind) // 10
    result = {
        "machine": machine,
        "counters": dataclasses.asdict(decoder.counters),
        "incidents": dict(kinds),
        "inserted": inserted,
        "decided": len(decisions),
        "in order": bool((np.diff(numbers) > 0).all()),
        "behind_s": {"first tenth": float(np.median(behind[:n])), "last tenth": float(np.median(behind[-n:]))},
        "marker_delay_s": {f"p{q}": float(np.percentile(delays, q)) for q in (50, 99, 100)},
        "age_s": {f"p{q}": float(np.percentile(ages, q)) for q in (50, 99, 100)},
        "latency_s": {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 99, 100)},
        "rss_growth_kib": memory[-1] - memory[0],
    }
    counters = decoder.counters
    rows = [
        ("seconds", f"{arguments.seconds:g}"),
        ("samples, of them lost", f"{counters.samples}, {counters.samples_lost}"),
        ("markers inserted, events, decisions", f"{inserted}, {counters.events}, {len(decisions)}"),
        (
            "events past the end, late, over a gap, failed",
            f"{counters.events_past_end}, {counters.skipped_late}, {counters.skipped_gap}, {counters.failed}",
        ),
        ("marker delay, p50 / p99 / largest", " / ".join(f"{1e3 * v:.2f} ms" for v in result["marker_delay_s"].values())),
        ("age of a decision, p50 / p99 / largest", " / ".join(f"{1e3 * v:.2f} ms" for v in result["age_s"].values())),
        ("arrival to decision, p50 / p99 / largest", " / ".join(f"{1e3 * v:.2f} ms" for v in result["latency_s"].values())),
        ("stamps behind arrivals, first and last tenth", " / ".join(f"{1e3 * v:.2f} ms" for v in result["behind_s"].values())),
        ("growth of memory", f"{result['rss_growth_kib']} KiB"),
        ("incidents", ", ".join(f"{kind}: {k}" for kind, k in kinds.items()) or "none"),
    ]
    table = "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows) + "\n"
    write_result(arguments.out, result, table)


if __name__ == "__main__":
    main()
