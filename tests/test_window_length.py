"""What enters a token, the low-latency contract, and the age of a decision."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from bundles import small_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.cli.export import _length_note
from sjepa_deploy.eeg.chain import Chain, algorithmic_delay
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import BandPass, Flow
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.errors import StreamError
from sjepa_deploy.export.window_length import compare_window_lengths
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.runtime.bench.decision_age import LSL_LOOPBACK, decision_age, filter_delays, low_latency
from sjepa_deploy.runtime.bench.results import AgePart
from sjepa_deploy.spec import EncoderSpec, Preprocessing

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

# ---------------------------------------------------------------- what enters a token


def last_sample_with_a_gradient(n_times):
    """Return which sample is the last one that the tokens depend on, without the normalisation that sees all of them."""
    model = build_model(small_spec(n_times=n_times), seed=0).double().eval()
    encoder = model.feature_encoder
    encoder[1][2] = torch.nn.Identity()
    window = torch.randn(1, 1, n_times, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoder(window).abs().sum().backward()
    return int(window.grad[0, 0].nonzero().max())


@settings(deadline=None, max_examples=30)
@given(st.integers(152, 700))
def test_the_shortest_window_ends_with_the_last_sample_that_a_token_depends_on(n_times):
    spec = small_spec(n_times=n_times)
    assert spec.shortest_n_times == last_sample_with_a_gradient(n_times) + 1
    assert spec.tail == pytest.approx((n_times - spec.shortest_n_times) / 100.0)


@given(
    layers=st.lists(st.tuples(st.just(64), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4),
    n_tokens=st.integers(1, 20),
)
def test_a_span_is_the_least_that_gives_its_tokens(layers, n_tokens):
    encoder = EncoderSpec(conv_layers=tuple(layers))
    span = encoder.span(n_tokens)
    assert encoder.n_outputs_of_layers(span)[-1] == n_tokens
    assert encoder.n_outputs_of_layers(span - 1)[-1] < n_tokens


def test_the_default_window_has_a_tail_of_almost_half_a_second():
    assert [(small_spec(n_times=n).shortest_n_times, small_spec(n_times=n).tail) for n in (152, 200, 279, 280, 2048)] == [
        (152, 0.0),
        (152, 0.48),
        (152, 1.27),
        (280, 0.0),
        (1944, 1.04),
    ]


# ---------------------------------------------------------------- the low-latency contract


@pytest.fixture(scope="module")
def recording(recorded):
    return fit_recording(read_recording(recorded("eeglab_data.set")), small_spec().signal).data


def by_hand(model, eeg):
    with reference_mode(model):
        return model.double()(torch.from_numpy(eeg.astype(np.float64))).numpy()


@pytest.mark.parametrize("variant", ["prelocal", "contextual"])
@pytest.mark.parametrize(("trained", "exported", "earlier"), [(200, 152, 0.48), (152, 200, -0.48), (200, 256, -0.56)])
def test_the_change_is_that_of_the_outputs_on_a_recording(recording, variant, trained, exported, earlier):
    longest = max(trained, exported)
    eeg = np.ascontiguousarray(windows(recording, longest, longest)[:20])
    short, long = (build_model(small_spec(variant, n_times=n), seed=3) for n in (exported, trained))
    found = compare_window_lengths(short, trained, eeg, "a recording")
    before, after = by_hand(long, eeg[..., :trained]), by_hand(short, eeg[..., :exported])
    spread = np.sqrt(by_hand(long, eeg[..., -trained:]).var(axis=0).mean())
    assert found.earlier == pytest.approx(earlier)
    assert (found.n_windows, found.spread) == (20, pytest.approx(spread))
    assert found.same_tokens.change == pytest.approx(np.sqrt(((after - before) ** 2).mean()) / spread)
    correlations = [np.corrcoef(before[:, i], after[:, i])[0, 1] for i in range(3)]
    assert found.same_tokens.correlation == pytest.approx(np.mean(correlations))
    assert found.same_tokens.decision_flips == (before.argmax(1) != after.argmax(1)).sum()
    live = np.mean([np.corrcoef(by_hand(long, eeg[..., -trained:])[:, i], by_hand(short, eeg[..., -exported:])[:, i])[0, 1]
                    for i in range(3)])  # fmt: skip
    assert found.same_moment.correlation == pytest.approx(live)
    assert found.same_tokens.correlation > 0.8 > found.same_moment.correlation


def test_a_model_whose_outputs_never_vary_has_no_change():
    model = build_model(small_spec(n_times=152), seed=0)
    torch.nn.init.zeros_(model.final_layer[1].weight)
    eeg = eeg_windows(4, 8, 200, 100.0, np.random.default_rng(0))
    assert compare_window_lengths(model, 200, eeg, "synthetic EEG") is None


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return a function that exports a checkpoint of 200 samples and returns the bundle and what was printed."""
    folder = tmp_path_factory.mktemp("lengths")
    write_checkpoint(build_model(small_spec("postlocal"), seed=7), folder / "trained")

    def run(capsys, *flags):
        out = folder / "out"
        flags = ("--checkpoint", folder / "trained", "--precision", "fp32", "--max-batch", 4, "--out", out, "--force", *flags)
        assert run_command(_command("export"), "sjepa-export", list(map(str, flags))) == 0
        return Bundle.open(out), capsys.readouterr().out

    return run


def test_the_export_offers_the_shorter_window(export, capsys):
    _, printed = export(capsys)
    assert "The newest 48 samples of a window enter no token: decisions are 0.48 s old. --n-times 152 takes" in printed


def test_the_export_of_the_shorter_window_says_what_it_changes_on_the_recording(export, written, capsys):
    bundle, printed = export(capsys, "--n-times", 152, "--parity-data", written("eeglab_data.set").path, "--interpolate", 1)
    (note,) = bundle.manifest.weights.notes
    assert re.match(
        r"made for windows of 200 samples, exported for 152: decisions are 0\.48 s younger; where the tokens hold the same EEG "
        r"the outputs change by \d+ % of their spread \(correlation 0\.9\d+, \d+ of 128 decisions flip\), at the same moment "
        r"they correlate at -?0\.\d\d, on 128 windows of eeglab_data\.set$",
        note,
    )
    assert f"note: {note}\n" in printed
    assert "enter no token" not in printed
    assert bundle.spec.n_times == 152
    assert all(result.passed for result in bundle.manifest.parity)


def length_note(variant, n_times, eeg=None, path=None):
    """Return what the export notes about windows of `n_times` samples on weights that were trained on 200."""
    model = build_model(small_spec(variant, n_times=n_times), seed=7)
    return _length_note({"n_times": 200}, model, eeg, path, 0)


def test_without_long_windows_the_change_is_measured_on_synthetic_eeg():
    (note,) = length_note("postlocal", 152)
    assert note.endswith("on 128 windows of synthetic EEG")
    short = eeg_windows(5, 8, 152, 100.0, np.random.default_rng(0))
    assert length_note("postlocal", 152, short, Path("short.npy")) == (note,)
    long = eeg_windows(5, 8, 256, 100.0, np.random.default_rng(0))
    (note,) = length_note("postlocal", 256, long, Path("long.npy"))
    assert "decisions are 0.56 s older" in note
    assert note.endswith("on 5 windows of long.npy")


def test_the_trained_length_needs_no_note():
    assert length_note("postlocal", 200) == ()


def test_features_of_another_number_of_tokens_are_not_compared():
    assert length_note("base", 280) == ("made for windows of 200 samples, exported for 280",)


# ---------------------------------------------------------------- the age of a decision


def delays(sfreq, source_sfreq, **preprocessing):
    spec = small_spec(sfreq=sfreq, preprocessing=Preprocessing(**preprocessing))
    return {part.name: part for part in filter_delays(spec, source_sfreq)}


@pytest.mark.parametrize(("sfreq", "source_sfreq"), [(128.0, 128.0), (100.0, 100.0), (100.0, 500.0), (128.0, 512.0)])
def test_the_filters_delay_the_envelope_of_a_rhythm_by_as_much(sfreq, source_sfreq):
    """The live filters at work on a burst of 10 Hz that rises and falls so slowly that it is narrow in frequency."""
    parts = delays(sfreq, source_sfreq)
    signal = small_spec(sfreq=sfreq, preprocessing=Preprocessing(reference="none")).signal
    time = np.arange(0, 120, 1 / source_sfreq)
    burst = np.exp(-(((time - 60) / 8) ** 2)) * np.cos(2 * np.pi * 10 * time)
    prepared, rows = [], []
    chain = Chain(signal, signal.ch_names, source_sfreq, np.eye(8))
    for start in range(0, len(time), 5000):
        out, at = chain(np.repeat(burst[start : start + 5000, None], 8, axis=1))
        prepared.append(out[:, 0])
        rows += [row + start for row in at]
    power = np.abs(scipy.signal.hilbert(np.concatenate(prepared))) ** 2
    delay = (time[rows] * power).sum() / power.sum() - 60
    assert sum(part.seconds for part in parts.values()) == pytest.approx(delay, abs=1e-3)
    assert delay > 0.003
    assert set(parts) == ({"band-pass"} if sfreq == source_sfreq else {"band-pass", "resample"})
    assert {part.source for part in parts.values()} == {"group delay at 10 Hz"}


def test_the_filter_of_the_published_models_delays_slow_rhythms_more():
    signal = small_spec(sfreq=128.0, preprocessing=Preprocessing()).signal
    sos = BandPass().sections(Flow(ch_names=signal.ch_names, sfreq=128.0, goal=signal.goal))
    told = algorithmic_delay(signal, 128.0).at_hz
    assert len(told) == 4
    for hertz, seconds in told:
        sections = [scipy.signal.group_delay((s[:3], s[3:]), w=[hertz], fs=128)[1][0] for s in sos]
        assert seconds == pytest.approx(sum(sections) / 128, rel=1e-4)


def test_a_band_that_is_open_on_both_sides_delays_nothing():
    assert delays(100.0, 100.0, l_freq=None, h_freq=None) == {}
    assert list(delays(100.0, 500.0, l_freq=None, h_freq=None)) == ["resample"]


def test_a_rate_that_does_not_hold_10_hz_is_stated_at_what_it_holds():
    assert delays(12.0, 12.0, l_freq=0.5, h_freq=None)["band-pass"].source == "group delay at 4 Hz"


def test_a_source_that_is_slower_than_the_model_is_refused():
    with pytest.raises(StreamError, match="The stream has 50 Hz, the model 100 Hz"):
        delays(100.0, 50.0)


INFERENCE = AgePart(name="inference", seconds=0.005, source="measured")


def test_the_decision_age_of_the_default_window():
    age = decision_age(small_spec(), bundle="b", backend="ort-cpu", precision="fp32", hop=0.1, inference=INFERENCE)
    parts = {part.name: part.seconds for part in age.parts}
    assert list(parts) == ["window", "model", "band-pass", "hop", "transport", "inference"]
    assert (parts["window"], parts["model"], parts["hop"], parts["inference"]) == (0.755, 0.48, 0.1, 0.005)
    assert parts["band-pass"] == delays(100.0, 100.0)["band-pass"].seconds
    assert age.total_s == pytest.approx(sum(parts.values()))


def test_the_part_of_the_transport_is_the_result_that_it_cites():
    result = json.loads((RESULTS / "streaming_every_sample_2-core-cpu_2026-11-25.json").read_text())
    (ages,) = (run["age_ms"] for run in result["runs"] if run["variant"] == "prelocal")
    assert pytest.approx(ages["p99"], abs=0.005) == 1e3 * LSL_LOOPBACK.seconds


def test_the_low_latency_window_saves_the_tail_and_nothing_else():
    spec = small_spec()
    age = decision_age(spec, bundle="b", backend="ort-cpu", precision="fp32", hop=0.1, inference=INFERENCE)
    shorter = low_latency(age, spec)
    assert age.total_s - shorter.total_s == pytest.approx(0.48)
    assert shorter.bundle == "b, --n-times 152"
    assert low_latency(age, spec.replace(n_times=152)) is None
    again = decision_age(
        spec.replace(n_times=152), bundle=shorter.bundle, backend="ort-cpu", precision="fp32", hop=0.1, inference=INFERENCE
    )
    assert [(p.name, p.seconds) for p in again.parts] == [(p.name, p.seconds) for p in shorter.parts]
