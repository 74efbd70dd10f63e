"""Incidents that happen again and again are counted, and hide no other."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from monitors import Written
from streams import ScriptedSource, chunks_of, eeg, info_of

from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.repeats import REPEAT_S, Repeats
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.runtime.predictor import load


def number_in(incident):
    """Return how many incidents a told one stands for."""
    words = incident.text.split("This happened ")
    return int(words[1].split()[0]) if len(words) == 2 else 1


@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from("abc")), max_size=80))
def test_every_incident_is_told_or_counted_and_none_twice_a_minute(steps):
    repeats, now, told, happened = Repeats(), 0.0, [], Counter()
    for wait, text in steps:
        now += wait
        told += repeats.due(now, 0)
        incident = Incident(kind="gap", time=now, text=f"{text}.")
        happened[text] += 1
        if repeats.is_new(incident):
            told.append(incident)
    told += repeats.due(now, 0, ending=True)
    counted = Counter()
    for incident in told:
        counted[incident.text[0]] += number_in(incident)
    assert counted == happened
    for text in "abc":
        times = [incident.time for incident in told if incident.text.startswith(text)]
        assert all(later - earlier >= REPEAT_S for earlier, later in itertools.pairwise(times[:-1]))


def test_a_decoder_that_is_late_again_and_again_tells_it_once_a_minute(make_bundle):
    """Every other second of 5 minutes comes late. The counters count all, the incidents stay readable."""
    with load(make_bundle("prelocal")) as predict:
        stamps = np.arange(30_000) / predict.spec.sfreq
        chunks = chunks_of(eeg(30_000), stamps)
        source = ScriptedSource(info_of(predict.spec), chunks)
        source.clock = lambda: source.now + (0.3 if int(source.now) % 2 else 0.0)
        decoder, incidents = Decoder(predict, source, StreamConfig(late="queue")), []
        decoder.on_incident(incidents.append)
        counters = decoder.run()
    late = [incident for incident in incidents if incident.kind == "deadline"]
    assert counters.misses > 1000
    assert 4 <= len(late) <= 7
    assert 140 <= sum(map(number_in, late)) <= 150  # runs of misses


def test_the_monitor_keeps_what_is_rare():
    """A thousand incidents of one kind do not drive those of other kinds out."""
    written = Written(n_incidents=16)
    written.happen("Fz is flat.", kind="channel")
    for number in range(1000):
        written.happen(f"{number} samples are missing.", kind="gap")
        if number == 500:
            written.happen("The stream was lost.", kind="lost")
    kept = written.monitor.snapshot().incidents
    assert len(kept) == 16
    assert [incident.text for incident in kept if incident.kind != "gap"] == ["Fz is flat.", "The stream was lost."]
    assert [incident.text for incident in kept if incident.kind == "gap"] == [
        f"{n} samples are missing." for n in range(986, 1000)
    ]
