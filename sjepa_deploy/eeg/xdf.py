"""Reads XDF files, of LabRecorder and our own records, and finds by the stamps where samples are missing."""

from __future__ import annotations

import functools
import io
import itertools
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.continuity import Stretches, stretches_of
from sjepa_deploy.eeg.events import event_name
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.pauses import PAUSE, Told
from sjepa_deploy.eeg.readers import raw_from_array
from sjepa_deploy.eeg.units import unit_named, volts_in
from sjepa_deploy.errors import MissingDependencyError, RecordingError, StreamError, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import mne
    from numpy.typing import NDArray

    from sjepa_deploy.spec import Unit

CHUNKS_NAME, DECISIONS_NAME, INCIDENTS_NAME, MARKERS_NAME = "sjepa chunks", "sjepa decisions", "sjepa events", "sjepa markers"
UNDECIDED_NAME, COMMANDS_NAME, HEADS_NAME = "sjepa undecided", "sjepa commands", "sjepa last layers"
"""Streams of our own records. Of each chunk there are the number of samples, when it was received, whether the stream was
interrupted before it, and the correction in its stamps."""

_NO_EVENTS = (INCIDENTS_NAME, MARKERS_NAME, UNDECIDED_NAME, COMMANDS_NAME, HEADS_NAME)

IN_PAUSE = 1e-3
"""Samples by which a point in a pause lies before the first sample after the pause, which it does not belong to."""

LARGEST_RATE_ERROR = 0.01
"""Beyond this ratio a recorded stream is not at its nominal rate."""

MOST_LOST = 0.25
"""Share of samples lost in gaps of less than a second from which on the rate of a stream is doubted instead."""


def load_xdf(path: Path, *, synchronize: bool) -> list[dict[str, Any]]:
    """Return the streams of a file as pyxdf does, with their jitter. One of our records may be cut short by a kill.

    Parameters
    ----------
    path : Path
        The file.
    synchronize : bool
        Whether to bring the stamps to one clock by lines through its offsets, which no step of a correction makes uneven.
        Otherwise they are as they were recorded.

    Raises
    ------
    MissingDependencyError
        If pyxdf is not installed.
    """
    try:
        import pyxdf
    except ImportError as error:
        raise MissingDependencyError("pyxdf", "eeg") from error
    options = dict.fromkeys(("synchronize_clocks", "handle_clock_resets"), synchronize)
    # pyxdf leaves a file that it opens itself and refuses open; stamps that are not finite are for `Timeline` to refuse
    with path.open("rb") as file, np.errstate(invalid="ignore"):
        ours = f"<name>{DECISIONS_NAME}</name>".encode() in file.read(1 << 20)
        file.seek(0)
        whole = _whole_chunks(file.read()) if ours else file
        streams, _ = pyxdf.load_xdf(whole, dejitter_timestamps=False, verbose=False, **options)
    found: list[dict[str, Any]] = streams
    return found


def _whole_chunks(data: bytes) -> io.BytesIO:
    """Return one of our records without a last chunk that a kill cut short."""
    stop = 4
    while stop + 9 <= len(data) and data[stop] == 8:  # bytes of the length, as the recorder writes them
        (length,) = struct.unpack_from("<Q", data, stop + 1)
        if stop + 9 + length > len(data):
            break
        stop += 9 + length
    return io.BytesIO(data[:stop])


def read_xdf(path: Path, unit: Unit | None, ch_names: Sequence[str] | None, notes: list[str]) -> mne.io.BaseRaw:
    """Read the one EEG stream of a recording of the Lab Streaming Layer."""
    return read_placed(path, unit, ch_names, notes)[0]


def read_placed(
    path: Path, unit: Unit | None, ch_names: Sequence[str] | None, notes: list[str]
) -> tuple[mne.io.BaseRaw, Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    """Read a recording as `read_xdf` does, and return it with a function that places points in time.

    The function takes stamps on the clock of the file, and returns the seconds of samples after the first one, as annotations
    have them. Points in a pause lie at its start; points outside of the recording may be negative or beyond its end.
    """
    streams = load_xdf(path, synchronize=True)
    stream = _eeg_stream(streams, path.name)
    info = stream["info"]
    name, rate = info["name"][0], float(info["nominal_srate"][0])
    values, stamps = np.asarray(stream["time_series"]), np.asarray(stream["time_stamps"], dtype=np.float64)
    restarts: list[int] = []
    corrections = np.zeros(1)  # from the sender's clock, whose stamps tell losses, to that of the markers
    own = next((other for other in streams if other["info"]["name"][0] == CHUNKS_NAME), None)
    if own is not None:
        facts = np.asarray(own["time_series"], dtype=np.float64)
        ends = np.cumsum(facts[:, 0]).astype(int)
        facts, ends = facts[ends <= len(stamps)], ends[ends <= len(stamps)]
        if not len(ends):
            raise RecordingError(f"{path.name} ends before the first whole chunk of samples.", "Give another record.")
        starts = np.r_[0, ends[:-1]]
        restarts = starts[(facts[:, 2] > 0) & (starts > 0)].tolist()
        values, stamps = values[: ends[-1]], stamps[: ends[-1]]
        if facts.shape[1] > 3:
            corrections = np.repeat(facts[:, 3], facts[:, 0].astype(int))
    elif stream.get("footer") is None:
        raise RecordingError(
            f"{path.name} is truncated: stream {name} has no footer.",
            "Copy it again, or repair it by loading and saving it.",
        )
    try:
        stretches = stretches_of(values, stamps - corrections, rate, restarts=restarts)
    except StreamError as error:
        raise RecordingError(f"Stream {name}: {error}", "Mend the stamps.") from error
    _check_rate(name, (stamps - corrections)[stretches.rows], rate, stretches)
    samples = values[stretches.rows].astype(np.float64).T
    described = (((info["desc"] or [None])[0] or {}).get("channels") or [None])[0] or {}
    channels: list[dict[str, list[str]]] = described.get("channel") or [{}] * len(samples)
    picks = [i for i, channel in enumerate(channels) if _text(channel, "type", "EEG").casefold() == "eeg"]
    if not picks or len(channels) != len(samples):
        raise RecordingError(f"Stream {name} does not describe its {len(samples)} channels as EEG.", "Mend its description.")
    labels = [_text(channels[i], "label", "") for i in picks]
    words = [_text(channels[i], "unit", "") for i in picks]
    units = [unit or unit_named(word) for word in words]
    if unit is not None and (stated := sorted({word for word in words if word and unit_named(word) != unit})):
        notes.append(f"taken as {unit}, by `--unit`, and not as {listed(stated)}, as stream {name} states")
    if not any(units):
        stated = sorted({word for word in words if word})
        why = f"states its unit as {listed(stated)}, which is none of nV, uV, mV and V" if stated else "does not state its unit"
        raise RecordingError(f"Stream {name} of {path.name} {why}.", "Give it with `--unit`.")
    if not all(labels):
        if ch_names is None:
            raise RecordingError(
                f"Stream {name} of {path.name} does not name its {len(picks)} channels.",
                "Name them in their order with `--channels A,B,...`.",
            )
        labels = list(ch_names)
        if len(labels) != len(picks):
            raise RecordingError(
                f"Stream {name} of {path.name} has {len(picks)} channels, and {len(labels)} names were given.",
                "Mend `--channels`.",
            )
    kept = [k for k, known in enumerate(units) if known is not None]
    if len(kept) < len(units):
        gone = [f"{labels[k]} ({words[k] or 'no unit'})" for k in range(len(units)) if units[k] is None]
        notes.append(f"left out {listed(gone)}: no voltage; `--unit` takes all channels in one unit")
    scale = np.array([volts_in(known) for known in units if known is not None])[:, None]
    raw = raw_from_array(samples[[picks[k] for k in kept]] * scale, rate, [labels[k] for k in kept], path.name)
    _mark_losses(raw, stretches, notes)
    times, texts = _markers(streams)
    place = functools.partial(_places, stamps=stamps[stretches.rows], stretches=stretches, rate=rate)
    seconds = place(times)
    inside = (seconds >= 0) & (seconds <= (raw.n_times - 1) / rate)
    raw.annotations.append(seconds[inside], np.zeros(int(inside.sum())), texts[inside])
    return raw, place


def _markers(streams: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return the stamps and the texts of the markers: the samples of irregular streams of one channel."""
    times, texts = [], []
    for stream in streams:
        info = stream["info"]
        if float(info["nominal_srate"][0]) == 0 and int(info["channel_count"][0]) == 1 and info["name"][0] not in _NO_EVENTS:
            times += [float(stamp) for stamp in stream["time_stamps"]]
            texts += [event_name(sample[0]) for sample in stream["time_series"]]
    return np.array(times, dtype=np.float64), np.array(texts, dtype=str)


def _places(times: NDArray[np.float64], stamps: NDArray[np.float64], stretches: Stretches, rate: float) -> NDArray[np.float64]:
    """Return where points in time lie, in seconds of samples; those in a pause lie at its start.

    In each stretch a line goes through the stamps, as their jitter is no uncertainty of a marker.
    """
    edges = [0, *(place for place, _ in stretches.cuts), len(stamps)]
    starts, slopes = [], []
    for a, b in itertools.pairwise(edges):
        slope, middle = _line(stamps[a:b]) if b - a > rate else (1 / rate, float(np.mean(stamps[a:b])))
        starts.append(middle - slope * (b - a - 1) / 2)
        slopes.append(slope)
    which = np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
    first, end = np.array(edges[:-1])[which], np.array(edges[1:])[which] - IN_PAUSE
    places: NDArray[np.float64] = np.minimum(first + (times - np.array(starts)[which]) / np.array(slopes)[which], end)
    return places / rate


def _line(stamps: NDArray[np.float64]) -> tuple[float, float]:
    """Return the slope of the least-squares line through stamps, in seconds a sample, and its middle."""
    index = np.arange(len(stamps)) - (len(stamps) - 1) / 2
    return float(index @ (stamps - stamps[0])) / max(float(index @ index), 1.0), float(stamps.mean())


def _check_rate(name: str, stamps: NDArray[np.float64], rate: float, stretches: Stretches) -> None:
    """Refuse a stream whose stamps show another rate than the nominal one."""
    n_lost = sum(lost for _, lost in stretches.cuts if lost < rate)
    edges = np.array([0, *(place for place, _ in stretches.cuts), len(stamps)])
    k = int(np.diff(edges).argmax())
    longest = stamps[edges[k] : edges[k + 1]]
    slope, _ = _line(longest)
    n = len(longest)
    spread = float(np.std(longest - slope * np.arange(n))) * (12 / n**3) ** 0.5  # of the slope
    error = abs(slope * rate - 1) - 5 * spread * rate
    if n_lost > MOST_LOST * len(stamps) or (n > 1 and error > LARGEST_RATE_ERROR):
        low, high = np.quantile(np.diff(stamps), [0.05, 0.95])
        raise RecordingError(
            f"Stream {name} is not at its rate, or a great part of it is lost: most samples are {low:.3g} to {high:.3g} s apart, "
            f"nominally {1 / rate:.3g} s.",
            "Mend the nominal rate in its description, or cut a stretch with fewer losses out of it.",
        )


def _mark_losses(raw: mne.io.BaseRaw, stretches: Stretches, notes: list[str]) -> None:
    """Mark where samples are missing as pauses, and tell it."""
    rate, cuts = raw.info["sfreq"], stretches.cuts
    places = np.array([place for place, _ in cuts], dtype=np.float64)
    raw.set_annotations(require_mne().Annotations(places / rate, 0.0, [PAUSE] * len(cuts)), verbose="error")
    raw.info["temp"] = Told(paused=tuple((place, lost / rate) for place, lost in cuts))
    if n_lost := sum(lost for _, lost in cuts):
        n_places = sum(lost > 0 for _, lost in cuts)
        notes.append(f"{n_lost} samples ({n_lost / rate:.3g} s) are missing in {n_places} places")
    if stretches.n_resets:
        notes.append(f"the clock of the stamps was set back {stretches.n_resets} times: how long these pauses were is not known")
    if n_twice := stretches.n_repeated + stretches.n_early:
        notes.append(f"left out {n_twice} samples that came twice or late")


def _eeg_stream(streams: list[dict[str, Any]], source: str) -> dict[str, Any]:
    regular = [
        stream
        for stream in streams
        if float(stream["info"]["nominal_srate"][0]) > 0 and stream["info"]["channel_format"][0] != "string"
    ]
    eeg = [stream for stream in regular if (stream["info"]["type"][0] or "").casefold() == "eeg"] or regular
    if len(eeg) != 1 or not len(eeg[0]["time_stamps"]):
        names = ", ".join(f"{stream['info']['name'][0]} ({stream['info']['type'][0]})" for stream in streams)
        raise RecordingError(
            f"{source} does not have exactly one EEG stream with samples; its streams are {names or 'none'}.",
            "Keep one regular stream of type EEG in the file.",
        )
    return eeg[0]


def _text(channel: dict[str, list[str]], key: str, default: str) -> str:
    return (channel.get(key) or [default])[0] or default
