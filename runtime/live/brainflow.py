"""Reads amplifiers that BrainFlow speaks to: most low-cost ones, its synthetic board, and recordings of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.resources
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.events import event_name
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.names import parse_rename, renamed
from sjepa_deploy.errors import MissingDependencyError, StreamError, listed
from sjepa_deploy.runtime.live.counted import CountedStamps
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.spec import SignalSpec, Unit

BUFFER_S = 360
"""Seconds that BrainFlow keeps for a decoder that stalls; what is older is lost, and seen as a gap."""

BEGIN_S = 5.0
"""Seconds in which a board must send its first samples."""

LEARN_S = 0.25
"""Seconds of samples by which it is known whether the board numbers every sample."""

POLL_S = 0.001
"""Seconds from one look to the next: BrainFlow has no call that waits for samples."""

MARKER = "marker"
"""Name of the channel of BrainFlow's marker row."""


def require_board_shim() -> Any:
    """Return the module `brainflow.board_shim`, silent and ready.

    Raises
    ------
    MissingDependencyError
        If BrainFlow is not installed.
    """
    try:
        from brainflow import board_shim
    except ImportError as error:
        raise MissingDependencyError("brainflow", "brainflow") from error
    # It finds its library by its module, which Python below 3.12 refuses, and else by pkg_resources, which setuptools dropped.
    board_shim.files = lambda _: importlib.resources.files("brainflow")
    board_shim.BoardShim.disable_board_logger()
    return board_shim


class BrainFlowSource:
    """Reads a board through BrainFlow. Channels, rate and rows are those of BrainFlow's description of the board.

    The last channel, `marker`, is the marker row: what `insert_marker` put beside a sample, and 0 elsewhere. Where the board
    numbers every sample, lost samples are counted by these numbers, and the stamps are regular (see `CountedStamps`). Otherwise
    they are BrainFlow's own, taken on arrival. Both are on `time.monotonic`, which is the clock of LSL on Linux.

    Parameters
    ----------
    text : str
        "BOARD" or "BOARD,serial_port=/dev/ttyUSB0,...": a name of `brainflow.BoardIds`, with or without its `_BOARD`, and fields
        of `BrainFlowInputParams`.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of the samples. None: microvolts, which BrainFlow gives.
    ch_names : sequence of str or None
        Names of the channels in their order. None takes the names in BrainFlow's description, which are the usual places.
    rename : sequence of str
        "THEIRS=MINE": channels that get other names.

    Raises
    ------
    StreamError
        If there is no such board or parameter, the board cannot be opened or sends nothing, or its channels have no names.
    MissingDependencyError
        If BrainFlow is not installed.
    """

    def __init__(
        self, text: str, *, unit: Unit | None = None, ch_names: Sequence[str] | None = None, rename: Sequence[str] = ()
    ) -> None:
        self._shim = require_board_shim()
        self._error = self._shim.BrainFlowError
        self.live, self.ended = True, False
        self.incidents: deque[Incident] = deque()
        self.n_flushed = 0
        self.clock = time.monotonic
        board_id, params = self._parse(text)
        self._board: Any = None
        with contextlib.ExitStack() as opened, self._refused("cannot be opened", "Check its parameters, and that it is on."):
            opened.callback(self.close)
            self._board = self._shim.BoardShim(board_id, params)
            description = self._shim.BoardShim.get_board_descr(self._board.get_board_id())
            self.info = _info_of(description, unit, ch_names, rename)
            self._rows = [*_eeg_rows(description), description["marker_channel"]]
            self._number_row, self._stamp_row = description["package_num_channel"], description["timestamp_channel"]
            self._board.prepare_session()
            self._board.start_stream(round(BUFFER_S * self.info.sfreq))
            self._counted = self._learn()
            opened.pop_all()
        self._fresh = True
        self._waiting: deque[Chunk] = deque()
        if self._counted is None:
            note = "the board does not number every sample: losses are found by the stamps alone"
            self.info = dataclasses.replace(self.info, notes=(note,))

    def _parse(self, text: str) -> tuple[int, Any]:
        """Return the number of a board and its parameters."""
        board, *fields = text.split(",")
        boards = {one.name.removesuffix("_BOARD"): int(one) for one in self._shim.BoardIds}
        wanted = board.strip().upper().removesuffix("_BOARD")
        if wanted not in boards:
            near = difflib.get_close_matches(wanted, boards, 3) or ["SYNTHETIC", "CYTON", "PLAYBACK_FILE"]
            raise StreamError(f"BrainFlow has no board {board}.", f"Name one of brainflow.BoardIds, such as {listed(near)}.")
        params = self._shim.BrainFlowInputParams()
        for field in fields:
            key, _, value = (part.strip() for part in field.partition("="))
            if key not in vars(params):
                raise StreamError(f"BrainFlow has no parameter {key}.", f"Use one of {', '.join(vars(params))}.")
            if key == "master_board":
                value = str(boards.get(value.upper().removesuffix("_BOARD"), value))
            try:
                setattr(params, key, type(getattr(params, key))(value))
            except ValueError:
                raise StreamError(f"{key}={value} is no number.", "Mend the address of the board.") from None
        return boards[wanted], params

    @contextlib.contextmanager
    def _refused(self, what: str, how: str) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StreamError(f"The board {what} ({error}).", how) from error

    def _learn(self) -> CountedStamps | None:
        """Take the first samples, and return what counts by their numbers; None if the board does not number every sample."""
        ends = self.clock() + BEGIN_S
        while (n_there := self._board.get_board_data_count()) < max(32, LEARN_S * self.info.sfreq):
            if self.clock() > ends:
                raise StreamError(f"{self.info.name} sent {n_there} samples in {BEGIN_S:g} s.", "Check that it is on, and near.")
            time.sleep(POLL_S)
        first = self._board.get_board_data()
        self.n_flushed = first.shape[1]
        counted = CountedStamps(self.info.sfreq)
        return counted if counted.begin(first[self._number_row], self._arrivals(first)) else None

    def read(self, timeout: float) -> Chunk | None:
        """Return the samples that came; None if none came."""
        if self._waiting:
            return self._waiting.popleft()
        ends = self.clock() + timeout
        with self._refused("cannot be read", "Look at the board, and start again."):
            if self._fresh:
                self._flush()
            while not self._board.get_board_data_count():
                if self.clock() >= ends:
                    return None
                time.sleep(POLL_S)
            data = self._board.get_board_data()
        received, stamps = self.clock(), self._stamps(data)
        samples = np.ascontiguousarray(data[self._rows].T)
        breaks = [] if self._counted is None else self._counted.breaks
        for start, stop in itertools.pairwise(sorted({0, *breaks, len(stamps)})):
            self._waiting.append(Chunk(samples[start:stop], stamps[start:stop], received, start in breaks))
        return self._waiting.popleft()

    def _flush(self) -> None:
        self._fresh = False
        old = self._board.get_board_data()
        self._stamps(old)
        self.n_flushed += old.shape[1]
        self._tell("flushed", f"{self.n_flushed} old samples dropped.")

    def _arrivals(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        arrivals: NDArray[np.float64] = data[self._stamp_row] + (self.clock() - time.time())
        return arrivals

    def _stamps(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        arrivals = self._arrivals(data)
        if self._counted is None:
            return arrivals
        stamps = self._counted.stamps(data[self._number_row], arrivals)
        if self._counted.lost:
            self._tell("lost", f"{self.info.name} numbered {self._counted.lost} more samples than came.")
        if self._counted.astray:
            self._counted = None
            self._tell("clock", f"The numbers of the samples of {self.info.name} fit its stamps no more: the stamps alone count.")
        return stamps

    def _tell(self, kind: str, text: str) -> None:
        self.incidents.append(Incident(kind=kind, time=self.clock(), text=text))

    def insert_marker(self, value: float) -> None:
        """Put a marker beside the next sample. Any thread may call the method.

        Parameters
        ----------
        value : float
            Name of the event, not 0.
        """
        if self._board is None:
            raise StreamError(f"{self.info.name} is closed.", "Open the board again.")
        with self._refused("takes no marker", "Use a number other than 0."):
            self._board.insert_marker(float(value))

    def close(self) -> None:
        """Let the board go."""
        board, self._board = self._board, None  # one that is collected later would end another session of the same board
        if board is not None:
            with contextlib.suppress(self._error):
                if board.is_prepared():
                    board.release_session()
        self.ended = True


class InsertedMarkers:
    """Gives the markers that `BrainFlowSource.insert_marker` put beside samples. Their values are the names.

    Parameters
    ----------
    source : BrainFlowSource
        The board.
    """

    def __init__(self, source: BrainFlowSource) -> None:
        self._found: list[Event] = []
        self.incidents: deque[Incident] = deque()
        self.n_lost = 0

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Look for markers: every value but 0 is one."""
        for row in np.flatnonzero(chunk.samples[:, -1]).tolist():
            self._found.append(
                Event(float(chunk.stamps[row]) + offset, event_name(chunk.samples[row, -1]), chunk.received, MARKER)
            )

    def read(self) -> list[Event]:
        """Return the events that were found since the last call."""
        found, self._found = self._found, []
        return found

    def rest(self) -> list[Event]:
        """Return no event: all were found with their samples."""
        return []

    def close(self) -> None:
        """Release nothing."""


def _eeg_rows(description: dict[str, Any]) -> list[int]:
    """Return the rows of the electrodes: those of EEG, or of any potential where a board does not say what it is put to."""
    kinds = ("eeg_channels", "emg_channels", "ecg_channels", "eog_channels")
    rows: list[int] = next((description[kind] for kind in kinds if description.get(kind)), [])
    if not rows:
        raise StreamError(f"BrainFlow knows no electrode of the board {description['name']}.", "Name a board with EEG.")
    return rows


def _info_of(description: dict[str, Any], unit: Unit | None, ch_names: Sequence[str] | None, rename: Sequence[str]) -> StreamInfo:
    """Return the contract in BrainFlow's description of a board."""
    name, n_chans = description["name"], len(_eeg_rows(description))
    names = tuple(ch_names or filter(None, description.get("eeg_names", "").split(",")))
    if len(names) != n_chans:
        said = f", and {len(names)} names were given" if names else ""
        raise StreamError(
            f"BrainFlow does not name the {n_chans} channels of {name}{said}.", "Name them in order with `--channels A,B,...`."
        )
    names = (*renamed(names, parse_rename(rename, StreamError), StreamError), MARKER)
    return StreamInfo(
        name=name, ch_names=names, sfreq=float(description["sampling_rate"]), unit=unit or "uV", other_units=(MARKER,)
    )


def open_brainflow(text: str, _: SignalSpec, options: SourceOptions) -> BrainFlowSource:
    """Return the board that `text` names, see `BrainFlowSource`."""
    return BrainFlowSource(text, unit=options.unit, ch_names=options.ch_names, rename=options.rename)
