"""How much of what another person loses does a calibration bring back, how long does it take, and what do poisoned labels do?

EEG is planted as in `task_parity.py`: a wave of 8 Hz that is locked to events, of another sign for each of two classes. A model
learns from one person. Another person's wave comes later, or their electrodes sit elsewhere. The closed form of 40 trials and a
short fine-tuning are judged on another recording of that person; the same person is decoded live with `adapt`. Then labels are
poisoned.

    python benchmarks/calibration.py --seeds 3 --out benchmarks/results/calibration_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import mne
import numpy as np
import torch
from machine import describe_machine, write_result

import sjepa_deploy
from sjepa_deploy.bundle import Provenance
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.last_layer import fit_classes
from sjepa_deploy.learning.brief import train_briefly
from sjepa_deploy.learning.calibrate import CalibrationConfig, features_of, refit, with_last_layer
from sjepa_deploy.learning.metrics import balanced_accuracy
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.live.adapt import AdaptConfig, adapt
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import PlannedMarkers
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, SignalSpec

VARIANTS = ("prelocal", "postlocal", "contextual")
CLASSES = ("left", "right")
SFREQ, HERTZ, AMPLITUDE = 250.0, 8.0, 2.5e-6
MONTAGE = read_montage("sjepa-62").pick(["F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"])
ENCODER = EncoderSpec(n_layers=2, n_decoder_layers=1)
SHIFTS: dict[str, tuple[float, bool]] = {
    "wave 30 ms later": (0.030, False),
    "wave 62.5 ms later": (0.0625, False),
    "electrodes moved by one place": (0.0, True),
}
N_TRIALS, N_JUDGED, EPOCHS = 40, 200, 20
SIGNAL = SignalSpec(
    n_chans=8,
    n_times=160,
    sfreq=100.0,
    ch_names=MONTAGE.ch_names,
    positions=MONTAGE.positions,
    steps=(BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference()),
    phase="causal",
    event_window=EventWindow(start=0.0, events=CLASSES),
)


def planted(rng: np.random.Generator, n_events: int, delay: float = 0.0, moved: bool = False) -> mne.io.RawArray:
    """Return a recording of 8 channels, and a wave of 0.8 s from 0.2 s + `delay` after each event."""
    n = round((n_events * 2.2 + 10) * SFREQ)
    volts = np.cumsum(rng.normal(size=(8, n)), axis=1) * 0.7e-6 + rng.normal(size=(8, n)) * 6e-6
    onsets = 6.0 + 2.2 * np.arange(n_events) + rng.uniform(0, 0.2, n_events)
    kinds = rng.permutation([CLASSES[i % 2] for i in range(n_events)])
    length = round(0.8 * SFREQ)
    wave = AMPLITUDE * np.sin(2 * np.pi * HERTZ * np.arange(length) / SFREQ) * np.hanning(length)
    for onset, kind in zip(onsets, kinds, strict=True):
        first = round((onset + 0.2 + delay) * SFREQ)
        volts[:, first : first + length] += np.outer([1, -1] * 4, wave if kind == "left" else -wave)
    if moved:
        volts = np.roll(volts, 1, axis=0)
    raw = mne.io.RawArray(volts, mne.create_info(list(MONTAGE.ch_names), SFREQ, "eeg"), verbose="error")
    return raw.set_annotations(mne.Annotations(onsets, 0.0, kinds), verbose="error")


def windows_of(raw: mne.io.BaseRaw) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows of all events, and the numbers of their classes."""
    prepared = prepare(raw, SIGNAL)
    return prepared.eeg, np.array([CLASSES.index(name) for name in prepared.events.description])


def score(model: torch.nn.Module, eeg: np.ndarray, labels: np.ndarray) -> float:
    """Return the balanced accuracy."""
    with torch.inference_mode():
        return balanced_accuracy(labels, model(torch.from_numpy(eeg)).numpy())


class Stream:
    """Gives a recording in chunks of 100 ms, as fast as they are taken, on the recording's clock."""

    def __init__(self, raw: mne.io.BaseRaw) -> None:
        samples = raw.get_data().T * 1e6
        stamps = np.arange(len(samples)) / SFREQ
        self.info = StreamInfo(name="planted", ch_names=tuple(raw.ch_names), sfreq=SFREQ, unit="uV")
        self.incidents: deque[Any] = deque()
        self.n_flushed, self.live, self._now = 0, False, 0.0
        cuts = range(0, len(samples), 25)
        self._chunks = deque(Chunk(samples[i : i + 25], stamps[i : i + 25], float(stamps[i : i + 25][-1])) for i in cuts)

    @property
    def ended(self) -> bool:
        return not self._chunks

    def read(self, timeout: float) -> Chunk | None:
        chunk = self._chunks.popleft() if self._chunks else None
        self._now = self._now if chunk is None else chunk.received
        return chunk

    def clock(self) -> float:
        return self._now

    def close(self) -> None:
        pass


def live(bundle: Any, raw: mne.io.BaseRaw, told: np.ndarray, config: AdaptConfig) -> tuple[Any, Any, np.ndarray]:
    """Decode the events of a recording with labels `told`. Return decoder, adapter and whether each decision was right."""
    source = Stream(raw)
    markers = PlannedMarkers(list(zip(raw.annotations.onset.tolist(), map(str, told), strict=True)), source.clock)
    predict = sjepa_deploy.load(bundle, check_unit=False)
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(("all",)), markers=[markers])
    adapter = adapt(decoder, config)
    truth = [CLASSES.index(name) for name in raw.annotations.description]
    right = np.array([decision.prediction.argmax() == truth[i] for i, decision in enumerate(decoder)])
    return decoder, adapter, right


def of_person(seed: int, variant: str, rows: list[dict[str, Any]], lives: list[dict[str, Any]], folder: Path) -> None:
    """Train on one person, and calibrate for others."""
    rng = np.random.default_rng(seed)
    spec = ModelSpec(variant=variant, signal=SIGNAL, n_outputs=2, class_names=CLASSES, encoder=ENCODER)
    model = build_model(spec, seed=seed).train()
    train_briefly(model, *windows_of(planted(rng, 200)), epochs=EPOCHS, lr=2e-3, batch_size=16, seed=seed)
    model.eval()
    known = score(model, *windows_of(planted(rng, N_JUDGED)))
    for shift, (delay, moved) in SHIFTS.items():
        eeg, labels = windows_of(planted(rng, N_TRIALS, delay, moved))
        judged = windows_of(planted(rng, N_JUDGED, delay, moved))
        tuned = copy.deepcopy(model)
        short = CalibrationConfig()
        train_briefly(tuned, eeg, labels, epochs=short.epochs, lr=short.lr, batch_size=short.batch_size, seed=seed)
        curve = {}
        for n in (8, 16, 24, 32, N_TRIALS):
            some = with_last_layer(model, refit(model, features_of(model, eeg[:n]), labels[:n]))
            curve[n] = score(some, *judged)
        facts = {"known": known, "before": score(model, *judged), "after": curve[N_TRIALS], "tuned": score(tuned, *judged)}
        rows.append({"seed": seed, "variant": variant, "shift": shift, "curve": curve} | facts)
        print(rows[-1], flush=True)
    bundle = to_bundle(
        model,
        folder / f"{variant}{seed}",
        weights=Provenance(source="planted", format="benchmark"),
        precisions=("fp32",),
        max_batch=2,
    )
    delay, moved = SHIFTS["wave 62.5 ms later"]
    raw = planted(rng, N_TRIALS + N_JUDGED, delay, moved)
    _, adapter, right = live(bundle, raw, raw.annotations.description, AdaptConfig(budget=N_TRIALS, cooldown=4.0))
    seconds = [change.seconds for change in adapter.changes]
    raw = planted(rng, 180)
    names = raw.annotations.description
    swapped = np.where(names == "left", "right", "left")
    noise = rng.permutation(names)
    lived: dict[str, Any] = {"seed": seed, "variant": variant, "updates_ms": [1e3 * each for each in seconds]}
    lived |= {"before_10": float(right[:10].mean()), "after": float(right[N_TRIALS:].mean()), "known": known}
    for kind, poison in (("swapped", swapped), ("random", noise)):
        told = np.concatenate([names[:80], poison[80:]])
        decoder, adapter, right = live(bundle, raw, told, AdaptConfig(cooldown=20.0))
        clean = [change for change in adapter.changes if change.why == "update" and change.n_labels <= 80][-1]
        window = np.ascontiguousarray(windows_of(raw)[0][:1])
        bits = False
        if adapter.alarmed:
            again = sjepa_deploy.load(bundle, check_unit=False)
            again.adaptable().last_layer = clean.layer
            bits = decoder.predict(window).tobytes() == again(window).tobytes()
        lived[kind] = {
            "alarm": adapter.alarmed,
            "after_labels": adapter.n_labels - 80 if adapter.alarmed else None,
            "back to the bits of before the poison": bits,
            "right after the alarm": float(right[adapter.n_labels :].mean()) if adapter.alarmed else None,
        }
    lives.append(lived)
    print(lived, flush=True)


def fit_times() -> list[dict[str, Any]]:
    """Return the time of the closed form over trials and features."""
    rng, found = np.random.default_rng(0), []
    for n, n_features in ((40, 256), (100, 256), (40, 3840), (100, 3840)):
        features, labels = rng.normal(size=(n, n_features)), np.arange(n) % 2
        wall, cpu = [], []
        for _ in range(100):
            start, of_thread = time.perf_counter(), time.thread_time()
            fit_classes(features, labels, 2)
            wall.append(1e3 * (time.perf_counter() - start))
            cpu.append(1e3 * (time.thread_time() - of_thread))
        facts = {"median_ms": float(np.median(wall)), "p90_ms": float(np.percentile(wall, 90)), "cpu_ms": float(np.median(cpu))}
        found.append({"trials": n, "features": n_features} | facts)
    return found


def main() -> None:
    """Run all seeds and variants, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    lives: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for variant in VARIANTS:
                of_person(seed, variant, rows, lives, Path(folder))
    times = fit_times()
    lines = [
        "# A person's calibration",
        "",
        f"Balanced accuracy on {N_JUDGED} events of another recording, mean over {args.seeds} seeds (lowest to highest). The "
        f"closed form and the fine-tuning ({CalibrationConfig().epochs} epochs) had {N_TRIALS} trials. Back is the share of the "
        "lost accuracy. Chance is 0.5; a wave half a period later makes the classes change places.",
        "",
        "| variant | shift of the person | known person | as it was | closed form | back | fine-tuned | back |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        for shift in SHIFTS:
            of = [row for row in rows if (row["variant"], row["shift"]) == (variant, shift)]
            cells = {name: _told([row[name] for row in of]) for name in ("known", "before", "after", "tuned")}
            for name in ("after", "tuned"):
                back = [(row[name] - row["before"]) / (row["known"] - row["before"]) for row in of]
                cells[name] += f" | {np.mean(back):.0%}"
            lines.append(f"| {variant} | {shift} | {' | '.join(cells.values())} |")
    lines += ["", "Trials and balanced accuracy, wave 62.5 ms later, mean over variants and seeds:", ""]
    of = [row["curve"] for row in rows if row["shift"] == "wave 62.5 ms later"]
    lines += ["| trials | " + " | ".join(map(str, of[0])) + " |", "| --- |" + " --- |" * len(of[0])]
    lines += ["| balanced accuracy | " + " | ".join(f"{np.mean([c[n] for c in of]):.3f}" for n in of[0]) + " |"]
    updates = [each for one in lives for each in one["updates_ms"]]
    lines += [
        "",
        f"Live (`adapt`, ort-cpu): wave 62.5 ms later, {N_TRIALS} labels of events, then {N_JUDGED} events without.",
        "",
        "| variant | first 10 right | right after 40 labels | alarm after swapped labels | after random ones | bits back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        own = [one for one in lives if one["variant"] == variant]
        poisoned = [[one[kind]["after_labels"] for one in own] for kind in ("swapped", "random")]
        after = ["; ".join("none" if n is None else str(n) for n in each) for each in poisoned]
        bits = all(
            one[k]["back to the bits of before the poison"] for one in own for k in ("swapped", "random") if one[k]["alarm"]
        )
        first, then = (_told([one[name] for one in own]) for name in ("before_10", "after"))
        lines.append(f"| {variant} | {first} | {then} | {after[0]} | {after[1]} | {'yes' if bits else 'NO'} |")
    lines += [
        "",
        f"{len(updates)} updates of the last layer took {np.median(updates):.2f} ms (median), "
        f"{np.percentile(updates, 90):.2f} ms (p90) and {np.max(updates):.2f} ms at most, on two cores that other work shares.",
        "",
        "| trials | features | median | p90 | CPU time, median |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {t['trials']} | {t['features']} | {t['median_ms']:.2f} ms | {t['p90_ms']:.2f} ms | {t['cpu_ms']:.2f} ms |"
            for t in times
        ),
    ]
    write_result(
        args.out, {"machine": describe_machine(), "rows": rows, "live": lives, "fit_times": times}, "\n".join(lines) + "\n"
    )


def _told(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
