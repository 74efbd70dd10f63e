"""The examples of the feedback socket: PsychoPy's half without a screen, over real LSL; the page in Chromium."""

import functools
import http.server
import importlib.util
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from bundles import copy_bundle
from own_lsl import CONFIG
from test_feedback import TOKEN, running

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.stored import write_layer
from sjepa_deploy.runtime.decisions.threshold import Threshold
from sjepa_deploy.runtime.feedback.feedback import Feedback
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.schedule import Events

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = ("left", "right", "rest")


@pytest.fixture(scope="module")
def bundle(make_bundle, tmp_path_factory):
    copied = Bundle.open(copy_bundle(make_bundle("prelocal", class_names=CLASSES), tmp_path_factory.mktemp("example") / "bundle"))
    steps = (Probabilities(temperature=0.02), Threshold(enter=0.4))
    known = {"name": "default", "bundle": copied.manifest.digest, "output_name": "prediction", "class_names": CLASSES}
    write_layer(copied, LayerDescription(steps=steps, n_outputs=3, **known))
    return copied


@pytest.fixture
def psychopy_trials():
    spec = importlib.util.spec_from_file_location("psychopy_trials", EXAMPLES / "psychopy_trials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (None, "no answer"),
        ({"type": "undecided", "reason": "gap"}, "not yet (gap)"),
        ({"type": "decision", "state": "rejected", "reason": "doubt"}, "not yet (doubt)"),
        ({"type": "decision", "state": "decided", "class": "left", "probability": 0.934, "reason": ""}, "left 93%"),
        ({"type": "decision", "prediction": [0.5, -1.25]}, "0.5, -1.25"),
    ],
)
def test_answers_in_words(psychopy_trials, message, words):
    assert psychopy_trials.said(message) == words


@pytest.mark.alone
def test_trials_over_lsl_and_the_socket(bundle, psychopy_trials, own_lsl):
    """Cues go out over LSL, EEG comes from another process, and each cue gets the decision on it."""
    amplifier, stream = f"amp-{uuid.uuid4().hex[:8]}", f"cues-{uuid.uuid4().hex[:8]}"
    sender = [sys.executable, Path(__file__).with_name("lsl_sender.py"), amplifier, amplifier, "100", "microvolts"]
    process = subprocess.Popen(
        [*sender, ",".join(bundle.spec.ch_names), "0", CONFIG, "float32"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        cues = psychopy_trials.Cues(stream)
        decoder = Decoder.open(
            bundle,
            f"lsl:{amplifier}",
            StreamConfig(late="queue"),
            decisions=DecisionLayer.load(bundle),
            schedule=Events(("left", "right"), 0.0),
            markers=[f"lsl:{stream}"],
        )
        made = []
        decoder.on_decision(made.append)
        with decoder, Feedback(decoder, port=0) as feedback:
            thread = threading.Thread(target=decoder.run)
            thread.start()
            client = psychopy_trials.DecoderClient(feedback.ports["lines"])
            assert client.run["events"] == ["left", "right"]
            assert cues.wait_for_decoder(20)
            assert client.ask("mark", text="trials begin")["accepted"]
            shown = []
            messages = [psychopy_trials.run_trial(client, cues, cue, shown.append, 15.0) for cue in ("left", "right")]
            assert psychopy_trials.run_trial(client, cues, "nothing", shown.append, 0.2) is None
            assert client.ask("stop")["accepted"]
            thread.join(20)
            client.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [message["event"] for message in messages] == ["left", "right"]
    assert [message["index"] for message in messages] == [decision.index for decision in made] == [0, 1]
    words = [psychopy_trials.said(message) for message in messages]
    assert shown == ["left", words[0], "right", words[1], "nothing", "no answer"]
    assert [message.get("class") for message in messages] == [decision.state.class_name for decision in made]


def test_a_page_shows_decisions_and_commands_the_decoder(bundle, browser, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=EXAMPLES)
    handler.log_message = lambda *_: None
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as pages,
        running(bundle, token=TOKEN, decisions=DecisionLayer.load(bundle)) as (decoder, feedback, told),
    ):
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{feedback.ports['websocket']}"

        def connect(page, token):
            browser.open(page)
            browser.run(f"at('url').value = '{url}'; at('token').value = '{token}'; at('connect').requestSubmit()")

        connect((EXAMPLES / "decoder.html").as_uri(), TOKEN)  # a file has the origin "null"
        browser.wait("socket.readyState === 3")
        assert browser.text("#link") == "not connected"
        page = f"http://127.0.0.1:{pages.server_port}/decoder.html"
        connect(page, "wrong-wrong-wrong-wrong")
        browser.wait("at('log').textContent.includes('token')")
        browser.wait("at('link').textContent === 'not connected' && socket.readyState === 3")
        connect(page, TOKEN)
        browser.wait("at('link').textContent.startsWith('connected: bundle, synthetic')")
        browser.wait(f"{[*CLASSES, 'undecided']}.includes(at('class').textContent) && at('probabilities').children.length === 3")
        browser.screenshot(tmp_path / "decoder.png")
        browser.run("at('text').value = '<b>µ</b>'; at('mark').click()")
        browser.wait("at('log').textContent.includes('mark: <b>µ</b>')")
        assert [one.text for one in told["incidents"] if one.kind == "mark"] == ["<b>µ</b>"]
        browser.run("at('pause').click()")
        browser.wait("at('class').textContent === 'paused'")
        assert decoder.paused
        browser.run("at('start').click()")
        browser.wait("at('class').textContent !== 'paused'")
        browser.look()
        assert browser.errors == []
        pages.shutdown()
