"""One pipeline of eight steps, from the YAML file of a training to the replay of a live record: the same windows to the bit."""

import json
import re
from pathlib import Path

import mne
import numpy as np
import pytest
import yaml
from small import ENCODER

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.chain import finish_windows
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Clip, ExponentialStandardise, Notch, Reference, Resample, ZScore
from sjepa_deploy.learning.data import DataConfig, Target
from sjepa_deploy.learning.finetune import FinetuneConfig
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine, read_config
from sjepa_deploy.learning.pretrain import PretrainConfig
from sjepa_deploy.models.checkpoint import read_checkpoint
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.sources import ReplaySource
from sjepa_deploy.runtime.live.windows import WindowStream
from sjepa_deploy.serialize import encode

STEPS = (
    BandPass(l_freq=0.5, h_freq=40.0),
    Notch(freq=50.0),
    Reference(channels=("M1", "M2")),  # electrodes that the model does not have
    Resample(),
    Channels(),
    ExponentialStandardise(),
    Clip(limit=4.0),
    ZScore(),
)
CH_NAMES = ("F3", "F4", "C3", "C4", "P3", "P4")
HOP = 0.25


def sjepa(*arguments) -> None:
    assert run_command(group, "sjepa", [str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Return the folder of a recording, and of a model and a bundle that the commands made of it."""
    folder = tmp_path_factory.mktemp("chain")
    rng, rate, n = np.random.default_rng(3), 256.0, 256 * 120
    names = [*CH_NAMES, "M1", "M2"]
    volts = np.cumsum(rng.normal(size=(8, n)), axis=1) * 5e-7 + rng.normal(size=(8, n)) * 5e-6 + 2e-3
    volts += 2e-5 * np.sin(2 * np.pi * 50 * np.arange(n) / rate)
    raw = mne.io.RawArray(volts, mne.create_info(names, rate, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations(4.0 + 1.9 * np.arange(60), 0.0, rng.permutation(["left", "right"] * 30)), verbose="error")
    raw.save(folder / "session_raw.fif", verbose="error")
    target = Target(kind="event", task="classification", classes=("left", "right"), tmin=-0.2)
    data = DataConfig(
        source=(str(folder / "session_raw.fif"),), ch_names=CH_NAMES, n_times=152, steps=STEPS, target=target, n_folds=3
    )
    engine = Engine(max_epochs=2, batch_size=8, accelerator="cpu")
    config = FinetuneConfig(variant="prelocal", encoder=ENCODER, warmup_epochs=0, data=data, engine=engine)
    (folder / "config.yaml").write_text(yaml.safe_dump(encode(config)))
    sjepa("finetune", "--config", folder / "config.yaml", "--out", folder / "model")
    sjepa(
        "export", "--checkpoint", folder / "model", "--out", folder / "bundle", "--precision", "fp32", "--max-batch", 1
    )  # so that the table and the stream both decode window by window
    return folder, config


def test_the_steps_are_in_the_checkpoint_and_in_the_manifest(chain):
    folder, config = chain
    signal = Bundle.open(folder / "bundle").spec.signal
    known = read_checkpoint(folder / "model").known
    assert {name: known[name] for name in ("steps", "phase", "event_window", "ch_names", "unit")} == {
        name: getattr(signal, name) for name in ("steps", "phase", "event_window", "ch_names", "unit")
    }
    assert (signal.steps, signal.phase, signal.ch_names) == (STEPS, "causal", CH_NAMES)
    assert (signal.event_window.start, signal.event_window.events) == (-0.2, ("left", "right"))
    stored = json.loads((folder / "bundle/manifest.json").read_text())["spec"]["signal"]
    assert stored["steps"] == encode(config.data.steps)


def test_windows_of_training_offline_and_live_have_the_same_bits(chain):
    folder, config = chain
    signal = Bundle.open(folder / "bundle").spec.signal
    raw = read_recording(folder / "session_raw.fif")
    learned = load_windows(config.data)
    prepared = prepare(raw, signal)
    assert len(learned.eeg) == len(prepared.eeg) == 60
    assert np.asarray(learned.eeg).tobytes() == prepared.eeg.tobytes()
    offline = np.concatenate(fit_recording(raw, signal).windows(25))
    info = StreamInfo(name="EEG", ch_names=tuple(raw.ch_names), sfreq=256.0, unit="V")
    rng = np.random.default_rng(0)
    source = ReplaySource(
        info, np.ascontiguousarray(raw.get_data().T), speed=float("inf"), chunk=lambda: int(rng.integers(1, 99))
    )
    stream = WindowStream(signal, info, StreamConfig(hop=HOP), counters=Counters(), report=lambda *told: None)
    live = []
    while (chunk := source.read(0.0)) is not None:
        live += [finish_windows(signal, stream.eeg())[0].copy() for _ in stream.push(chunk)]
    assert len(live) == len(offline) > 400
    assert np.array(live).tobytes() == offline.tobytes()


def test_run_stream_record_and_replay_give_the_same_predictions(chain, capsys):
    folder, _ = chain
    recording = folder / "session_raw.fif"
    sjepa("run", folder / "bundle", recording, "--hop", HOP, "--out", folder / "hops.tsv")
    table = np.loadtxt(folder / "hops.tsv", skiprows=1)[:, 1:].astype(np.float32)
    live = ["--hop", HOP, "--speed", "inf", "--late", "queue", "--quiet", "--out", folder / "lines.jsonl"]
    sjepa("stream", folder / "bundle", "--source", f"file:{recording}", *live, "--record", folder / "run.xdf")
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    decided = np.array([line["prediction"] for line in lines if "prediction" in line], dtype=np.float32)
    assert len(table) == len(decided) > 400
    assert table.tobytes() == decided.tobytes()
    capsys.readouterr()
    sjepa("stream", folder / "bundle", "--replay", folder / "run.xdf", "--json")
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["n_decisions"], replayed["n_differ"], replayed["n_missing"]) == (len(decided), 0, 0)


def test_events_are_decoded_at_the_windows_of_training(chain):
    folder, config = chain
    sjepa("run", folder / "bundle", folder / "session_raw.fif", "--events", "left,right", "--out", folder / "events.tsv")
    rows = [line.split("\t") for line in (folder / "events.tsv").read_text().splitlines()[1:]]
    with sjepa_deploy.load(folder / "bundle", check_unit=False) as predict:
        wanted = predict.predict(np.asarray(load_windows(config.data).eeg))
    assert np.array([row[-3:-1] for row in rows], dtype=np.float32).tobytes() == wanted.tobytes()


def test_the_steps_of_the_page_are_read(tmp_path):
    """A field that the file leaves out has its default."""
    page = (Path(__file__).parents[1] / "docs/finetune.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "config.yaml").write_text(example)
    found = read_config(PretrainConfig, tmp_path / "config.yaml").data.signal_steps
    band = BandPass(l_freq=0.5, h_freq=40.0)
    assert found == (Notch(freq=50.0), band, Resample(), Channels(), Reference(), ZScore())
