"""Windows out of recordings, BIDS folders, MNE Epochs, ``.npz`` files, or synthetic ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.data import SYNTHETIC, DataConfig, Target, Windows, encode_targets
from sjepa_deploy.errors import DataError, MissingDependencyError
from sjepa_deploy.montage import Montage, read_montage, require_mne
from sjepa_deploy.recording import fit_recording, read_recording, window_starts
from sjepa_deploy.spec import UNITS_IN_VOLTS, ModelSpec, Position, Preprocessing
from sjepa_deploy.synthetic import planted_eeg

if TYPE_CHECKING:
    import mne


def load_windows(config: DataConfig) -> Windows:
    """Return the windows that `config` describes, labelled where it has a target.

    Raises
    ------
    DataError
        If labels are missing, not finite or of one class only; or sources do not go together.
    RecordingError, MontageError
        If a recording cannot be read or does not fit.
    """
    parts = [part for source in config.source for part in _load(source, config)]
    first = parts[0]
    for part in parts:
        if (part.ch_names, part.sfreq, part.preprocessing) != (first.ch_names, first.sfreq, first.preprocessing):
            raise DataError(
                f"{part.recording[0]} and {first.recording[0]} differ in channels, rate or preprocessing.",
                "Choose channels that all have, or learn from one kind.",
            )
    targets, class_names = None, None
    if config.target is not None:
        values = [value for part in parts for value in (part.targets if part.targets is not None else ())]
        targets, class_names = encode_targets(values, config.target.task)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    eeg = first.eeg if len(parts) == 1 else joined("eeg")
    if not np.isfinite(eeg).all():
        raise DataError("Windows hold samples that are not finite.", "Leave these windows out.")
    return Windows(
        eeg=eeg,
        targets=targets,
        class_names=class_names,
        **{name: joined(name) for name in ("subject", "session", "recording", "onset")},
        ch_names=first.ch_names,
        positions=first.positions,
        sfreq=first.sfreq,
        preprocessing=first.preprocessing,
        steps=tuple(dict.fromkeys(step for part in parts for step in part.steps)),
    )


def _load(source: str, config: DataConfig) -> Iterable[Windows]:
    if source == SYNTHETIC:
        return [_load_synthetic(config)]
    path = Path(source)
    if not path.exists():
        raise DataError(f"There is no data at {source}.", f"Check the path, or use {SYNTHETIC}.")
    if path.is_dir():
        return _load_bids(path, config)
    if path.suffix == ".npz":
        return [_load_npz(path, config)]
    if path.name.endswith(("-epo.fif", "_epo.fif", "-epo.fif.gz", "_epo.fif.gz")):
        return [_load_epochs(path, config)]
    return [_load_raw(read_recording(path), path.stem, config, subject=path.stem, table=_table_beside(path, config))]


def _load_synthetic(config: DataConfig) -> Windows:
    montage = read_montage(config.montage or "GSN-HydroCel-129")
    if config.ch_names is not None:
        montage = montage.pick(config.ch_names)
    much = config.synthetic
    planted = planted_eeg(
        much.n_subjects, much.n_windows, montage.positions, config.n_times, config.sfreq, np.random.default_rng(much.seed)
    )
    targets: NDArray[Any] | None = None
    if config.target is not None:
        slow = np.where(planted.latent > 0, "slow", "fast")
        targets = slow if config.target.task == "classification" else planted.reaction_time
    subject = np.char.add("synthetic-", planted.subject.astype(str))
    return _made(
        planted.eeg, targets, subject, montage.ch_names, montage.positions, config.sfreq, config.prepared, ("synthetic EEG",)
    )


def _made(
    eeg: NDArray[np.float32],
    targets: NDArray[Any] | None,
    subject: NDArray[np.str_],
    ch_names: tuple[str, ...],
    positions: tuple[Position, ...] | None,
    sfreq: float,
    preprocessing: Preprocessing,
    steps: tuple[str, ...],
    **known: NDArray[Any],
) -> Windows:
    """Return windows whose session and recording are the subject, one after the other, unless something else is `known`."""
    places = {"session": subject, "recording": subject, "onset": np.arange(len(eeg)) * eeg.shape[2] / sfreq} | known
    return Windows(
        eeg=eeg,
        targets=targets,
        class_names=None,
        subject=subject,
        **places,
        ch_names=ch_names,
        positions=positions,
        sfreq=sfreq,
        preprocessing=preprocessing,
        steps=steps,
    )


def _load_raw(
    raw: mne.io.BaseRaw,
    name: str,
    config: DataConfig,
    *,
    subject: str,
    session: str = "1",
    table: Path | None = None,
    label: Any = None,
) -> Windows:
    """Cut windows out of a recording: around events where there is a target of each, else one after the other."""
    montage = _montage_of(raw, config)
    fitted = fit_recording(raw, _fitting_spec(montage, config), interpolate=config.interpolate)
    n_samples, steps = fitted.data.shape[1], list(fitted.steps)
    targets: list[Any] | None = None
    if config.target is None or label is not None:
        hop = config.n_times if config.hop is None else max(1, round(config.hop * config.sfreq))
        starts = window_starts(n_samples, config.n_times, hop)
        targets = None if label is None else [label] * len(starts)
    else:
        events = _read_column(table, config.target) if config.target.kind == "column" else reaction_times(raw, config.target)
        onsets = np.array([onset for onset, _ in events]) + config.target.tmin
        starts = np.rint(onsets * config.sfreq).astype(np.intp)
        whole = (starts >= 0) & (starts + config.n_times <= n_samples)
        starts, targets = starts[whole], [value for (_, value), ok in zip(events, whole, strict=True) if ok]
        if not len(starts):
            raise DataError(f"{name} has no event with a whole window and a label.", "Check the events' names and the table.")
        steps.append(f"cut windows {config.target.tmin:g} s after events")
    eeg = np.stack([fitted.data[:, start : start + config.n_times] for start in starts])
    return _made(
        eeg,
        None if targets is None else np.array(targets),
        np.full(len(eeg), subject),
        montage.ch_names,
        montage.positions if any(map(any, montage.positions)) else None,
        config.sfreq,
        config.prepared,
        tuple(steps),
        session=np.full(len(eeg), session),
        recording=np.full(len(eeg), name),
        onset=starts / config.sfreq,
    )


def _montage_of(raw: mne.io.BaseRaw | mne.BaseEpochs, config: DataConfig) -> Montage:
    """Return the channels to use. Positions that are not known are all zero."""
    if config.montage is not None:
        montage = read_montage(config.montage)
        if config.ch_names is not None or config.interpolate:
            return montage.pick(config.ch_names or montage.ch_names)
        good = {name.casefold() for name in raw.ch_names if name not in raw.info["bads"]}
        return montage.pick([name for name in montage.ch_names if name.casefold() in good] or montage.ch_names)
    names = config.ch_names or tuple(name for name in raw.ch_names if name not in raw.info["bads"])
    place = {ch["ch_name"].casefold(): tuple(map(float, ch["loc"][:3])) for ch in raw.info["chs"]}
    places = [place.get(name.casefold(), (math.nan,) * 3) for name in names]
    known = all(math.isfinite(x) for p in places for x in p) and all(any(p) for p in places)
    positions = tuple((p[0], p[1], p[2]) if known else (0.0, 0.0, 0.0) for p in places)
    return Montage(ch_names=names, positions=positions)


def _fitting_spec(montage: Montage, config: DataConfig) -> ModelSpec:
    return ModelSpec(
        variant="postlocal",
        n_chans=len(montage.ch_names),
        n_times=config.n_times,
        sfreq=config.sfreq,
        ch_names=montage.ch_names,
        positions=montage.positions if any(map(any, montage.positions)) else None,
        preprocessing=config.prepared,
    )


def reaction_times(raw: mne.io.BaseRaw, target: Target) -> list[tuple[float, float]]:
    """Return the onset of every stimulus that was answered before the next one, and the seconds to the answer.

    Raises
    ------
    DataError
        If the recording lacks stimuli or responses of these names.
    """
    onsets = raw.annotations.onset - (raw.first_time if raw.annotations.orig_time is not None else 0.0)
    names = [str(name) for name in raw.annotations.description]
    for wanted in (target.stimulus, target.response):
        if not wanted or not set(wanted) & set(names):
            there = ", ".join(sorted(set(names))) or "none"
            raise DataError(
                f"The recording has no events {' or '.join(wanted) or '(none was named)'}; its events are {there}.",
                "Name the stimulus and the response in the target's configuration.",
            )
    answered: list[tuple[float, float]] = []
    stimulus: float | None = None
    for onset, name in sorted(zip(onsets.tolist(), names, strict=True)):
        if name in target.stimulus:
            stimulus = onset
        elif name in target.response and stimulus is not None:
            if onset - stimulus <= target.max_reaction_time:
                answered.append((stimulus, onset - stimulus))
            stimulus = None
    return answered


def _table_beside(path: Path, config: DataConfig) -> Path | None:
    if config.target is None or config.target.kind != "column":
        return None
    return path.with_name(config.target.tsv.format(stem=path.stem))


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file."""
    if not path.is_file():
        raise DataError(f"There is no table {path}.", "Check the target's `tsv`.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def _read_column(table: Path | None, target: Target) -> list[tuple[float, str]]:
    assert table is not None, "a column is read from a table"
    rows = read_tsv(table)
    if not rows or target.column not in rows[0] or "onset" not in rows[0]:
        raise DataError(
            f"{table.name} has no columns onset and {target.column}.",
            f"It has {', '.join(rows[0] if rows else ()) or 'no rows'}.",
        )
    return [(float(row["onset"]), row[target.column]) for row in rows]


def _load_bids(root: Path, config: DataConfig) -> Iterable[Windows]:
    require_mne()
    try:
        import mne_bids
    except ImportError as error:
        raise MissingDependencyError("MNE-BIDS", "eeg") from error
    if not (root / "dataset_description.json").is_file():
        raise DataError(f"{root} is no BIDS folder: it has no dataset_description.json.", "Name the recordings themselves.")
    paths = mne_bids.find_matching_paths(
        root, datatypes="eeg", suffixes="eeg", extensions=[".edf", ".bdf", ".vhdr", ".set", ".fif"]
    )
    if not paths:
        raise DataError(f"{root} holds no EEG recording.", "Check the folder.")
    target = config.target
    by_subject: dict[str, str] = {}
    if target is not None and target.column is not None and (root / "participants.tsv").is_file():
        rows = read_tsv(root / "participants.tsv")
        if rows and target.column in rows[0]:
            by_subject = {row["participant_id"].removeprefix("sub-"): row[target.column] for row in rows}
    for path in paths:
        raw = mne_bids.read_raw_bids(path, verbose="error").load_data(verbose="error").pick("eeg")
        events = path.copy().update(suffix="events", extension=".tsv")
        yield _load_raw(
            raw,
            path.basename,
            config,
            subject=path.subject,
            session=path.session or "1",
            table=Path(events.fpath),
            label=by_subject.get(path.subject, "") if by_subject else None,
        )


def _load_epochs(path: Path, config: DataConfig) -> Windows:
    """Read Epochs, which were filtered before they were cut: their band is taken from the file, not made here."""
    mne = require_mne()
    epochs = mne.read_epochs(path, preload=True, verbose="error").pick("eeg")
    montage = _montage_of(epochs, config)
    spec = _fitting_spec(montage, config)
    names = {name.casefold(): name for name in epochs.ch_names}
    if missing := [name for name in montage.ch_names if name.casefold() not in names]:
        raise DataError(f"{path.name} lacks the channels {', '.join(missing[:8])}.", "Choose channels that it has.")
    epochs = epochs.reorder_channels([names[name.casefold()] for name in montage.ch_names])
    low, high = epochs.info["highpass"] or None, epochs.info["lowpass"]
    if epochs.info["sfreq"] < spec.sfreq * (1 - 1e-6):
        raise DataError(f"{path.name} is sampled at {epochs.info['sfreq']:g} Hz.", f"Use --sfreq {epochs.info['sfreq']:g}.")
    if not math.isclose(epochs.info["sfreq"], spec.sfreq):
        epochs = epochs.resample(spec.sfreq, verbose="error")
    tmin = config.target.tmin if config.target is not None else epochs.tmin
    first = round((tmin - epochs.tmin) * spec.sfreq)
    volts = epochs.get_data(copy=False)
    if first < 0 or first + config.n_times > volts.shape[2]:
        raise DataError(
            f"The epochs of {path.name} last from {epochs.tmin:g} to {epochs.tmax:g} s and hold no window of "
            f"{config.n_times} samples from {tmin:g} s.",
            "Use a smaller --n-times, or another tmin.",
        )
    volts = volts[:, :, first : first + config.n_times]
    if spec.preprocessing.reference == "average":
        volts = volts - volts.mean(axis=1, keepdims=True)
    band = Preprocessing(
        reference=spec.preprocessing.reference, l_freq=low, h_freq=high if high and high < spec.sfreq / 2 else None
    )
    targets = None
    if config.target is not None:
        column = config.target.column or ("reaction_time" if config.target.kind == "reaction_time" else "event")
        if column == "event":
            of_id = {number: name for name, number in epochs.event_id.items()}
            targets = np.array([of_id[number] for number in epochs.events[:, 2]])
        elif epochs.metadata is None or column not in epochs.metadata:
            raise DataError(f"The metadata of {path.name} have no column {column}.", "Name another column.")
        else:
            targets = np.array(epochs.metadata[column].tolist(), dtype=object)
    name = np.full(len(volts), path.stem)
    onset = (epochs.events[:, 0] - epochs.events[0, 0]) / epochs.info["sfreq"] if len(volts) else np.zeros(0)
    return _made(
        np.ascontiguousarray(volts / UNITS_IN_VOLTS["uV"], dtype=np.float32),
        targets,
        name,
        montage.ch_names,
        spec.positions,
        spec.sfreq,
        band,
        ("epochs as they were cut and filtered", f"reference: {spec.preprocessing.reference}", "scaled to uV"),
        onset=onset,
    )


def _load_npz(path: Path, config: DataConfig) -> Windows:
    """Read ``eeg`` (n_windows, n_chans, n_times), ``ch_names``, ``sfreq`` and what else is there, without pickles."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path.name} cannot be read ({e}).", "Save it with numpy.savez, strings as str arrays.") from e
    if missing := [name for name in ("eeg", "ch_names", "sfreq") if name not in arrays]:
        raise DataError(f"{path.name} lacks {', '.join(missing)}.", "Save eeg, ch_names and sfreq at least.")
    eeg, ch_names = arrays["eeg"], tuple(map(str, arrays["ch_names"]))
    if eeg.ndim != 3 or eeg.shape[1] != len(ch_names) or eeg.dtype.kind not in "fiu" or not len(eeg):
        raise DataError(
            f"{path.name} has eeg of shape {eeg.shape} and type {eeg.dtype} for {len(ch_names)} names.",
            "Save real numbers of shape (n_windows, n_chans, n_times).",
        )
    sfreq, n_times = float(arrays["sfreq"]), eeg.shape[2]
    if not math.isclose(sfreq, config.sfreq) or n_times != config.n_times:
        raise DataError(
            f"{path.name} holds {n_times} samples at {sfreq:g} Hz, not {config.n_times} at {config.sfreq:g}.",
            f"Use --n-times {n_times} --sfreq {sfreq:g}.",
        )
    if config.preprocessing is None:
        raise DataError(
            f"{path.name} does not say how its windows were filtered and referenced.",
            "State it in the configuration's data.preprocessing: the checkpoint passes it on to decoding.",
        )
    unit = str(arrays.get("unit", "uV"))
    if unit not in UNITS_IN_VOLTS:
        raise DataError(f"{unit!r} of {path.name} is not a unit.", f"Use one of {', '.join(UNITS_IN_VOLTS)}.")
    targets = arrays.get("targets")
    if config.target is not None and (targets is None or len(targets) != len(eeg)):
        raise DataError(f"{path.name} has no targets, or not as many as windows.", "Save targets of shape (n_windows,).")
    if not {"subject", "session", "onset"} & set(arrays):
        raise DataError(
            f"{path.name} does not tell which windows belong together.", "Save subject, session or onset, shape (n_windows,)."
        )
    positions: tuple[Position, ...] | None = None
    if config.montage is not None:
        positions = read_montage(config.montage).pick(ch_names).positions
    elif "positions" in arrays:
        positions = tuple((float(x), float(y), float(z)) for x, y, z in arrays["positions"])
    subject = arrays.get("subject", np.full(len(eeg), path.stem)).astype(str)
    known = {"session": arrays["session"].astype(str)} if "session" in arrays else {}
    if "onset" in arrays:
        known["onset"] = arrays["onset"].astype(np.float64)
    return _made(
        np.ascontiguousarray(eeg * (UNITS_IN_VOLTS[unit] / UNITS_IN_VOLTS["uV"]), dtype=np.float32),
        targets if config.target is not None else None,
        subject,
        ch_names,
        positions,
        config.sfreq,
        config.preprocessing,
        ("windows as they were saved",),
        **known,
    )
