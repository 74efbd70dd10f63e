"""What is recorded can be decoded again, whatever happened to the process that recorded it."""

import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from streams import ScriptedSource, chunks_of, eeg, info_of, predictions, run_stream

import sjepa_deploy
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import RecordingError, StreamError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import RunDescription, read_record, record
from sjepa_deploy.runtime.live.replay import replay

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
        backend="ort-cpu",
        precision="fp32",
        version=sjepa_deploy.__version__,
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
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    recording = read_record(tmp_path / "run.xdf")
    n_recorded = sum(len(chunk.stamps) for chunk in recording.chunks)
    assert 0 < n_recorded < 12_000
    assert summary["not_written"]["samples in the record"] == summary["counters"]["samples"] - n_recorded
    assert run_stream(predict.bundle.path, "--replay", tmp_path / "run.xdf") == 0


def test_records_are_never_overwritten(predict, tmp_path):
    (tmp_path / "run.xdf").write_bytes(b"precious")
    source = ScriptedSource(info_of(predict.spec), [])
    with pytest.raises(StreamError, match=r"run\.xdf exists"):
        recorded(predict, tmp_path / "run.xdf", source)
    with pytest.raises(StreamError, match="cannot be written"):
        recorded(predict, tmp_path / "nowhere" / "run.xdf", source)
    assert (tmp_path / "run.xdf").read_bytes() == b"precious"


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
        assert process.wait(60) == 0
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
    assert run_stream(predict.bundle.path, *arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["not_written"]["lines"] >= summary["counters"]["decisions"] > 150
