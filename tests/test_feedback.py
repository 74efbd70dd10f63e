"""The feedback socket: what clients hear, what they may ask, who is refused, and that nobody holds the decoder up."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st
from streams import predictions, run_stream
from websockets.sync.client import connect as connect_websocket

from sjepa_deploy.errors import CommandError, FeedbackError, MissingDependencyError
from sjepa_deploy.runtime.feedback import feedback as feedback_module
from sjepa_deploy.runtime.feedback.feedback import FEEDBACK, Feedback
from sjepa_deploy.runtime.feedback.requests import looks_like_http, read_object, read_primary, read_request
from sjepa_deploy.runtime.live.commands import COMMANDS, BadChannels, Mark, Pause, Status
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.process import undisturbed
from sjepa_deploy.runtime.live.swap import take_loads

TOKEN = "not-a-secret-0123456789"


@contextlib.contextmanager
def running(bundle, *, config=None, speed=1.0, decisions=None, **options):
    """Decode synthetic EEG in a thread with a socket beside, until the context ends."""
    config = config or StreamConfig(hop=0.1, late="queue")
    with Decoder.open(bundle, "synthetic", config, speed=speed, decisions=decisions) as decoder:
        told = {"decisions": [], "commands": [], "incidents": []}
        decoder.on_decision(told["decisions"].append)
        decoder.on_command(told["commands"].append)
        decoder.on_incident(told["incidents"].append)
        with Feedback(decoder, port=0, **options) as feedback:

            def decode():
                with undisturbed(decoder):  # as the command does: no garbage is collected in between
                    decoder.run()

            thread = threading.Thread(target=decode)
            thread.start()
            client = Client(feedback.ports["lines"], token=options.get("token"))
            assert client.read("run")  # the server is there
            client.close()
            try:
                yield decoder, feedback, told
            finally:
                decoder.stop()
                thread.join(20)
                assert not thread.is_alive()


class Client:
    """A client that sends JSON lines."""

    def __init__(self, port, *, source="127.0.0.1", token=None, buffer=None):
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.bind((source, 0))
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.lines = self.socket.makefile("rb")
        if token is not None:
            self.send({"token": token})

    def send(self, message):
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data + b"\n")

    def read(self, *types):
        """Return the next message of a type; None when the connection has ended."""
        with contextlib.suppress(ConnectionResetError):
            while line := self.lines.readline():
                message = json.loads(line, parse_constant=pytest.fail)
                if not types or message["type"] in types:
                    return message
        return None

    def ask(self, **command):
        self.send(command)
        return self.read("reply", "error")

    def close(self):
        self.lines.close()
        self.socket.close()


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle("prelocal").path


@pytest.fixture(scope="module")
def open_socket(bundle):
    """A run whose socket needs no token."""
    with running(bundle, dareplane=True, speed=4.0) as run:
        yield run


@pytest.fixture(scope="module")
def guarded(bundle):
    """A run whose socket every address reaches, with a token."""
    with running(bundle, host="0.0.0.0", token=TOKEN, origins=("https://lab.example",)) as run:
        yield run


def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "command", "number"),
    [
        ('{"command": "status"}', Status(), None),
        ('{"command": "mark", "text": "eyes closed", "id": 7}', Mark(text="eyes closed"), 7),
        ('{"id": "a", "command": "bad channels", "names": ["Cz"]}', BadChannels(names=("Cz",)), "a"),
    ],
)
def test_a_request_is_a_command_with_an_id(text, command, number):
    request = read_request(read_object(text))
    assert (request.command, request.id) == (command, number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"command": "shutdown"}',
        '{"command": ["status"]}',
        '{"command": "status", "more": 1}',
        '{"command": "mark"}',
        '{"command": "mark", "text": 5}',
        '{"command": "mark", "text": ""}',
        '{"command": "mark", "text": "\\ud800"}',
        '{"command": "status", "id": 1.5}',
        '{"command": "status", "id": true}',
        '{"command": "status", "id": ' + "9" * 5000 + "}",
        '{"command": "bad channels", "names": "Cz"}',
        '{"command": "label", "event": "3", "class_name": "x"}',
        "[" * 5000,
        '{"command": "mark", "text": NaN}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_request_is_refused(text):
    with pytest.raises(CommandError):
        read_request(read_object(text))


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_are_a_command_or_an_error(data):
    for read in (lambda: read_request(read_object(data)), lambda: read_primary(data)):
        with contextlib.suppress(CommandError):
            read()


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"post /x HTTP/1.0", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01\x02"])
def test_bytes_of_browsers_are_known(line):
    assert looks_like_http(line)
    assert not looks_like_http(b'{"command": "mark", "text": "GET / HTTP/1.1"}')


# ---------------------------------------------------------------- JSON lines


def test_a_client_hears_the_run(open_socket):
    decoder, feedback, told = open_socket
    client = Client(feedback.ports["lines"])
    head = client.read()
    assert (head["type"], head["run"], head["digest"]) == ("run", decoder.run_id, decoder.predict.bundle.manifest.digest)
    heard = [client.read("decision") for _ in range(20)]
    made = {d.index: d for d in told["decisions"]}
    assert [m["index"] for m in heard] == list(range(heard[0]["index"], heard[0]["index"] + 20))
    for message in heard:
        decision = made[message["index"]]
        assert np.array(message["prediction"], np.float32).tobytes() == decision.prediction.tobytes()
        assert (message["time"], message["due"], message["decided"]) == (decision.time, decision.due, decision.decided)
        assert (message["run"], tuple(message["flags"])) == (head["run"], decision.flags)
    client.close()


def test_the_client_of_the_page_runs(open_socket, capsys):
    """The example as it stands, and the lines beside it have the keys that the socket sends."""
    page = (Path(__file__).parents[1] / "docs/feedback.md").read_text().partition("## A client")[2].partition("\n## ")[0]
    ((example,), shown) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "json"))
    decoder, feedback, told = open_socket
    assert "8770" in example
    exec(compile(example.replace("8770", str(feedback.ports["lines"])), "docs/feedback.md", "exec"), {})
    name, *decisions, reply = capsys.readouterr().out.splitlines()
    assert name == decoder.predict.bundle.path.name
    made = {d.index: d.prediction.ravel().tolist() for d in told["decisions"]}
    for line in decisions:
        index, _, prediction = line.partition(" ")
        assert json.loads(prediction) == made[int(index)]
    assert len(decisions) == 5
    sample = Client(feedback.ports["lines"])
    at_events = {"event", "onset", "marker_delay"}
    of_decision, of_reply = (json.loads(line) for line in shown)
    assert of_decision.keys() - at_events == sample.read("decision").keys()
    assert of_reply.keys() == sample.ask(command="mark", text="block 2", id=7).keys()
    sample.close()
    assert "'id': 7" in reply
    assert any(incident.kind == "mark" and "block 2" in incident.text for incident in told["incidents"])


def test_commands_are_answered_and_told_to_all(open_socket):
    decoder, feedback, _ = open_socket
    client, other = Client(feedback.ports["lines"]), Client(feedback.ports["lines"])
    assert other.read("run")
    assert client.read("decision")  # the status counts it
    reply = client.ask(command="status", id=1)
    assert (reply["accepted"], reply["id"], reply["text"]) == (True, 1, "deciding")
    assert reply["data"]["counters"]["decisions"] > 0
    assert client.ask(command="mark", text="eyes µ", id="m")["accepted"]
    assert other.read("incident")["text"] == "eyes µ"
    assert client.ask(command="pause")["text"] == "Now paused."
    executed = other.read("command")
    while executed["command"] != "pause":
        executed = other.read("command")
    assert (executed["accepted"], executed["reply"]) == (True, "Now paused.")
    beat = other.read("heartbeat")
    assert (beat["paused"], beat["run"]) == (True, decoder.run_id)
    assert beat["since_sample"] < 2 < beat["since_decision"]
    refused = client.ask(command="bad channels", names=["nose"])
    assert not refused["accepted"]
    assert "nose" in refused["text"]
    assert not client.ask(command="label", event=3, class_name="x")["accepted"]
    assert not client.ask(command="load", bundle="/etc")["accepted"]
    assert client.ask(command="start")["text"] == "Now deciding."
    assert other.read("decision")
    client.send(b'{"command": "shutdown"}')
    text = client.read("error")["text"]
    assert "no command" in text
    assert text.count("status") == 1, text
    assert client.ask(command="status")["accepted"]
    client.close()
    other.close()


def test_http_is_dropped(open_socket):
    """A web page lets a browser post anything to this machine: neither port reads a command in it."""
    _, feedback, told = open_socket
    n = len(told["commands"])
    bodies = {"lines": '\n{"command": "stop"}\n', "dareplane": ";STOP;"}
    for kind, body in bodies.items():
        connection = http.client.HTTPConnection("127.0.0.1", feedback.ports[kind], timeout=20)
        with pytest.raises((http.client.BadStatusLine, ConnectionError)):  # noqa: PT012
            connection.request("POST", "/", body, {"Content-Type": "text/plain", "Accept": "text/html;q=0.9"})
            connection.getresponse()
        connection.close()
    client = Client(feedback.ports["lines"])
    assert client.ask(command="status")["accepted"]
    assert {type(one.command) for one in told["commands"][n:]} == {Status}
    client.close()


def test_a_first_line_that_is_no_command_and_endless_ones_end_the_connection(open_socket):
    _, feedback, _ = open_socket
    for data in (b"hello", b"x" * 200_000):
        client = Client(feedback.ports["lines"])
        assert client.read("run")
        client.send(data)
        while client.read() is not None:
            pass
        client.close()


# ---------------------------------------------------------------- who is refused


def test_from_elsewhere_nothing_is_told_or_obeyed_without_the_token(guarded):
    """127.0.0.2 stands for another machine: what matters is who knows the token."""
    _, feedback, told = guarded
    n = len(told["commands"])
    for first in ({"command": "stop"}, {"token": "wrong"}, {"token": 5}, b"\xff", {"token": TOKEN + "x"}):
        client = Client(feedback.ports["lines"], source="127.0.0.2")
        client.send(first)
        client.send({"command": "stop"})
        heard = [client.read(), client.read()]
        assert heard[0]["type"] == "error"
        assert heard[1] is None
        client.close()
    silent = Client(feedback.ports["lines"], source="127.0.0.2")
    assert silent.read()["type"] == "error"  # after TOKEN_S
    silent.close()
    assert len(told["commands"]) == n
    crowd = [Client(feedback.ports["lines"], source="127.0.0.2") for _ in range(40)]  # locks nobody out
    known = Client(feedback.ports["lines"], source="127.0.0.2", token=TOKEN)
    assert known.read()["type"] == "run"
    for each in crowd:
        each.close()
    assert known.ask(command="status")["accepted"]
    known.close()


def test_a_missing_package_is_named(bundle, monkeypatch):
    with Decoder.open(bundle, "synthetic") as decoder:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"websockets.*\[feedback\]"):
            Feedback(decoder, port=0)


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"host": "::"}, {"token": "short"}, {"token": "ö" * 20}])
def test_an_address_that_others_reach_needs_a_good_token(bundle, options):
    with Decoder.open(bundle, "synthetic") as decoder, pytest.raises(FeedbackError, match="token"):
        Feedback(decoder, port=0, **options)


def test_a_websocket_needs_the_token_and_an_origin_of_this_machine(guarded, open_socket):
    assert "websocket" not in open_socket[1].ports
    _, feedback, told = guarded
    url = f"ws://127.0.0.1:{feedback.ports['websocket']}"
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example", "https://localhost.evil"):
        with pytest.raises(websockets.InvalidStatus, match="403"):
            connect_websocket(url, origin=origin)
    for origin in (None, "http://localhost:8000", "https://127.0.0.1", "https://lab.example"):
        with connect_websocket(url, origin=origin) as client:
            client.send(json.dumps({"token": TOKEN}))
            assert json.loads(client.recv(10))["type"] == "run"
            client.send(json.dumps({"command": "mark", "text": "by WebSocket", "id": 5}))
            heard = [json.loads(client.recv(10))]
            while heard[-1]["type"] != "reply":
                heard.append(json.loads(client.recv(10)))
            assert (heard[-1]["accepted"], heard[-1]["id"]) == (True, 5)
    n = len(told["commands"])
    with connect_websocket(url) as client:
        client.send(json.dumps({"command": "stop"}))
        assert json.loads(client.recv(10))["type"] == "error"
        with pytest.raises(websockets.ConnectionClosed):
            client.recv(10)
    assert len(told["commands"]) == n


def test_a_client_that_does_not_read_is_let_go(bundle):
    with running(bundle, config=StreamConfig(hop=0, late="queue"), speed=20.0) as (decoder, feedback, told):
        client = Client(feedback.ports["lines"], buffer=4096)
        other = Client(feedback.ports["lines"])
        heard = []
        reading = threading.Thread(target=lambda: heard.extend(iter(other.read, None)))
        reading.start()
        until(lambda: feedback.counts["let go"] == 1)
        until(lambda: any(one.kind == "feedback" for one in told["incidents"]))
        n = len(told["decisions"])
        until(lambda: sum(m["type"] == "decision" for m in heard) > n / 2)
        decoder.stop()
        client.close()
    reading.join(10)
    other.close()
    indices = [m["index"] for m in heard if m["type"] == "decision"]
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    assert feedback.counts["left out"] == 0


def test_a_server_that_dies_is_started_again(bundle, monkeypatch):
    monkeypatch.setattr(feedback_module, "RESTART_AFTER_S", 0.1)
    with running(bundle) as (_, feedback, told):
        client = Client(feedback.ports["lines"])
        assert client.ask(command="status")["accepted"]
        os.kill(feedback.server_pid, signal.SIGKILL)
        assert client.read("reply") is None
        client.close()
        again = Client(feedback.ports["lines"])
        assert again.ask(command="pause")["accepted"]
        assert "feedback" in [one.kind for one in told["incidents"]]
        again.close()


# ---------------------------------------------------------------- Dareplane


def test_dareplane_commands_the_decoder(bundle):
    """`dareplane_utils`, which its control room talks to modules with, is the client."""
    communication = pytest.importorskip("dareplane_utils.module_handling.communication")
    from dareplane_utils.module_handling.module_connection import ModuleConnection

    with running(bundle, dareplane=True) as (_, feedback, told):
        link = communication.SocketCommunicator("127.0.0.1", feedback.ports["dareplane"], "sjepa")
        module = ModuleConnection("sjepa", None, link)
        module.connect_to_module()
        module.send_message(b"GET_PCOMMS")
        names = module.receive_message(2048).decode().split("|")
        assert set(names) >= {"START", "STOP", "PAUSE", "MARK", "BAD_CHANNELS", "GET_PCOMMS", "UP", "CLOSE"}
        assert len(names) == len(COMMANDS) + 3
        module.send_message(b"UP")
        assert module.receive_message(16) == b"1"
        module.send_message(b'MARK|{"text": "block 1"}')
        module.send_message(b"NOTHING")
        module.send_message(b"PAUSE;START")
        until(lambda: len(told["commands"]) == 3)
        assert [one.command for one in told["commands"]][:2] == [Mark(text="block 1"), Pause()]
        module.send_message(b"STOP")
        until(lambda: len(told["commands"]) == 4)
        module.stop_connection()
    assert feedback.counts["malformed"] == 1


# ---------------------------------------------------------------- another bundle


def test_bundles_are_loaded_by_names_alone_and_one_of_another_contract_is_refused(make_bundle):
    first, second, other = (  # those of test_swap
        make_bundle(variant, class_names=("left", "right", "rest"), **changes)
        for variant, changes in (("prelocal", {}), ("postlocal", {"model_seed": 3}), ("prelocal", {"sfreq": 128.0}))
    )
    with running(first) as (decoder, feedback, told):
        take_loads(decoder, {"second": second.path, "other": other.path})
        client = Client(feedback.ports["lines"])
        for name, why in (("other", "sfreq: 100.0 and 128.0"), (str(second.path), "No bundle was named")):
            reply = client.ask(command="load", bundle=name, id=name)
            assert (reply["accepted"], reply["id"]) == (False, name)
            assert why in reply["text"]
        assert decoder.predict.bundle.path == first.path
        reply = client.ask(command="load", bundle="second")
        assert (reply["accepted"], reply["data"]["digest"]) == (True, second.manifest.digest)
        late = Client(feedback.ports["lines"])
        assert late.read("run")["digest"] == second.manifest.digest
        until(lambda: told["decisions"] and told["decisions"][-1].index > reply["data"]["window"] + 2)
        client.close()
        late.close()
    indices = [decision.index for decision in told["decisions"]]
    assert indices == list(range(len(indices)))


# ---------------------------------------------------------------- nobody holds the decoder up


def bombard(decoder, feedback, seed, stop):
    """Send lines that are no command, as fuzzed commands: 10,000 of them, and until 120 windows were decided."""
    rng = np.random.default_rng(seed)
    valid = [b'{"command": "mark", "text": "fuzz"}', b'{"command": "bad channels", "names": ["Cz"]}', b'{"command": "label"}']
    n = 0
    while n < 10_000 or decoder.counters.decisions < 120:
        client = Client(feedback.ports["lines"], token=TOKEN)
        client.send({"command": "status"})
        client.read("reply")
        for _ in range(100):  # then it is let go
            line = bytearray(valid[n % 3])
            for at in rng.integers(0, len(line), 3):
                line[at] = rng.choice([0, 34, 44, 91, 123, 255])
            line = bytes(line).replace(b"\n", b" ")
            client.send(b"{" + line if n % 2 else line[1:])
            n += 1
        while client.read() is not None:
            pass
        client.close()
    stop.set()


@pytest.mark.alone
def test_ten_thousand_malformed_lines_make_no_window_late(bundle):
    """The decisions have the bits of a run without clients, and no more of them are late."""

    def decode(with_clients):
        config = StreamConfig(hop=0.05, deadline=0.05, late="queue")
        with running(bundle, config=config, token=TOKEN) as (decoder, feedback, told):
            stop = threading.Event()
            until(lambda: feedback.counts["clients"] == 0 and decoder.counters.decisions > 5)
            if with_clients:
                sending = threading.Thread(target=bombard, args=(decoder, feedback, 0, stop))
                sending.start()
                assert stop.wait(120)
                sending.join()
                until(lambda: feedback.counts["malformed"] >= 10_000, 5)
            else:
                until(lambda: decoder.counters.samples > 1000)
        ages = [d.latency for d in told["decisions"]]
        return decoder, told, feedback, np.percentile(ages, [50, 99])

    quiet, told_quiet, _, ages_quiet = decode(False)
    loud, told_loud, feedback, ages_loud = decode(True)
    both = predictions(told_quiet["decisions"]).keys() & predictions(told_loud["decisions"]).keys()
    assert len(both) > 100
    assert all(predictions(told_quiet["decisions"])[i] == predictions(told_loud["decisions"])[i] for i in both)
    assert {type(one.command) for one in told_loud["commands"]} == {Status}
    print(  # noqa: T201
        f"{feedback.counts}; late {quiet.counters.misses} of {quiet.counters.decisions} without, {loud.counters.misses} of "
        f"{loud.counters.decisions} with clients; latency p50, p99 in ms {ages_quiet * 1e3} and {ages_loud * 1e3}"
    )
    assert loud.counters.misses <= quiet.counters.misses + loud.counters.decisions // 100


# ---------------------------------------------------------------- the command


def test_the_command_serves_the_socket(bundle, tmp_path, capsys):
    (tmp_path / "token").write_text(TOKEN + "\n")
    options = ["--source", "synthetic", "--speed", "inf", "--late", "queue", "--duration", "3", "--quiet"]
    assert run_stream(bundle, *options, "--dareplane") == 2
    assert "--feedback" in capsys.readouterr().err
    assert run_stream(bundle, *options, "--feedback", "0.0.0.0:0") == 2
    assert "token" in capsys.readouterr().err
    assert run_stream(bundle, *options, "--feedback", "127.0.0.1:0", "--token-file", tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err
    served = ["--feedback", "127.0.0.1:0", "--token-file", tmp_path / "token", "--dareplane"]
    assert run_stream(bundle, *options, *served) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in ("lines on port", "websocket on port", "dareplane on port"))
    assert FEEDBACK.parse("[::1]") == ("::1", FEEDBACK.port)
