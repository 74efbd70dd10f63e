"""What is recorded can be decoded again, whatever happened to the process that recorded it."""

import dataclasses
import errno
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import pyxdf
from streams import ScriptedSource, chunks_of, eeg, info_of, predictions, run_stream

import sjepa_deploy
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import RecordingError, StreamError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lines import write_lines
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import EVENT_FIELDS, RunDescription, read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.spec import Preprocessing

CODE = "import sys; sys.argv[0] = 'sjepa-stream'; from sjepa_deploy.cli.stream import main; main()"


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


def recorded(predict, path, source, **config):
    """Return a decoder of a source and its recorder."""
    decoder = Decoder(predict, source, StreamConfig(**config))
    return decoder, record(decoder, path)


@pytest.fixture
def eventful(predict):
    """Return a source with a gap, a restart, NaN and chunks of many sizes."""
    samples = eeg(1500).astype(np.float32)
    samples[1000:1004, 2] = np.nan
    keep = np.r_[0:500, 720:1500]
    stamps = keep / 100.0 + 12_345.678
    chunks = chunks_of(samples[keep], stamps, 7, restarted_at=(900,))
    return ScriptedSource(info_of(predict.spec), chunks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32])
def test_samples_stamps_and_decisions_come_back_to_the_bit(predict, tmp_path, dtype):
    samples = (eeg(500) * 10).astype(dtype)
    stamps = np.arange(500) / 100 + 98_765.4321
    decoder, recorder = recorded(
        predict, tmp_path / "run.xdf", ScriptedSource(info_of(predict.spec), chunks_of(samples, stamps, 9))
    )
    decisions = list(decoder)
    recorder.close()
    recording = read_record(tmp_path / "run.xdf")
    assert np.concatenate([chunk.samples for chunk in recording.chunks]).tobytes() == samples.tobytes()
    assert np.concatenate([chunk.stamps for chunk in recording.chunks]).tobytes() == stamps.tobytes()
    assert [len(chunk.stamps) for chunk in recording.chunks] == [9] * 55 + [5]
    assert {i: prediction.tobytes() for i, prediction in recording.decisions.items()} == predictions(decisions)
    assert recording.run == RunDescription(
        stream=decoder.source.info,
        config=decoder.config,
        bundle=str(predict.bundle.path),
        bundle_digest=predict.bundle.manifest.digest,
        run_id=decoder.run_id,
        backend="ort-cpu",
        precision="fp32",
        version=sjepa_deploy.__version__,
        event_fields=EVENT_FIELDS,
    )


def test_replay_gives_the_same_decisions_through_gaps_and_restarts(predict, eventful, tmp_path, capsys):
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", eventful, bad_channels="repair", late="queue")
    decisions = list(decoder)
    recorder.close()
    assert {"gap", "interruption", "channel"} <= {incident.kind for incident in read_record(tmp_path / "run.xdf").incidents}
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "run.xdf", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_decisions"], result["n_differ"], result["n_missing"]) == (len(decisions), 0, 0)


def test_a_replay_tells_which_windows_differ(predict, eventful, tmp_path):
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", eventful)
    for decision in decoder:
        if decision.index in (10, 12):
            decision.prediction[1] += 1e-6
    recorder.close()
    recording = read_record(tmp_path / "run.xdf")
    result = replay(predict, recording)
    assert (result.differ, result.missing, result.passed) == ((10, 12), (), False)
    assert (result.n_decisions, result.n_samples) == (decoder.counters.decisions, decoder.counters.samples)
    assert (result.record, result.backend, result.precision) == (str(tmp_path / "run.xdf"), "ort-cpu", "fp32")
    whole = dataclasses.replace(recording, chunks=recording.chunks[:-1])
    assert replay(predict, whole).missing == (max(recording.decisions),)


def test_decisions_whose_samples_a_kill_cut_off_are_told_and_no_difference(predict, eventful, tmp_path, capsys):
    """A kill between the write of a decision and the write of its samples: what is in the record came again to the bit."""
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", eventful, late="queue")
    recorder._stop.set()  # nothing is written until the end
    recorder._thread.join()
    decisions = list(decoder)
    recorder._chunks.pop()
    recorder.close()
    recording = read_record(tmp_path / "run.xdf")
    assert (recording.n_cut_off, len(recording.decisions)) == (1, len(decisions) - 1)
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "run.xdf", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) | {"n_differ": 0, "n_missing": 0, "n_cut_off": 1} == json.loads(told.out)
    assert "1 more decision" in told.err


def test_a_decision_is_written_after_its_samples(predict, tmp_path):
    """Whenever the process is killed, also between a decision and its chunk, every decision in the file has its samples."""
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(600), np.arange(600) / 100))
    path = tmp_path / "run.xdf"
    decoder, recorder = recorded(predict, path, source)
    recorder._stop.set()
    recorder._hurry.set()
    recorder._thread.join()
    n_read = []

    def flush_and_read(decision):
        """As if the recorder's thread wrote at this very moment, and the process died then."""
        recorder._flush()
        if decision.index:
            recording = read_record(path)
            n_read.append(len(recording.decisions))
            assert recording.n_cut_off == 0

    decoder.on_decision(flush_and_read)
    decisions = list(decoder)
    recorder.close()
    assert n_read == list(range(1, len(decisions)))
    assert len(read_record(path).decisions) == len(decisions)


def test_replay_finds_a_difference(predict, make_bundle, eventful, tmp_path, capsys):
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", eventful)
    for decision in decoder:
        if decision.index == 10:
            decision.prediction[1] += 1e-6
    recorder.close()
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "run.xdf") == 1
    assert "differs from window 10 on" in capsys.readouterr().err
    other = make_bundle("prelocal", model_seed=1).path
    assert run_stream(other, "--replay", tmp_path / "run.xdf") == 2
    assert "was decoded with another bundle" in capsys.readouterr().err


def test_mne_reads_the_samples(predict, tmp_path):
    samples = eeg(500).astype(np.float32)
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples, np.arange(500) / 100))
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", source)
    decoder.run()
    recorder.close()
    raw = read_recording(tmp_path / "run.xdf")
    assert tuple(raw.ch_names) == predict.spec.ch_names
    assert raw.info["sfreq"] == 100
    np.testing.assert_allclose(raw.get_data(), samples.T * 1e-6, rtol=1e-6)


@pytest.mark.parametrize("end", ["whole", "killed", "killed in the middle of a write"])
def test_sjepa_run_decodes_what_the_live_path_decoded(make_bundle, tmp_path, capsys, end):
    """Through losses, restarts, samples that came again and steps of the clock's correction; every window of both is compared."""
    preprocessing = Preprocessing(reference="none", l_freq=None, h_freq=None)  # live filters are causal
    order = np.r_[0:500, 501:700, 720:900, 880:900, 900:1400, 1700:2500]
    samples = eeg(2500).astype(np.float32)[order]
    own = order / 100 + 5_000.0
    chunks = []
    for start in range(0, len(order), 7):
        correction = 40.0 + 0.0005 * (start // 70 % 3)
        stamps = own[start : start + 7] + correction
        chunks.append(Chunk(samples[start : start + 7], stamps, float(stamps.max()), start == 700, correction))
    path = tmp_path / "run.xdf"
    with sjepa_deploy.load(make_bundle("prelocal", preprocessing=preprocessing).path, check_unit=False) as predict:
        decoder, recorder = recorded(predict, path, ScriptedSource(info_of(predict.spec), chunks), hop=0.0, late="queue")
        live = {decision.time: decision.prediction for decision in decoder}
        recorder.close()
        bundle = predict.bundle.path
    if end != "whole":
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b'<?xml version="1.0"?><info/>') - (15 if end == "killed" else 3000)])
    arguments = [bundle, path, "--hop", 0.01, "--out", tmp_path / "out.tsv"]
    assert run_command(_command("run"), "sjepa-run", [str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "321 samples (3.21 s) are missing in 3 places" in said
    assert "left out 20 samples that came twice" in said
    table = np.loadtxt(tmp_path / "out.tsv", skiprows=1)
    times = np.array(list(live)) - 40.0 - 5_000.0
    found = np.searchsorted(times, table[:, 0] - 0.002)
    np.testing.assert_allclose(times[found], table[:, 0], rtol=0, atol=0.0015)
    np.testing.assert_allclose(np.array(list(live.values()))[found], table[:, 1:], rtol=1e-4, atol=1e-5)
    assert len(table) == len(live) if end != "killed in the middle of a write" else len(table) > len(live) - 60


def test_killed_process_leaves_a_record_up_to_the_last_second(predict, tmp_path):
    path, out = tmp_path / "run.xdf", tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-c",
        CODE,
        predict.bundle.path,
        "--source",
        "synthetic",
        "--record",
        path,
        "--out",
        out,
        "--quiet",
    ]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and (not out.exists() or out.read_text().count('"index"') < 25):
        assert process.poll() is None
        time.sleep(0.05)
    before = read_record(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = json.loads(out.read_text().splitlines()[-1])["time"]
    recording = read_record(path)
    assert newest - max(recording.stamps.values()) < 5.0  # a second, and what a busy machine adds
    assert len(recording.decisions) >= len(before.decisions) >= 1
    assert all(recording.decisions[i].tobytes() == made.tobytes() for i, made in before.decisions.items())
    assert run_stream(predict.bundle.path, "--replay", path) == 0


def test_records_of_runs_that_are_killed_at_random_replay(predict, tmp_path):
    """A few kills; ``python tests/killed_recordings.py 40 BUNDLE FOLDER`` makes as many as wanted."""
    script = Path(__file__).with_name("killed_recordings.py")
    command = [sys.executable, str(script), "4", str(predict.bundle.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["read"] + said["without_a_sample"] == said["kills"] == 4
    assert said["differ"] == said["missing"] == said["cut_off"] == 0
    assert said["decisions"] > 100


@pytest.mark.parametrize("n_bytes", [0, 1, 17, 33, 40, 200])
def test_record_cut_anywhere_in_its_last_chunk_is_read(predict, eventful, tmp_path, n_bytes):
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", eventful)
    decoder.run()
    recorder.close()
    whole = (tmp_path / "run.xdf").read_bytes()
    (tmp_path / "cut.xdf").write_bytes(whole[: len(whole) - n_bytes])
    recording = read_record(tmp_path / "cut.xdf")
    assert len(recording.decisions) > 0
    assert sum(len(chunk.stamps) for chunk in recording.chunks) == decoder.counters.samples


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        taken = bytes(data[: self._room])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= len(taken)
        return self._file.write(taken)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_full_disk_ends_the_record_and_not_the_decoder(predict, tmp_path):
    incidents = []
    samples = eeg(3000)
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples, np.arange(3000) / 100))
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", source)
    decoder.on_incident(incidents.append)
    recorder._file = FullDisk(recorder._file, 150_000)
    for decision in decoder:
        if decision.index % 60 == 59:
            recorder._flush()  # what its thread does every second
    recorder.close()
    assert decoder.counters.decisions == 281
    assert [(incident.kind, incident.text) for incident in incidents] == [("record", "Recording ended: the disk is full.")]
    recording = read_record(tmp_path / "run.xdf")
    n_recorded = sum(len(chunk.stamps) for chunk in recording.chunks)
    assert n_recorded > 0
    assert recorder.n_lost["samples"] == 3000 - n_recorded
    assert recorder.n_lost["decisions"] == 281 - len(recording.decisions)
    np.testing.assert_array_equal(np.concatenate([c.samples for c in recording.chunks]), samples[:n_recorded])


def test_stalled_disk_costs_bounded_memory_and_is_counted(predict, tmp_path):
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(9000), np.arange(9000) / 100))
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", source, hop=0, late="queue")
    recorder._stop.set()  # nothing is written any more
    recorder._thread.join()
    decoder.run()
    assert recorder.n_lost["samples"] == 9000 - 6010
    assert 0 < len(recorder._decisions) < 6010
    assert recorder.n_lost["decisions"] == decoder.counters.decisions - len(recorder._decisions)
    recorder.close()


def test_a_real_disk_that_is_full(predict, tmp_path):
    """The system refuses to let the file grow: the decoder goes on, and the record is whole up to there."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); {CODE}"
    arguments = ["--source", "synthetic", "--speed", "20", "--duration", "120", "--json", "--quiet"]
    command = [sys.executable, "-c", code, predict.bundle.path, *arguments, "--record", tmp_path / "run.xdf"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    summary = json.loads(done.stdout)
    recording = read_record(tmp_path / "run.xdf")
    n_recorded = sum(len(chunk.stamps) for chunk in recording.chunks)
    assert 0 < n_recorded < 12_000
    n_lost = summary["not_written"]["samples in the record"]
    assert n_lost == summary["counters"]["samples"] - n_recorded
    assert f"Not written: {n_lost} samples in the record" in done.stderr
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "run.xdf") == 0


def test_records_are_never_overwritten(predict, tmp_path):
    (tmp_path / "run.xdf").write_bytes(b"precious")
    source = ScriptedSource(info_of(predict.spec), [])
    with pytest.raises(StreamError, match=r"run\.xdf exists"):
        recorded(predict, tmp_path / "run.xdf", source)
    with pytest.raises(StreamError, match="cannot be written"):
        recorded(predict, tmp_path / "nowhere" / "run.xdf", source)
    assert (tmp_path / "run.xdf").read_bytes() == b"precious"


def test_a_run_without_a_sample_leaves_no_record_and_no_lines(predict, tmp_path):
    path, out = tmp_path / "run.xdf", tmp_path / "lines"
    decoder, recorder = recorded(predict, path, ScriptedSource(info_of(predict.spec), []))
    lines = write_lines(decoder, out)
    assert path.exists()
    assert out.exists()
    decoder.run()
    recorder.close()
    lines.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_that_were_there_stay(predict, tmp_path):
    out = tmp_path / "lines"
    out.touch()
    write_lines(Decoder(predict, ScriptedSource(info_of(predict.spec), [])), out).close()
    assert out.exists()


def test_a_start_that_fails_leaves_nothing(predict, tmp_path, capsys):
    """The page's port is taken, or nobody reads a FIFO: the next start finds the place as it was."""
    record_file, out, fifo = tmp_path / "run.xdf", tmp_path / "lines", tmp_path / "fifo"
    os.mkfifo(fifo)
    out.write_text("precious")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        files = ["--record", record_file, "--out", out, "--force", "--quiet"]
        page = ["--dashboard-address", f"127.0.0.1:{port}"]
        assert run_stream(predict.bundle.path, "--source", "synthetic", *files, *page) == 2
    assert f"port {port}" in capsys.readouterr().err
    assert run_stream(predict.bundle.path, "--source", "synthetic", "--record", record_file, "--out", fifo, "--quiet") == 2
    assert "Nobody reads the FIFO" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert not record_file.exists()


def test_a_fifo_that_is_read_gets_the_lines(predict, tmp_path):
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.extend(fifo.read_text().splitlines()))
    reader.start()
    arguments = ["--source", "synthetic", "--speed", "inf", "--duration", "20", "--quiet", "--late", "queue"]
    end = time.monotonic() + 60
    while (status := run_stream(predict.bundle.path, *arguments, "--out", fifo)) == 2 and time.monotonic() < end:
        time.sleep(0.1)  # until the reader has opened it
    reader.join()
    assert status == 0
    assert sum('"index"' in line for line in got) > 150


def test_giving_up_ends_with_the_summary(predict, monkeypatch, capsys):
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(600), np.arange(600) / 100))
    monkeypatch.setattr(type(source), "ended", False)
    monkeypatch.setattr("sjepa_deploy.runtime.live.decoder.open_source", lambda *_: source)
    assert run_stream(predict.bundle.path, "--source", "lsl:amp", "--give-up", "0.5", "--json") == 2
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert summary["counters"]["samples"] == 600
    assert summary["counters"]["decisions"] == 41
    assert "has sent nothing" in summary["error"]
    assert "has sent nothing" in told.err


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_the_run_whole_unless_it_is_ignored(predict, tmp_path, ignored):
    """SIGHUP, with which nohup and a session manager deal differently."""
    path, out = tmp_path / "run.xdf", tmp_path / "out.jsonl"
    code = f"import signal; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'}); {CODE}"
    command = [sys.executable, "-c", code, predict.bundle.path, "--source", "synthetic", "--record", path, "--out", out, "--json"]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and (not out.exists() or out.read_text().count('"index"') < 5):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        summary = json.loads(process.stdout.read())
        assert process.wait(30) == 0
    recording = read_record(path)
    assert len(recording.decisions) == summary["counters"]["decisions"] >= 5
    assert out.read_text().count('"index"') == summary["counters"]["decisions"]


def test_a_terminal_that_is_gone_costs_neither_record_nor_lines(predict, tmp_path):
    """Nobody is left to read a summary, and drawing fails: one line on stderr, and a status that is not 0."""
    path, out = tmp_path / "run.xdf", tmp_path / "out.jsonl"
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {CODE}"  # whatever the tests were started with
    command = [sys.executable, "-c", code, predict.bundle.path, "--source", "synthetic", "--record", path, "--out", out]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [str(part) for part in command], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        os.close(theirs)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and (not out.exists() or out.read_text().count('"index"') < 5):
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 2**16)
        os.close(ours)
        process.send_signal(signal.SIGHUP)  # from the kernel where the terminal is the session's own
        told = process.stderr.read()
        assert process.wait(30) == 2
    assert told.strip().endswith("sjepa-stream: the terminal is gone, nothing more could be told")
    assert len(read_record(path).decisions) == out.read_text().count('"index"') >= 5


def test_pyxdf_reads_a_record_without_a_warning(predict, tmp_path, caplog):
    samples = eeg(1500).astype(np.float32)
    keep = np.r_[0:500, 530:1500]
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples[keep], keep / 100.0 + 12_345.678, 7))
    decoder, recorder = recorded(predict, tmp_path / "run.xdf", source)
    decoder.run()
    recorder._flush()
    recorder.close()
    streams, _ = pyxdf.load_xdf(tmp_path / "run.xdf", dejitter_timestamps=False)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("pyxdf")] == []
    by_name = {stream["info"]["name"][0]: stream for stream in streams}
    np.testing.assert_allclose(by_name["amp"]["time_stamps"], keep / 100.0 + 12_345.678, rtol=0, atol=1e-6)
    assert len(by_name["sjepa decisions"]["time_stamps"]) == decoder.counters.decisions
    pyxdf.load_xdf(tmp_path / "run.xdf")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("pyxdf")] == []


def test_other_files_are_no_records(tmp_path):
    with pytest.raises(RecordingError, match="There is no record"):
        read_record(tmp_path / "nothing.xdf")
    for content in (b"", b"XDF:", b"something else entirely"):
        (tmp_path / "wrong.xdf").write_bytes(content)
        with pytest.raises(RecordingError, match="is no record of sjepa-stream"):
            read_record(tmp_path / "wrong.xdf")


def test_a_reader_that_stalls_costs_bounded_memory_and_its_lines_are_counted(predict):
    code = f"import sjepa_deploy.runtime.live.lines as s; s.MOST_LINES = 500; s.LAST_LINES_S = 0.5; {CODE}"
    arguments = ["--source", "synthetic", "--speed", "20", "--duration", "60", "--hop", "0", "--late", "queue", "--quiet"]
    command = [sys.executable, "-c", code, str(predict.bundle.path), *arguments, "--out", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        told = process.stderr.read()  # until the process ends
        assert process.wait(60) == 2
        lines = process.stdout.read().splitlines()
    n_lost = int(re.search(r"Not written: (\d+) lines", told)[1])
    assert n_lost > 1000
    read = [json.loads(line) for line in lines[:-1]]  # the last may be half
    indices = [line["index"] for line in read if "index" in line]
    assert indices == list(range(len(indices)))


def test_a_recording_is_decoded_no_faster_than_its_lines_and_record_are_written(predict, tmp_path, monkeypatch, capsys):
    from sjepa_deploy.runtime.live import lines, recorder

    monkeypatch.setattr(lines, "MOST_LINES", 10)
    monkeypatch.setattr(recorder, "MOST_PENDING_S", 2.0)
    files = ["--out", tmp_path / "lines", "--record", tmp_path / "run.xdf"]
    arguments = ["--source", "synthetic", "--speed", "inf", "--duration", "120", "--late", "queue", "--json", "--quiet", *files]
    assert run_stream(predict.bundle.path, *arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert not any(summary["not_written"].values())
    n = summary["counters"]["decisions"]
    assert sum('"index"' in line for line in (tmp_path / "lines").read_text().splitlines()) == n > 1000
    recording = read_record(tmp_path / "run.xdf")
    assert len(recording.decisions) == n
    assert sum(len(chunk.stamps) for chunk in recording.chunks) == summary["counters"]["samples"]


def test_wall_clock_that_jumps_changes_nothing(predict, tmp_path, monkeypatch):
    def decoded(name):
        arguments = ["--source", "synthetic", "--speed", "10", "--duration", "15", "--late", "queue", "--quiet"]
        files = ["--record", tmp_path / f"{name}.xdf", "--out", tmp_path / f"{name}.jsonl"]
        assert run_stream(predict.bundle.path, *arguments, *files) == 0
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        return [line for line in lines if "index" in line]

    want = decoded("steady")
    jumps = itertools.cycle([0.0, 1e9, -1e9, 3600.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(jumps) * 1e9))
    jumped = decoded("jumping")
    monkeypatch.undo()
    n = min(len(want), len(jumped))
    assert n > 100
    assert [line["prediction"] for line in jumped[:n]] == [line["prediction"] for line in want[:n]]
    assert all(0 <= line["age"] < 60 for line in jumped)
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "jumping.xdf") == 0


def test_lines_on_a_full_disk_do_not_stop_the_decoder(predict, capsys):
    arguments = ["--source", "synthetic", "--speed", "inf", "--duration", "20", "--out", "/dev/full", "--json"]
    assert run_stream(predict.bundle.path, *arguments) == 2
    told = capsys.readouterr()
    assert "Not written" in told.err
    summary = json.loads(told.out)
    assert summary["not_written"]["lines"] >= summary["counters"]["decisions"] > 150
