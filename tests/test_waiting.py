"""Decisions that are late because the source sends blocks: the cause is named, with a deadline that no decision misses."""

import dataclasses
import re

import numpy as np
import pytest
from streams import ScriptedSource, Wrapped, chunks_of, decode, eeg, info_of

import sjepa_deploy
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.predictor import Predictor


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


def in_blocks(spec, size, *, sfreq=256.0, delay=0.005, seconds=20):
    """Return a source whose samples come in blocks of a size, `delay` after the newest of them."""
    n = round(seconds * sfreq)
    chunks = chunks_of(eeg(n, sfreq=sfreq), np.arange(n) / sfreq, size)
    return ScriptedSource(info_of(spec, sfreq), [dataclasses.replace(chunk, received=chunk.received + delay) for chunk in chunks])


def deadline_in(text):
    return float(re.search(r"--deadline ([\d.]+)\.$", text)[1])


@pytest.mark.parametrize(("size", "words"), [(16, "blocks of 62.5 ms"), (32, "blocks of 125 ms")])
@pytest.mark.parametrize("late", ["skip", "hold", "queue"])
def test_blocks_of_the_source_are_named_once_with_a_deadline_that_suits_them(predict, size, words, late):
    decoder, _, incidents = decode(predict, in_blocks(predict.spec, size), hop=0.02, late=late)
    assert decoder.counters.misses > 100
    told = [incident.text for incident in incidents if incident.kind == "deadline" and "--deadline" in incident.text]
    assert len(told) == 1
    assert words in told[0]
    assert words in decoder.advice
    oldest = (size - 1) / 256 + 0.005
    assert oldest < deadline_in(decoder.advice) < 1.5 * oldest
    again, _, _ = decode(predict, in_blocks(predict.spec, size), hop=0.02, deadline=deadline_in(decoder.advice), late=late)
    assert (again.counters.misses, again.advice) == (0, None)


def test_the_error_of_windows_that_are_all_late_names_the_cause(predict):
    source = in_blocks(predict.spec, 16, delay=0.1)
    with pytest.raises(StreamError, match=r"All windows of 5 s came too late.*blocks of 62.5 ms.*--deadline 0\.\d+\.$"):
        decode(predict, source, hop=0.02)


def test_a_slow_backend_is_no_cause_in_the_source(predict):
    """Of 90 ms a call at a hop of 20 ms, whatever waits in the decoder meanwhile."""
    for size in (1, 2):
        source = in_blocks(predict.spec, size, delay=0.001)
        backend = Wrapped(predict.backend)
        decoder = Decoder(Predictor(predict.bundle, backend, check_unit=False), source, StreamConfig(hop=0.02, late="queue"))

        def work(eeg, source=source):
            source.now += 0.09

        backend.before = work
        counters = decoder.run()
        assert counters.misses > 100
        assert decoder.advice is None


def test_a_stream_in_time_gets_no_advice(predict):
    decoder, _, _ = decode(predict, in_blocks(predict.spec, 16), hop=0.1)
    assert (decoder.counters.misses, decoder.advice) == (0, None)
