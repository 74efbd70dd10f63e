"""A real `tritonserver` on this machine's processor, asked by the real client."""

import http.client
import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from bundles import copy_bundle, export_small, small_spec
from served import Subject, provide_tritonserver, windows_and_runs, windows_of
from streams import ScriptedSource, assert_accounted, chunks_of, decode_samples, eeg, info_of, predictions
from tritonclient.grpc import service_pb2

import sjepa_deploy
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.serve import serve
from sjepa_deploy.cli.stream import stream
from sjepa_deploy.cli.verify import verify
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample, ZScore
from sjepa_deploy.errors import BackendError, InputError, RefusedError, ServingError, UnansweredError
from sjepa_deploy.export.to_triton import read_config, to_triton
from sjepa_deploy.parity import TOLERANCE, batch_sizes, check_parity
from sjepa_deploy.runtime.live import calls
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import synthetic_source
from sjepa_deploy.serving import Answer, Client, Server

VARIANTS = ("prelocal", "postlocal", "contextual")

PATIENT = {"deadline": 10.0, "instances": 1}  # on a busy machine a small model may take long

STEPS = (BandPass(), Resample(), Channels(), Reference(), ZScore())

NO_ANSWER = (UnansweredError, RefusedError)

# In place of our model: it takes its time, so that what happens to requests in work and in the queue does not depend on speed.
SLOW = """
import time
from sjepa_deploy.serving.model import TritonPythonModel as Model

class TritonPythonModel(Model):
    def _run(self, eeg):
        time.sleep(0.5)
        return super()._run(eeg)
"""

# It writes down what it decodes, beside itself.
COUNTED = """
from pathlib import Path
from sjepa_deploy.serving.model import TritonPythonModel as Model

class TritonPythonModel(Model):
    def execute(self, requests):
        with Path(__file__).with_name("carried_out").open("a") as file:
            file.writelines(f"{request.request_id()}\\n" for request in requests)
        return super().execute(requests)
"""


@pytest.fixture(scope="module")
def server(make_bundle, tmp_path_factory, pytestconfig):
    """Return a running server with every kind of model."""
    provide_tritonserver(pytestconfig.cache.mkdir("tritonserver"))
    repository = tmp_path_factory.mktemp("repository")
    for variant in VARIANTS:
        to_triton(make_bundle(variant), repository, name=variant, **PATIENT)
    to_triton(make_bundle("prelocal", max_batch=3, static_batch=3), repository, name="static", **PATIENT)
    to_triton(make_bundle("prelocal", class_names=("left", "right", "rest")), repository, name="volts", from_unit="V", **PATIENT)
    to_triton(make_bundle("prelocal", steps=STEPS), repository, name="steps", **PATIENT)
    add_odd_models(make_bundle, repository)
    answer_soon(repository)
    with Server(repository) as running:
        yield running


@pytest.fixture(scope="module")
def mortal(server, make_bundle, tmp_path_factory):
    """Return a running server for tests that stop it and start it again, with few models: it starts fast."""
    repository = tmp_path_factory.mktemp("mortal")
    add_odd_models(make_bundle, repository)
    to_triton(make_bundle("contextual"), repository, name="counted", **PATIENT)
    (repository / "counted" / "1" / "model.py").write_text(COUNTED)
    answer_soon(repository)
    with Server(repository) as running:
        yield running


def add_odd_models(make_bundle, repository: Path) -> None:
    """Add one that takes no batches, and one that is slow and has a short queue."""
    to_triton(make_bundle("contextual"), repository, name="alone", batched=False, **PATIENT)
    to_triton(make_bundle("prelocal"), repository, name="slow", batched=False, **PATIENT)
    (repository / "slow" / "1" / "model.py").write_text(SLOW)
    edit_config(repository / "slow", lambda queue: setattr(queue.default_queue_policy, "max_queue_size", 2))


def answer_soon(repository: Path) -> None:
    """Let no request wait for others for more than 5 ms: a share of such patient deadlines would be most of what tests take."""
    for file in repository.glob("*/config.pbtxt"):
        if read_config(file).HasField("dynamic_batching"):
            edit_config(file.parent, lambda queue: setattr(queue, "max_queue_delay_microseconds", 5000))


def edit_config(model: Path, edit) -> None:
    file = model / "config.pbtxt"
    config = read_config(file)
    edit(config.dynamic_batching)
    file.write_text(str(config))


@pytest.fixture
def client(server):
    """Return a function that opens a client, and closes it after the test."""
    opened = []

    def open_client(model, at=server, **options):
        opened.append(Client(f"{at.endpoints['grpc']}/{model}", **{"timeout": 20.0} | options))
        return opened[-1]

    yield open_client
    for each in opened:
        each.close()


def local_outputs(bundle, windows) -> np.ndarray:
    """Return what the bundle gives here, each window alone."""
    with sjepa_deploy.load(bundle, n_threads=1) as predict:
        return np.concatenate([predict(window[None]).copy() for window in windows])


def assert_same(output, expected) -> None:
    """Compare within the tolerance that a graph has anyway: the rows of a batch may be added up in another order."""
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE["fp32"] * np.sqrt(np.mean(np.square(expected))))


# ---------------------------------------------------------------- parity and contract


@pytest.mark.parametrize("scheme", ["triton", "triton-shm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_served_equals_pytorch_in_float64(server, make_bundle, variant, scheme):
    """All rows of all batches, windows with NaN too."""
    bundle = make_bundle(variant)
    with sjepa_deploy.load(bundle, backend=f"{scheme}:{server.endpoints['grpc']}/{variant}") as predict:
        sizes = batch_sizes(bundle.graph("fp32").max_batch)
        result = check_parity(predict.backend.run, bundle.reference(), backend=scheme, precision="fp32", sizes=sizes)
        assert result.passed, result
        windows = windows_of(bundle.spec, 0, 9)
        assert_same(predict.predict(windows), local_outputs(bundle, windows))
        with pytest.raises(InputError, match="NaN or infinite"):  # here, before it is sent
            predict(windows[:1] * np.nan)


def test_verify_judges_a_server(server, make_bundle, capsys):
    bundle = make_bundle("postlocal")
    address = f"triton:{server.endpoints['grpc']}/postlocal"
    assert run_command(verify, "sjepa-verify", [str(bundle.path), "--backend", address, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(r["backend"], r["passed"]) for r in printed["results"]] == [(address, True)]
    elsewhere = address.replace("postlocal", "contextual")
    assert run_command(verify, "sjepa-verify", [str(bundle.path), "--backend", elsewhere]) == 2
    assert "variant is contextual there and postlocal here" in capsys.readouterr().err


def test_a_client_knows_the_montage(server, client, make_bundle):
    bundle = make_bundle("contextual")
    served = client("contextual")
    assert served.manifest == bundle.manifest
    assert (served.spec, served.contract.unit, served.precision) == (bundle.spec, "uV", "fp32")
    assert client("contextual", spec=bundle.spec).spec == bundle.spec
    assert client("contextual", bundle=bundle).manifest.digest == bundle.manifest.digest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"ch_names": ("Fz", "F3", "F4", "C3", "Cz", "C4", "P3", "P4")},
            "ch_names is F3, Fz, F4, C3 and 4 more there and Fz, F3, ",
        ),
        ({"sfreq": 128.0}, "sfreq is 100.0 there and 128.0 here"),
        ({"unit": "V"}, "windows are in uV there and in V here"),
        ({"n_chans": 4, "ch_names": None, "positions": None}, "n_chans is 8 there and 4 here"),
    ],
)
def test_another_montage_is_refused(client, changes, says):
    with pytest.raises(ServingError, match=re.escape(says)):
        client("prelocal", spec=small_spec("prelocal", **changes))


def test_another_bundle_of_the_same_montage_is_refused(client, make_bundle):
    with pytest.raises(ServingError, match="serves another bundle"):
        client("prelocal", bundle=make_bundle("prelocal", model_seed=1))


@pytest.mark.parametrize("model", ["prelocal", "volts"])
@pytest.mark.parametrize("parameter", ["sjepa_contract", "sjepa_bundle"])
def test_the_server_itself_refuses_a_request_that_means_another_model(server, model, parameter):
    """As after a restart with another bundle under the same name, which a client may not notice in time."""
    window = raw_input(windows_of(small_spec("prelocal"), 0, 1) * np.float32(1e-6 if model == "volts" else 1))
    with server._client() as (raw, error):
        raw.infer(model, [window])
        with pytest.raises(error, match="serves another model than the client means") as raised:
            raw.infer(model, [window], parameters={parameter: "0" * 32})
        assert raised.value.status() == "StatusCode.NOT_FOUND"


def test_a_client_that_meant_another_model_looks_again(client, make_bundle):
    served = client("prelocal")
    served._parameters["sjepa_bundle"] = "0" * 64
    window = windows_of(served.spec, 0, 1)
    assert_same(served(window), local_outputs(make_bundle("prelocal"), window))


@pytest.mark.parametrize(("option", "what"), [("--port", "gRPC"), ("--http-port", "HTTP"), ("--metrics-port", "metrics")])
def test_a_port_that_is_taken_is_named_and_nothing_is_started(make_bundle, tmp_path, capsys, option, what):
    """Whoever has the port might else answer in the place of the server."""
    program, started = tmp_path / "tritonserver", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bundle, repository = str(make_bundle("prelocal").path), tmp_path / "models"
        arguments = [bundle, "--repository", str(repository), "--tritonserver", str(program), option, str(port)]
        assert run_command(serve, "sjepa-serve", arguments) == 2
    told = capsys.readouterr()
    assert f"127.0.0.1 port {port} for {what} (Address already in use)" in told.err
    assert told.out == ""
    assert not started.exists()
    assert not repository.exists()


def test_two_ports_that_are_the_same_are_refused(tmp_path):
    with pytest.raises(ServingError, match="Port 18001 is named for gRPC and for HTTP"):
        Server(tmp_path, grpc_port=18001, http_port=18001, program=Path(sys.executable))


def test_a_server_that_ended_is_not_ready_though_another_one_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "ready", lambda self: time.sleep(0.5) or True)
    with pytest.raises(ServingError, match="ended at once"), Server(tmp_path, program=Path("/bin/false")) as server:
        assert server.process.poll() is None


def test_addresses_and_servers_that_are_not_there(server, make_bundle):
    bundle = make_bundle("prelocal")
    for name, says in (
        ("triton:host", "no address"),
        ("triton:host:1/", "no address"),
        ("triton:127.0.0.1:1/prelocal", "does not offer prelocal"),
        (f"triton:{server.endpoints['grpc']}/nothing", "does not offer nothing"),
    ):
        with pytest.raises(BackendError, match=says):
            sjepa_deploy.load(bundle, backend=name)


def test_an_ensemble_takes_volts_in_any_reference(server, client, make_bundle):
    bundle = make_bundle("prelocal", class_names=("left", "right", "rest"))
    served = client("volts")
    assert served.contract.unit == "V"
    windows = windows_of(bundle.spec, 0, 3)
    volts = windows * np.float32(1e-6) + np.float32(0.01)  # every channel against an electrode 10 mV away
    rereferenced = windows.astype(np.float64) - windows.astype(np.float64).mean(axis=1, keepdims=True)
    expected = local_outputs(bundle, rereferenced.astype(np.float32))
    # float32 holds an offset of 10 mV to 1 nV
    np.testing.assert_allclose(served(volts), expected, rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="probably not in uV"):
        served(windows)
    with pytest.raises(ServingError, match="windows are in V there and in uV here"):
        client("volts", bundle=bundle)
    with server._client() as (raw, _):
        answer = raw.infer(
            "volts", [raw_input(volts[:1])], outputs=[tritonclient.grpc.InferRequestedOutput("prediction", class_count=1)]
        )
    _, index, label = answer.as_numpy("prediction")[0][0].decode().split(":")
    assert (label, int(index)) == (("left", "right", "rest")[expected[0].argmax()], expected[0].argmax())


def test_a_static_batch(client, make_bundle):
    bundle = make_bundle("prelocal", max_batch=3, static_batch=3)
    windows = windows_of(bundle.spec, 0, 3)
    served = client("static", bundle=bundle)
    assert_same(served(windows), local_outputs(make_bundle("prelocal"), windows))
    with pytest.raises(InputError, match="unexpected shape"):
        served(windows[:1])


# ---------------------------------------------------------------- subjects beside each other


@pytest.mark.parametrize(("model", "bitwise"), [("alone", True), ("contextual", False)])
def test_interleaved_subjects_get_what_they_get_alone(server, client, make_bundle, model, bitwise):
    n_windows, n_runs = windows_and_runs(server, model)
    subjects = [Subject(client(model), number) for number in range(6)]
    for subject in subjects:
        subject.start()
    for subject in subjects:
        subject.wait_for(60 - len(subject.outcomes))
    for subject in subjects:
        subject.stop()
    n_windows, n_runs = np.subtract(windows_and_runs(server, model), (n_windows, n_runs))
    assert n_windows >= 360
    assert n_runs == n_windows if bitwise else n_runs < n_windows
    for subject in subjects:
        assert all(isinstance(outcome, Answer) for outcome in subject.outcomes)
        expected = local_outputs(make_bundle("contextual"), subject.windows)
        for i, answer in enumerate(subject.outcomes):
            if bitwise:
                np.testing.assert_array_equal(answer.output[0], expected[i % len(expected)])
            else:
                assert_same(answer.output[0], expected[i % len(expected)])


@pytest.mark.alone
def test_a_version_is_unloaded_and_reloaded_under_load(server, client, make_bundle):
    """Nothing is lost or wrong: each answer is that of the bundle behind the version which it names."""
    bundles = {"1": make_bundle("postlocal"), "2": make_bundle("postlocal", model_seed=1)}
    for version, bundle in bundles.items():
        added = to_triton(bundle, server.repository, name="reloaded", deadline=10.0, instances=1)
        answer_soon(server.repository)
        assert added.version == version
        if version == "1":
            server.load("reloaded")
    pinned = client("reloaded", bundle=bundles["1"])
    subjects = [Subject(client("reloaded"), number) for number in range(4)]
    for subject in subjects:
        subject.start()
    subjects[0].wait_for(30)
    server.load("reloaded")
    subjects[0].wait_for(30)
    server.unload("reloaded")
    server.load("reloaded")
    for subject in subjects:
        subject.wait_for(30)
        subject.stop()
    for subject in subjects:
        assert {answer.version for answer in subject.outcomes} == {"1", "2"}
        expected = {version: local_outputs(bundle, subject.windows) for version, bundle in bundles.items()}
        for i, answer in enumerate(subject.outcomes):
            assert_same(answer.output[0], expected[answer.version][i % len(subject.windows)])
        assert subject.client.manifest == bundles["2"].manifest
    with pytest.raises(ServingError, match="serves another bundle"):
        pinned.infer(subjects[0].window(0))


def test_another_montage_is_no_new_version(server, make_bundle):
    with pytest.raises(sjepa_deploy.SjepaError, match="with another montage"):
        to_triton(make_bundle("prelocal", sfreq=250.0), server.repository, name="postlocal", deadline=10.0)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_killed_server_comes_back(mortal, client, make_bundle, shared_memory):
    """Every window has one outcome, nothing is sent twice that may have been decoded, and subjects keep their answers."""
    noted = mortal.repository / "counted" / "1" / "carried_out"
    noted.unlink(missing_ok=True)
    subjects = [Subject(client("counted", mortal, timeout=1.0, shared_memory=shared_memory), number) for number in range(4)]
    for subject in subjects:
        subject.start()
    for subject in subjects:
        subject.wait_for(10)
    mortal.kill()
    before = [len(subject.outcomes) for subject in subjects]
    subjects[0].wait_for(1)
    mortal.start()
    for subject in subjects:
        subject.wait_for(20)
    for subject in subjects:
        subject.stop()
    carried_out = noted.read_text().split()
    assert len(carried_out) == len(set(carried_out)), "by both servers together, no window was decoded twice"
    answers, n_open = set(), 0
    for subject, n_before in zip(subjects, before, strict=True):
        expected = local_outputs(make_bundle("contextual"), subject.windows)
        lost = [outcome for outcome in subject.outcomes if not isinstance(outcome, Answer)]
        assert lost
        assert all(isinstance(error, NO_ANSWER) for error in lost), lost
        assert any(isinstance(outcome, Answer) for outcome in subject.outcomes[n_before + 1 :])
        for i, outcome in enumerate(subject.outcomes):
            if isinstance(outcome, Answer):
                assert_same(outcome.output[0], expected[i % len(expected)])
                assert outcome.attempts == 1 or i > n_before
                answers.add(outcome.request_id)
        n_open += sum(isinstance(outcome, UnansweredError) for outcome in subject.outcomes)
    assert answers <= set(carried_out)
    assert len(set(carried_out) - answers) <= n_open, "what was decoded without an answer was reported as open"


@pytest.mark.alone
def test_a_window_that_a_killed_server_had_is_sent_again_on_request(mortal, client, make_bundle):
    window = windows_of(make_bundle("prelocal").spec, 0, 1)
    careful, eager = client("slow", mortal, timeout=60.0), client("slow", mortal, timeout=60.0, resend_unanswered=True)
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(outcome_of, each, window) for each in (careful, eager)]
        time.sleep(0.25)  # one is in work, one in the queue
        mortal.kill()
        mortal.start()
        lost, answered = (outcome.result() for outcome in outcomes)
    assert isinstance(lost, UnansweredError), lost
    assert answered.attempts > 1
    np.testing.assert_array_equal(answered.output, local_outputs(make_bundle("prelocal"), window))


@pytest.mark.alone
def test_a_server_that_ends_answers_what_it_has(mortal, client, make_bundle):
    windows = windows_of(make_bundle("prelocal").spec, 0, 3)
    clients = [client("slow", mortal, timeout=60.0) for _ in windows]
    with ThreadPoolExecutor(3) as pool:
        outcomes = [pool.submit(outcome_of, each, windows[i : i + 1]) for i, each in enumerate(clients)]
        time.sleep(0.25)  # one is in work, two in the queue
        mortal.stop()
        answers = [outcome.result() for outcome in outcomes]
    mortal.start()
    np.testing.assert_array_equal([answer.output[0] for answer in answers], local_outputs(make_bundle("prelocal"), windows))


def test_a_live_stream_goes_on_when_its_server_was_killed(mortal, make_bundle):
    """Each window is decided as here, or is counted and reported."""
    bundle = make_bundle("contextual")
    samples = eeg(1000)
    with sjepa_deploy.load(bundle, n_threads=1, check_unit=False) as predict:
        _, expected, _ = decode_samples(predict, samples, late="queue")
    stop_at, start_at = 30, 32
    address = f"triton:{mortal.endpoints['grpc']}/alone"
    with sjepa_deploy.load(bundle, backend=address, check_unit=False) as predict:
        source = ScriptedSource(info_of(predict.spec), chunks_of(samples, np.arange(1000) / 100.0))
        decoder = Decoder(predict, source, StreamConfig(late="queue"))
        incidents, decisions = [], []
        decoder.on_incident(incidents.append)
        # Not by incidents: equal ones are told once a minute.
        decoder.on_chunk(lambda _: mortal.process or decoder.counters.failed < start_at - stop_at or mortal.start())
        for decision in decoder:
            decisions.append(decision)
            if decision.index == stop_at:
                mortal.kill()
    assert_accounted(decoder.counters, decisions)
    lost = {d.index for d in expected} - {d.index for d in decisions}
    assert lost == set(range(stop_at + 1, start_at + 1))
    again = [re.search(r"happened (\d+) more time", incident.text) for incident in incidents if incident.kind == "unanswered"]
    assert decoder.counters.failed == len(lost) == sum(int(more[1]) if more else 1 for more in again)
    wanted = predictions(expected)
    assert all(wanted[index] == prediction for index, prediction in predictions(decisions).items())


def test_stream_and_check_with_a_server(server, make_bundle, tmp_path):
    bundle = make_bundle("prelocal")
    decided = {}
    for backend in ("ort-cpu", f"triton:{server.endpoints['grpc']}/prelocal"):
        lines = tmp_path / f"{len(decided)}.jsonl"
        options = f"--source synthetic --speed inf --duration 20 --late queue --quiet --backend {backend} --out {lines}"
        assert run_command(stream, "sjepa-stream", [str(bundle.path), *options.split()]) == 0
        written = [json.loads(line) for line in lines.read_text().splitlines()]
        decided[backend] = np.array([line["prediction"] for line in written if "prediction" in line])
    here, there = decided.values()
    assert len(here) == len(there) > 180
    assert_same(there, here)


def test_steps_on_windows_run_in_the_model(server, client, make_bundle):
    bundle = make_bundle("prelocal", steps=STEPS)
    served = client("steps")
    assert served.contract.client_steps == ("band-pass", "resample", "channels", "reference")
    assert served.contract.model_steps == ("z-score",)
    windows = windows_of(bundle.spec, 0, 3)
    finished = ((windows - windows.mean(axis=2, keepdims=True)) / windows.std(axis=2, keepdims=True)).astype(np.float32)
    expected = local_outputs(bundle, finished)
    assert_same(served(windows), expected)
    assert_same(served.infer(finished, n_steps=len(STEPS)).output, expected)
    with sjepa_deploy.load(bundle, backend=f"triton:{server.endpoints['grpc']}/steps") as predict:
        assert_same(predict(finished), expected)  # a backend takes windows after all steps, wherever it computes
    with pytest.raises(InputError, match="went through 3 steps"):
        served.infer(windows, n_steps=3)
    with pytest.raises(ServingError, match="steps is "):
        client("steps", spec=bundle.spec.replace(steps=STEPS[:-1]))


def test_a_stream_leaves_the_steps_on_windows_to_the_model(server, make_bundle, monkeypatch):
    bundle = make_bundle("prelocal", steps=STEPS)
    decided = []
    for backend in ("ort-cpu", f"triton:{server.endpoints['grpc']}/steps"):
        if decided:
            monkeypatch.setattr(calls, "finish_windows", None)  # they would be done twice
        with sjepa_deploy.load(bundle, backend=backend) as predict:
            decoder = Decoder(
                predict, synthetic_source(bundle.spec.signal, speed=float("inf"), n_samples=600), StreamConfig(late="queue")
            )
            decided.append(np.array([decision.prediction for decision in decoder]))
    here, there = decided
    assert len(here) == len(there) > 20
    assert_same(there, here)


# ---------------------------------------------------------------- deadlines and queues


@pytest.mark.alone
def test_a_late_answer_is_reported_and_never_taken_for_another(client, make_bundle):
    bundle = make_bundle("prelocal")
    windows = windows_of(bundle.spec, 0, 2)
    expected = local_outputs(bundle, windows)
    for shared_memory in (False, True):
        served = client("slow", shared_memory=shared_memory)
        served.infer(windows[:1])
        with pytest.raises(NO_ANSWER, match="may have decoded it|refused a request"):
            served.infer(windows[:1], timeout=0.2)
        np.testing.assert_array_equal(served.infer(windows[1:]).output, expected[1:])


@pytest.mark.alone
def test_a_full_queue_refuses_and_a_late_request_is_dropped(client, make_bundle):
    bundle = make_bundle("prelocal")
    windows = windows_of(bundle.spec, 0, 8)
    expected = local_outputs(bundle, windows)
    clients = [client("slow") for _ in windows]
    with ThreadPoolExecutor(len(windows)) as pool:
        outcomes = list(pool.map(lambda i: outcome_of(clients[i], windows[i : i + 1]), range(len(windows))))
    refused = [outcome for outcome in outcomes if isinstance(outcome, RefusedError)]
    assert refused
    assert all("Exceeds maximum queue size" in str(error) for error in refused)
    answered = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Answer)]
    assert len(answered) + len(refused) == len(windows)
    for i in answered:
        np.testing.assert_array_equal(outcomes[i].output[0], expected[i])
    assert all(answer.attempts == 1 for answer in map(outcomes.__getitem__, answered))


def outcome_of(served, window):
    try:
        return served.infer(window)
    except ServingError as e:
        return e


# ---------------------------------------------------------------- bad input


def raw_input(eeg, name="eeg", datatype="FP32"):
    tensor = tritonclient.grpc.InferInput(name, eeg.shape, datatype)
    tensor.set_data_from_numpy(eeg)
    return tensor


def test_bad_requests_get_their_codes(server):
    good = windows_of(small_spec("prelocal"), 0, 5)
    nan = good[:1].copy()
    nan[0, 3, 7] = np.nan
    with server._client() as (raw, error):
        for asked, status, says in (
            (("prelocal", raw_input(good[:1, :7])), "INVALID_ARGUMENT", "unexpected shape"),
            (("prelocal", raw_input(good[0])), "INVALID_ARGUMENT", "batch-size must be <= 4"),
            (("prelocal", raw_input(good[:1].astype(np.float64), datatype="FP64")), "INVALID_ARGUMENT", "data-type"),
            (("prelocal", raw_input(good[:1], name="meg")), "INVALID_ARGUMENT", "meg"),
            (("prelocal", raw_input(good)), "INVALID_ARGUMENT", "batch-size must be <= 4"),
            (("prelocal", raw_input(nan)), "INVALID_ARGUMENT", "A window holds 1 samples that are NaN or infinite"),
            (("prelocal", raw_input(good[:1] / 1e6)), "INVALID_ARGUMENT", "probably not in uV"),
            (("volts", raw_input(nan / 1e6)), "INVALID_ARGUMENT", "A window holds"),
            (("nothing", raw_input(good[:1])), "NOT_FOUND", "unknown model"),
        ):
            with pytest.raises(error) as raised:
                raw.infer(asked[0], [asked[1]])
            assert raised.value.status() == f"StatusCode.{status}", says
            assert says in raised.value.message()


@pytest.mark.parametrize(
    "wrong", [lambda x: x[0], lambda x: x[:0], lambda x: x[:, :7], lambda x: x[..., :100], lambda x: x.astype(np.float64)]
)
def test_a_client_says_what_is_wrong_with_an_array_before_it_sends_it(server, client, wrong):
    served = client("prelocal")
    before = windows_and_runs(server, "prelocal")
    with pytest.raises(InputError, match=r"takes no .* Send float32 of shape \(batch, 8, 200\)"):
        served(wrong(windows_of(served.spec, 0, 1)))
    assert windows_and_runs(server, "prelocal") == before


def test_one_bad_request_does_not_spoil_its_batch(server, client, make_bundle):
    """Good and bad requests at once, from many threads, so that they meet in batches."""
    bundle = make_bundle("contextual")
    good = windows_of(bundle.spec, 0, 1)
    expected = local_outputs(bundle, good)
    clients = [client("contextual") for _ in range(8)]

    def ask(i):
        window = good * np.float32(np.nan if i % 2 else 1)
        for _ in range(20):
            if i % 2:
                with pytest.raises(InputError, match="NaN or infinite"):
                    clients[i](window)
            else:
                assert_same(clients[i](window), expected)

    n_windows, n_runs = windows_and_runs(server, "contextual")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    n_windows, n_runs = np.subtract(windows_and_runs(server, "contextual"), (n_windows, n_runs))
    assert n_runs < n_windows


def test_a_request_of_no_windows_costs_those_of_its_batch_an_attempt(server, client, make_bundle):
    """Triton drops the whole batch; our client knows that nothing was decoded and sends again."""
    to_triton(make_bundle("prelocal"), server.repository, name="waits", deadline=2.0, instances=1)  # long enough to form batches
    server.load("waits")
    window = windows_of(make_bundle("prelocal").spec, 0, 1)
    nothing = service_pb2.ModelInferRequest(model_name="waits")
    nothing.inputs.add(name="eeg", datatype="FP32", shape=(0, *window.shape[1:]))
    nothing.raw_input_contents.append(window.tobytes())
    clients = [client("waits") for _ in range(8)]
    with grpc.insecure_channel(server.endpoints["grpc"]) as channel, ThreadPoolExecutor(8) as pool:
        spoil = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answers = []
        for _ in range(500):  # until a batch has both: on an idle server most requests find nobody to share one with
            if any(isinstance(answer, Answer) and answer.attempts > 1 for answer in answers):
                break
            spoiling = [spoil.future(nothing.SerializeToString(), timeout=60) for _ in range(8)]
            answers += pool.map(lambda each: outcome_of(each, window), clients)
            assert {each.code() for each in spoiling} <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}
    expected = local_outputs(make_bundle("prelocal"), window)
    assert all(isinstance(answer, Answer) for answer in answers), answers
    for answer in answers:
        assert_same(answer.output, expected)
    assert any(answer.attempts > 1 for answer in answers)


N_FUZZED = 10_000


@pytest.mark.alone
def test_ten_thousand_malformed_requests(server, client, make_bundle):
    """The server lives, says why it refuses, gives no answer but the right one, and serves another subject meanwhile."""
    bundle = make_bundle("prelocal")
    bystanders = {name: Subject(client(name), i) for i, name in enumerate(("prelocal", "contextual"))}
    for bystander in bystanders.values():
        bystander.start()
    try:
        with sjepa_deploy.load(bundle, check_unit=False, non_finite="pass") as predict:
            codes = fuzz_grpc(server, predict, N_FUZZED - 1000)
        statuses = fuzz_http(server, 1000)
        for bystander in bystanders.values():
            bystander.wait_for(10)
    finally:
        for bystander in bystanders.values():
            bystander.stop()
    assert server.ready()
    assert server.process.poll() is None
    for name, bystander in bystanders.items():
        expected = local_outputs(make_bundle(name), bystander.windows)
        for i, answer in enumerate(bystander.outcomes):
            assert isinstance(answer, Answer), answer
            assert_same(answer.output[0], expected[i % len(expected)])
    assert sum(codes.values()) + sum(statuses.values()) - codes[grpc.StatusCode.OK] - statuses[200] >= N_FUZZED
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > N_FUZZED / 4
    allowed = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED")
    assert {code.name for code in codes} <= set(allowed), codes
    assert set(statuses) <= {200, 400, 404, 405, 500}, statuses


def fuzz_grpc(server, predict, n):
    """Send such requests until `n` were refused, and count the codes. What is answered must be answered rightly."""
    rng = random.Random(0)
    good = windows_of(predict.spec, 0, 1)
    codes, in_flight = Counter(), []
    with grpc.insecure_channel(server.endpoints["grpc"]) as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def collect(request, future):
            code = future.code()
            codes[code] += 1
            if code is grpc.StatusCode.OK:
                sent, answer = service_pb2.ModelInferRequest.FromString(request), service_pb2.ModelInferResponse()
                answer.ParseFromString(future.result())
                eeg = np.frombuffer(sent.raw_input_contents[0], np.float32).reshape(-1, *predict.spec.input_shape)
                output = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, *predict.spec.output_shape)
                assert answer.id == sent.id.partition("\0")[0]
                np.testing.assert_allclose(output, predict(eeg), rtol=1e-4, atol=1e-4)
            else:
                assert future.details()

        for i in itertools.count():
            if codes.total() - codes[grpc.StatusCode.OK] >= n:
                break
            request = malformed(rng, good, i)
            in_flight.append((request, send.future(request, timeout=60)))
            if len(in_flight) >= 64:
                collect(*in_flight.pop(0))
        for each in in_flight:
            collect(*each)
    return codes


def malformed(rng, good, i) -> bytes:
    """Return a request with one thing wrong, or its bytes with some flipped, cut or repeated."""
    request = service_pb2.ModelInferRequest(model_name="prelocal", id=f"fuzz {i}")
    tensor = request.inputs.add(name="eeg", datatype="FP32", shape=good.shape)
    request.raw_input_contents.append(good.tobytes())
    request.parameters["sjepa_checked"].bool_param = rng.random() < 0.5
    odd = rng.choice([-1, 0, 1, 3, 7, 2**31, 2**62, -(2**63)])
    mutations = (
        lambda: tensor.shape.__setitem__(rng.randrange(3), odd),
        lambda: tensor.shape.append(odd),
        lambda: tensor.ClearField("shape"),
        lambda: setattr(tensor, "datatype", rng.choice(["FP64", "FP16", "BYTES", "INT8", "", "fp32", "\u00e9" * 99])),
        lambda: setattr(tensor, "name", rng.choice(["", "EEG", "x" * 4096, "eeg\0"])),
        lambda: setattr(request, "model_name", rng.choice(["", "..", "../prelocal", "prelocal ", "x" * 4096])),
        lambda: setattr(request, "model_version", rng.choice(["0", "-1", "99", "one", "1.0", "9" * 40])),
        lambda: request.raw_input_contents.__setitem__(0, good.tobytes()[: rng.randrange(good.nbytes)]),
        lambda: request.raw_input_contents.__setitem__(0, good.tobytes() * 2),
        lambda: request.raw_input_contents.__setitem__(0, rng.randbytes(good.nbytes)),
        lambda: request.raw_input_contents.append(b"more"),
        lambda: request.ClearField("raw_input_contents"),
        lambda: request.ClearField("inputs"),
        lambda: request.inputs.append(tensor),
        lambda: request.outputs.add(name=rng.choice(["", "nothing", "eeg"])),
        lambda: setattr(request.parameters["timeout"], "int64_param", odd),
        lambda: setattr(request.parameters["priority"], "string_param", "high"),
        lambda: setattr(request.parameters["sequence_id"], "int64_param", odd),
        lambda: setattr(request.parameters["sjepa_contract"], "int64_param", odd),
        lambda: setattr(request.parameters["sjepa_bundle"], "string_param", "0" * 64),
        lambda: setattr(tensor.parameters["shared_memory_region"], "string_param", rng.choice(["", "none", "/etc/passwd"])),
        lambda: setattr(tensor.parameters["binary_data_size"], "int64_param", odd),
        lambda: tensor.contents.fp32_contents.extend([1.0] * 5),
    )
    if rng.random() < 0.75:
        rng.choice(mutations)()
        return request.SerializeToString()
    content = bytearray(request.SerializeToString())
    head = min(200, len(content))  # the fields; the rest is EEG
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(head)] = rng.randrange(256)
    return bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])


def fuzz_http(server, n):
    """Send JSON that is none, or the wrong one, until `n` were refused, and count the statuses."""
    rng = random.Random(1)
    connection = http.client.HTTPConnection(server.host, server.http_port, timeout=60)
    good = {"inputs": [{"name": "eeg", "datatype": "FP32", "shape": [1, 8, 200], "data": [1.0]}]}
    statuses = Counter()
    while statuses.total() - statuses[200] < n:
        body = bytearray(json.dumps(good).encode())
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        path = rng.choice(
            ["/v2/models/prelocal/infer", "/v2/models/nothing/infer", "/v2/models/prelocal/versions/x/infer", "/v2/x"]
        )
        headers = {"Inference-Header-Content-Length": str(rng.choice([-1, 0, 5, 10**12]))} if rng.random() < 0.2 else {}
        connection.request(rng.choice(["POST", "POST", "GET"]), path, bytes(body), headers)
        response = connection.getresponse()
        response.read()
        statuses[response.status] += 1
    connection.close()
    return statuses


# ---------------------------------------------------------------- the life of a server


def test_the_server_has_the_metrics_that_the_autoscaler_needs(server, client):
    served = client("slow", timeout=0.2)
    with pytest.raises(NO_ANSWER):
        served(windows_of(served.spec, 0, 1))
    text = urlopen(server.endpoints["metrics"], timeout=20).read().decode()
    query = (Path(__file__).parents[1] / "deploy" / "prometheus-adapter.yaml").read_text()
    wanted = set(re.findall(r"nv_\w+", query)) | {"nv_inference_compute_infer_duration_us", "nv_inference_pending_request_count"}
    assert {"nv_inference_queue_duration_us", "nv_inference_request_failure"} <= wanted
    for metric in wanted:
        assert re.search(rf'{metric}{{[^}}]*model="slow"', text), metric
    assert re.search(r'nv_inference_request_failure{[^}]*reason="REJECTED"', text)


def test_a_repository_that_does_not_load_is_an_error_that_says_why(server, make_bundle, tmp_path):
    to_triton(make_bundle("prelocal"), tmp_path / "repository", name="broken", deadline=10.0)
    (tmp_path / "repository" / "broken" / "1" / "bundle" / "model.fp32.onnx").write_bytes(b"")
    broken = Server(tmp_path / "repository")
    with pytest.raises(ServingError, match="model.fp32.onnx of the bundle .* was changed after it was written"):
        broken.start()
    broken.close()


def test_a_server_dies_with_the_process_that_started_it(server, make_bundle, tmp_path):
    to_triton(make_bundle("prelocal"), tmp_path / "repository", name="prelocal", deadline=10.0, instances=1)
    code = (
        "import sys, time, pathlib; from sjepa_deploy.serving import Server\n"
        "server = Server(pathlib.Path(sys.argv[1])).start(); print(server.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "repository")], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 60
    while group_lives(pid):
        assert time.monotonic() < ends, "the server lives on"
        time.sleep(0.1)


def group_lives(pid: int) -> bool:
    """Whether a process of the group `pid` runs; zombies, which nobody may wait for here, do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pid and state != "Z":
            return True
    return False


def test_serve_reloads_a_bundle_that_is_exported_again(server, make_bundle, tmp_path):
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "bundle")
    command = [
        Path(sys.executable).parent / "sjepa-serve",
        path,
        "--json",
        "--deadline",
        "10",
        "--instances",
        "1",
        "--name",
        "live",
    ]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(serving.stdout.readline())
            assert lines[-1], serving.stderr.read()
        address = f"{json.loads(''.join(lines))['endpoints']['grpc']}/live"
        with Client(address, timeout=20.0) as served:
            window = windows_of(served.spec, 0, 1)
            assert served.infer(window).version == "1"
            export_small(path, small_spec("prelocal"), model_seed=1, force=True)
            ends = time.monotonic() + 60
            while (answer := served.infer(window)).version == "1":
                assert time.monotonic() < ends
                time.sleep(0.05)
            assert_same(answer.output, local_outputs(sjepa_deploy.Bundle.open(path), window))
        serving.send_signal(signal.SIGTERM)
        _, said = serving.communicate(timeout=60)
        assert serving.returncode == 0
        assert "live: version 2 is loaded" in said
    finally:
        serving.kill()
        serving.wait()


def test_a_closed_client_says_so_and_a_second_thread_is_refused(client, make_bundle):
    opened = client("prelocal", bundle=make_bundle("prelocal"))
    windows = np.zeros((1, *opened.spec.input_shape), np.float32)
    assert opened.run(windows).shape == (1, *opened.spec.output_shape)
    opened._turn.begin()
    with pytest.raises(BackendError, match="Two threads"):
        opened.run(windows)
    opened._turn.end()
    assert opened.run(windows).shape == (1, *opened.spec.output_shape)
    for _ in range(2):
        opened.close()
        with pytest.raises(BackendError, match="was closed"):
            opened.run(windows)
