"""Is every event decided on the right window, or counted, and how soon? Markers and EEG from processes with clocks of their own.

    sjepa-export --variant prelocal,postlocal --out bundles
    python benchmarks/events.py --bundles bundles

`live` sends EEG and markers over LSL from two processes whose clocks have an offset and a drift of their own (`other_clock.c`,
which a C compiler makes). The stamps have jitter, samples are lost, markers come 0 to 3 s after their events, out of order.
`virtual` does the same on a virtual clock, without LSL. Both are recorded, and judged by the record: MNE says at which sample
each event is, the causal steps run on the whole record, and the window at that sample must have the bits of the window that was
decided. `latency` counts from the window's newest sample to the decision, with markers at irregular intervals that come at once;
the backend is left cold between events, or kept warm. `--quick` runs a short version of all parts. A result that is there keeps
the parts that `--parts` leaves out, and latencies with another `--priority`, so that `latency` may run later, on a quiet machine
(18 minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mne
import numpy as np
from event_senders import COUNT, Plan, eeg_of, senders
from machine import describe_machine, write_result
from streaming import LSL_CONFIG, percentiles

import sjepa_deploy
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.pauses import PAUSE, segments_of
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.runtime.backend import Backend
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import MarkerSource, PlannedMarkers
from sjepa_deploy.runtime.live.open_markers import open_markers
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.process import set_real_time, undisturbed
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import Chunk, Incident, Source
from sjepa_deploy.runtime.machine import CpuTimes
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.spec import SignalSpec

RESULTS = Path(__file__).parent / "results"

# ---------------------------------------------------------------- the decoder


class Hashing(Backend):
    """Runs another backend, and keeps the hash of each window that it was given while `keeps`."""

    name, precision = "hashing", "fp32"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.hashes: list[bytes] = []
        self.keeps = False

    def run(self, eeg: np.ndarray) -> np.ndarray:
        """Run the model on windows."""
        if self.keeps:
            self.hashes += [hash_of(window) for window in eeg]
        return self._backend.run(eeg)


def hash_of(window: np.ndarray) -> bytes:
    """Return the hash of the bits of a window."""
    return hashlib.blake2b(np.ascontiguousarray(window, np.float32).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Holds what a decoder did with the events of a plan."""

    decisions: list[Decision]
    hashes: list[bytes]
    left: list[Undecided]
    counters: dict[str, int]
    incidents: Counter[str]


def decode(
    predict: Predictor, source: Source, markers: Sequence[MarkerSource], plan: Plan, path: Path, seconds: float | None = None
) -> Run:
    """Decode the events of a plan, and record them."""
    hashing = Hashing(predict.backend)
    config = StreamConfig(late="queue", check_unit=False)
    events = Events(start=plan.tmin, history=plan.delay + 1.0)
    decoder = Decoder(Predictor(predict.bundle, hashing, check_unit=False), source, config, schedule=events, markers=markers)
    left: list[Undecided] = []
    incidents: Counter[str] = Counter()
    decoder.on_undecided(left.append)
    decoder.on_incident(lambda incident: incidents.update([incident.kind]))
    if seconds is not None:
        decoder.stop_after(seconds)
    recorder = record(decoder, path)
    hashing.keeps = True  # the calls before were to warm up
    decisions = list(decoder)
    recorder.close()
    assert not any(recorder.n_lost.values())
    return Run(
        decisions=decisions,
        hashes=hashing.hashes,
        left=left,
        counters=dataclasses.asdict(decoder.counters),
        incidents=incidents,
    )


def judge(run: Run, plan: Plan, signal: SignalSpec, path: Path) -> dict[str, Any]:
    """Compare the windows that were decided with those that the offline run cuts from the record at MNE's samples."""
    raw = read_recording(path)
    segments = segments_of(raw)
    causal = []
    for segment in segments:  # each starts anew
        alone = mne.io.RawArray(raw.get_data(start=segment.start, stop=segment.stop), raw.info, verbose="error")
        long_enough = alone.n_times / plan.sfreq > (signal.n_times + 2) / signal.sfreq
        causal.append(fit_recording(alone, signal, phase="causal", check_unit=False) if long_enough else None)
    names = sorted({str(name) for name in raw.annotations.description} - {PAUSE})
    found, _ = mne.events_from_annotations(raw, event_id={name: int(name) + 1 for name in names}, verbose="error")
    counts = np.rint(raw.get_data(picks=[COUNT])[0] * 1e9).astype(int)
    ends = np.array([segment.stop for segment in segments])
    wanted: dict[int, bytes] = {}
    off: Counter[int] = Counter()
    truth = {number: round(sample) for sample, number, _ in plan.events}
    lost = plan.lost
    for sample, _, number in (found - [raw.first_samp, 0, 1]).tolist():
        which = int(np.searchsorted(ends, sample, side="right"))
        segment, fitted = segments[which], causal[which]
        if lost[truth[number]]:
            continue  # the event was in a loss, and MNE knows none
        off[int(counts[sample]) - truth[number]] += 1
        start = int(np.rint((sample - segment.start) * signal.sfreq / plan.sfreq) + np.rint(plan.tmin * signal.sfreq))
        if fitted is not None and start >= 0 and start + signal.n_times <= fitted.data.shape[1]:
            wanted[number] = hash_of(fitted.data[:, start : start + signal.n_times])
    decided = {int(d.event.description): bits for d, bits in zip(run.decisions, run.hashes, strict=True) if d.event is not None}
    reasons = Counter(one.reason for one in run.left)
    undecided = {int(one.event.description): one.reason for one in run.left}
    counters = run.counters
    delays = [d.event.marker_delay for d in run.decisions if d.event is not None]
    return {
        "events": plan.n_events,
        "came": counters["events"],
        "decisions": len(run.decisions),
        "reasons": dict(reasons),
        "accounted": counters["events"] == len(run.decisions) + sum(reasons.values()) == plan.n_events
        and len(decided) + len(undecided) == plan.n_events,
        "same_bits": sum(wanted.get(number) == bits for number, bits in decided.items()),
        "other_bits": sorted(number for number, bits in decided.items() if number in wanted and wanted[number] != bits),
        "decided_and_no_window": sorted(set(decided) - set(wanted)),
        "window_and_not_decided": {number: undecided.get(number) for number in sorted(set(wanted) - set(decided))},
        "samples_off": {str(samples): n for samples, n in sorted(off.items())},
        "samples": counters["samples"],
        "samples_lost": counters["samples_lost"],
        "segments": len(segments),
        "marker_delay_s": np.quantile(delays, [0.0, 0.5, 1.0]).tolist(),
        "incidents": dict(run.incidents),
        "counters": counters,
    }


def live(predict: Predictor, plan: Plan, config: str) -> dict[str, Any]:
    """Decode the events of a plan over LSL, and judge what came."""
    from sjepa_deploy.runtime.live.lsl import LslSource

    name = f"events-{uuid.uuid4().hex[:8]}"
    assert predict.spec.ch_names is not None
    with senders(plan, name, predict.spec.ch_names, config) as begin, tempfile.TemporaryDirectory() as folder:
        source = LslSource(name, timeout=10.0)
        markers = open_markers([f"lsl:{name}-markers"], source)
        begin()
        before = CpuTimes.now()
        path = Path(folder) / "run.xdf"
        try:
            run = decode(predict, source, markers, plan, path, plan.n_samples / plan.sfreq - 0.5)
        finally:
            source.close()
            for one in markers:
                one.close()
        after = CpuTimes.now()
        result = judge(run, plan, predict.spec.signal, path)
    return result | {"others_cores": after.others_since(before), "stolen_cores": after.stolen_since(before)}


class VirtualSource:
    """Gives the samples of a plan on a virtual clock, as LSL would: the correction of the sender's clock moves in steps."""

    def __init__(self, plan: Plan, ch_names: Sequence[str]) -> None:
        self.info = StreamInfo(name="virtual", ch_names=(*ch_names, COUNT), sfreq=plan.sfreq, unit="V")
        self.incidents: deque[Incident] = deque()
        self.n_flushed, self.live = 0, False
        self._plan, self._stretch, self._there = plan, eeg_of(plan, len(ch_names)), np.flatnonzero(~plan.lost)
        self._rng = np.random.default_rng([plan.seed, 5])
        self._next, self._now, self._correct_at, self._correction = 0, 0.0, 0.0, 0.0

    @property
    def ended(self) -> bool:
        """Return whether all samples were given."""
        return self._next >= len(self._there)

    def read(self, timeout: float) -> Chunk | None:
        """Return the next few samples."""
        if self.ended:
            return None
        plan, (offset, drift) = self._plan, self._plan.clocks[0]
        rows = self._there[self._next : self._next + int(self._rng.integers(1, 60))]
        self._next += len(rows)
        when = rows / plan.sfreq
        self._now = float(when[-1]) + self._rng.uniform(0.0, 0.02)
        if self._now > self._correct_at:
            self._correction, self._correct_at = correction(offset, drift, self._now, self._rng), self._now + 5.0
        own = when * (1 + drift) + offset + self._rng.normal(0, plan.jitter, len(rows))
        samples = self._stretch(int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
        return Chunk(samples, own + self._correction, self._now, False, self._correction)

    def clock(self) -> float:
        """Return when the newest samples came."""
        return self._now

    def close(self) -> None:
        """Release nothing."""


def correction(offset: float, drift: float, now: float, rng: np.random.Generator) -> float:
    """Return what LSL would measure: the offset of a clock at a time, within some microseconds."""
    return -(offset + drift * now) + rng.normal(0, 2e-5)


def virtual(predict: Predictor, plan: Plan) -> dict[str, Any]:
    """Decode the events of a plan on a virtual clock, and judge what came."""
    assert predict.spec.ch_names is not None
    source = VirtualSource(plan, predict.spec.ch_names)
    rng, (offset, drift) = np.random.default_rng([plan.seed, 6]), plan.clocks[1]
    planned, corrected, correct_at = [], 0.0, 0.0
    for sample, number, delay in sorted(plan.events, key=lambda each: each[0] / plan.sfreq + each[2]):
        onset = sample / plan.sfreq
        if onset + delay > correct_at:
            corrected, correct_at = correction(offset, drift, onset + delay, rng), onset + delay + 5.0
        stamp = onset * (1 + drift) + offset + corrected
        planned.append((stamp, f"{number:06d}", onset + delay - stamp))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.xdf"
        started = time.perf_counter()
        run = decode(predict, source, [PlannedMarkers(planned, source.clock)], plan, path)
        seconds = time.perf_counter() - started
        return judge(run, plan, predict.spec.signal, path) | {"decoding_s": seconds, "stream_s": plan.n_samples / plan.sfreq}


# ---------------------------------------------------------------- how soon


def latency(bundle: Path, plan: Plan, config: str, keep_warm: float | None, priority: int | None) -> dict[str, Any]:
    """Decode events at irregular intervals over LSL, whose markers come at once, and tell how old decisions are."""
    from sjepa_deploy.runtime.live.lsl import LslSource

    name = f"latency-{uuid.uuid4().hex[:8]}"
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        assert predict.spec.ch_names is not None
        with senders(plan, name, predict.spec.ch_names, config, priority) as begin:
            source = LslSource(name, timeout=10.0)
            markers = open_markers([f"lsl:{name}-markers"], source)
            events = Events(start=plan.tmin)
            settings = StreamConfig(late="queue", check_unit=False, keep_warm=keep_warm)
            decoder = Decoder(predict, source, settings, schedule=events, markers=markers)
            decoder.stop_after(plan.n_samples / plan.sfreq - 0.5)
            begin()
            before = CpuTimes.now()
            with decoder, undisturbed(decoder):
                decisions = list(decoder)
            after = CpuTimes.now()
    ages = np.array([d.decided - max(d.time, d.event.arrived) for d in decisions if d.event is not None])
    counters = dataclasses.asdict(decoder.counters)
    return {
        "variant": bundle.name,
        "keep_warm": keep_warm,
        "priority": priority,
        "events": counters["events"],
        "decisions": len(decisions),
        "age_ms": percentiles(ages),
        "arrival_to_decision_ms": percentiles(np.array([d.latency for d in decisions])),
        "inference_ms": percentiles(np.array([d.infer_s for d in decisions])),
        "over_5_ms": int((ages > 5e-3).sum()),
        "others_cores": after.others_since(before),
        "stolen_cores": after.stolen_since(before),
        "counters": counters,
    }


# ---------------------------------------------------------------- the page


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        "Events over LSL (two processes with clocks of their own) and on a virtual clock, judged by their records:",
        "",
        "| part | events | decisions | counted | accounted | same bits as at MNE's sample | others | event at its own sample "
        "| samples lost | markers late by s (least, median, most) | load before | others' cores | stolen | commit |",
        "| --- " * 14 + "|",
    ]
    for name in ("live", "virtual"):
        if (part := result.get(name)) is None:
            continue
        counted = ", ".join(f"{reason} {n}" for reason, n in sorted(part["reasons"].items()))
        others = len(part["other_bits"]) + len(part["decided_and_no_window"])
        n_off = sum(part["samples_off"].values())
        delays = ", ".join(f"{delay:.2f}" for delay in part["marker_delay_s"])
        lines.append(
            f"| {name} | {part['events']:,} | {part['decisions']:,} | {counted or 'none'} | {part['accounted']} "
            f"| {part['same_bits']:,} | {others} | {part['samples_off'].get('0', 0):,} of {n_off:,} "
            f"| {part['samples_lost']:,} of {part['samples'] + part['samples_lost']:,} | {delays} "
            f"| {part['load_before']:.1f} | {cores(part.get('others_cores'))} | {cores(part.get('stolen_cores'))} "
            f"| {part['commit'][:7]} |"
        )
    if result.get("latency"):
        lines += [
            "",
            "Newest sample of the window to the decision in ms, for events at irregular intervals; cores that others kept busy,",
            "and that the hypervisor took, on average. Both senders run on the same cores.",
            "",
            "| model | backend | decisions | p50 | p90 | p99 | max | over 5 ms | inference p50, p99 | load before "
            "| others' cores | stolen | commit |",
            "| --- " * 13 + "|",
        ]
    for run in result.get("latency", []):
        age, inference = ({k: f"{v:.2f}" for k, v in run[key].items()} for key in ("age_ms", "inference_ms"))
        warm = "cold" if run["keep_warm"] is None else f"kept warm ({run['keep_warm'] * 1e3:g} ms)"
        warm += "" if run["priority"] is None else f", priority {run['priority']}"
        lines.append(
            f"| {run['variant']} | {warm} | {run['decisions']} | {age.get('p50', '-')} | {age.get('p90', '-')} | "
            f"{age.get('p99', '-')} | {age.get('max', '-')} | {run['over_5_ms']} | {inference.get('p50', '-')}, "
            f"{inference.get('p99', '-')} | {run['load_before']:.1f} | {cores(run['others_cores'])} "
            f"| {cores(run['stolen_cores'])} | {run['commit'][:7]} |"
        )
    return "\n".join(lines)


def cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True, help="folder with the bundles prelocal and postlocal")
    parser.add_argument("--parts", default="live,virtual,latency")
    parser.add_argument("--minutes", type=float, default=4.5, help="of each of the four latency runs")
    parser.add_argument("--priority", type=int, help="real-time priority of senders and decoder in the part latency")
    parser.add_argument("--quick", action="store_true", help="200 events, 2,000 on the virtual clock, half a minute of latency")
    parser.add_argument("--out", type=Path, help="name of the result, without suffix")
    args = parser.parse_args()
    if shutil.which("cc") is None:
        parser.error("a C compiler (cc) is needed")
    import pylsl

    config = LSL_CONFIG.format(session=f"events-{uuid.uuid4().hex}")
    pylsl.set_config_content(config)
    out = args.out or RESULTS / f"events_2-core-cpu_{time.strftime('%Y-%m-%d')}"
    parts = args.parts.split(",")
    machine = describe_machine()
    result: dict[str, Any] = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {}
    result["machine"] = machine
    ran = {"commit": machine["commit"]}

    def load() -> dict[str, Any]:
        return ran | {"load_before": os.getloadavg()[0]}

    with sjepa_deploy.load(args.bundles / "prelocal", check_unit=False) as predict:
        if "live" in parts:
            plan = Plan(n_events=200 if args.quick else 5000, per_second=20.0, sfreq=500.0)
            result["live"] = load() | live(predict, plan, config)
            write_result(out, result, table(result))
        if "virtual" in parts:
            plan = Plan(n_events=2000 if args.quick else 100_000, per_second=100.0, sfreq=250.0, seed=1)
            result["virtual"] = load() | virtual(predict, plan)
            write_result(out, result, table(result))
    minutes = 0.5 if args.quick else args.minutes
    if args.priority is not None:
        set_real_time(args.priority)
    if "latency" in parts:  # a percentile of 99 needs 500 decisions
        result.setdefault("latency", [])
        for variant in ("prelocal", "postlocal"):
            for keep_warm in (None, 0.005):
                plan = Plan(
                    n_events=round(minutes * 60 * 2),
                    per_second=2.0,
                    sfreq=500.0,
                    delay=0.0,
                    lose_every=float("inf"),
                    tmin=0.0,
                    stamped_when_sent=True,
                )
                again = {"variant": variant, "keep_warm": keep_warm, "priority": args.priority}
                result["latency"] = [run for run in result["latency"] if not again.items() <= run.items()]
                result["latency"].append(load() | latency(args.bundles / variant, plan, config, keep_warm, args.priority))
                write_result(out, result, table(result))


if __name__ == "__main__":
    main()
