"""What an experimenter sees: the page against the decisions, events and states that the decoder itself gave."""

import re
import time
from collections import Counter

import numpy as np
import pytest
from bundles import copy_bundle
from dashboards import TOKEN, assert_clean, get, idle_dashboard, open_page, texts, wait_until
from monitors import LiveDecoder, Written
from streams import ScriptedSource, chunks_of, eeg, info_of

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import DashboardError
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.pauses import Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.smoothing import Exponential
from sjepa_deploy.runtime.decisions.state import STATES, State
from sjepa_deploy.runtime.decisions.stored import write_layer
from sjepa_deploy.runtime.decisions.threshold import Threshold
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import PlannedMarkers
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.watch.standing import standing_of
from sjepa_deploy.runtime.watch.watching import watch

DASH = "\N{EN DASH}"
CLASSES = ("left", "right", "rest")
SURE = (Probabilities(temperature=0.02), Threshold(enter=0.8, leave=0.8))  # the outputs of random weights are small
SMOOTH = (Probabilities(temperature=0.02), Exponential(seconds=0.3), Refractory(seconds=0.6), Threshold(enter=0.6, leave=0.5))


@pytest.fixture(scope="module")
def bundle(make_bundle, tmp_path_factory):
    """Return a bundle with two layers: one for events, one for windows that follow each other."""
    copied = Bundle.open(copy_bundle(make_bundle("prelocal", class_names=CLASSES), tmp_path_factory.mktemp("page") / "bundle"))
    for name, steps in (("events", SURE), ("hop", SMOOTH)):
        facts = {"output_name": "prediction", "n_outputs": 3, "class_names": CLASSES, "signal": Signal(max_gap=None)}
        write_layer(copied, LayerDescription(name=name, bundle=copied.manifest.digest, steps=steps, **facts))
    return copied


@pytest.fixture(scope="module")
def predict(bundle):
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        yield predict


class Run:
    """Decodes 40 s of a stream that lacks 1 s, and holds what the decoder told."""

    def __init__(self, predict, layer=None, plan=None):
        samples, kept = eeg(4000).astype(np.float32), np.r_[0:2000, 2100:4000]
        source = ScriptedSource(info_of(predict.spec), chunks_of(samples[kept], kept / 100.0))
        options = {"decisions": None if layer is None else DecisionLayer.load(predict.bundle, layer)}
        if plan is not None:
            options |= {"schedule": Events(("go", "stop"), start=0.0), "markers": [PlannedMarkers(plan, source.clock)]}
        self.decoder = Decoder(predict, source, StreamConfig(), **options)
        self.monitor, self.told = watch(self.decoder), []
        self.decoder.on_undecided(self.told.append)
        self.decoder.on_decision(self.told.append)
        self.decisions = list(self.decoder)


def trials(browser):
    """Return the rows of the list of trials, the newest first: the texts of the cells, and the line below."""
    rows = "[...document.querySelectorAll('#trials tbody tr.trial')]"
    cells = "[...row.cells].map(cell => cell.textContent)"
    return browser.run(f"return {rows}.map(row => [...{cells}, row.nextElementSibling.textContent])")


def is_green(browser):
    colour = browser.run("return getComputedStyle(document.getElementById('state'), '::before').color")
    root = "getComputedStyle(document.documentElement).getPropertyValue('--ok').trim()"
    make = f"const e = document.createElement('i'); e.style.color = {root}; document.body.append(e); "
    return colour == browser.run(make + "const found = getComputedStyle(e).color; e.remove(); return found")


def percent(p):
    return f"{100 * p:.0f} %" if p == 1 or p <= 0.995 else "> 99 %"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_event_is_a_trial_with_its_decision_or_the_reason_why_not(browser, predict, tmp_path, width, scheme):
    """Events before the first window, in the loss, late, doubled, unwanted, and after the end."""
    plan = [(0.5 + 1.5 * i, ("go", "stop", "other")[i % 3], 0.04 * (i % 4)) for i in range(24)]
    plan += [(35.5, "go", 0.0), (35.5, "go", 0.001), (39.5, "stop", 0.0)]
    run = Run(predict, "events", plan)
    wanted = [entry for entry in plan if entry[1] != "other"]
    assert len(run.told) == len(wanted) == run.decoder.counters.events
    with idle_dashboard(run.monitor) as dashboard:
        open_page(browser, dashboard, width=width, scheme=scheme)
        browser.wait("state.trials.length > 0")
        shown = trials(browser)
        wall = browser.run("return state.wall - state.now")
        assert len(shown) == len(run.told)
        for told, (when, event, what, p, delay, why) in zip(reversed(run.told), shown, strict=True):
            onset = told.event.onset
            assert event == told.event.description
            near = [time.strftime("%H:%M:%S", time.localtime(wall + onset + late)) for late in (-1, 0, 1)]
            assert when in near, "the decoder's clock stands still here, and the wall's does not"
            if hasattr(told, "prediction"):
                state = told.state
                assert what == (state.class_name if state.name == "decided" else state.name)
                assert p == percent(state.probability)
                assert delay.split()[1] in ("µs", "ms", "s")
                assert why.startswith(f"{state.reason}; marker ")
                assert why.endswith(" late")
            else:
                assert (what, p, delay) == ("no decision", DASH, DASH)
                assert why.startswith(told.reason)
            assert f"{1000 * told.event.marker_delay:.0f}"[:1] in why.partition("marker ")[2]
        assert {row[2] for row in shown} >= {*CLASSES[:1], "no decision", "undecided"} or len({row[2] for row in shown}) > 2
        assert browser.text("#n-trials") == str(len(run.told))
        last = run.decisions[-1]
        drawn = "return document.querySelectorAll('#values {}').length"
        assert browser.run(drawn.format("circle.dot")) == len(CLASSES) * len(run.decisions)
        onsets = [onset for onset, *_ in plan if onset <= browser.run("return state.now")]
        assert browser.run(drawn.format("line.mark")) == len(onsets)
        assert f"{len(run.decisions)} decisions, {len(onsets)} events" in browser.text("#span")
        assert texts(browser, "#outputs td.n") == [percent(p) for p in last.state.probabilities]
        assert browser.text("#since").startswith(last.event.description)
        counted = dict(zip(texts(browser, "#counters th"), texts(browser, "#counters td"), strict=True))
        states = Counter(d.state.name for d in run.decisions)
        assert {name: counted.get(f"state: {name}", "0") for name in STATES} == {n: str(states[n]) for n in STATES}
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.screenshot(tmp_path / "page.png").stat().st_size > 10_000
        assert_clean(browser, dashboard)


def test_states_of_windows_are_drawn_and_each_change_is_listed(browser, predict):
    run = Run(predict, "hop")
    changes = [
        now.state
        for before, now in zip([None, *run.decisions], run.decisions, strict=False)
        if now.state.name in ("decided", "rejected")
        and (before is None or (before.state.name, before.state.class_name) != (now.state.name, now.state.class_name))
    ]
    assert len(changes) > 10
    with idle_dashboard(run.monitor) as dashboard:
        open_page(browser, dashboard)
        assert [row[1] for row in trials(browser)] == [state.class_name for state in reversed(changes)][:32]
        assert [row[2] for row in trials(browser)] == [percent(state.probability) for state in reversed(changes)][:32]
        assert browser.text("#n-trials") == str(len(changes))
        browser.run("document.getElementById('span-choice').value = '300'; draw()")
        assert browser.run("return document.querySelectorAll('#values .decided').length") == len(changes)
        ticks = texts(browser, "#values .tick")
        assert ticks[:3] == ["0 %", "50 %", "100 %"]
        assert len(ticks) > 5
        assert all(re.fullmatch(r"\d\d:\d\d:\d\d", tick) for tick in ticks[3:])
        x = "[...document.querySelectorAll('#values .time')].map(t => t.previousElementSibling.x1.baseVal.value)"
        moved = browser.run(f"const x = {x}; return x.slice(1).map((to, i) => to - x[i])")
        assert np.ptp(moved) < 1.0, "equal times are equal distances"
        assert_clean(browser, dashboard)


def test_a_class_stands_until_something_else_may_be_decided(browser):
    """A decision lasts one window of 0.1 s and the page draws four times a second: the class must not be missed."""
    clock = [10.0]
    written = Written(clock=lambda: clock[0], layer="default", class_names=("left", "right"))

    def decide(index, name, reason, *chosen):
        state = State(name, reason, *chosen) if chosen else None
        written.decide(index, time=9.0 + index / 10, prediction=(0, 0), state=state)

    decide(0, "decided", "probability reached the threshold", "left", 0.93, (0.93, 0.07))
    decide(1, "refractory", "too soon after the last decision", None, 0.6, (0.4, 0.6))
    with idle_dashboard(written.monitor) as dashboard:
        open_page(browser, dashboard)
        assert (browser.text("#class"), browser.text("#reason")) == ("left 93 %", "refractory: too soon after the last decision")
        decide(2, "undecided", "probability is below the threshold", None, 0.55, (0.45, 0.55))
        browser.wait("document.getElementById('class').textContent === 'undecided'")
        assert browser.text("#last").startswith("Last: left 93 % at ")
        written.monitor.set_state("silent")
        browser.wait("document.getElementById('class').textContent === 'Source is silent'")


def test_without_a_layer_outputs_are_shown_and_nothing_is_said_to_be_decided(browser, predict):
    plan = [(2.0 + i, "go", 0.0) for i in range(6)]
    run = Run(predict, plan=plan)
    with idle_dashboard(run.monitor) as dashboard:
        open_page(browser, dashboard)
        assert browser.text("#class") == "outputs only"
        newest = trials(browser)[0]
        values = run.decisions[-1].prediction.ravel().tolist()
        assert texts(browser, "#outputs td.n") == [f"{v:.3f}" for v in values]
        assert newest[2] == ", ".join(f"{name} {v:.3f}" for name, v in zip(CLASSES, values, strict=True))
    base = Written(output_names=())
    base.decide(0, prediction=np.zeros((8, 64)))
    with idle_dashboard(base.monitor) as dashboard:
        browser.open(dashboard.url)
        browser.wait("state !== null && state.decision !== null")
        assert browser.text("#span") == "A base model: its features are not shown."
        assert_clean(browser, dashboard)


UNSURE, GONE = State("undecided", "not sure", None, 0.6, (0.4, 0.6)), State("no signal", "gone")
SURE_OF_IT = State("decided", "sure", "left", 0.9, (0.9, 0.1))


def hops(written, state, seconds):
    for index in range(round(10 * seconds)):
        written.decide(index, prediction=(1, 2), state=state)


@pytest.mark.parametrize(
    ("events", "now", "write", "tone", "words"),
    [
        (None, 6.0, lambda w: hops(w, SURE_OF_IT, 6), "good", "Decoding"),
        (None, 59.0, lambda w: hops(w, UNSURE, 59), "good", "Decoding"),
        (
            None,
            62.0,
            lambda w: hops(w, UNSURE, 62),
            "wait",
            "Undecided: No class for 62 s; the newest windows: 620 undecided.",
        ),
        (
            None,
            6.0,
            lambda w: hops(w, GONE, 6),
            "bad",
            "No signal: The windows of 5 s say nothing: gone.",
        ),
        (("go",), 75.0, lambda w: None, "wait", "Waiting for events: No event (go) for 75 s."),
        (("go",), 5.0, lambda w: w.event(1.0, "go", UNSURE), "good", "Decoding"),
        (
            ("go",),
            8.0,
            lambda w: [w.event(1.0 + i, "go", UNSURE if i % 2 else None) for i in range(6)],
            "wait",
            "Undecided: The last 5 events have no class: 3 undecided, 2 no decision (gap).",
        ),
        (
            ("go",),
            8.0,
            lambda w: [w.event(1.0 + i, "go", None) for i in range(6)],
            "bad",
            "No decisions: The last 5 events have no class: 5 no decision (gap).",
        ),
    ],
)
def test_how_a_decoder_stands(events, now, write, tone, words):
    clock = [0.0]
    written = Written(clock=lambda: clock[0], layer="a", class_names=("left", "right"), events=events, overdue=None)
    written.monitor.received(0.0)
    clock[0] = 0.1
    write(written)
    clock[0] = now
    standing = standing_of(written.monitor.snapshot())
    assert (standing.tone, ": ".join(filter(None, (standing.title, standing.text)))) == (tone, words)


def test_it_is_not_green_while_it_is_paused(browser):
    written = Written(clock=lambda: 1.0, layer="a", class_names=("left", "right"))
    written.decide(0, prediction=(1, 2), state=SURE_OF_IT)
    written.monitor.received(0.1, paused=True)
    with idle_dashboard(written.monitor) as dashboard:
        open_page(browser, dashboard)
        assert (browser.text("#state"), browser.text("#class")) == ("Paused", "Paused")
        assert browser.text("#why") == "Nothing is decided until somebody starts it again."
        assert not is_green(browser)
        assert get(dashboard, "/healthz")[0] == 200, "nobody restarts what somebody paused"
        written.monitor.received(0.2)
        written.decide(1, prediction=(1, 2), state=SURE_OF_IT)
        browser.wait("document.getElementById('state').textContent === 'Decoding'")
        assert is_green(browser)


def test_traces_are_drawn_with_their_unit_and_bad_ones_apart(browser, predict):
    run = Run(predict)
    with idle_dashboard(run.monitor) as dashboard:
        open_page(browser, dashboard)
        browser.wait("document.querySelectorAll('#traces .trace').length === 8")
        assert set(predict.spec.ch_names) <= set(texts(browser, "#traces text.tick"))
        assert re.fullmatch(r"\d+ µV", browser.text("#trace-scale"))
        paths = browser.run("return [...document.querySelectorAll('.trace')].map(path => path.getAttribute('d'))")
        assert all(path.count("L") > 200 for path in paths), "10 s have 250 bins"
        assert_clean(browser, dashboard)
    with pytest.raises(DashboardError, match="no channel Oz"):
        watch(run.decoder, ["Oz"])


def test_the_recording_its_size_and_the_disk_are_shown(browser, predict, tmp_path):
    samples = eeg(1000).astype(np.float32)
    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(samples, np.arange(1000) / 100.0)), StreamConfig())
    monitor = watch(decoder)
    recorder = record(decoder, tmp_path / "run.xdf")
    decoder.run()
    with idle_dashboard(monitor) as dashboard:
        open_page(browser, dashboard)
        assert browser.text("#recording") == "Not recorded"
        dashboard.recorder = recorder
        wait_until(lambda: recorder.path.stat().st_size > 10_000)
        size = recorder.path.stat().st_size
        browser.wait(f"state.recording?.size >= {size}")
        assert re.fullmatch(r"Recording run\.xdf, \d+(\.\d+)? kB, [\d.]+ [MGT]B left.*", browser.text("#recording"))
        assert float(browser.text("#recording").split(", ")[1].split()[0]) == pytest.approx(size / 1000, rel=0.02)
        recorder._failed = True  # as on a disk that is full (test_record.py)
        recorder.n_lost["samples"] = 1234
        browser.wait("document.getElementById('recording').textContent.startsWith('Recording ended')")
        assert browser.text("#recording").endswith("Not recorded: 1,234 samples")
        assert browser.run("return document.getElementById('recording').className") == "chip soft late"
        assert_clean(browser, dashboard)
    recorder.close()


def test_buttons_give_commands(browser, bundle):
    hostile = "<img src=x onerror=alert(1)> ü 漢字"
    with (
        LiveDecoder(bundle) as running,
        idle_dashboard(running.monitor, token=TOKEN, commands=running.decoder.commands) as dashboard,
    ):

        def press(selector, **values):
            for name, text in values.items():
                browser.run(f"document.getElementById('{name.replace('_', '-')}').value = {text!r}")
            browser.run(f"document.querySelector({selector!r}).click()")

        browser.open(f"{dashboard.url}?token={TOKEN}")
        open_page(browser, dashboard)
        press("#mark-form button", mark_text=hostile)
        browser.wait("document.getElementById('events').textContent.includes('mark: <img')")
        assert hostile in [incident.text for incident in running.monitor.snapshot().incidents]
        browser.wait("document.getElementById('reply').textContent.startsWith('Marked at')")
        press("#pause")
        browser.wait("state.state === 'paused' && document.getElementById('pause').textContent === 'Start'")
        assert running.decoder.paused
        press("#pause")
        browser.wait("state.state === 'decoding'")
        assert not running.decoder.paused
        press("#bad-form button", bad_name="Cz")
        browser.wait("$('bads').children.length && $('channels').textContent.includes('Cz named')")
        assert running.monitor.snapshot().bads == ("Cz",)
        press("#bads button")
        browser.wait("document.querySelector('#bads button') === null")
        assert running.monitor.snapshot().bads == ()
        browser.look()
        assert browser.errors == []
        assert set(browser.requests) == {dashboard.url, f"{dashboard.url}events", f"{dashboard.url}command"}


def test_a_bundle_that_was_loaded_meanwhile_is_the_one_on_the_page(browser, bundle, predict, tmp_path):
    other = Bundle.open(copy_bundle(bundle, tmp_path / "after-training"))
    run = Run(predict)
    with idle_dashboard(run.monitor) as dashboard, sjepa_deploy.load(other, check_unit=False) as theirs:
        open_page(browser, dashboard)
        assert browser.text("#bundle") == bundle.path.name
        run.decoder.swap(theirs)
        browser.wait("document.getElementById('bundle').textContent === 'after-training'")
        assert "bundle: after-training" in browser.text("#events")
        assert 'bundle="after-training"' in get(dashboard, "/metrics")[2]
        assert_clean(browser, dashboard)
