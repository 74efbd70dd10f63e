"""From samples as they arrive to windows as the model expects them. No clock: the result depends on samples and stamps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.causal import Preprocessor
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.interpolation import LEAST_GOOD, match_channels, mixing_matrix
from sjepa_deploy.eeg.quality import REASONS, ChannelQuality, ChannelState
from sjepa_deploy.eeg.recording import PLAUSIBLE_RMS
from sjepa_deploy.errors import StreamError, listed
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.ring import Ring
from sjepa_deploy.runtime.live.sources import Chunk, Samples
from sjepa_deploy.runtime.live.timeline import CONSECUTIVE, EARLY, LARGEST_RATE_ERROR, REPEATED, RESET, Timeline
from sjepa_deploy.spec import UNITS_IN_VOLTS, ModelSpec

BadChannels = Literal["flag", "repair", "stop"]

NOTED_RATE_ERROR = 0.001
"""Ratio from which on a stream's rate is reported as off."""


@dataclass(frozen=True, slots=True)
class Window:
    """A whole window; its samples are in `WindowStream.eeg`.

    Attributes
    ----------
    index : int
        Number among all windows that were due.
    stamp : float
        Stamp of the newest sample, on the source's clock.
    bridged : bool
        Whether samples in it were interpolated in time.
    bad_channels : tuple of str
        Channels of the model that were bad somewhere in it, repaired or not.
    """

    index: int
    stamp: float
    bridged: bool
    bad_channels: tuple[str, ...]


class WindowStream:
    """Turns chunks of a stream into windows of a model, with every sample and every window accounted for.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    info : StreamInfo
        The stream.
    hop : int
        Samples at the model's rate from one window to the next.
    interpolate : bool
        Whether channels that the stream lacks are interpolated; otherwise they are an error.
    bads : sequence of str
        Channels of the stream that are known to be bad and count as missing.
    bad_channels : {"flag", "repair", "stop"}
        What happens to channels that turn bad: they are named, also interpolated while they are bad, or end the stream.
    bridge : int
        Largest number of lost samples that is interpolated in time. After a larger loss everything starts anew. Above 0 the
        stamps are taken to be regular.
    max_jitter : float
        See `Timeline`.
    counters : Counters
        Where to count.
    report : callable
        Called with the kind and the text of every incident.

    Raises
    ------
    StreamError
        If the stream breaks the model's contract.
    """

    def __init__(
        self,
        spec: ModelSpec,
        info: StreamInfo,
        *,
        hop: int,
        counters: Counters,
        report: Callable[[str, str], None],
        interpolate: bool = False,
        bads: Sequence[str] = (),
        bad_channels: BadChannels = "flag",
        bridge: int = 0,
        max_jitter: float = 0.1,
    ) -> None:
        self._spec, self._info, self._hop, self._bridge = spec, info, hop, bridge
        self._counters, self._report = counters, report
        self._columns, self.ch_names, self.missing = match_channels(spec, info, interpolate=interpolate, bads=bads)
        self._all_columns = np.array_equal(self._columns, np.arange(len(info.ch_names)))
        self._policy: BadChannels = bad_channels
        if bad_channels == "repair" and spec.positions is None:
            raise StreamError("The bundle holds no positions to repair channels by.", "Use `--bad-channels flag`.")
        self._pre = Preprocessor(spec, info.sfreq, mixing_matrix(self.ch_names, spec)[0])
        self.delay = self._pre.delay
        self._scale = UNITS_IN_VOLTS[info.unit] / UNITS_IN_VOLTS[spec.unit]
        self._volt = 1 / UNITS_IN_VOLTS[spec.unit]
        self._timeline = Timeline(info.sfreq, max_jitter, trusted=bridge > 0)
        self._quality = ChannelQuality(len(self.ch_names), info.sfreq, self._volt)
        self._ring = Ring(*spec.input_shape)
        n = len(self.ch_names)
        self.codes = np.zeros(n, np.int8)
        self._non_finite = self._spoilt = np.zeros(n, bool)  # now, and somewhere in this block
        self._hold = np.zeros(n)
        self._bad_at = np.full(n, -(2**62))  # elapsed samples when a channel was last bad
        self._any_bad = False
        self._newest_bad = self._bridged_at = -(2**62)
        self._elapsed = 0  # samples at the model's rate, with those that were lost
        self._whole = 0  # of these, samples without interruption
        self._due_in = spec.n_times
        self._started = self._plausible = self._rate_noted = False
        self._last_row: Samples | None = None
        self._received = 0.0
        self._offset = self._stamp = 0.0

    @property
    def due_at(self) -> float:
        """When the newest sample of the next window is to be expected, on the source's clock."""
        return self._stamp + self._offset + self._due_in / self._spec.sfreq

    def eeg(self) -> NDArray[np.float32]:
        """Return the newest window, shape (1, n_chans, n_times)."""
        return self._ring.window()

    def newest(self, n: int) -> NDArray[np.float32]:
        """Return the newest n samples, at most a window, shape (n_chans, n). The next call, also of `eeg`, overwrites them."""
        return self._ring.newest(n)

    def push(self, chunk: Chunk) -> Iterator[Window]:
        """Take a chunk and give each whole window that is due, while its samples are the newest in `eeg`."""
        samples, stamps = chunk.samples, chunk.stamps.tolist()
        n, counters, place = len(stamps), self._counters, self._timeline.place
        if samples.shape[1] != len(self._info.ch_names):
            raise StreamError(
                f"{self._info.name} sent {samples.shape[1]} channels in place of {len(self._info.ch_names)}.", "Mend the source."
            )
        counters.samples += n
        restarted, start = chunk.restarted, 0
        if restarted:
            counters.interruptions += 1
        for i, stamp in enumerate(stamps):
            verdict = place(stamp)
            if verdict == CONSECUTIVE and not restarted:
                continue
            if verdict == REPEATED and not self._came_twice(samples, i):
                self._timeline.follow(stamp)
                continue
            yield from self._take(samples[start:i], stamps[start:i])
            start = i + 1
            if verdict == REPEATED:
                counters.samples_repeated += 1
            elif verdict == EARLY:
                counters.samples_early += 1
            else:
                start = i
                n_lost, passed = max(0, verdict), chunk.received - self._received
                if verdict == RESET or (n_lost / self._info.sfreq > 1.0 and passed < 0.5 * n_lost / self._info.sfreq):
                    counters.clock_resets += 1
                    self._offset = chunk.received - stamps[-1]
                    self._interrupt(0, "clock reset", "The clock of the stamps was set; from here on they count from arrival.")
                elif 0 < n_lost <= self._bridge and not restarted and self._last_row is not None:
                    yield from self._bridge_to(samples, stamps, i, n_lost)
                else:
                    counters.samples_lost += n_lost
                    counters.gaps += not restarted
                    kind = "interruption" if restarted else "gap"
                    self._interrupt(n_lost, kind, f"{n_lost} samples ({n_lost / self._info.sfreq:.3g} s) are missing.")
                restarted = False
        yield from self._take(samples[start:], stamps[start:])
        self._last_row, self._received, self._stamp = samples[-1], chunk.received, stamps[-1]

    def _came_twice(self, samples: Samples, i: int) -> bool:
        before = samples[i - 1] if i else self._last_row
        return before is not None and np.array_equal(samples[i], before, equal_nan=samples.dtype.kind == "f")

    def _bridge_to(self, samples: Samples, stamps: list[float], i: int, n_lost: int) -> Iterator[Window]:
        before = np.asarray(samples[i - 1] if i else self._last_row, np.float64)
        share = np.arange(1, n_lost + 1)[:, None] / (n_lost + 1)
        self._counters.samples_lost += n_lost
        self._counters.samples_bridged += n_lost
        period = 1 / self._info.sfreq
        self._report("bridged", f"{n_lost} lost samples were interpolated.")
        self._bridged_at = 2**62  # until the real ones are there
        with np.errstate(invalid="ignore"):  # between two infinite samples there is none
            made = before + share * (np.asarray(samples[i], np.float64) - before)
        yield from self._take(made, [stamps[i] - (n_lost - k) * period for k in range(n_lost)])
        self._bridged_at = self._elapsed

    def _interrupt(self, n_lost: int, kind: str, text: str) -> None:
        """Start anew, and account for the windows that fell into the loss."""
        self._report(kind, f"{text} Decisions go on when a window is whole again.")
        n = round(n_lost * self._pre.ratio)
        self._elapsed += n
        if n >= self._due_in:
            n_windows = 1 + (n - self._due_in) // self._hop
            self._counters.windows += n_windows
            self._counters.skipped_gap += n_windows
            self._due_in += n_windows * self._hop
        self._due_in -= n
        self._whole = 0
        self._started = False
        self._quality.restart()

    def _take(self, samples: Samples, stamps: list[float]) -> Iterator[Window]:
        """Take samples that follow each other."""
        rows = samples if self._all_columns else samples[:, self._columns]
        values: NDArray[np.float64] = rows * np.float64(self._scale)
        done = 0
        while done < len(values):
            piece = values[done : done + self._quality.room]
            finite = np.isfinite(piece)
            if not finite.all() or self._non_finite.any():
                piece = self._without_non_finite(piece, finite)
            if not self._started:
                self._pre.start(piece[0])
                self._started = True
            out, out_rows = self._pre(piece)
            if self._any_bad:
                self._bad_at[self.codes != ChannelState.OK] = self._newest_bad = self._elapsed + len(out)
            self._hold = piece[-1]
            yield from self._windows_of(out, [stamps[done + row] for row in out_rows])
            if self._quality.take(piece):
                self._quality.codes[self._spoilt] = ChannelState.OK  # they are held, not flat
                self._spoilt = self._non_finite
                if not self._plausible:
                    self._check_unit()
                self._judge(piece[-1])
                self._check_rate()
            done += len(piece)

    def _windows_of(self, out: NDArray[np.float64], stamps: list[float]) -> Iterator[Window]:
        position, n_times, counters = 0, self._spec.n_times, self._counters
        while position < len(out):
            n = min(self._due_in, len(out) - position)
            self._ring.extend(out[position : position + n])
            position += n
            self._elapsed += n
            self._whole += n
            self._due_in -= n
            if self._due_in:
                break
            self._due_in = self._hop
            counters.windows += 1
            if self._whole < n_times:
                counters.skipped_gap += 1
                continue
            bads: tuple[str, ...] = ()
            if self._elapsed - self._newest_bad < n_times:
                bads = tuple(self.ch_names[c] for c in np.flatnonzero(self._elapsed - self._bad_at < n_times))
            bridged = self._elapsed - self._bridged_at < n_times
            yield Window(counters.windows - 1, stamps[position - 1] + self._offset, bridged, bads)

    def _without_non_finite(self, piece: NDArray[np.float64], finite: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the first rows in which the same channels are not finite, with the last finite value in their place."""
        missing = ~finite[0]
        changes = np.flatnonzero((finite != finite[0]).any(axis=1))
        piece = piece[: changes[0] if len(changes) else None].copy()
        self._counters.samples_non_finite += int(missing.sum()) * len(piece)
        piece[:, missing] = self._hold[missing]
        self._spoilt = self._spoilt | missing
        if not np.array_equal(missing, self._non_finite):
            self._non_finite = missing
            self._judge(piece[0])
        return piece

    def _judge(self, sample: NDArray[np.float64]) -> None:
        """Bring the verdicts on the channels up to date, and act on those that changed."""
        codes = np.where(self._non_finite, ChannelState.NAN, self._quality.codes).astype(np.int8)
        changed = np.flatnonzero(codes != self.codes)
        if not len(changed):
            return
        recovered = [int(c) for c in changed if codes[c] == ChannelState.OK]
        for c in changed:
            was, now = REASONS[ChannelState(self.codes[c])], REASONS[ChannelState(codes[c])]
            self._report(
                "channel", f"{self.ch_names[c]} is {now}" + (f" again, it was {was}." if codes[c] == ChannelState.OK else ".")
            )
        self.codes = codes
        bad = [name for name, code in zip(self.ch_names, codes, strict=True) if code != ChannelState.OK]
        if bad and self._policy == "stop":
            raise StreamError(
                f"{listed(bad)} turned bad ({REASONS[ChannelState(max(codes))]}).",
                "Mend the electrodes, or use another --bad-channels.",
            )
        self._any_bad = bool(bad)
        if recovered:
            self._pre.restart_channels(recovered, sample)
        if self._policy == "repair":
            if len(self.ch_names) - len(bad) < LEAST_GOOD:
                self._report("channel", f"{len(bad)} channels are bad, too many to repair.")
                bad = []
            self._pre.set_matrix(mixing_matrix(self.ch_names, self._spec, bad)[0])

    def _check_unit(self) -> None:
        """Refuse amplitudes that no EEG has in the stream's unit: volts taken for microvolts change outputs without any error."""
        alive = self._quality.spread[(self._quality.spread > 0) & ~self._non_finite]
        self._plausible = len(alive) > 0
        if self._plausible and not PLAUSIBLE_RMS[0] <= float(np.median(alive)) <= PLAUSIBLE_RMS[1]:
            raise StreamError(
                f"The median channel of {self._info.name} has an RMS of {np.median(alive) * 1e6:.3g} uV when taken as "
                f"{self._info.unit}, which is no EEG.",
                "State the unit that the samples are really in with `--unit`.",
            )

    def _check_rate(self) -> None:
        measured = self._timeline.sfreq
        if measured is None:
            return
        error = measured / self._info.sfreq - 1
        if abs(error) > LARGEST_RATE_ERROR:
            raise StreamError(
                f"{self._info.name} says {self._info.sfreq:g} Hz and sends {measured:.4g} Hz.", "Mend the source's nominal rate."
            )
        if abs(error) > NOTED_RATE_ERROR and not self._rate_noted:
            self._rate_noted = True
            self._report("rate", f"The stamps show {measured:.6g} Hz, {error:+.2%} off the nominal rate.")
