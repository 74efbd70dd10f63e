"""The export says what a model learned from: by a file, by flags, or by a list of assumptions that its user confirms."""

import json

import numpy as np
import oracle
import pytest
import torch
import yaml
from bundles import MONTAGE, edit_manifest, export_small, small_spec
from oracle import make_spec, randomise

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.signal_file import read_signal, write_signal
from sjepa_deploy.eeg.steps import (
    BandPass,
    Baseline,
    Channels,
    ExponentialStandardise,
    Notch,
    Reference,
    Resample,
    ZScore,
)
from sjepa_deploy.eeg.steps.changed import changed_steps
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import SpecError
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import EventWindow, SignalSpec

STEPS = (Notch(freq=60.0), BandPass(l_freq=1.0, h_freq=30.0), Reference(channels=("M1", "M2")), Resample(), Channels(), ZScore())
FAST = ("--precision", "fp32", "--max-batch", "2", "--engine", "none")


def whole_signal(**changes) -> SignalSpec:
    fields = {
        "n_chans": 8,
        "n_times": 200,
        "sfreq": 100.0,
        "unit": "V",
        "ch_names": MONTAGE.ch_names,
        "positions": MONTAGE.positions,
        "steps": STEPS,
        "phase": "causal",
        "event_window": EventWindow(start=-0.5, events=("left", "right")),
    }
    return SignalSpec(**fields | changes)


@pytest.fixture
def export(capsys, tmp_path):
    """Return a function that exports, and returns exit status, what was printed, and the specification."""

    def run(*flags):
        out = tmp_path / "bundle"
        arguments = ["--force", "--out", out, *FAST, *flags]
        status = run_command(_command("export"), "sjepa-export", list(map(str, arguments)))
        shown = capsys.readouterr()
        return status, " ".join(shown.out.split()), shown.err, Bundle.open(out).spec if out.exists() else None

    return run


@pytest.fixture
def theirs(tmp_path):
    """Return the folder of a model that braindecode saved: 8 channels with names, 3 outputs."""
    model = randomise(oracle.braindecode_model(small_spec("postlocal")))
    model._save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- a file


def test_a_signal_is_read_as_it_was_written(tmp_path):
    signal = whole_signal()
    write_signal(tmp_path / "signal.json", signal)
    assert SignalSpec(**read_signal(tmp_path / "signal.json")) == signal
    (tmp_path / "signal.yaml").write_text(yaml.safe_dump(encode(signal)))
    assert SignalSpec(**read_signal(tmp_path / "signal.yaml")) == signal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [{step: notsch}]", ("notsch", "notch")),
        ("steps: [{step: notch, frequency: 50.0}]", ("frequency",)),
        ("steps: [{step: notch, freq: -50.0}]", ("-50",)),
        ("steps: [{step: exponential-standardise, factor_new: 1e-3}]", ("factor_new", "0.001")),
        ("phase: linear", ("phase", "zero-phase")),
        ("tmin: 0.5", ("tmin", "event_window")),
        ("event_window: {start: .nan}", ("nan",)),
        ("event_window: {start: 0.0, name: left}", ("name",)),
        ("1: 2", ("'1'",)),
        ("[1, 2]", ("object",)),
        ("", ("object",)),
        ("a: [", ("YAML",)),
        ("unit: [uV]", ("unit",)),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(export, tmp_path, text, words):
    (tmp_path / "my.yaml").write_text(text)
    status, _, err, spec = export("--variant", "prelocal", "--channels", 8, "--signal", tmp_path / "my.yaml")
    assert (status, spec, err.count("\n")) == (2, None, 1)
    for word in ("my.yaml", *words):
        assert word in err


def test_a_signal_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        read_signal(tmp_path / "nowhere.json")
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b'{"sfreq": NaN}'):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(SpecError, match="neither JSON nor"):
            read_signal(tmp_path / "bad.json")


def test_a_signal_of_a_file_needs_no_confirmation(export, theirs):
    write_signal(theirs / "mine.json", whole_signal())
    status, printed, err, spec = export("--checkpoint", theirs, "--signal", theirs / "mine.json", "--class-names", "a,b,c")
    assert status == 0, err
    assert spec.signal == whole_signal()
    assert (spec.task, spec.class_names) == ("classification", ("a", "b", "c"))
    assert "steps, causal: notch freq 60" in printed
    assert "logits of the classes a, b, c" in printed


def test_a_part_of_a_signal_leaves_the_rest_to_be_confirmed(export, theirs):
    (theirs / "part.yaml").write_text("phase: causal\nunit: V\n")
    flags = ("--checkpoint", theirs, "--signal", theirs / "part.yaml")
    status, printed, _, spec = export(*flags)
    assert (status, spec) == (2, None)
    assert "--band" in printed
    assert "--phase" not in printed
    status, printed, err, spec = export(*flags, "--assume-signal")
    assert status == 0, err
    assert (spec.signal.phase, spec.unit) == ("causal", "V")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--phase zero-phase", "phase"),
        ("--unit uV", "unit"),
        ("--sfreq 128", "sfreq"),
        ("--n-times 256", "n_times"),
        ("--channels 9", "n_chans"),
        ("--channels Fz,Cz", "ch_names"),
        ("--montage sjepa-62", "ch_names"),
        ("--tmin 0.2", "start"),
        ("--events up", "events"),
        ("--band 2 30", "steps"),
        ("--notch 50", "steps"),
        ("--notch 0", "steps"),
        ("--reference none", "steps"),
        ("--reference average", "steps"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_refused(export, tmp_path, flags, named):
    write_signal(tmp_path / "mine.json", whole_signal())
    status, _, err, spec = export("--variant", "postlocal", "--signal", tmp_path / "mine.json", *flags.split())
    assert (status, spec, err.count("\n")) == (2, None, 1)
    assert flags.split()[0] in err
    assert named in err


def test_flags_that_repeat_the_file_are_no_contradiction(export, tmp_path):
    write_signal(tmp_path / "mine.json", whole_signal())
    flags = "--phase causal --unit V --tmin -0.5 --events left,right --band 1 30 --notch 60 --reference M1,M2"
    status, _, err, spec = export("--variant", "postlocal", "--signal", tmp_path / "mine.json", *flags.split())
    assert status == 0, err
    assert spec.signal == whole_signal()


# ---------------------------------------------------------------- flags


def test_flags_change_single_things(export, theirs):
    flags = "--unit V --band 1 30 --notch 50 --reference Cz --phase causal --tmin -0.2 --events left,right"
    status, _, err, spec = export("--checkpoint", theirs, *flags.split())  # all is said: nothing to confirm
    assert status == 0, err
    band = BandPass(l_freq=1.0, h_freq=30.0)
    assert spec.signal.steps == (Notch(freq=50.0), band, Resample(), Channels(), Reference(channels=("Cz",)))
    assert (spec.unit, spec.signal.phase) == ("V", "causal")
    assert spec.signal.event_window == EventWindow(start=-0.2, events=("left", "right"))


def test_electrodes_that_the_model_lacks_are_subtracted_before_its_channels_are_picked():
    steps = (BandPass(), Resample(), Channels(), Reference())
    names = ("Cz", "Pz")
    assert changed_steps(steps, {"reference": ("M1", "m2")}, names) == (
        BandPass(),
        Resample(),
        Reference(channels=("M1", "m2")),
        Channels(),
    )
    assert changed_steps(steps, {"reference": ("cz",)}, names) == (*steps[:3], Reference(channels=("cz",)))
    assert changed_steps(steps, {"reference": "none"}, names) == steps[:3]
    assert changed_steps(steps, {"l_freq": None, "h_freq": None}, names) == steps[1:]
    assert changed_steps(steps[1:], {"l_freq": 2.0}, names) == (BandPass(l_freq=2.0, h_freq=None), *steps[1:])
    assert changed_steps((Notch(), *steps), {"notch": None}, names) == steps
    assert changed_steps(steps, {}, None) == steps


def test_events_without_a_start_are_refused(export, theirs):
    status, _, err, spec = export("--checkpoint", theirs, "--events", "left", "--assume-signal")
    assert (status, spec) == (2, None)
    assert "--tmin" in err


# ---------------------------------------------------------------- what is assumed


def test_a_foreign_checkpoint_is_not_exported_before_its_assumptions_are_confirmed(export, theirs):
    status, printed, err, spec = export("--checkpoint", theirs)
    assert (status, spec, err.count("\n")) == (2, None, 1)
    assert "--assume-signal" in err
    for flag in ("--unit", "--band", "--reference", "--phase", "--tmin", "--task"):
        assert flag in printed
    status, printed, err, spec = export("--checkpoint", theirs, "--assume-signal")
    assert status == 0, err
    assert (spec.signal.phase, spec.unit, spec.ch_names) == ("zero-phase", "uV", MONTAGE.ch_names)
    assert "steps, zero-phase: band-pass l_freq 0.5 h_freq 40" in printed


def test_bare_weights_are_no_exception(export, tmp_path):
    torch.save(build_model(make_spec("prelocal", 4), seed=0).state_dict(), tmp_path / "bare.pth")
    status, printed, _, spec = export("--checkpoint", tmp_path / "bare.pth")
    assert (status, spec) == (2, None)
    for flag in ("--sfreq", "--n-times", "--band", "--strides"):
        assert flag in printed


def test_our_checkpoints_and_random_weights_need_no_confirmation(export, tmp_path):
    write_checkpoint(build_model(small_spec("postlocal", phase="causal"), seed=0), tmp_path / "ours")
    status, printed, err, spec = export("--checkpoint", tmp_path / "ours")
    assert status == 0, err
    assert spec == small_spec("postlocal", phase="causal")
    assert "steps, causal" in printed
    assert export("--variant", "prelocal", "--channels", 4)[0] == 0


def test_flags_that_contradict_our_checkpoint_are_refused(export, tmp_path):
    signal = whole_signal()
    spec = small_spec("postlocal").replace(signal=signal)
    write_checkpoint(build_model(spec, seed=0), tmp_path / "ours")
    for flags in ("--phase zero-phase", "--tmin 0.1", "--events up", "--task classification"):
        status, _, err, written = export("--checkpoint", tmp_path / "ours", *flags.split())
        assert (status, written) == (2, None), flags
        assert "contradicts" in err
    other = signal.replace(steps=(*STEPS[:-1], ExponentialStandardise(), Baseline()))
    write_signal(tmp_path / "other.json", other)
    status, _, err, written = export("--checkpoint", tmp_path / "ours", "--signal", tmp_path / "other.json")
    assert (status, written) == (2, None)
    assert "steps" in err


def test_an_older_checkpoint_of_ours_may_be_told_its_task(export, tmp_path):
    """Before the task was stored, three outputs without names could be either."""
    folder = tmp_path / "old"
    write_checkpoint(build_model(small_spec("postlocal"), seed=0), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sjepa_deploy"]["task"]
    (folder / "config.json").write_text(json.dumps(config))
    status, printed, err, spec = export("--checkpoint", folder, "--task", "classification")
    assert status == 0, err
    assert (spec.task, spec.class_names) == ("classification", None)
    assert "logits of the classes 0, 1, 2" in printed


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("flags", "task", "told"),
    [
        ("--class-names left,right --n-outputs 1", "classification", "the logit of right, against left"),
        ("--class-names left,right", "classification", "logits of the classes left, right"),
        ("--task classification --n-outputs 2", "classification", "logits of the classes 0, 1"),
        ("--task classification", "classification", "the logit of 1, against 0"),
        ("--task regression --output-unit s", "regression", "a number in s"),
        ("--n-outputs 2", "regression", "2 numbers"),
    ],
)
def test_the_kind_of_the_outputs_is_told_by_every_command(export, tmp_path, capsys, flags, task, told):
    status, printed, err, spec = export("--variant", "prelocal", "--channels", 4, *flags.split())
    assert status == 0, err
    assert spec.task == task
    assert f"outputs: {told}" in printed
    for command in (("verify", "--backend", "ort-cpu"), ("doctor",)):
        assert run_command(_command(command[0]), "sjepa", [*command[1:], str(tmp_path / "bundle")]) == 0
        assert f"outputs: {told}" in " ".join(capsys.readouterr().out.split())
    flips = Bundle.open(tmp_path / "bundle").manifest.parity[0].decision_flips
    assert flips == (0 if task == "classification" else None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--class-names left,right --task regression", "class names"),
        ("--class-names left,right --output-unit s", "unit"),
        ("--task features", "features"),
        ("--class-names left,right,up --n-outputs 2", "3 class names for 2 outputs"),
    ],
)
def test_kinds_of_outputs_that_contradict_each_other(export, flags, words):
    status, _, err, spec = export("--variant", "prelocal", "--channels", 4, *flags.split())
    assert (status, spec) == (2, None)
    assert words in err


# ---------------------------------------------------------------- bad input, through the commands


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"step": "alignment", "matrix": np.eye(2).tolist(), "ch_names": ["A", "B"]}, "alignment"),
        ({"step": "alignment", "matrix": [[1.0]], "ch_names": ["Cz", "Pz"]}, "alignment"),
        ({"step": "scale", "factors": [0.0]}, "scaling"),
        ({"step": "clip", "limit": -1.0}, "clipping"),
        ({"step": "baseline"}, "baseline"),  # of windows that belong to no events
        ({"step": "band-pass", "l_freq": 60.0, "h_freq": None}, "half the sampling rate"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_the_command(export, tmp_path, step, words):
    steps = [{"step": "resample"}, {"step": "channels"}, step]
    (tmp_path / "my.json").write_text(json.dumps({"steps": steps}))
    status, _, err, spec = export("--variant", "prelocal", "--channels", "Cz,Pz", "--signal", tmp_path / "my.json")
    assert (status, spec, err.count("\n")) == (2, None, 1)
    assert words in err.casefold()


def test_steps_on_windows_before_steps_on_samples_are_refused(export, tmp_path):
    (tmp_path / "my.yaml").write_text("steps: [{step: z-score}, {step: resample}, {step: channels}]")
    status, _, err, spec = export("--variant", "prelocal", "--channels", 4, "--signal", tmp_path / "my.yaml")
    assert (status, spec) == (2, None)
    assert "z-score" in err


def test_an_unknown_step_in_a_manifest_is_named(tmp_path, capsys):
    bundle = export_small(tmp_path / "bundle", small_spec())
    edit_manifest(bundle.path, lambda m: m["spec"]["signal"]["steps"].append({"step": "wavelet", "level": 3}))
    for command in (("verify",), ("run", tmp_path / "none.edf")):
        arguments = [bundle.path, *command[1:]]
        assert run_command(_command(command[0]), "sjepa", list(map(str, arguments))) == 2
        assert "wavelet" in capsys.readouterr().err


def test_event_windows_beyond_the_ends_of_a_recording_are_told(tmp_path, capsys):
    spec = small_spec(event_window=EventWindow(start=0.5, events=("go",)), phase="causal")
    bundle = export_small(tmp_path / "bundle", spec)
    np.save(tmp_path / "r.npy", eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0])
    command = [bundle.path, tmp_path / "r.npy", "--unit", "uV", "--sfreq", 100, "--events", tmp_path / "e.tsv"]
    for onsets, status, words in (((3.0, 9.0), 0, "left out 1 of 2 events"), ((9.0, -4.0, 1e6), 2, "No window at 0.5 s")):
        (tmp_path / "e.tsv").write_text("onset\ttrial_type\n" + "".join(f"{onset}\tgo\n" for onset in onsets))
        assert run_command(_command("run"), "sjepa-run", list(map(str, command))) == status
        shown = capsys.readouterr()
        assert words in shown.err
        assert len(shown.out.splitlines()) == (2 if status == 0 else 0)
