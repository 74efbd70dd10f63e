"""Are public recordings read and decoded as by hand? Reads each by MNE alone, and beside it by the toolkit, offline and live.

`recordings.tsv` lists the recordings and where they come from; none of them is part of this repository. FOLDER holds each
repository of the list at its commit, as OWNER/NAME/; what is not there is left out. The recordings of tests/recordings.tsv are
tried too, see `make recordings`.

    python benchmarks/recordings.py FOLDER --out benchmarks/results/recordings_MACHINE_DATE
    python benchmarks/recordings.py FOLDER --only eeglab --out /tmp/some     # those whose name holds this text

For each one a PreLocal model with random weights is exported, of the recording's own channels and rate. By hand: MNE's reader
(pyxdf for XDF), the same channels, cut at the pauses that annotations name, zero-phase band-pass and average reference by MNE,
microvolts, windows. Live: `sjepa-stream --check`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import itertools
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import mne
import numpy as np
import pyxdf
from machine import ROOT, describe_machine, write_result
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.eeg.epochs import holds_windows, read_windows
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.live.check import CHUNKS, check_streaming
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.machine import versions
from sjepa_deploy.runtime.predictor import load
from sjepa_deploy.spec import ModelSpec, Preprocessing, Unit

N_TIMES = 200
"""Samples of a window."""

READERS = ("mne", "pyxdf", "mffpy", "pymatreader", "antio")
"""Packages that recordings are read with, by hand and by the toolkit."""

LONG = 20_000
"""Samples of a recording that is not sent one by one, but in random chunks and in those of 32: every send costs Python's time."""

ALLOWED = 1e-6
"""Largest difference from MNE, relative to the largest sample: float32 rounds by 6e-8 of each."""

CUTS = ("bad boundary", "edge boundary", "boundary", "new segment", "amplifier disconnected")
UNITS = {"uV": 1e-6, "mV": 1e-3, "V": 1.0}

Windows = NDArray[np.float64]
Fitting = Callable[[ModelSpec, bool], tuple[NDArray[np.float32], tuple[str, ...]]]


class NoWindowError(Exception):
    """No stretch holds a window and the filter."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What came out for one recording; `offline` and `live` say "equal" and "passes", or what did not."""

    name: str
    format: str
    n_chans: int = 0
    sfreq: float = 0.0
    seconds: float = 0.0
    band: str = ""
    by_hand: str = ""
    offline: str = ""
    n_windows: int = 0
    largest_difference: float | None = None
    live: str = ""
    steps: tuple[str, ...] = ()


def read_by_hand(path: Path, unit: Unit | None, only: list[str] | None = None) -> mne.io.BaseRaw | mne.BaseEpochs:
    """Return a recording as MNE reads it; `only` names the channels of one rate, where an EDF file has several."""
    suffix = path.suffix.lower()
    if path.name.endswith("-epo.fif"):
        return mne.read_epochs(path)
    if suffix == ".xdf":
        streams, _ = pyxdf.load_xdf(path)
        (stream,) = [s for s in streams if float(s["info"]["nominal_srate"][0]) and s["info"]["channel_format"][0] != "string"]
        samples = np.array(stream["time_series"], dtype=float).T * UNITS[unit or "uV"]
        described = (stream["info"]["desc"][0] or {}).get("channels", [{}])[0].get("channel", [])
        labels = [channel.get("label", [None])[0] for channel in described]
        names = labels if all(labels) and labels else [f"EEG {i:03}" for i in range(1, len(samples) + 1)]
        return mne.io.RawArray(samples, mne.create_info(names, float(stream["info"]["nominal_srate"][0]), "eeg"))
    if suffix in (".edf", ".bdf"):
        read = mne.io.read_raw_edf if suffix == ".edf" else mne.io.read_raw_bdf
        try:
            return read(path, infer_types=True, preload=True, include=only)
        except Exception as error:
            if "encoding" not in str(error):
                raise
            return read(path, infer_types=True, preload=True, include=only, encoding="latin1")
    if suffix == ".cnt":
        is_ant = path.read_bytes()[:4] in (b"RIFF", b"RF64")
        return mne.io.read_raw_ant(path, preload=True) if is_ant else mne.io.read_raw_cnt(path, preload=True)
    raw = mne.io.read_raw(path, preload=True)
    if suffix == ".mff":
        filled = np.flatnonzero((raw.get_data("eeg") == 0).all(axis=0))
        if len(filled) < raw.n_times:  # zeros in all channels were not recorded
            raw.annotations.append(raw.times[filled], 1 / raw.info["sfreq"], "BAD_ACQ_SKIP")
    return raw


def segments(raw: mne.io.BaseRaw) -> list[tuple[int, int]]:
    """Return first and last sample of the stretches that no annotation interrupts."""
    edges, skipped = {0, raw.n_times}, np.zeros(raw.n_times, bool)
    for mark in raw.annotations:
        kind = mark["description"].lower()
        first = int(np.clip(np.ceil((mark["onset"] - raw.first_time) * raw.info["sfreq"] - 1e-3), 0, raw.n_times))
        if kind.startswith("bad_acq_skip"):
            end = (mark["onset"] + mark["duration"] - raw.first_time) * raw.info["sfreq"]
            last = int(np.clip(np.ceil(end - 1e-3), first, raw.n_times))
            skipped[first:last] = True
            edges |= {first, last}
        elif kind.startswith(CUTS):
            edges.add(first)
    ends = sorted(edges)
    return [(a, b) for a, b in itertools.pairwise(ends) if not skipped[a]]


def windows_by_hand(raw: mne.io.BaseRaw | mne.BaseEpochs, spec: ModelSpec, band: Preprocessing) -> Windows:
    """Return all windows of all stretches by MNE in microvolts, shape (n_windows, n_chans, n_times)."""
    if isinstance(raw, mne.BaseEpochs):  # their filter was there before they were cut
        if spec.n_chans > 1:
            raw = raw.copy().pick("eeg").set_eeg_reference("average", projection=False)
        return raw.get_data(picks=list(spec.ch_names or ()))[:, :, : spec.n_times] * 1e6
    pieces = []
    for first, last in segments(raw):
        if last - first < spec.n_times:
            continue
        data = raw.get_data(picks=list(spec.ch_names or ()))[:, first:last]
        piece = mne.io.RawArray(data, mne.create_info(list(spec.ch_names or ()), raw.info["sfreq"], "eeg"))
        if band.l_freq or band.h_freq:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*filter_length.*")
                    piece.filter(band.l_freq, band.h_freq, picks="all", phase="zero", verbose="warning")
            except RuntimeWarning:
                continue  # a stretch that is shorter than the filter
        if band.reference == "average":
            piece.set_eeg_reference("average", projection=False)
        whole = piece.n_times // spec.n_times
        microvolts = piece.get_data()[:, : whole * spec.n_times] * 1e6
        pieces.append(microvolts.reshape(spec.n_chans, whole, spec.n_times).swapaxes(0, 1))
    if not pieces:
        raise NoWindowError
    return np.concatenate(pieces)


def read_here(path: Path, unit: Unit | None, ch_names: list[str]) -> tuple[list[str], float, int, Fitting]:
    """Return channels, rate and samples of a recording as the toolkit reads it, and what fits it to a model."""
    if holds_windows(path):
        epochs = mne.read_epochs(path).pick("eeg")
        names = [name for name in epochs.ch_names if name not in epochs.info["bads"]]

        def cut(spec: ModelSpec, checked: bool) -> tuple[NDArray[np.float32], tuple[str, ...]]:
            windows = read_windows(path, spec.signal)
            return windows.eeg, windows.steps

        return names, float(epochs.info["sfreq"]), len(epochs) * len(epochs.times), cut
    raw = read_recording(path, unit=unit, ch_names=ch_names)

    def fit(spec: ModelSpec, checked: bool) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        fitted = fit_recording(raw, spec.signal, check_unit=checked)
        return np.concatenate(fitted.windows(N_TIMES)), fitted.steps

    good = [name for name in raw.ch_names if name not in raw.info["bads"]]
    return good, float(raw.info["sfreq"]), raw.n_times, fit


def compare(path: Path, unit: Unit | None, outcome: Outcome) -> ModelSpec | None:
    """Compare the windows of `path` with those by hand, and return the spec of a model of this recording."""
    hand = None
    try:
        hand = read_by_hand(path, unit)
        kinds = [kind for kind in hand.get_channel_types() if kind == "eeg"]
        outcome.by_hand = f"{len(kinds)} EEG channels"
    except Exception as error:
        outcome.by_hand = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    try:
        names, sfreq, n_samples, fit = read_here(path, unit, [] if hand is None else list(hand.ch_names))
    except SjepaError as error:
        outcome.offline = f"refused: {error.problem}"
        return None
    outcome.n_chans, outcome.sfreq, outcome.seconds = len(names), sfreq, n_samples / sfreq
    band = dataclasses.replace(Preprocessing.default(sfreq), reference="average" if len(names) > 1 else "none")
    spec = ModelSpec.of(
        variant="prelocal",
        n_chans=len(names),
        n_times=N_TIMES,
        sfreq=sfreq,
        ch_names=tuple(names),
        preprocessing=band,
        phase="zero-phase",
    )
    assert hand is not None, "read here, and not by hand"
    if hand.info["sfreq"] != sfreq:
        hand = read_by_hand(path, unit, only=names)
    try:
        expected = windows_by_hand(hand, spec, band)
    except NoWindowError:
        band = dataclasses.replace(band, l_freq=None, h_freq=None)
        spec = spec.replace(preprocessing=band)
        try:
            expected = windows_by_hand(hand, spec, band)
        except NoWindowError:
            outcome.by_hand += f", no window of {N_TIMES} samples"
            expected = np.empty((0, len(names), N_TIMES))
    outcome.band = "none" if band.h_freq is None and band.l_freq is None else f"{band.l_freq or 0:g} to {band.h_freq or 0:g} Hz"
    note = ""
    try:
        ours, outcome.steps = fit(spec, True)
    except SjepaError as error:
        if "no EEG" not in error.problem:
            outcome.offline = f"refused: {error.problem}"
            return spec
        note = f", and refused by default: {error.problem}"
        ours, outcome.steps = fit(spec, False)
    outcome.n_windows = len(ours)
    if ours.shape != expected.shape:
        outcome.offline = f"FAULT: windows of shape {ours.shape}, by hand {expected.shape}"
        return spec
    scale = float(np.abs(expected).max()) or 1.0
    outcome.largest_difference = float(np.abs(ours - expected).max()) / scale
    equal = outcome.largest_difference <= ALLOWED
    outcome.offline = f"{'equal' if equal else f'FAULT: differs by {outcome.largest_difference:.1e}'}{note}"
    return spec


def model_of(spec: ModelSpec, folder: Path) -> Bundle:
    """Return a bundle of PreLocal with random weights, exported into `folder` once."""
    path = folder / hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
    if path.exists():
        return Bundle.open(path)
    weights = Provenance(source="random", format="initialisation", seed=0)
    return to_bundle(build_model(spec, seed=0), path, weights=weights, precisions=("fp32",), max_batch=2)


def check(path: Path, unit: Unit | None, bundle: Bundle, outcome: Outcome) -> None:
    """Check the live path on `path`."""
    spec = bundle.spec
    if holds_windows(path):
        outcome.live = "cannot judge: these windows are cut already."
        return
    chunks = CHUNKS if outcome.seconds * spec.sfreq < LONG else ("32", "random")
    names = None if path.suffix.lower() != ".xdf" else spec.ch_names
    config = StreamConfig(hop=N_TIMES / spec.sfreq, check_unit="refused by default" not in outcome.offline)
    try:
        with load(bundle, n_threads=1, check_unit=config.check_unit) as predict:
            result = check_streaming(predict, path, config, unit=unit, ch_names=names, chunks=chunks)
    except SjepaError as error:
        outcome.live = f"cannot judge: {error.problem}"
        return
    same = "the same bits" if result.identical else "other bits"
    outcome.live = "passes" if result.passed else f"FAULT: {same}, {result.max_error:.1e} from PyTorch in float64"


def tried(name: str, kind: str, path: Path, unit: Unit | None, bundles: Path) -> Outcome:
    """Return what came out for one recording."""
    outcome = Outcome(name=name, format=kind)
    try:
        spec = compare(path, unit, outcome)
        if spec is not None and outcome.n_windows:
            check(path, unit, model_of(spec, bundles), outcome)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(where.filename).name})"
        outcome.offline, outcome.live = (outcome.offline, fault) if outcome.offline else (fault, "")
    return outcome


def sha256(path: Path) -> str:
    """Return the hash of a file, or of all files of a folder in the order of their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def listed(folder: Path) -> list[tuple[str, str, Path, Unit | None]]:
    """Return name, format, path and unit of the recordings of `recordings.tsv` that `folder` holds, unaltered."""
    found = []
    with Path(__file__).with_name("recordings.tsv").open(newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            path = folder / row["repository"] / row["path"]
            if not path.exists():
                sys.stderr.write(f"{path} is missing.\n")
            elif sha256(path) != row["sha256"]:
                raise SystemExit(f"{path} is not the listed one: check out {row['commit']}.")
            else:
                unit = None if row["unit"] == "-" else cast("Literal['uV']", row["unit"])
                found.append((row["name"], row["format"], path, unit))
    return found


def of_tests() -> list[tuple[str, str, Path, Unit | None]]:
    """Return the recordings of the tests that are here."""
    sys.path.insert(0, str(ROOT / "tests"))
    from eeg_files import REAL, folders

    kinds = {".set": "EEGLAB", ".edf": "EDF", ".bdf": "BDF", ".vhdr": "BrainVision", ".xdf": "XDF"}
    paths = {name: folder / name for folder in reversed(folders()) for name in REAL if (folder / name).is_file()}
    recordings = [(name, kinds[path.suffix], path) for name, path in paths.items() if path.suffix in kinds]
    return [(name, kind, path, "uV" if kind == "XDF" else None) for name, kind, path in recordings]


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as Markdown."""

    def short(text: str) -> str:
        return text if len(text) <= 160 else text[:157] + "..."

    lines = [
        "| recording | format | channels x Hz x s | band | by hand | offline | difference | live |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        size = f"{o.n_chans} x {o.sfreq:g} x {o.seconds:.3g}" if o.n_chans else ""
        off = "" if o.largest_difference is None else f"{o.largest_difference:.0e}"
        cells = (o.name, o.format, size, o.band, o.by_hand, o.offline, off, o.live)
        lines.append(f"| {' | '.join(short(cell.replace('|', '/')) for cell in cells)} |")
    return "\n".join([summary(outcomes), "", *lines])


def summary(outcomes: list[Outcome]) -> str:
    """Return the counts of outcomes in a sentence each."""
    offline = Counter(o.offline.partition(":")[0].partition(",")[0] for o in outcomes)
    live = Counter(o.live.partition(":")[0] or "not tried" for o in outcomes)
    counts = [", ".join(f"{n} {what}" for what, n in sorted(c.items(), key=lambda item: -item[1])) for c in (offline, live)]
    return f"{len(outcomes)} recordings. Offline: {counts[0]}. Live: {counts[1]}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the repositories of recordings.tsv are")
    parser.add_argument("--only", default="", help="text that the names of the recordings hold")
    parser.add_argument("--bundles", type=Path, help="folder that keeps the exported models for the next run")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    machine = describe_machine()
    machine["versions"] |= {name: version or "not installed" for name, version in versions(READERS).items()}
    mne.set_log_level("ERROR")
    warnings.simplefilter("ignore")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = args.bundles or Path(folder)
        for name, kind, path, unit in [*of_tests(), *listed(args.folder)]:
            if args.only in name:
                outcomes.append(tried(name, kind, path, unit, bundles))
                sys.stderr.write(f"{name}: {outcomes[-1].offline}; {outcomes[-1].live}\n")
    result = {"machine": machine, "recordings": [dataclasses.asdict(outcome) for outcome in outcomes]}
    write_result(args.out, result, table(outcomes))


if __name__ == "__main__":
    main()
