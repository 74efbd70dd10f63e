"""Loads windows from recordings, BIDS folders, MNE Epochs and ``.npz`` files, or makes synthetic windows."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.amplitudes import check_amplitude
from sjepa_deploy.eeg.epochs import EPOCHS, epochs_at
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.montage import Montage, read_montage, require_mne
from sjepa_deploy.eeg.names import find_channels, renamed, says_other_than_eeg
from sjepa_deploy.eeg.pauses import PAUSE, Told, sample_time, segments_of, time_of, told
from sjepa_deploy.eeg.readers import heard, reading
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps.reference import average_reference
from sjepa_deploy.eeg.synthetic import planted_eeg
from sjepa_deploy.eeg.units import check_unit, conversion, volts_in
from sjepa_deploy.eeg.windows import FittedRecording
from sjepa_deploy.errors import DataError, MissingDependencyError, NoWindowsError, RecordingError, TooShortError, counted, listed
from sjepa_deploy.learning.data import SYNTHETIC, DataConfig, Target, Windows, encode_targets
from sjepa_deploy.learning.origin import check_twins, samples_hash
from sjepa_deploy.learning.store import WindowStore, mapped_member, pieces_of
from sjepa_deploy.learning.targets import class_events, reaction_times, read_column, read_tsv
from sjepa_deploy.parity import UNREADABLE_NPZ
from sjepa_deploy.spec import EventWindow, Position, Preprocessing, Reference, SignalSpec, Unit

if TYPE_CHECKING:
    import mne

JUDGED_WINDOWS = 4096
"""Number of windows whose amplitude is judged."""

IN_WINDOWS = ("targets", "subject", "session", "onset")
"""Arrays of an ``.npz`` file that have a value for each window."""

Reader = Callable[[Windows | None], Windows]
"""Reads one recording or file, with the channels of the first one where there is one before it."""

Cut = Callable[["mne.io.BaseRaw", FittedRecording, NDArray[np.intp]], NDArray[np.float32]]
"""Returns the windows that begin at samples of a recording, which is given as it was read, too."""


def _cut(raw: mne.io.BaseRaw, fitted: FittedRecording, starts: NDArray[np.intp]) -> NDArray[np.float32]:
    return fitted.cut(starts)


def load_windows(config: DataConfig, *, cut: Cut = _cut) -> Windows:
    """Return the windows that `config` describes, labelled where it has a target.

    Parameters
    ----------
    config : DataConfig
        The data.
    cut : callable
        Cuts the windows out of recordings. Windows that were cut before are taken as they are.

    Raises
    ------
    DataError
        If labels are missing, not finite or of one class only; or sources do not go together.
    RecordingError, MontageError
        If a recording cannot be read or does not fit.
    """
    parts: list[Windows] = []
    skipped: list[NoWindowsError | TooShortError] = []
    store = WindowStore(None if config.memory is None else config.memory * 2**30)
    for source, name in zip(config.source, source_names(config.source), strict=True):
        for read in _readers(source, name, config, cut):
            try:
                part = read(parts[0] if parts else None)
            except (NoWindowsError, TooShortError) as e:
                skipped.append(e)
                continue
            _check(part, config)
            store.append(part.eeg)
            parts.append(replace(part, eeg=part.eeg[:0]))
    if not parts:
        raise (
            skipped[0]
            if len(skipped) == 1
            else DataError(f"None of {len(skipped)} recordings gives a window. {skipped[0].problem}", skipped[0].mend)
        )
    first = parts[0]
    for part in parts:
        if (part.signal.steps, part.signal.phase) != (first.signal.steps, first.signal.phase):
            raise DataError(
                f"{part.recording[0]} and {first.recording[0]} went through different steps.",
                "Learn from one kind.",
            )
    check_twins(pair for part in parts for pair in part.hashes.items())
    targets, class_names = None, None
    events = sum((Counter(part.events) for part in parts), Counter[str]())
    if config.target is not None:
        values = [value for part in parts for value in (part.targets if part.targets is not None else ())]
        targets, class_names = encode_targets(values, config.target.task, config.target.class_names, events=events)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    steps = tuple(dict.fromkeys(step for part in parts for step in part.steps))
    if store.in_file:
        steps += ("kept in a mapped file",)
    return Windows(
        eeg=store.windows(),
        targets=targets,
        class_names=class_names,
        **{name: joined(name) for name in ("subject", "session", "recording", "onset")},
        signal=first.signal,
        steps=steps,
        hashes={name: digest for part in parts for name, digest in part.hashes.items()},
        skipped=tuple(e.problem for e in skipped),
        events=events,
    )


def _check(part: Windows, config: DataConfig) -> None:
    """Refuse samples that are not finite, and amplitudes that no EEG has: of many windows, evenly spaced ones are judged."""
    if not all(np.isfinite(piece).all() for piece in pieces_of(part.eeg)):
        raise DataError("Windows hold samples that are not finite.", "Leave these windows out.")
    if config.check_unit and part.signal.in_unit:
        mend = "State the unit they are stored in (`unit` of an .npz; volts passed as microvolts?)."
        step = -(-len(part) // JUDGED_WINDOWS)
        check_amplitude(part.eeg[::step], part.sfreq, mend, unit="uV")


def source_names(sources: Sequence[str]) -> list[str]:
    """Return a name for each source: as much of the end of its path, without the suffix, as no other source has.

    ``a/run.edf`` and ``b/run.edf`` are "a/run" and "b/run", two people.

    Raises
    ------
    DataError
        If a file or folder is named twice.
    """
    paths = [Path(source).resolve() for source in sources]
    if twice := [path.name for path, n in Counter(paths).items() if n > 1]:
        raise DataError(f"{twice[0]} is named twice.", "Leave it out once.")
    stems = [path if path.is_dir() else path.with_suffix("") for path in paths]
    ends = [(stem if stems.count(stem) == 1 else path).parts for path, stem in zip(paths, stems, strict=True)]
    names = []
    for i, parts in enumerate(ends):
        others = ends[:i] + ends[i + 1 :]
        depth = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names.append("/".join(parts[-depth:]))
    return names


def _readers(source: str, name: str, config: DataConfig, cut: Cut) -> Iterator[Reader]:
    path = Path(source)
    if config.bids_entities and path.exists() and not path.is_dir():
        raise DataError(
            f"{source} is no BIDS folder: subjects, sessions, tasks and runs are of these.", "Name BIDS folders alone."
        )
    if source == SYNTHETIC:
        yield functools.partial(_load_synthetic, config)
    elif not path.exists():
        raise DataError(f"There is no data at {source}.", f"Check the path, or use {SYNTHETIC}.")
    elif path.is_dir():
        yield from _readers_of_bids(path, config, f"{name}/" if len(config.source) > 1 else "", cut)
    elif path.suffix == ".npz":
        yield functools.partial(_load_npz, path, name, config)
    elif path.name.endswith(EPOCHS):
        yield functools.partial(_load_epochs, path, name, config)
    else:
        yield functools.partial(_load_recording, path, name, config, cut)


def _load_synthetic(config: DataConfig, first: Windows | None) -> Windows:
    assert first is None, "the synthetic source stands alone"
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
    signal = _signal(config, montage.ch_names, montage.positions)
    return _made(planted.eeg, targets, subject, signal, ("synthetic EEG",))


def _made(
    eeg: NDArray[np.float32],
    targets: NDArray[Any] | None,
    subject: NDArray[np.str_],
    signal: SignalSpec,
    steps: tuple[str, ...],
    hashes: dict[str, str] | None = None,
    events: Mapping[str, int] | None = None,
    **known: NDArray[Any],
) -> Windows:
    """Return windows whose session and recording are the subject, one after the other, unless something else is `known`.

    Without `hashes` of the recordings, the windows are hashed.
    """
    places = {"session": subject, "recording": subject, "onset": np.arange(len(eeg)) * signal.seconds} | known
    if hashes is None:
        rows = {str(name): np.flatnonzero(places["recording"] == name) for name in np.unique(places["recording"])}
        hashes = {name: samples_hash(eeg[some] for some in pieces_of(of_it, eeg[0].nbytes)) for name, of_it in rows.items()}
    return Windows(
        eeg=eeg,
        targets=targets,
        class_names=None,
        subject=subject,
        **places,
        signal=signal,
        steps=steps,
        hashes=hashes,
        events=events or {},
    )


def _load_recording(path: Path, name: str, config: DataConfig, cut: Cut, first: Windows | None) -> Windows:
    table = None
    if config.target is not None and config.target.kind == "column":
        table = path.with_name(config.target.tsv.format(stem=path.stem))
    raw = read_recording(path, unit=config.unit, ch_names=config.ch_names, rename=config.renamed)
    return _load_raw(raw, name, config, cut, first, subject=name, table=table)


def _load_raw(
    raw: mne.io.BaseRaw,
    name: str,
    config: DataConfig,
    cut: Cut,
    first: Windows | None,
    *,
    subject: str,
    session: str = "1",
    table: Path | None = None,
    label: Any = None,
) -> Windows:
    """Cut windows out of a recording: around events where there is a target of each, else one after the other."""
    try:  # events first: a recording without them is passed over, whatever else it lacks
        events = [] if config.target is None or label is not None else _events(raw, table, config.target)
        signal = _fitting_signal(raw.info, config, first, of_events=label is None)
        share = config.interpolate_share if config.interpolate else 0.0
        fitted = fit_recording(raw, signal, interpolate=share, check_unit=config.check_unit)
    except (RecordingError, DataError) as e:
        raise type(e)(f"{name}: {e.problem}", e.mend) from e  # one of many
    digest = samples_hash([raw.get_data()])
    steps = list(fitted.steps)
    values: list[Any] | None = None
    if config.target is None or label is not None:
        hop = config.n_times if config.hop is None else max(1, round(config.hop * config.sfreq))
        starts = fitted.window_starts(hop)
        whole = np.ones(len(starts), dtype=np.bool_)
        values = None if label is None else [label] * len(starts)
    else:
        values = [value for _, value in events]
        onsets = np.array([onset for onset, _ in events], dtype=np.float64)
        starts, whole = fitted.place_windows(onsets, config.target.tmin)
        steps.append(f"cut windows {config.target.tmin:g} s after events")
    onset = fitted.times(starts)
    good = ~_marked_bad(raw, onset, config.n_times / config.sfreq)
    if n_bad := int((whole & ~good).sum()):
        steps.append(f"left out {n_bad} windows in stretches marked bad")
    kept = np.flatnonzero(whole & good)
    if not len(kept):
        raise NoWindowsError(
            f"{name} has no whole window that is not marked bad and, where events are learned from, follows one of them.",
            "Check the events' names, the table and the annotations.",
        )
    return _made(
        cut(raw, fitted, starts[kept]),
        None if values is None else np.array([values[i] for i in kept]),
        np.full(len(kept), subject),
        signal,
        tuple(steps),
        {name: digest},
        session=np.full(len(kept), session),
        recording=np.full(len(kept), name),
        onset=onset[kept],
        events={} if config.target is None or config.target.kind != "event" else Counter(events_of(raw).description),
    )


def _events(raw: mne.io.BaseRaw, table: Path | None, target: Target) -> Sequence[tuple[float, Any]]:
    """Return the onset in seconds and the label of every event."""
    if target.kind == "reaction_time":
        return reaction_times(raw, target)
    if target.kind == "event":
        return class_events(raw, target)
    assert table is not None, "a column is read from a table"
    return read_column(table, target)


def _marked_bad(raw: mne.io.BaseRaw, onset: NDArray[np.float64], length: float) -> NDArray[np.bool_]:
    """Return a mask of the windows that overlap annotations that MNE rejects by: "BAD..." and "EDGE...", whatever their case."""
    marks = raw.annotations
    rejected = np.array([name.casefold().startswith(("bad", "edge")) for name in marks.description], dtype=np.bool_)
    begin = time_of(marks.onset[rejected] - raw.first_time, segments_of(raw), raw.info["sfreq"])
    end = begin + marks.duration[rejected]
    overlaps: NDArray[np.bool_] = (onset[:, None] < end) & (onset[:, None] + length > begin)
    return np.asarray(overlaps.any(axis=1))


def _signal(
    config: DataConfig,
    ch_names: tuple[str, ...],
    positions: tuple[Position, ...] | None,
    event_window: EventWindow | None = None,
) -> SignalSpec:
    return SignalSpec(
        n_chans=len(ch_names),
        n_times=config.n_times,
        sfreq=config.sfreq,
        ch_names=ch_names,
        positions=positions,
        steps=config.signal_steps,
        phase=config.phase,
        event_window=event_window,
    )


def _fitting_signal(info: mne.Info, config: DataConfig, first: Windows | None, *, of_events: bool) -> SignalSpec:
    """Return the signal that recordings are fitted to. Its channels are the first recording's, the montage's, or those of `info`.

    Of `info`, those that are marked bad and those whose names say that they are no EEG ("EOG1") are left out.
    """
    bads = info["bads"]
    positions: tuple[Position, ...] | None
    if first is not None:
        return first.signal
    if config.montage is not None:
        montage = read_montage(config.montage)
        match = find_channels(montage.ch_names, [name for name in info["ch_names"] if name not in bads])
        there = [name for name, column in zip(montage.ch_names, match.columns, strict=True) if column is not None]
        montage = montage.pick(config.ch_names or (montage.ch_names if config.interpolate or not there else there))
        ch_names, positions = montage.ch_names, montage.positions
    else:
        ch_names = config.ch_names or tuple(
            name for name in info["ch_names"] if name not in bads and not says_other_than_eeg(name)
        )
        place = {ch["ch_name"].casefold(): tuple(map(float, ch["loc"][:3])) for ch in info["chs"]}
        places = [place.get(name.casefold(), (math.nan,) * 3) for name in ch_names]
        known = all(any(p) and all(map(math.isfinite, p)) for p in places)
        positions = tuple((p[0], p[1], p[2]) for p in places) if known else None
    return _signal(config, ch_names, positions, config.event_window if of_events else None)


def _readers_of_bids(root: Path, config: DataConfig, prefix: str, cut: Cut) -> Iterator[Reader]:
    """Give the readers of a BIDS folder. `prefix` tells its subjects and recordings from those of other sources."""
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
    paths = [path for path in paths if Path(path.fpath).relative_to(root).parts[0] == f"sub-{path.subject}"]  # no derivatives
    if not paths:
        raise DataError(f"{root} holds no EEG recording.", "Check the folder.")
    for entity, wanted in config.bids_entities.items():
        there = sorted({str(getattr(path, entity.removesuffix("s"))) for path in paths})
        if absent := [value for value in wanted if value not in there]:
            raise DataError(f"{root} has no {entity} {listed(absent)}; it has {listed(there, 64)}.", f"Mend --{entity}.")
        paths = [path for path in paths if getattr(path, entity.removesuffix("s")) in wanted]
        if not paths:
            raise DataError(f"{root} holds no recording of these {listed(config.bids_entities)} together.", "Take more of one.")
    target = config.target
    by_subject: dict[str, str] = {}
    if target is not None and target.column is not None and (root / "participants.tsv").is_file():
        rows = read_tsv(root / "participants.tsv")
        if rows and target.column in rows[0]:
            by_subject = {row["participant_id"].removeprefix("sub-"): row[target.column] for row in rows}
    for path in paths:
        label = by_subject.get(path.subject, "") if by_subject else None
        yield functools.partial(_load_bids, path, prefix, config, cut, label)


def _load_bids(
    path: Any,  # mne_bids.BIDSPath
    prefix: str,
    config: DataConfig,
    cut: Cut,
    label: str | None,
    first: Windows | None,
) -> Windows:
    import mne_bids

    notes: list[str] = []
    with reading(path.basename), heard(notes):
        raw = mne_bids.read_raw_bids(path, verbose="warning").load_data(verbose="error").pick("eeg")
    raw.info["temp"] = Told(notes=tuple(notes))
    if Path(path.fpath).suffix.lower() in (".edf", ".bdf"):
        raw = _of_edf(read_recording(path.fpath, unit=config.unit), raw, path.basename)
    if config.rename:
        raw.rename_channels(dict(zip(raw.ch_names, renamed(raw.ch_names, config.renamed, RecordingError), strict=True)))
    events = Path(path.copy().update(suffix="events", extension=".tsv").fpath)
    session = path.session or "1"
    name, subject = prefix + path.basename, prefix + path.subject
    return _load_raw(raw, name, config, cut, first, subject=subject, session=session, table=events, label=label)


def _of_edf(raw: mne.io.BaseRaw, described: mne.io.BaseRaw, name: str) -> mne.io.BaseRaw:
    """Return an EDF file as `read_recording` reads it, with the names, places, bad channels and events that a BIDS folder gives.

    MNE alone brings all channels to the highest rate, joins what is paused, and takes unknown units for volts.
    """
    mne = require_mne()
    match = find_channels(described.ch_names, raw.ch_names)
    theirs = {i: mine for mine, i in zip(described.ch_names, match.columns, strict=True) if i is not None}
    if not theirs:
        raise RecordingError(
            f"None of the channels of {name} has the name that channels.tsv gives it; it has {listed(raw.ch_names, 64)}.",
            "Mend channels.tsv.",
        )
    segments, pauses = segments_of(raw), raw.annotations[[name == PAUSE for name in raw.annotations.description]]
    raw.pick([raw.ch_names[i] for i in theirs]).rename_channels(dict(zip(raw.ch_names, theirs.values(), strict=True)))
    raw.info["bads"] = [bad for bad in described.info["bads"] if bad in raw.ch_names]
    loc = {channel["ch_name"]: channel["loc"] for channel in described.info["chs"]}
    for channel in raw.info["chs"]:
        channel["loc"] = loc[channel["ch_name"]].copy()
    marks = described.annotations
    places = sample_time(marks.onset - described.first_time, segments, raw.info["sfreq"])
    events = mne.Annotations(places, marks.duration, marks.description, orig_time=pauses.orig_time)
    raw.set_annotations(events + pauses, verbose="error")
    raw.info["temp"] = Told(notes=told(described).notes + told(raw).notes, paused=told(raw).paused)
    return raw


def _load_epochs(path: Path, name: str, config: DataConfig, first: Windows | None) -> Windows:
    """Read Epochs, which were filtered before they were cut: their band is taken from the file, not made here."""
    mne = require_mne()
    with reading(path.name):
        epochs = mne.read_epochs(path, preload=True, verbose="error").pick("eeg")
    signal = _fitting_signal(epochs.info, config, first, of_events=True)
    assert signal.ch_names is not None
    onset = (epochs.events[:, 0] - epochs.events[:1, 0]) / epochs.info["sfreq"]
    low, high = epochs.info["highpass"] or None, epochs.info["lowpass"]
    tmin = config.target.tmin if config.target is not None else epochs.tmin
    volts = epochs_at(epochs, signal.ch_names, signal.sfreq, tmin, config.n_times, path.name)
    reference: Reference = "average" if signal.ends_with_average else "none"
    if reference == "average":
        volts = average_reference(volts, axis=1)
    band = Preprocessing(reference=reference, l_freq=low, h_freq=high if high and high < signal.sfreq / 2 else None)
    targets, kept = None, np.arange(len(volts))
    if config.target is not None:
        labels = _labels_of_epochs(epochs, config.target, name)
        kept = np.flatnonzero([label is not None for label in labels])
        if not len(kept):
            raise NoWindowsError(
                f"{name} has no events of these classes; its events are {counted(_counts_of_epochs(epochs))}.", "Mend --classes."
            )
        targets = np.array([labels[i] for i in kept], dtype=object)
    return _made(
        np.ascontiguousarray(volts[kept] / volts_in("uV"), dtype=np.float32),
        targets,
        np.full(len(kept), name),
        signal.replace(steps=band.steps, phase="zero-phase"),
        ("epochs as they were cut and filtered", f"reference: {reference}", "scaled to uV"),
        onset=onset[kept],
        events={} if config.target is None or config.target.kind != "event" else _counts_of_epochs(epochs),
    )


def _counts_of_epochs(epochs: mne.Epochs) -> dict[str, int]:
    """Return how many epochs each event has."""
    return {event: int((epochs.events[:, 2] == number).sum()) for event, number in epochs.event_id.items()}


def _labels_of_epochs(epochs: mne.Epochs, target: Target, name: str) -> list[Any]:
    """Return the label of each epoch, or None where its event is of none of the target's classes."""
    column = target.column or ("reaction_time" if target.kind == "reaction_time" else "event")
    if column == "event":
        of_id = {number: event for event, number in epochs.event_id.items()}
        values: list[Any] = [of_id[number] for number in epochs.events[:, 2]]
    elif epochs.metadata is None or column not in epochs.metadata:
        raise DataError(f"The metadata of {name} have no column {column}.", "Name another column.")
    else:
        values = epochs.metadata[column].tolist()
    return [target.class_of(str(value)) for value in values] if target.classes else values


def _load_npz(path: Path, name: str, config: DataConfig, first: Windows | None) -> Windows:
    """Read ``eeg`` (n_windows, n_chans, n_times), ``ch_names``, ``sfreq`` and what else is there, without pickles."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            mapped = mapped_member(path, "eeg") if "eeg" in stored.files else None
            arrays = {name: stored[name] for name in stored.files if name != "eeg" or mapped is None}
            arrays |= {} if mapped is None else {"eeg": mapped}
    except UNREADABLE_NPZ as e:
        raise DataError(f"{path.name} cannot be read ({e}).", "Save it with numpy.savez, strings as str arrays.") from e
    if missing := [name for name in ("eeg", "ch_names", "sfreq") if name not in arrays]:
        raise DataError(f"{path.name} lacks {', '.join(missing)}.", "Save eeg, ch_names and sfreq at least.")
    eeg, ch_names = arrays["eeg"], tuple(map(str, arrays["ch_names"].ravel()))
    if eeg.ndim != 3 or eeg.shape[1] != len(ch_names) or eeg.dtype.kind not in "fiu" or not len(eeg):
        raise DataError(
            f"{path.name} has eeg of shape {eeg.shape} and type {eeg.dtype} for {len(ch_names)} names.",
            "Save real numbers of shape (n_windows, n_chans, n_times).",
        )
    if config.target is not None and "targets" not in arrays:
        raise DataError(f"{path.name} has no targets.", "Save targets of shape (n_windows,).")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(IN_WINDOWS, (len(eeg),))
    shapes |= {"positions": (len(ch_names), 3), "sfreq": (), "unit": ()}
    if wrong := [name for name, shape in shapes.items() if name in arrays and arrays[name].shape != shape]:
        name = wrong[0]
        raise DataError(f"{path.name} has {name} of shape {arrays[name].shape}, not {shapes[name]}.", "Save it in that shape.")
    if not {"subject", "session", "onset"} & set(arrays):
        raise DataError(
            f"{path.name} does not tell which windows belong together.", "Save subject, session or onset, shape (n_windows,)."
        )
    if words := [name for name in ("sfreq", "onset", "positions") if name in arrays and arrays[name].dtype.kind not in "fiu"]:
        raise DataError(f"{words[0]} of {path.name} is no number.", "Save sfreq in Hz, onset in seconds, positions in metres.")
    sfreq, n_times = float(arrays["sfreq"]), eeg.shape[2]
    if not math.isclose(sfreq, config.sfreq) or n_times != config.n_times:
        raise DataError(
            f"{path.name} holds {n_times} samples at {sfreq:g} Hz, not {config.n_times} at {config.sfreq:g}.",
            f"Use --n-times {n_times} --sfreq {sfreq:g}.",
        )
    if config.preprocessing is None and config.steps is None:
        raise DataError(
            f"{path.name} does not say how its windows were filtered and referenced.",
            "State it in the configuration's data.preprocessing or data.steps: the checkpoint passes it on to decoding.",
        )
    unit = str(arrays.get("unit", "uV"))
    check_unit(unit, DataError, f" of {path.name}")
    places = arrays.get("positions", np.zeros((len(ch_names), 3)))
    saved = Montage(ch_names=ch_names, positions=tuple((float(x), float(y), float(z)) for x, y, z in places))
    theirs = None if first is None else first.signal.ch_names
    chosen = saved.pick(theirs or config.ch_names or ch_names)
    rows = [ch_names.index(name) for name in chosen.ch_names]
    positions = chosen.positions if "positions" in arrays else None
    if config.montage is not None:
        positions = read_montage(config.montage).pick(chosen.ch_names).positions
    kept = np.arange(len(eeg))
    if config.target is not None and config.target.classes:
        labels = [config.target.class_of(str(value)) for value in arrays["targets"]]
        kept = np.flatnonzero([label is not None for label in labels])
        if not len(kept):
            raise NoWindowsError(f"{name} has no targets of these classes.", "Mend --classes.")
        arrays = {key: value[kept] if key in IN_WINDOWS else value for key, value in arrays.items()}
        arrays["targets"] = np.array([labels[i] for i in kept])
    subject = arrays.get("subject", np.full(len(kept), name)).astype(str)
    session = arrays.get("session", subject).astype(str)
    return _made(
        _in_microvolts(eeg, kept, rows, conversion(cast(Unit, unit), "uV"), config),
        arrays["targets"] if config.target is not None else None,
        subject,
        first.signal if first is not None else _signal(config, chosen.ch_names, positions),
        ("windows as they were saved",),
        session=session,
        recording=np.char.add(np.char.add(np.char.add(f"{name}/", subject), "/"), session),
        onset=arrays.get("onset", np.full(len(kept), np.nan)).astype(np.float64),
    )


def _in_microvolts(
    eeg: NDArray[Any], kept: NDArray[np.intp], rows: list[int], factor: float, config: DataConfig
) -> NDArray[np.float32]:
    """Return some windows and channels of `eeg` times `factor`. What needs no change stays mapped where it is."""
    if len(kept) == len(eeg) and rows == list(range(eeg.shape[1])) and factor == 1 and eeg.dtype == np.float32:
        return eeg
    store = WindowStore(None if config.memory is None else config.memory * 2**30)
    for some in pieces_of(kept, eeg[0].nbytes):
        store.append(np.ascontiguousarray(eeg[some][:, rows] * factor, dtype=np.float32))
    return store.windows()
