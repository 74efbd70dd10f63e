"""Generates streams with losses, jitter, packets, clock steps and samples that come again, and judges every window of them.

The first channel of a stream counts its samples, and nothing filters it: what stands in a window is the truth about its holes.
``benchmarks/losses.py`` judges thousands of them.
"""

import collections
import dataclasses

import numpy as np

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.runtime.live.windows import WindowStream
from sjepa_deploy.spec import Preprocessing

KINDS = ("exact", "rounded", "late", "uniform", "normal", "packets", "one stamp a packet", "held up")


@dataclasses.dataclass(kw_only=True)
class Lossy:
    """A stream: index and stamp of each sample that came, in the order in which they came, and what is known of it."""

    kind: str
    sfreq: float
    index: np.ndarray
    stamps: np.ndarray
    received: np.ndarray
    jitter: float  # seconds between the earliest and the latest stamp, without what held the sender up
    n_again: int
    again_shows: bool  # whether stamps tell what is sent again from equal neighbours under one stamp


def lossy(rng, kind=None, *, seconds=12.0, rate=None):
    """Return a random stream."""
    kind = kind or str(rng.choice(KINDS))
    sfreq = float(rng.choice([100, 128, 250, 256, 500])) if rate is None else rate
    n = round(seconds * sfreq)
    index = np.arange(n)
    period = 1 / sfreq
    drift = 1 + rng.choice([0.0, 1e-5, 1e-4, -1e-4, 1e-3])
    size = int(rng.integers(2, max(3, round(0.08 * sfreq))))
    scale = float(rng.choice([0.1, 0.5, 1.0])) * period
    late = {
        "late": lambda: np.minimum(rng.exponential(scale, n), 6 * scale),
        "uniform": lambda: rng.uniform(0, 2 * scale, n),
        "normal": lambda: np.clip(rng.normal(0, scale / 2, n), -2 * scale, 2 * scale),
        "packets": lambda: np.minimum(rng.exponential(scale / 2, n // size + 1), 3 * scale)[index // size],
        "one stamp a packet": lambda: (size - 1 - index % size) * period,
    }.get(kind, lambda: np.zeros(n))()
    true = 1000.0 + index * period * drift
    stamps = true + late
    jitter = float(late.max() - late.min())
    if kind == "rounded":
        stamps = np.round(stamps, 6)
    if kind == "held up":
        for at in rng.integers(3 * sfreq, n - sfreq, 3):
            until = stamps[at] + rng.uniform(0.01, 0.09)
            stamps = np.maximum(stamps, np.where(index >= at, np.minimum(until + (index - at) * 1e-5, 1e9), 0))
            stamps = np.where(stamps > true + 0.1, true, stamps)
    keep = np.ones(n, bool)
    first = round(2.5 * sfreq) if kind != "exact" else 1  # by then the jitter is known
    how = rng.choice(["none", "one", "some", "share", "long"])
    if how == "share":
        keep = rng.random(n) >= rng.choice([0.01, 0.05, 0.1])
    elif how != "none":
        for _ in range(1 if how == "one" else 4):
            at = int(rng.integers(first, n - sfreq))
            keep[at : at + int(rng.integers(1, 5) if how != "long" else rng.integers(sfreq // 10, 2 * sfreq))] = False
    keep[:first] = True
    index, stamps, received = index[keep], stamps[keep], true[keep] + 0.1
    if rng.random() < 0.2 and kind in ("exact", "rounded"):  # the sender's clock is set
        at = int(rng.integers(first, len(index)))
        stamps = stamps + np.where(np.arange(len(index)) >= at, rng.choice([-100.0, -5.0, 30.0, 1000.0]), 0.0)
    n_again, again_shows = 0, True
    if rng.random() < 0.3:  # a block is sent again
        at = int(rng.integers(first + 60, len(index)))
        n_again = int(rng.integers(1, 40))
        again_shows = bool((np.abs(stamps[at - n_again : at] - stamps[at - 1]) > 1e-9).any()) or stamps[at - 2] != stamps[at - 1]
        order = np.r_[0:at, at - n_again : at, at : len(index)]
        index, stamps, received = index[order], stamps[order], np.maximum.accumulate(received[order])
    return Lossy(
        kind=kind,
        sfreq=sfreq,
        index=index,
        stamps=stamps,
        received=received,
        jitter=jitter,
        n_again=n_again,
        again_shows=again_shows,
    )


def spec_for(spec, sfreq):
    """Return a model's spec at another rate, without filters, for windows of 200 samples or a second."""
    plain = Preprocessing(l_freq=None, h_freq=None, reference="none")
    return spec.replace(sfreq=sfreq, n_times=max(200, round(sfreq)), preprocessing=plain)


def judge(spec, stream, rng):
    """Decode the stream's windows. Returns a dict of counts; asserts that every window is accounted for."""
    spec = spec_for(spec, stream.sfreq)
    info = StreamInfo(name="lossy", ch_names=spec.ch_names, sfreq=stream.sfreq, unit="uV")
    sent = np.random.default_rng(0).normal(0, 20, (stream.index.max() + 1, spec.n_chans)).astype(np.float32)
    sent[:, 0] = np.arange(len(sent)) % 4096
    samples = sent[stream.index]
    counters, kinds = Counters(), collections.Counter()
    windows = WindowStream(
        spec.signal, info, StreamConfig(hop=0.05), counters=counters, report=lambda kind, text: kinds.update([kind])
    )
    counts = collections.Counter(streams=1, samples=len(stream.index))
    start, n_windows = 0, 0
    while start < len(stream.index):
        stop = start + int(rng.integers(1, 60))
        chunk = Chunk(samples[start:stop], stream.stamps[start:stop], float(stream.received[start:stop][-1]))
        for window in windows.push(chunk):
            n_windows += 1
            steps = np.diff(windows.eeg()[0, 0]) % 4096
            hole = float(steps.max()) - 1 if len(steps) else 0.0
            counts["windows"] += 1
            twice = bool((steps == 0).any() or (steps > 2048).any())
            counts["a sample twice" if stream.again_shows else "a sample twice, under one stamp"] += twice
            if hole > 0 and (steps <= 2048).all():
                counts["over a hole"] += 1
                if not window.doubtful:
                    tellable = hole / stream.sfreq > 2 * stream.jitter + (0.8 / stream.sfreq if stream.jitter else 0)
                    counts["unflagged, tellable" if tellable else "unflagged, within the jitter"] += 1
        start = stop
    assert counters.windows == n_windows + counters.skipped_gap
    counts["lost"] = int(stream.index.max() + 1 - len(np.unique(stream.index)))
    counts["found lost"] = counters.samples_lost
    counts["again"], counts["found again"] = stream.n_again, counters.samples_repeated
    counts["gaps"], counts["resets"] = counters.gaps, counters.clock_resets
    return counts
