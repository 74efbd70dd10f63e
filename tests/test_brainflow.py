"""BrainFlow's synthetic and playback boards; stamps by numbers of samples, beside the losses that were planted."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest
from brainflow.board_shim import BoardIds, BoardShim, BrainFlowError
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from streams import assert_accounted, run_stream

import sjepa_deploy
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.continuity import stretches_of
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.brainflow import BrainFlowSource, _info_of, require_board_shim
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counted import CountedStamps
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.spec import EventWindow

NAMES = ("Fz", "C3", "Cz", "C4", "Pz", "Oz", "F3", "F4")
SYNTHETIC = BoardIds.SYNTHETIC_BOARD.value


require_board_shim()  # before the tests ask it for descriptions


@pytest.fixture(scope="module")
def bundle(make_bundle):
    """Return a model of channels that the synthetic board has."""
    montage = read_montage("sjepa-62").pick(NAMES)
    return make_bundle("prelocal", ch_names=montage.ch_names, positions=montage.positions, phase="causal")


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    sfreq=st.sampled_from([125.0, 250.0, 500.0]),
    n_numbers=st.sampled_from([200, 256, 65536]),
    first=st.integers(0, 199),
    step=st.sampled_from([1, 2]),
    rate=st.floats(0.999, 1.001),
    losses=st.lists(st.tuples(st.integers(600, 4400), st.integers(1, 60)), max_size=8, unique_by=lambda loss: loss[0]),
    delay=st.sampled_from(["none", "jitter", "packets", "stall"]),
    back=st.floats(8.01, 10.5),
    size=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_numbers_tell_what_was_lost(sfreq, n_numbers, first, step, rate, losses, delay, back, size, seed):
    """The oracle is what was planted: samples that did not come, and when each was taken. The decoder's verdicts are the same."""
    rng = np.random.default_rng(seed)
    taken = np.arange(5000)
    for at, n in losses:
        taken = taken[(taken < at) | (taken >= at + n)]
    times = taken / (sfreq * rate)
    late = {
        "none": np.zeros(len(times)),
        "jitter": rng.exponential(0.01, len(times)),
        "packets": (np.ceil(times * 12) / 12) - times,
        "stall": np.where((times > 8.0) & (times < back), back - times, 0.0),
    }[delay]
    arrivals = np.maximum.accumulate(times + late)
    numbers = (first + taken) % n_numbers * step
    counted = CountedStamps(sfreq)
    assert counted.begin(numbers[:100].astype(float), arrivals[:100])
    stamps, lost = [], 0
    for start in range(100, len(taken), size):
        stamps.append(counted.stamps(numbers[start : start + size].astype(float), arrivals[start : start + size]))
        lost += counted.lost
    stamps = np.concatenate(stamps)
    assert lost == 5000 - len(taken) - (4999 - taken[-1])
    assert not counted.astray
    np.testing.assert_allclose(stamps[-200:], times[-200:] + np.mean(late[-200:] if delay != "stall" else 0.0), atol=0.04)
    cuts = stretches_of(np.arange(len(stamps))[:, None].astype(float), stamps, sfreq).cuts
    assert [n for _, n in cuts] == [n - 1 for n in np.diff(taken).tolist() if n > 1]


@pytest.mark.parametrize("n_lost", [150, 256, 600])
def test_a_loss_of_about_all_numbers_is_a_break_at_once_and_counted_soon(n_lost):
    """Of a stall as long nothing is lost, but nobody knows at first: both are breaks."""
    taken = np.r_[0:1000, 1000 + n_lost : 3000 + n_lost]
    stalled = np.arange(3000)
    arrivals = stalled / 250.0
    arrivals[1000 : 1000 + n_lost] = arrivals[1000 + n_lost]
    for numbers, came, wanted in ((taken, taken / 250.0, n_lost), (stalled, arrivals, 0)):
        counted, lost, breaks = CountedStamps(250.0), 0, []
        assert counted.begin((numbers[:100] % 256).astype(float), came[:100])
        for start in range(100, 3000, 10):
            rows = slice(start, start + 10)
            stamps = counted.stamps((numbers[rows] % 256).astype(float), came[rows])
            lost += counted.lost
            breaks += [start + row for row in counted.breaks]
        assert lost == wanted
        assert breaks == ([1000] if n_lost > 200 or not wanted else [])
        assert abs(stamps[-1] - came[-1]) < 0.05


def test_numbers_that_do_not_count_samples_are_known():
    """Two samples a packet, one number for all, noise; and numbers that begin anew while the board sends on."""
    counted = CountedStamps(250.0)
    for numbers in (np.repeat(np.arange(50), 2), np.zeros(100), np.random.default_rng(0).integers(0, 9, 100)):
        assert not counted.begin(numbers.astype(float), np.arange(100) / 250.0)
    numbers, times = (np.arange(10_000) % 256).astype(float), np.arange(10_000) / 250.0
    assert counted.begin(numbers[:100], times[:100])
    counted.stamps(numbers[100:], times[100:])
    assert not counted.astray
    for start in range(0, 10_000, 10):  # two numbers a sample now
        counted.stamps(numbers[start : start + 10] * 2 % 256, 40.0 + times[start : start + 10])
    assert counted.astray


def test_every_board_of_brainflow_is_described():
    """The rows are those of BrainFlow's own getters; a board without electrodes, or without their names, is refused."""
    n_named = 0
    for board in BoardIds:
        if board.value < SYNTHETIC:
            continue
        description = BoardShim.get_board_descr(board.value)
        rows = []
        for get in (BoardShim.get_exg_channels, BoardShim.get_eeg_channels):  # EEG alone where there is any
            with contextlib.suppress(BrainFlowError):
                rows = get(board.value)
        names = [f"E{i}" for i in range(len(rows))]
        if not rows:
            with pytest.raises(StreamError, match="no electrode"):
                _info_of(description, None, None, ())
            continue
        info = _info_of(description, None, names, ())
        assert info.ch_names == (*names, "marker")
        assert info.sfreq == BoardShim.get_sampling_rate(board.value)
        if description.get("eeg_names"):
            assert _info_of(description, None, None, ()).ch_names[:-1] == tuple(BoardShim.get_eeg_names(board.value))
            n_named += 1
        else:
            with pytest.raises(StreamError, match="--channels"):
                _info_of(description, None, None, ())
    assert n_named > 10


def test_inserted_markers_are_decided_on_the_synthetic_board(bundle, tmp_path):
    """Every marker gets the decision of the window that is cut from the record at the marker's sample, to the bit."""
    window = EventWindow(start=0.0)
    path = tmp_path / "run.xdf"
    with Decoder.open(
        bundle, "brainflow:synthetic", StreamConfig(late="queue"), schedule=Events(start=0.0), markers=["board"]
    ) as decoder:
        recorder, incidents, values = record(decoder, path), [], itertools.count(1)
        decoder.on_incident(incidents.append)
        decoder.stop_after(10.0)

        def insert():
            while not stopped.wait(0.7):
                for _ in range(2):  # next to each other
                    decoder.source.insert_marker(next(values))

        stopped, inserting = threading.Event(), threading.Thread(target=insert)
        inserting.start()
        try:
            decisions = list(decoder)
        finally:
            stopped.set()
            inserting.join()
            recorder.close()
    counters = decoder.counters
    assert_accounted(counters, decisions)
    assert counters.samples_lost == 0
    assert abs(counters.samples - 2500) < 50
    assert {incident.kind for incident in incidents} <= {"flushed", "deadline"}
    numbers = [int(decision.event.description) for decision in decisions]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 18
    assert all(decision.event.marker_delay < 0.5 for decision in decisions)
    signal = dataclasses.replace(bundle.manifest.spec.signal, event_window=window)
    cut = prepare(read_recording(path), signal, check_unit=False)
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        for decision, eeg in zip(decisions, cut.eeg, strict=True):
            assert decision.prediction.tobytes() == predict(eeg[None])[0].tobytes()
        assert replay(predict, read_record(path)).passed


def test_a_playback_file_with_losses(bundle, tmp_path):
    """Samples come as they are in the file, and each loss is found with its size."""
    description = BoardShim.get_board_descr(SYNTHETIC)
    table = np.zeros((750, description["num_rows"]))
    rows = description["eeg_channels"]
    table[:, rows] = np.cumsum(np.random.default_rng(0).normal(0, 5, (750, len(rows))), axis=0).round(6)
    table[:, description["package_num_channel"]] = np.arange(750) % 256
    table[:, description["timestamp_channel"]] = 1.7e9 + np.arange(750) / 250
    table = np.delete(table, [300, 400, 401, 402, 403, 404, 405, 406], axis=0)
    np.savetxt(tmp_path / "run.csv", table, fmt="%.6f", delimiter="\t")
    address = f"brainflow:PLAYBACK_FILE_BOARD,master_board=SYNTHETIC_BOARD,file={tmp_path / 'run.csv'}"
    config = StreamConfig(give_up=0.3, check_unit=False)
    chunks, incidents = [], []
    with Decoder.open(bundle, address, config) as decoder:
        decoder.on_chunk(chunks.append)
        decoder.on_incident(incidents.append)
        with pytest.raises(StreamError, match="nothing"):
            decoder.run()
    n = decoder.counters.samples
    assert 500 < n <= len(table)  # the first ones were old
    samples = np.concatenate([chunk.samples for chunk in chunks])
    np.testing.assert_allclose(samples[:, :-1], table[len(table) - n :, rows], atol=1e-6)
    assert decoder.counters.samples_lost == 8
    assert sum(incident.kind == "lost" for incident in incidents) == 2


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("brainflow:CITON", "CYTON"),
        ("brainflow:SYNTHETIC,port=3", "serial_port"),
        ("brainflow:SYNTHETIC,ip_port=many", "no number"),
        ("brainflow:CYTON,serial_port=/dev/nothing", "cannot be opened"),
        ("brainflow:GANGLION", "does not name"),
        ("brainflow:", "is not a source"),
    ],
)
def test_boards_that_cannot_be_read(bundle, capsys, address, word):
    assert run_stream(bundle.path, "--source", address) == 2
    assert word in capsys.readouterr().err


def test_a_board_of_another_source(bundle, capsys):
    arguments = ["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "board"]
    assert run_stream(bundle.path, *arguments) == 2
    assert "no board of BrainFlow" in capsys.readouterr().err


def test_a_board_that_is_closed_can_be_opened_again():
    """What was not released would end the session of the next one. Names in the description are usual places."""
    for _ in range(2):
        source = BrainFlowSource("SYNTHETIC_BOARD", ch_names=[f"X{i}" for i in range(16)], rename=["X0=Fz"])
        assert source.info.ch_names[:2] == ("Fz", "X1")
        assert source.read(1.0).samples.shape[1] == 17
        source.close()
