"""Holds labelled windows of EEG, and splits them into training, validation and test parts.

Windows are in microvolts and in memory. The steps done to a recording are a `SignalSpec`, which goes into the checkpoint so
that export and live decoding do the same. `sjepa_deploy.learning.loading` gets windows out of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.interpolation import INTERPOLATED_SHARE
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.steps import Phase, Step
from sjepa_deploy.errors import DataError, counted, listed
from sjepa_deploy.spec import EventWindow, Preprocessing, SignalSpec, Unit

SYNTHETIC = "synthetic"
Task = Literal["regression", "classification"]
SplitBy = Literal["subject", "session", "recording", "block"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Says how a window is labelled.

    Attributes
    ----------
    kind : {"reaction_time", "column", "event"}
        "reaction_time": seconds from a stimulus to the next response, as in the EEG Foundation Challenge (NeurIPS 2025).
        "event": the class of an event, by `classes`.
        "column": a column of a TSV, of the metadata of Epochs ("event" is the event's name), or ``targets`` of an ``.npz``.
    task : {"regression", "classification"}
        Whether it is a number or a class.
    classes : tuple of str
        "CLASS=EVENT", or "EVENT" where the class is called like its event; several events may be of one class. Events are
        descriptions of annotations, values of a trigger channel ("1"), markers of an XDF file, names of the events of Epochs, or
        what stands in `column`. Other events are passed over.
    stimulus, response : tuple of str
        Descriptions of the events of a recording. Of a table, `stimulus` picks the rows with such a ``trial_type``.
    tmin : float
        Start of a window after its event in seconds. With 200 samples at 100 Hz, 0.5 makes it 0.5 to 2.5 s.
    max_reaction_time : float
        A response later than this many seconds is none to that stimulus.
    column : str or None
        Name of the column.
    tsv : str
        The table with the columns ``onset`` (seconds) and `column`, in the recording's folder; {stem} is the recording's name.
        Of a BIDS folder, events.tsv is read, or participants.tsv where the column is there.
    """

    kind: Literal["reaction_time", "column", "event"] = "reaction_time"
    task: Task = "regression"
    classes: tuple[str, ...] = ()
    stimulus: tuple[str, ...] = ()
    response: tuple[str, ...] = ()
    tmin: float = 0.5
    max_reaction_time: float = 2.5
    column: str | None = None
    tsv: str = "{stem}.tsv"

    def __post_init__(self) -> None:
        if not math.isfinite(self.tmin) or not self.max_reaction_time > 0:
            raise DataError(
                f"tmin is {self.tmin:g} s, max_reaction_time {self.max_reaction_time:g} s.",
                "Use a finite tmin and a positive max_reaction_time.",
            )
        if self.classes and (self.kind == "reaction_time" or self.task == "regression"):
            raise DataError(
                f"Classes are named, but the target is a {self.kind} and the task a {self.task}.",
                "Set kind to event (or column) and task to classification, or leave the classes out.",
            )
        if self.kind == "event" and not self.classes:
            raise DataError("No class is named.", "Name each by --classes CLASS=EVENT, or under data.target.classes.")
        if wrong := [text for text in self.classes if not all(part.strip() for part in text.split("=", 1))]:
            raise DataError(f"{wrong[0]!r} is no CLASS=EVENT.", "Write for example LEFT=T1.")
        if len(self.events) < len(self.classes):
            raise DataError("An event is of two classes.", "Name each event once.")

    @property
    def events(self) -> dict[str, str]:
        """Return the class of each event that is learned from."""
        pairs = [[part.strip() for part in text.split("=", 1)] for text in self.classes]
        return {pair[-1]: pair[0] for pair in pairs}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes in their order, or () where the data tell them."""
        return tuple(dict.fromkeys(self.events.values()))

    def class_of(self, event: str) -> str | None:
        """Return the class of an event, or None if the event is of no class. Without `classes`, each event is its own class."""
        return self.events.get(event) if self.classes else event


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Says how much synthetic EEG to make (`sjepa_deploy.eeg.synthetic.planted_eeg`)."""

    n_subjects: int = 10
    n_windows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_subjects < 1 or self.n_windows < 1 or self.seed < 0:
            raise DataError(
                f"{self.n_windows} synthetic windows of {self.n_subjects} subjects, seed {self.seed}, are none.",
                "Use 1 or more of both, and a seed of 0 or more.",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Says where windows come from, what shape they have, and how they are split.

    Attributes
    ----------
    source : tuple of str
        Recordings that MNE reads, ``*-epo.fif``, ``.npz`` files, BIDS folders; or "synthetic".
    montage : str or None
        Names and positions of the channels. By default those of the first recording without its bad ones.
    ch_names : tuple of str or None
        Channels to use. By default all of the montage that the first recording has (with `interpolate`, all of the montage), or
        all of the first recording. All others must have them too.
    interpolate : bool
        Make the channels that a recording lacks from the others.
    interpolate_share : float
        Largest share of the channels, 0 to 1, that `interpolate` makes.
    subjects, sessions, tasks, runs : tuple of str
        Entities of BIDS folders to take, without "sub-", "ses-", "task-" and "run-". Empty: all.
    rename : tuple of str
        "THEIRS=MINE": channels of the recordings that get other names.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of recordings that state none, or a wrong one.
    check_unit : bool
        Refuse amplitudes that no EEG has.
    sfreq : float
        Sampling rate in Hz that recordings are brought to.
    n_times : int
        Samples of a window.
    hop : float or None
        Seconds from one unlabelled window to the next; by default they adjoin.
    preprocessing : Preprocessing or None
        Band and reference; by default those of the published pretraining. Of ``.npz`` files it says what was done to them.
    steps : tuple of Step or None
        All steps of the signal, in place of `preprocessing`.
    phase : {"causal", "zero-phase"}
        Form of the steps. "causal" is what runs live; live, a model of zero-phase windows meets
        other signals than it learned from.
    target : Target or None
        The labels.
    split : {"auto", "subject", "session", "recording", "block"}
        What stays together. "block" cuts each recording into contiguous stretches. "auto" takes the first of subject and
        session that there are at least 3 of, else "block".
    n_folds, fold : int
        The groups or blocks are dealt to `n_folds` folds. `fold` is the test set, the next one validates, the rest trains.
    split_seed : int
        Seed by which subjects, sessions or recordings are dealt. Runs that share it share the folds, whatever their
        `Engine.seed` is.
    gap : float or None
        Seconds around validation and test windows of the same recording from which nothing is trained on; one window by default.
    memory : float or None
        Largest size of windows in GiB that is held in memory; more are kept in a mapped file. None: a quarter of what is
        available.
    synthetic : Synthetic
        The synthetic source.
    """

    source: tuple[str, ...] = (SYNTHETIC,)
    montage: str | None = None
    ch_names: tuple[str, ...] | None = None
    interpolate: bool = False
    interpolate_share: float = INTERPOLATED_SHARE
    subjects: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    unit: Unit | None = None
    check_unit: bool = True
    sfreq: float = 100.0
    n_times: int = 200
    hop: float | None = None
    preprocessing: Preprocessing | None = None
    steps: tuple[Step, ...] | None = None
    phase: Phase = "causal"
    target: Target | None = None
    split: Literal["auto", "subject", "session", "recording", "block"] = "auto"
    n_folds: int = 5
    fold: int = 0
    split_seed: int = 0
    gap: float | None = None
    memory: float | None = None
    synthetic: Synthetic = field(default_factory=Synthetic)

    def __post_init__(self) -> None:
        if not self.source or (SYNTHETIC in self.source and len(self.source) > 1):
            raise DataError("The source is empty, or synthetic among others.", "Name recordings, or synthetic alone.")
        if self.bids_entities and self.source == (SYNTHETIC,):
            raise DataError("Subjects, sessions, tasks and runs are of BIDS folders.", "Name a BIDS folder, or leave them out.")
        for name in ("sfreq", "n_times", "hop"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"{name} is {value:g}.", "Use a positive number.")
        if not 0 <= self.interpolate_share <= 1:
            raise DataError(f"interpolate_share is {self.interpolate_share:g}.", "Use a share from 0 to 1.")
        if self.steps is not None and self.preprocessing is not None:
            raise DataError("Both steps and preprocessing are given.", "Leave preprocessing out: it is short for standard steps.")
        if self.gap is not None and not self.gap >= 0:
            raise DataError(f"gap is {self.gap:g} s.", "Use 0 or more.")
        if self.n_folds < 3 or not 0 <= self.fold < self.n_folds:
            raise DataError(f"Fold {self.fold} of {self.n_folds} is none.", "Use 3 folds or more, numbered from 0.")
        if self.memory is not None and not self.memory >= 0:
            raise DataError(f"memory is {self.memory:g} GiB.", "Use 0 or more.")
        if self.split_seed < 0:
            raise DataError(f"split_seed is {self.split_seed}.", "Use 0 or more.")

    @property
    def bids_entities(self) -> dict[str, tuple[str, ...]]:
        """Return the entities of BIDS folders to take, where there is a choice."""
        given = {"subjects": self.subjects, "sessions": self.sessions, "tasks": self.tasks, "runs": self.runs}
        return {name: values for name, values in given.items() if values}

    @property
    def renamed(self) -> dict[str, str]:
        """Return new channel names by old ones."""
        return parse_rename(self.rename, DataError)

    @property
    def signal_steps(self) -> tuple[Step, ...]:
        """Return the steps that recordings go through."""
        return self.steps or (self.preprocessing or Preprocessing.default(self.sfreq)).steps

    @property
    def event_window(self) -> EventWindow | None:
        """Return where windows lie after the events that are learned from."""
        return (
            None
            if self.target is None
            else EventWindow(start=self.target.tmin, events=self.target.stimulus or tuple(self.target.events))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Holds windows of EEG and all that is known of them.

    Attributes
    ----------
    eeg : ndarray of float32, shape (n_windows, n_chans, n_times)
        In microvolts; mapped from a file where they do not fit into memory.
    targets : ndarray, shape (n_windows,), or None
        float32 numbers, or int64 classes.
    class_names : tuple of str or None
        Names of the classes.
    subject, session, recording : ndarray of str, shape (n_windows,)
        Origin of each window.
    onset : ndarray, shape (n_windows,)
        Start of each window in its recording in seconds; NaN where it is not known.
    signal : SignalSpec
        What they are, and what was done to them.
    steps : tuple of str
        Sentences that say what was done to the recordings.
    hashes : dict of str to str
        `sjepa_deploy.learning.origin.samples_hash` of each recording.
    skipped : tuple of str
        Sentences that say which recordings gave no window, and why.
    events : dict of str to int
        Events of the recordings that gave windows, also those of no class, where classes are named by events.
    """

    eeg: NDArray[np.float32]
    targets: NDArray[Any] | None
    class_names: tuple[str, ...] | None
    subject: NDArray[np.str_]
    session: NDArray[np.str_]
    recording: NDArray[np.str_]
    onset: NDArray[np.float64]
    signal: SignalSpec
    steps: tuple[str, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    events: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.eeg)

    def places(self, rows: NDArray[np.intp]) -> Windows:
        """Return some of the windows without their samples: all that a split reads."""
        shape = (len(rows), *self.eeg.shape[1:])
        kept = {name: getattr(self, name)[rows] for name in ("subject", "session", "recording", "onset")}
        return replace(
            self,
            eeg=np.broadcast_to(np.float32(0), shape),
            targets=None if self.targets is None else self.targets[rows],
            **kept,
        )

    def label(self, i: int) -> str:
        """Return the label of window `i` as text."""
        assert self.targets is not None
        return f"{self.targets[i]:.6g}" if self.class_names is None else self.class_names[self.targets[i]]

    @property
    def sfreq(self) -> float:
        """Return the rate of the windows in Hz."""
        return self.signal.sfreq


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Holds the indices of the windows of each part, and how the windows were divided."""

    train: NDArray[np.intp]
    val: NDArray[np.intp]
    test: NDArray[np.intp]
    by: SplitBy


def encode_targets(
    values: Sequence[Any], task: Task, class_names: tuple[str, ...] = (), *, events: Mapping[str, int] | None = None
) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    """Return labels as float32 numbers, or as int64 classes in the order of `class_names`, else of their names.

    `events` counts the events that classes may be named by, for the message where a class has no window.

    Raises
    ------
    DataError
        If labels are missing, not finite, no numbers, all equal, or of one class only.
    """
    texts = ["" if value is None else str(value).strip() for value in values]
    missing = [i for i, text in enumerate(texts) if text.casefold() in ("", "n/a", "nan", "none")]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(texts)} labels are missing or NaN, the first of window {missing[0]}.",
            "Label these windows, or leave them out.",
        )
    if task == "classification":
        there = tuple(sorted(set(texts)))
        if absent := [name for name in class_names if name not in there]:
            known = f" The recordings with windows have the events {counted(events)}." if events else ""
            raise DataError(
                f"No window is of {listed(absent)}; the others are of {listed(there)}.{known}",
                "Name an event of each class by --classes CLASS=EVENT.",
            )
        class_names = class_names or there
        if len(class_names) < 2:
            raise DataError(f"All {len(texts)} windows are of the class {class_names}.", "Give windows of two classes or more.")
        return np.array([class_names.index(text) for text in texts], dtype=np.int64), class_names
    try:
        numbers = np.array([float(text) for text in texts], dtype=np.float32)
    except ValueError as e:
        raise DataError(f"A label is no number ({e}).", "Set the task to classification, or choose another column.") from e
    if not np.isfinite(numbers).all() or len(set(numbers.tolist())) < 2:
        raise DataError("The labels are infinite, or all the same.", "Give numbers that differ.")
    return numbers, None


def split_windows(windows: Windows, config: DataConfig) -> Split:
    """Divide windows into three parts that share no subject, no session, no recording, or no stretch of a recording.

    Raises
    ------
    DataError
        If there are too few groups, or a part would be empty.
    """
    groups = groups_of(windows)
    by: SplitBy
    if config.split == "auto":
        by = "subject" if len(set(groups["subject"])) >= 3 else "session" if len(set(groups["session"])) >= 3 else "block"
    else:
        by = config.split
    if by == "block":
        if np.isnan(windows.onset).any():
            raise DataError(
                "Blocks cannot be cut: the source does not tell when each window starts, so windows may overlap.",
                "Save `onset` in seconds, or data of 3 subjects or sessions.",
            )
        fold = _fold_of_blocks(windows, config.n_folds)
        n_folds = config.n_folds
    else:
        names = np.unique(groups[by])
        n_folds = min(config.n_folds, len(names))
        if n_folds < 3:
            raise DataError(f"There are {len(names)} of {by}, too few to train, validate and test.", "Split by block.")
        dealt = dict(
            zip(np.random.default_rng(config.split_seed).permutation(names), np.arange(len(names)) % n_folds, strict=True)
        )
        fold = np.array([dealt[name] for name in groups[by]])
    test_fold = config.fold % n_folds
    test, val = fold == test_fold, fold == (test_fold + 1) % n_folds
    train = ~(test | val)
    if by == "block":
        length = windows.signal.seconds
        distance = length + (length if config.gap is None else config.gap)  # from start to start
        val &= ~_close_to(windows, test, distance)
        train &= ~_close_to(windows, test | val, distance)
    parts = {"train": train, "val": val, "test": test}
    if empty := [name for name, part in parts.items() if not part.any()]:
        raise DataError(f"No window is left for {empty[0]}.", "Give longer recordings, or use fewer folds or a smaller gap.")
    return Split(train=np.flatnonzero(train), val=np.flatnonzero(val), test=np.flatnonzero(test), by=by)


def groups_of(windows: Windows) -> dict[str, NDArray[np.str_]]:
    """Return the name of the subject, session and recording of each window. Sessions of two subjects are two sessions."""
    sessions = np.char.add(np.char.add(windows.subject, "/"), windows.session)
    return {"subject": windows.subject, "session": sessions, "recording": windows.recording}


def _fold_of_blocks(windows: Windows, n_folds: int) -> NDArray[np.intp]:
    fold = np.zeros(len(windows), dtype=np.intp)
    for name in np.unique(windows.recording):
        of_this = np.flatnonzero(windows.recording == name)
        in_time = of_this[np.argsort(windows.onset[of_this], kind="stable")]
        fold[in_time] = np.arange(len(in_time)) * n_folds // len(in_time)
    return fold


def _close_to(windows: Windows, others: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Return a mask of the windows that start less than `distance` seconds from one of `others` in the same recording."""
    close = np.zeros(len(windows), dtype=np.bool_)
    for name in np.unique(windows.recording):
        here = windows.recording == name
        theirs = np.sort(windows.onset[here & others])
        if len(theirs):
            mine = windows.onset[here]
            after = np.searchsorted(theirs, mine)
            nearest = np.minimum(abs(mine - theirs[after - 1]), abs(mine - theirs[np.minimum(after, len(theirs) - 1)]))
            close[here] = nearest < distance - 1e-9
    return close & ~others
