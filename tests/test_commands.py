"""Commands to a live decoder: executed between chunks by its own thread, told to all, and without any effect on other windows."""

import json
import threading
from collections import deque
from concurrent.futures import wait

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from streams import ScriptedSource, assert_accounted, chunks_of, decode_samples, eeg, info_of, predictions

import sjepa_deploy
from sjepa_deploy.errors import CommandError, StreamError
from sjepa_deploy.runtime.live.commands import (
    MOST_WAITING,
    BadChannels,
    Command,
    Commands,
    Label,
    Load,
    Mark,
    Pause,
    Reply,
    Start,
    Status,
    Stop,
)
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lines import write_lines
from sjepa_deploy.runtime.live.markers import Event, PlannedMarkers
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.serialize import decode, encode
from sjepa_deploy.spec import Preprocessing

N = 1000
SAMPLES, STAMPS = eeg(N), np.arange(N) / 100.0


@pytest.fixture(scope="module")
def predict(make_bundle):
    bundle = make_bundle("prelocal", preprocessing=Preprocessing(l_freq=1.0, h_freq=40.0))
    with sjepa_deploy.load(bundle.path, check_unit=False) as predict:
        yield predict


class Run:
    """Decodes 10 s in chunks of 0.1 s, and submits commands before the chunks that begin at certain seconds."""

    def __init__(self, predict, plan, config=None, *, prepare=lambda decoder: None, **options):
        self.decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(SAMPLES, STAMPS)), config, **options)
        self.replies, self.executed, self.incidents, self.undecided = [], [], [], []
        self.decoder.on_command(self.executed.append)
        self.decoder.on_incident(self.incidents.append)
        self.decoder.on_undecided(self.undecided.append)
        prepare(self.decoder)
        plan = [(round(second * 100), command) for second, command in plan]

        def submit(chunk):
            while plan and plan[0][0] <= self.decoder.counters.samples:
                self.replies.append(self.decoder.commands.submit(plan.pop(0)[1]))

        self.decoder.on_chunk(submit)
        self.decisions = list(self.decoder)
        assert_accounted(self.decoder.counters, self.decisions)


def test_a_paused_decoder_decides_nothing_and_its_filters_go_on(predict):
    _, clean, _ = decode_samples(predict, SAMPLES)
    run = Run(predict, [(4.0, Pause()), (5.0, Status()), (6.0, Start()), (6.0, Start())])
    assert [reply.result().text for reply in run.replies] == ["Now paused.", "paused", "Now deciding.", "Already deciding."]
    counters = run.decoder.counters
    assert run.replies[1].result().data["counters"]["skipped_paused"] == 10
    assert (counters.windows, counters.skipped_paused) == (81, 20)
    paused = {d.index for d in clean} - {d.index for d in run.decisions}
    assert [d.time for d in clean if d.index in paused] == pytest.approx(np.arange(4.09, 6.0, 0.1))
    assert predictions(run.decisions) == {i: bits for i, bits in predictions(clean).items() if i not in paused}
    assert [(type(one.command), one.sample) for one in run.executed][:3] == [(Pause, 400), (Status, 500), (Start, 600)]
    assert all(one.asked <= one.time == pytest.approx(one.sample / 100 - 0.01) for one in run.executed)


def test_events_of_a_pause_are_told(predict):
    markers = PlannedMarkers([(at, "x") for at in (1.0, 3.5, 6.0)], lambda: 100.0)
    run = Run(predict, [(4.0, Pause()), (7.0, Start())], schedule=Events(("x",), 0.0), markers=[markers])
    assert [decision.event.onset for decision in run.decisions] == [1.0, 6.0]
    assert [(one.event.onset, one.reason) for one in run.undecided] == [(3.5, "paused")]


@pytest.mark.parametrize("repair", [True, False])
def test_named_channels_count_as_bad(predict, repair):
    """Where bad channels are repaired, windows become those of a stream that never had the channels (`bads`)."""
    config = StreamConfig(bad_channels="repair" if repair else "flag")
    run = Run(predict, [(1.0, BadChannels(names=("cz", "F3"))), (7.0, BadChannels(names=()))], config)
    _, clean, _ = decode_samples(predict, SAMPLES)
    _, without, _ = decode_samples(predict, SAMPLES, interpolate=True, bads=("F3", "Cz"))
    assert all(reply.result().accepted for reply in run.replies)
    named = [d for d in run.decisions if 3.05 < d.time < 7.05]
    assert {d.bad_channels for d in named} == {("F3", "Cz")}
    wanted = {d.index: d.prediction for d in (without if repair else clean)}
    for decision in named:
        np.testing.assert_allclose(decision.prediction, wanted[decision.index], atol=1e-5)
    other = {d.index: d.prediction for d in (clean if repair else without)}
    assert min(float(abs(d.prediction - other[d.index]).max()) for d in named) > 1e-3
    assert [d.bad_channels for d in run.decisions if d.time > 9.05] == [()] * 10
    assert [i.text for i in run.incidents if i.kind == "channel"] == [
        "F3 is named as bad.",
        "Cz is named as bad.",
        "F3 is good again, it was named as bad.",
        "Cz is good again, it was named as bad.",
    ]


@pytest.mark.parametrize(
    ("policy", "names", "why"),
    [
        ("flag", ("nose",), "no channels nose"),
        ("stop", ("Cz",), "would end"),
        ("repair", ("F3", "Fz", "F4", "C3", "Cz"), "too many"),
    ],
)
def test_channels_that_cannot_be_named_change_nothing(predict, policy, names, why):
    _, clean, _ = decode_samples(predict, SAMPLES)
    run = Run(predict, [(3.0, BadChannels(names=names))], StreamConfig(bad_channels=policy))
    reply = run.replies[0].result()
    assert not reply.accepted
    assert why in reply.text
    assert predictions(run.decisions) == predictions(clean)


def test_marks_are_in_lines_and_records(predict, tmp_path):
    """Also twice the same text, which as an incident of the stream would be counted only."""
    kept = []

    def prepare(decoder):
        kept.extend([write_lines(decoder, tmp_path / "out.jsonl"), record(decoder, tmp_path / "run.xdf")])

    run = Run(predict, [(3.0, Mark(text="eyes closed")), (4.0, Mark(text="eyes closed"))], prepare=prepare)
    for one in kept:
        one.close()
    marks = [(i.time, i.text, i.sample) for i in run.incidents if i.kind == "mark"]
    assert marks == [(2.99, "eyes closed", 300), (3.99, "eyes closed", 400)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["time"], line["text"], line["sample"]) for line in lines if line.get("kind") == "mark"] == marks
    recorded = read_record(tmp_path / "run.xdf").incidents
    assert [(i.time, i.text, i.sample) for i in recorded if i.kind == "mark"] == marks
    for text in ("", "x" * 1001, "\ud800"):
        with pytest.raises(CommandError, match="no text"):
            Mark(text=text)


def test_labels_and_bundles_go_to_who_takes_them(predict):
    """A handler may answer later: it is asked again after each chunk."""
    label, load = Label(event=3, class_name="left"), Load(bundle="b")
    assert [r.result().accepted for r in Run(predict, [(2.0, label), (3.0, load)]).replies] == [False, False]
    taken = []

    def loader(command, asked):
        chunks = iter(range(3))
        return lambda: Reply(accepted=True, text="there") if next(chunks, None) is None else None

    def label_it(command, asked):
        taken.append((command, asked))
        if command.class_name == "nose":
            raise StreamError("There is no class nose.", "Name another.")
        return Reply(accepted=True, text="")

    def prepare(decoder):
        decoder.commands.handle(Label, label_it)
        decoder.commands.handle(Load, loader)

    plan = [(2.0, load), (2.0, label), (3.0, Label(event=4, class_name="nose")), (9.9, load)]
    run = Run(predict, plan, prepare=prepare)
    assert taken == [(label, 1.99), (plan[2][1], 2.99)]
    assert [(type(one.command), one.sample, one.reply.text) for one in run.executed] == [
        (Label, 210, ""),
        (Load, 240, "there"),
        (Label, 300, "There is no class nose. Name another."),
        (Load, 1000, "The run has ended."),
    ]


def test_a_stop_ends_the_run_with_the_chunk_at_hand(predict):
    run = Run(predict, [(5.0, Stop()), (5.0, Status())])
    assert run.decoder.counters.samples == 500
    assert [(reply.result().accepted, reply.result().text) for reply in run.replies] == [
        (True, "The run ends."),
        (False, "The run has ended."),
    ]
    assert not run.decoder.commands.submit(Status()).result(timeout=0).accepted


COMMANDS = st.one_of(
    st.sampled_from([Pause(), Start(), Status()]),
    st.builds(Mark, text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)),
    st.builds(BadChannels, names=st.lists(st.sampled_from(["Cz", "f3", "C4", "nose", ""]), max_size=3).map(tuple)),
    st.builds(Load, bundle=st.text(max_size=5)),
    st.builds(Label, event=st.integers(), class_name=st.text(max_size=5)),
)


@pytest.fixture(scope="module")
def bits(predict):
    """Return the predictions of a run without commands."""
    _, clean, _ = decode_samples(predict, SAMPLES)
    return predictions(clean)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0.0, 10.0), COMMANDS), max_size=30))
@example([(0.0, BadChannels(names=("Cz",))), (0.0, BadChannels(names=()))])
def test_no_commands_alter_a_decision_but_by_leaving_it_out(predict, bits, plan):
    """Any commands at any time: every window has its decision or its reason, and no other bits; each command its answer."""
    run = Run(predict, sorted(plan, key=lambda each: each[0]))
    assert all(bits[decision.index] == decision.prediction.tobytes() for decision in run.decisions)
    assert run.decoder.counters.windows == 81
    assert all(reply.done() for reply in run.replies)
    paused, left_out, n = False, set(), 0
    changes = deque((one.sample, type(one.command)) for one in run.executed if one.reply.accepted)
    for sample in range(10, 1001, 10):  # chunk by chunk
        if sample >= 200:
            left_out |= {n} if paused else set()
            n += 1
        while changes and changes[0][0] <= sample:
            kind = changes.popleft()[1]
            paused = kind is Pause or (paused and kind is not Start)
    assert left_out == set(bits) - {decision.index for decision in run.decisions}


def test_many_threads_submit_and_every_command_is_answered_once_in_order():
    now = [0.0]
    commands = Commands(lambda: now[0])
    seen, executed = [], []
    commands.handle(Mark, lambda mark, asked: (seen.append(mark.text), Reply(accepted=True, text=mark.text))[1])
    commands.on_executed(executed.append)
    futures = {}

    def submit(who):
        futures[who] = [commands.submit(Mark(text=f"{who}/{i}")) for i in range(200)]

    threads = [threading.Thread(target=submit, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or commands._waiting:
        commands.execute_next(0)
    commands.close(0)
    every = [future for of_one in futures.values() for future in of_one]
    assert not wait(every, timeout=0).not_done
    for who, of_one in futures.items():
        done = [future.result().text for future in of_one if future.result().accepted]
        assert done == [text for text in seen if text.startswith(f"{who}/")]
        assert {future.result().text for future in of_one if not future.result().accepted} <= {"Too many commands wait."}
    assert len(seen) == len(executed) >= MOST_WAITING


def test_a_queue_that_is_full_refuses_and_a_chunk_takes_one_command():
    commands = Commands(lambda: 0.0)
    commands.handle(Pause, lambda command, asked: Reply(accepted=True, text=""))
    futures = [commands.submit(Pause()) for _ in range(MOST_WAITING + 1)]
    assert [future.done() for future in futures] == [False] * MOST_WAITING + [True]
    commands.execute_next(0)
    assert [future.done() for future in futures[:2]] == [True, False]


@pytest.mark.parametrize("command", [Status(), Mark(text="µ"), BadChannels(names=("Cz",)), Label(event=1, class_name="x")])
def test_commands_are_json(command):
    assert decode(Command, json.loads(json.dumps(encode(command)))) == command


def test_an_event_of_the_class_event_is_not_a_command():
    with pytest.raises(ValueError, match="command"):
        decode(Command, {"command": "event"} | {"onset": Event(0.0, "x", 0.0).onset})
