"""The recipes of docs/extending.md: what they name exists, and their code, run as it stands there, extends the toolkit."""

import importlib
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from bundles import export_small, small_spec
from streams import eeg, info_of, predictions, run_command

import sjepa_deploy
from sjepa_deploy.cli.verify import verify
from sjepa_deploy.eeg.chain import Chain, zero_phase
from sjepa_deploy.eeg.steps import STEPS as SIGNAL_STEPS
from sjepa_deploy.eeg.steps import Channels, Flow, Resample
from sjepa_deploy.errors import BackendError, InputError, SpecError, StreamError
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.runtime.backend import BACKENDS, BackendEntry, BackendOptions
from sjepa_deploy.runtime.backends.reference import run_reference
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.steps import STEPS
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.open_source import SOURCES, SourceEntry, SourceOptions, open_source
from sjepa_deploy.runtime.live.sources import ReplaySource
from sjepa_deploy.serialize import decode, encode
from sjepa_deploy.spec import SignalSpec

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def code(recipe):
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", RECIPES[recipe], re.M | re.S)]


def test_there_are_eight_recipes_and_the_files_that_they_name():
    assert list(RECIPES) == [
        "A backend",
        "A source",
        "A preprocessing step",
        "A precision",
        "A decoding mode",
        "A step of the decision layer",
        "A variant",
        "A figure in the report",
    ]
    for recipe, text in RECIPES.items():
        named = re.findall(r"`((?:sjepa_deploy|runtime|export|tests|docs)/[\w/.]*)`", text)
        assert named, recipe
        assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.fixture
def bundle(tmp_path):
    return export_small(tmp_path / "bundle", small_spec())


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """The backend of the recipe, in a module of its own and in the table."""
    module, row = code("A backend")
    (tmp_path / "onnx_reference.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(BACKENDS)
    exec(row, {"BACKENDS": BACKENDS, "BackendEntry": BackendEntry})
    (name,) = BACKENDS.keys() - before
    yield name
    del BACKENDS[name]


def test_the_backend_of_the_recipe_decodes_and_is_verified(backend, bundle, capsys):
    windows = np.stack([eeg(200, seed=seed).T for seed in range(3)]).astype(np.float32)
    wanted = run_reference(build_model(bundle.spec, seed=0).double(), windows)
    with sjepa_deploy.load(bundle, backend=backend) as predict:
        assert predict.backend.name == backend
        error = np.abs(predict.predict(windows) - wanted).max()
        assert error < TOLERANCE["fp32"] * np.sqrt(np.mean(wanted**2))
        assert predict.backend.input_buffer(1) is None
        assert predict.backend.split(windows[:1], 1) is None
        predict.backend.warmup()
        with pytest.raises(InputError, match="does not read arrays on the GPU"):
            predict.backend.run_on_gpu(windows)
    assert run_command(verify, "sjepa-verify", [str(bundle.path), "--backend", backend]) == 0
    assert "passed" in capsys.readouterr().out


def test_the_backend_of_the_recipe_refuses_what_it_cannot_do(backend, bundle):
    with pytest.raises(BackendError, match="does not run in tf32"):
        sjepa_deploy.load(bundle, backend=backend, precision="tf32")
    with pytest.raises(BackendError, match="keeps no kernel on the GPU"):
        sjepa_deploy.load(bundle, backend=backend, options=BackendOptions(persistent=True))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The source of the recipe, in a module of its own and in the table."""
    module, row = code("A source")
    (tmp_path / "array_source.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(SOURCES)
    exec(row, {"SOURCES": SOURCES, "SourceEntry": SourceEntry})
    (name,) = SOURCES.keys() - before
    yield name
    del SOURCES[name]


def test_the_source_of_the_recipe_is_decoded(source, bundle, tmp_path):
    samples = eeg(450)
    np.save(tmp_path / "eeg.npy", samples)
    config = StreamConfig(hop=0.5)
    opened = open_source(f"{source}:{tmp_path / 'eeg.npy'}", bundle.spec.signal, SourceOptions(speed=float("inf")))
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        found = list(Decoder(predict, opened, config))
        wanted = list(Decoder(predict, ReplaySource(info_of(bundle.spec), samples, speed=float("inf")), config))
    assert len(found) == 6
    assert predictions(found) == predictions(wanted)
    with pytest.raises(StreamError, match="takes no unit"):
        open_source(f"{source}:{tmp_path / 'eeg.npy'}", bundle.spec.signal, SourceOptions(unit="V"))


def test_the_step_of_the_recipe_decides_and_is_stored(monkeypatch):
    module, row = code("A step of the decision layer")
    names = {"STEPS": STEPS}
    monkeypatch.setitem(STEPS, "agreement", None)  # taken out again after the test
    exec(module, names)
    exec(row, names)
    agreement = names["Agreement"](n_windows=3)
    described = LayerDescription(
        name="mine",
        bundle="digest",
        output_name="prediction",
        n_outputs=2,
        class_names=("left", "right"),
        steps=(Probabilities(), agreement),
    )
    layer = DecisionLayer(LayerDescription.decoded(described.encoded()))
    outputs = np.array([[1, 0], [1, 0], [2, 0], [0, 1], [np.nan, 0], [0, 1], [0, 1], [0, 1]])
    states = layer.run(outputs, np.arange(8))
    assert [state.class_name for state in states] == [None, None, "left", None, None, None, None, "right"]
    assert "3 windows in a row" in str(described)


@pytest.fixture
def step(tmp_path, monkeypatch):
    """The step of the recipe, in a module of its own and in the table."""
    module, row = code("A preprocessing step")
    (tmp_path / "drift_removal.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("drift_removal").DriftRemoval
    exec(row, {"STEPS": SIGNAL_STEPS, "DriftRemoval": made})
    yield made
    del SIGNAL_STEPS[made.name]


def test_the_step_of_the_recipe_is_stored_and_runs_in_both_forms(step):
    signal = SignalSpec(
        n_chans=2, n_times=100, sfreq=100.0, ch_names=("C3", "C4"), steps=(step(seconds=0.5), Resample(), Channels())
    )
    assert decode(SignalSpec, json.loads(json.dumps(encode(signal)))) == signal
    samples = eeg(600)[:, :2]
    taps = [1, -1], [1, -np.exp(-1 / 50)]
    chain = Chain(signal, ("C3", "C4"), 100.0, np.eye(2))
    chain.start(samples[0])
    live = np.concatenate([chain(samples[:217])[0], chain(samples[217:])[0]])
    wanted = scipy.signal.lfilter(*taps, samples - samples[0], axis=0)
    np.testing.assert_allclose(live, wanted, rtol=0, atol=1e-9)
    flow = Flow(ch_names=("C3", "C4"), sfreq=100.0, goal=signal.goal)
    offline = zero_phase(signal, samples.T, flow, lambda data, _: data)
    np.testing.assert_allclose(offline, scipy.signal.filtfilt(*taps, samples.T), rtol=0, atol=1e-6)
    assert chain.delay.at_hz[0][1] == pytest.approx(step(seconds=0.5).delay(2.0, flow))
    with pytest.raises(SpecError, match="time constant"):
        step(seconds=0.0)
