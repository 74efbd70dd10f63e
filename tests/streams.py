"""Streams in memory, with a clock that the tests turn, and what goes wrong with them."""

from collections import deque

import numpy as np

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.runtime.backend import Backend
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk, ReplaySource


def eeg(n_samples, n_chans=8, sfreq=100.0, seed=0):
    """Return EEG in microvolts, shape (n_samples, n_chans)."""
    return eeg_windows(1, n_chans, n_samples, sfreq, np.random.default_rng(seed))[0].T.astype(np.float64)


def run_stream(*arguments):
    """Run `sjepa-stream` in this process and return its exit status."""
    return run_command(_command("stream"), "sjepa-stream", [str(argument) for argument in arguments])


def info_of(spec, sfreq=None, **changes):
    fields = {"name": "amp", "ch_names": spec.ch_names, "sfreq": sfreq or spec.sfreq, "unit": "uV"}
    return StreamInfo(**fields | changes)


class ScriptedSource:
    """Gives the chunks that it is told to, None for a read without samples. `now` is the clock, which the test may move."""

    def __init__(self, info, chunks):
        self.info = info
        self.incidents = deque()
        self.n_flushed, self.live = 0, True
        self.now = 0.0
        self.closed = False
        self._chunks = deque(chunks)

    @property
    def ended(self):
        return not self._chunks

    def read(self, timeout):
        chunk = self._chunks.popleft() if self._chunks else None
        if chunk is not None:
            self.now = max(self.now, chunk.received)
        return chunk

    def clock(self):
        return self.now

    def close(self):
        self.closed = True


class Wrapped(Backend):
    """The backend of another predictor. `before` is called with the windows before each call, and may raise."""

    name, precision = "wrapped", "fp32"

    def __init__(self, backend):
        self._backend = backend
        self.before = lambda eeg: None

    def run(self, eeg):
        self.before(eeg)
        return self._backend.run(eeg)

    def close(self):
        pass


def chunks_of(samples, stamps, size=10, *, restarted_at=()):
    """Cut samples into chunks, each received when its newest sample is stamped."""
    chunks = []
    for start in range(0, len(samples), size):
        part = stamps[start : start + size]
        restarted = any(start <= at < start + size for at in restarted_at)
        chunks.append(Chunk(samples[start : start + size], part, float(part[-1]), restarted))
    return chunks


def decode(predict, source, **config):
    """Decode a whole source, and return decoder, decisions and incidents. Every window must be accounted for."""
    decoder = Decoder(predict, source, StreamConfig(**config))
    incidents = []
    decoder.on_incident(incidents.append)
    decisions = list(decoder)
    assert_accounted(decoder.counters, decisions)
    return decoder, decisions, incidents


def decode_samples(predict, samples, stamps=None, *, info=None, size=10, restarted_at=(), **config):
    """Decode samples with their stamps."""
    info = info or info_of(predict.spec)
    stamps = np.arange(len(samples)) / info.sfreq if stamps is None else stamps
    return decode(predict, ScriptedSource(info, chunks_of(samples, stamps, size, restarted_at=restarted_at)), **config)


def replay(predict, samples, chunk, *, info=None, **config):
    """Decode samples as fast as possible in chunks of a size, or of sizes from a function. Returns the predictions."""
    source = ReplaySource(info or info_of(predict.spec), samples, speed=float("inf"), chunk=chunk)
    return decode(predict, source, late="queue", **config)


def assert_accounted(counters, decisions):
    skipped = counters.skipped_late + counters.skipped_gap + counters.skipped_paused
    assert counters.windows == counters.decisions + counters.held + skipped + counters.failed
    assert len(decisions) == counters.decisions + counters.held
    assert [d.index for d in decisions] == sorted({d.index for d in decisions})


def predictions(decisions):
    return {d.index: d.prediction.tobytes() for d in decisions}


def kinds(incidents):
    return [incident.kind for incident in incidents]
