"""What a record holds beside samples and decisions: events of each stream, events without a decision, commands; their replay."""

import dataclasses

import numpy as np
import pytest
from streams import ScriptedSource, assert_accounted, chunks_of, eeg, info_of

import sjepa_deploy
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.eeg.xdf import load_xdf
from sjepa_deploy.runtime.live.commands import BadChannels, Mark, Pause, Start, Status
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import PlannedMarkers
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import Events


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


class Named(PlannedMarkers):
    """Planned markers of a stream of a name."""

    def __init__(self, plan, clock, name):
        super().__init__(plan, clock)
        self.name = name

    def read(self):
        return [dataclasses.replace(event, stream=self.name) for event in super().read()]


def recorded(predict, path, source, plans, commands=(), **options):
    """Decode a source with markers, submit commands after so many samples, and return the decoder and what it told."""
    markers = [Named(plan, source.clock, name) for name, plan in plans.items()]
    config = options.pop("config", StreamConfig(late="queue"))
    decoder = Decoder(predict, source, config, markers=markers, **options)
    recorder, told = record(decoder, path), {"decisions": [], "undecided": [], "commands": []}
    decoder.on_decision(told["decisions"].append)
    decoder.on_undecided(told["undecided"].append)
    decoder.on_command(told["commands"].append)
    waiting = list(commands)

    def submit(chunk):
        while waiting and waiting[0][0] <= decoder.counters.samples:
            decoder.commands.submit(waiting.pop(0)[1])

    decoder.on_chunk(submit)
    decoder.run()
    recorder.close()
    assert_accounted(decoder.counters, told["decisions"])
    return decoder, told


def test_every_event_has_its_decision_or_reason_in_the_record(predict, tmp_path):
    """Events of two streams, one of them twice, one in a loss, one that is not asked for; each by its number."""
    samples, keep = eeg(3000).astype(np.float32), np.r_[0:1500, 1520:3000]
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples[keep], keep / 100.0, 10))
    plans = {
        "Stimuli": [(2.0, "a"), (5.0, "b"), (5.0, "b"), (15.1, "a"), (20.0, "rest"), (29.5, "a")],
        "Buttons": [(7.0, "press", 0.5), (20.0, "a")],
    }
    schedule = Events(("a", "b", "press"), start=0.0)
    _, told = recorded(predict, tmp_path / "run.xdf", source, plans, schedule=schedule)
    kept = read_record(tmp_path / "run.xdf")
    assert len(kept.events) == 8
    assert len(kept.rows) == len(told["decisions"]) == 4
    for row, decision in zip(kept.rows, told["decisions"], strict=True):
        assert kept.events[row.event].event == decision.event
        assert (row.index, row.time, row.received, row.decided) == (
            decision.index, decision.time, decision.received, decision.decided,
        )  # fmt: skip
        assert row.prediction.tobytes() == decision.prediction.tobytes()
    reasons = sorted((kept.events[left.event].event.onset, left.reason) for left in kept.undecided)
    assert reasons == sorted((left.event.onset, left.reason) for left in told["undecided"])
    assert [reason for _, reason in reasons] == ["doubled", "gap", "past end"]
    assert {row.event for row in kept.rows} | {left.event for left in kept.undecided} == set(range(8)) - {
        i for i, one in enumerate(kept.events) if one.event.description == "rest"
    }
    streams = {stream["info"]["name"][0]: stream for stream in load_xdf(tmp_path / "run.xdf", synchronize=True)}
    for name, plan in plans.items():
        assert [text[0] for text in streams[name]["time_series"]] == [event[1] for event in plan]
        np.testing.assert_array_equal(streams[name]["time_stamps"], [event[0] for event in plan])
    assert replay(predict, kept).passed


def test_markers_are_recorded_where_windows_are_decided_every_hop(predict, tmp_path):
    """Also of a sender whose clock is a thousand seconds behind: the events are at their samples."""
    chunks = chunks_of(eeg(1500), np.arange(1500) / 100.0, 10)
    corrections = 1000.0 + 0.004 * (np.arange(len(chunks)) > 70)
    chunks = [
        dataclasses.replace(chunk, stamps=chunk.stamps + by, received=chunk.received + by, correction=float(by))
        for chunk, by in zip(chunks, corrections, strict=True)
    ]
    source = ScriptedSource(info_of(predict.spec), chunks)
    decoder, told = recorded(predict, tmp_path / "run.xdf", source, {"Stimuli": [(1003.0, "a"), (1012.004, "b")]})
    assert decoder.counters.events == 0
    kept = read_record(tmp_path / "run.xdf")
    assert [one.event.description for one in kept.events] == ["a", "b"]
    assert len(kept.rows) == len(told["decisions"]) == 131
    assert all(row.event is None for row in kept.rows)
    found = events_of(read_recording(tmp_path / "run.xdf"))
    np.testing.assert_allclose(found.onset, [3.0, 12.0], atol=0.003)
    assert replay(predict, kept).passed


def test_commands_are_recorded_and_a_replay_obeys_them(predict, tmp_path):
    """Channels that a command names are interpolated in both; without the commands the replay differs."""
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(2000), np.arange(2000) / 100.0, 10))
    commands = [
        (400, BadChannels(names=("Cz", "C3"))),
        (400, Mark(text="two electrodes off")),
        (900, Pause()),
        (1000, Status()),
        (1200, BadChannels(names=())),
        (1300, Start()),
    ]
    config = StreamConfig(late="queue", bad_channels="repair")
    _, told = recorded(predict, tmp_path / "run.xdf", source, {}, commands, config=config)
    kept = read_record(tmp_path / "run.xdf")
    assert [one.command for one in kept.commands] == [one.command for one in told["commands"]] == [c for _, c in commands]
    assert [(one.sample, one.asked) for one in kept.commands] == [(one.sample, one.asked) for one in told["commands"]]
    assert all(one.reply.accepted for one in kept.commands)
    assert {row.n_bad_channels for row in kept.rows} == {0, 2}
    result = replay(predict, kept)
    assert (result.n_decisions, result.passed) == (len(told["decisions"]), True)
    assert len(replay(predict, dataclasses.replace(kept, commands=[])).differ) > 20
