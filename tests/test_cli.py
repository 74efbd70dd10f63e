import importlib.metadata
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import mne
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from bundles import MONTAGE, copy_bundle, edit_manifest, export_small, flip_byte, listing, rehash, small_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from sincs import sinc_sums

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import COMMANDS, _command, group, run_command
from sjepa_deploy.cli.doctor import kernel_lines
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.fused.choice import Choices, KernelChoice, KernelRecord, size_for
from sjepa_deploy.spec import EncoderSpec, Preprocessing

SMALL = ("--channels", ",".join(MONTAGE.ch_names), "--montage", "sjepa-62", "--max-batch", "2", "--precision", "fp32")


@pytest.fixture
def sjepa(capsys):
    """Return a function that runs a command here and returns exit status, stdout and stderr."""

    def run(name, *arguments):
        capsys.readouterr()
        status = run_command(_command(name), f"sjepa-{name}", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def bundle(make_bundle, tmp_path):
    """Return the path of a bundle that a test may alter."""
    return copy_bundle(make_bundle("prelocal"), tmp_path / "bundle")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a folder with the weights of a small postlocal model whose seed is 7."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(build_model(small_spec("postlocal"), seed=7), folder)
    return folder


# ---------------------------------------------------------------- export


def in_a_process(script, *arguments, **kwargs):
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=script)
    code = f"import sys, {found.module}; sys.argv[0] = {script!r}; {found.module}.{found.attr}()"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_ctrl_c_inside_pytorchs_exporter_is_an_interruption(sjepa, tmp_path, monkeypatch):
    """The exporter makes an error of its own of everything that is raised while it works."""

    def export(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except BaseException as e:
            raise RuntimeError("Failed to export the model") from e

    monkeypatch.setattr(torch.onnx, "export", export)
    status, _, err = sjepa("export", "--variant", "prelocal", *SMALL, "--out", tmp_path / "out")
    assert (status, err) == (130, "sjepa-export: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_all_variants_are_exported_and_say_that_they_are_random(sjepa, tmp_path, monkeypatch):
    monkeypatch.setitem(EncoderSpec.__init__.__kwdefaults__, "n_layers", 2)  # eight take four times as long
    out = tmp_path / "out"
    status, printed, err = sjepa("export", "--variant", "all", *SMALL, "--out", out, "--seed", 3, "--json")
    assert status == 0, err
    summaries = json.loads(printed)
    assert [summary["spec"]["variant"] for summary in summaries] == ["prelocal", "postlocal", "contextual", "base"]
    assert err.count("The weights are random: no checkpoint was given. The predictions mean nothing.") == 4
    for summary in summaries:
        bundle = Bundle.open(summary["bundle"])
        assert bundle.path == out / bundle.spec.variant
        assert (bundle.spec.ch_names, bundle.spec.n_chans, bundle.spec.n_times) == (MONTAGE.ch_names, 8, 200)
        assert bundle.spec.positions == MONTAGE.positions
        assert summary["random_weights"] is True
        assert summary["weights"]["seed"] == bundle.manifest.weights.seed == 3
        assert summary["parity"][0]["passed"] is True
        assert json.loads((bundle.path / "manifest.json").read_text())["parity"] == summary["parity"]
    shutil.rmtree(out / "prelocal")
    status, _, err = sjepa("export", "--variant", "all", *SMALL, "--out", out)
    assert (status, err.count("There is a bundle at")) == (2, 1)
    assert not (out / "prelocal").exists()  # nothing is written unless all can be


def test_a_checkpoint_needs_no_flags(checkpoint, tmp_path):
    """In a process of its own, where every warning is an error."""
    done = in_a_process(
        "sjepa", "export", "--checkpoint", checkpoint, "--out", tmp_path / "out", "--precision", "fp16,fp32", "--quiet"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "random" not in done.stdout
    assert re.search(r"fp16\s+ort-cpu .* passed\s+fp32\s+ort-cpu .* passed", done.stdout)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.spec == small_spec("postlocal")
    assert bundle.precisions == ("fp16", "fp32")
    assert (bundle.manifest.weights.source, bundle.manifest.weights.random) == (checkpoint.name, False)
    assert bundle.graph("fp16").max_batch == 64
    expected = build_model(bundle.spec, seed=7).state_dict()
    stored = safetensors.torch.load_file(bundle.checkpoint / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], value) for key, value in expected.items())


def test_every_flag_of_the_contract_arrives(sjepa, tmp_path):
    np.save(tmp_path / "windows.npy", eeg_windows(3, 5, 300, 120.0, np.random.default_rng(0)) / 1e6)
    flags = "--variant prelocal --channels 5 --n-times 300 --sfreq 120 --unit V --class-names left,right --spatial-filters 2"
    flags += " --reference none --band 1 0 --opset 19 --static-batch 3 --precision fp32 --seed 5 --json"
    parity_data = ("--parity-data", tmp_path / "windows.npy")
    status, out, err = sjepa("export", *flags.split(), *parity_data, "--out", tmp_path / "a[b]/out")
    assert status == 0
    spec = Bundle.open(tmp_path / "a[b]/out").spec
    assert (spec.input_shape, spec.sfreq, spec.unit, spec.n_outputs, spec.n_spat_filters) == ((5, 300), 120.0, "V", 2, 2)
    assert (spec.class_names, spec.ch_names) == (("left", "right"), None)
    assert spec.signal.steps == Preprocessing(reference="none", l_freq=1.0, h_freq=None).steps
    summary = json.loads(out)
    (graph,), (parity,) = summary["graphs"], summary["parity"]
    assert (graph["opset"], graph["static_batch"], graph["max_batch"]) == (19, 3, 3)
    assert parity["batch_sizes"] == [3]
    assert parity["n_windows"] == 3 + len([k for k in Bundle.open(tmp_path / "a[b]/out").reference().kinds if "data" not in k])
    assert f"Next: sjepa-verify {tmp_path / 'a[b]/out'}\n" in err  # whole: neither wrapped nor read as markup


def test_parity_data_are_renamed_interpolated_and_taken_in_any_unit_on_request(sjepa, tmp_path):
    """The oracle is what the same recording gives under the model's names, with one channel made from the others."""
    export = ("export", "--variant", "prelocal", "--montage", "standard_1020", "--channels", ",".join(MONTAGE.ch_names))
    export += ("--sfreq", 100, "--n-times", 200, "--precision", "fp32", "--max-batch", 2, "--engine", "none", "--force")
    volts = np.random.default_rng(0).normal(0, 2e-11, (7, 1000))
    raws = [
        mne.io.RawArray(volts, mne.create_info(list(names), 100.0, "eeg"), verbose="error")
        for names in (("mine", *MONTAGE.ch_names[1:7]), MONTAGE.ch_names[:7])
    ]
    raws[0].save(tmp_path / "a_raw.fif", fmt="double", verbose="error")
    data = ("--parity-data", tmp_path / "a_raw.fif", "--out", tmp_path / "out")
    flags = {"--rename": f"mine={MONTAGE.ch_names[0]}", "--interpolate": 0.125}
    for missing, message in (("--rename", "more than 0.125"), ("--interpolate", "lacks")):
        others = [part for name, value in flags.items() if name != missing for part in (name, value)]
        status, _, err = sjepa(*export, *data, *others, "--no-check-unit")
        assert (status, message in err) == (2, True), err
    status, _, err = sjepa(*export, *data, *(part for pair in flags.items() for part in pair))
    assert (status, "which is no EEG" in err) == (2, True), err
    status, _, err = sjepa(*export, *data, *(part for pair in flags.items() for part in pair), "--no-check-unit")
    assert status == 0, err
    bundle = Bundle.open(tmp_path / "out")
    fitted = fit_recording(raws[1], bundle.spec.signal, interpolate=0.125, check_unit=False)
    reference = bundle.reference()
    rows = [i for i, kind in enumerate(reference.kinds) if "parity data" in kind]
    np.testing.assert_allclose(reference.inputs[rows], fitted.windows(200)[0], rtol=1e-5, atol=1e-10)


# ---------------------------------------------------------------- verify


def test_a_copied_bundle_is_verified_without_pytorch(make_bundle, tmp_path):
    """In a process of its own, with another working directory, and with torch out of reach."""
    path = copy_bundle(make_bundle("contextual"), tmp_path / "elsewhere [x]")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    arguments = ("--backend", "ort-cpu", "--json")
    done = in_a_process("sjepa-verify", path.name, *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["passed"] is True
    assert [(r["backend"], r["precision"], r["passed"]) for r in answer["results"]] == [("ort-cpu", "fp32", True)]
    assert "elsewhere [x]: parity on this machine" in done.stderr


def test_verify_judges_all_that_loads_and_says_what_does_not(sjepa, make_bundle):
    path = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path
    status, out, err = sjepa("verify", path)
    assert (status, err) == (0, "")
    assert re.findall(r"(fp32|fp16)\s+(ort-cpu|torch) .* passed", out) == [
        ("fp32", "ort-cpu"),
        ("fp32", "torch"),
        ("fp16", "ort-cpu"),
    ]
    told, verdict = out.splitlines()[-2:]
    assert told.startswith("not judged: fp16 on torch, bf16 on ort-cpu, bf16 on torch, anything on ort-cuda, ")
    assert verdict == "verified: 2 graphs right on ort-cpu, 1 graph right on torch"
    assert "not judged: bf16 on ort-cpu. ONNX Runtime has no bf16 kernels on the CPU.\n" in sjepa("verify", path, "-v")[1]


@pytest.mark.parametrize(
    ("flags", "judged"),
    [
        ("--backend torch", [("torch", "fp32")]),
        ("--backend ort-cpu", [("ort-cpu", "fp32"), ("ort-cpu", "fp16")]),
        ("--precision fp16", [("ort-cpu", "fp16")]),
        ("--precision fp16 --precision fp32 --backend ort-cpu", [("ort-cpu", "fp32"), ("ort-cpu", "fp16")]),
    ],
)
def test_verify_judges_what_is_asked_for(sjepa, make_bundle, flags, judged):
    path = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path
    status, out, _ = sjepa("verify", path, *flags.split(), "--json")
    assert status == 0
    assert [(r["backend"], r["precision"]) for r in json.loads(out)["results"]] == judged


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_verify_fails_where_the_outputs_differ(sjepa, bundle, flags):
    """The hashes are right, the outputs are not: as on a machine that computes something else."""
    arrays = dict(np.load(bundle / "reference.npz"))
    arrays["outputs"][2, 0] *= 1.01
    np.savez(bundle / "reference.npz", **arrays)
    rehash(bundle, "reference.npz")
    status, out, err = sjepa("verify", bundle, "--backend", "ort-cpu", *flags)
    assert status == 1
    assert err.endswith(f"{bundle} does not give the reference outputs on this machine. Do not decode with what failed.\n")
    assert re.search(r"fp32\s+ort-cpu .* FAILED", err if flags else out)
    if flags:
        answer = json.loads(out)
        assert answer["passed"] is False
        assert answer["results"][0]["worst"].startswith("eeg 2 at batch")


def test_verify_finds_other_weights_under_the_same_contract(sjepa, make_bundle, bundle):
    """The other graph says that it was made from this checkpoint: what opens is still compared with the reference."""
    own = onnx.load(bundle / "model.fp32.onnx")
    other = onnx.load(make_bundle("prelocal", model_seed=1).graph_path("fp32"))
    onnx.helper.set_model_props(other, {entry.key: entry.value for entry in own.metadata_props})
    onnx.save(other, bundle / "model.fp32.onnx")
    rehash(bundle, "model.fp32.onnx")
    assert sjepa("verify", bundle, "--backend", "ort-cpu")[0] == 1


# ---------------------------------------------------------------- run on recordings


@pytest.fixture(scope="module")
def eeglab(written):
    """Return the path of a recording of 32 channels."""
    return written("eeglab_data.set").path


@pytest.fixture(scope="module")
def recording(eeglab):
    return mne.io.read_raw(eeglab, preload=True, verbose="error")


def by_hand(raw, spec, model, hop):
    """Return times and predictions by MNE's filter, sums of sincs, a loop over windows, and PyTorch in float64."""
    data = mne.filter.filter_data(raw.get_data(), 128.0, 0.5, 40.0, phase="zero", verbose="error")
    data = sinc_sums(data, 128.0, 100.0)
    data = (data - data.mean(axis=0)) * 1e6
    times, outputs = [], []
    for start in range(0, data.shape[1] - 199, hop):
        times.append((start + 199) / 100)
        window = torch.from_numpy(data[None, :, start : start + 200])
        with torch.no_grad():
            outputs.append(model(window)[0].numpy())
    assert spec.input_shape == (len(data), 200)
    return np.array(times), np.array(outputs)


def read_table(text):
    header, *lines = text.splitlines()
    assert header.split("\t")[0] == "time"
    values = np.array([[float(cell) for cell in line.split("\t")] for line in lines])
    return header.split("\t")[1:], values[:, 0], values[:, 1:]


def assert_equal_tables(text, times, outputs):
    _, found_times, found = read_table(text)
    np.testing.assert_allclose(found_times, times, rtol=0, atol=1e-6)
    assert found.shape == outputs.shape
    assert np.abs(found - outputs).max() < 1e-5 * np.sqrt(np.mean(outputs**2))


@pytest.fixture(scope="module")
def eeglab_bundle(make_bundle, recording):
    """Return a 32-channel contextual model of the recording's own montage."""
    positions = tuple(tuple(map(float, channel["loc"][:3])) for channel in recording.info["chs"])
    return make_bundle("contextual", n_chans=32, ch_names=tuple(recording.ch_names), positions=positions)


def test_a_recording_is_decoded_as_pytorch_does_contextual(sjepa, eeglab, recording, eeglab_bundle, tmp_path):
    status, out, err = sjepa("run", eeglab_bundle.path, eeglab, "--out", tmp_path / "out.tsv", "--json")
    assert status == 0
    model = build_model(eeglab_bundle.spec, seed=0).double().eval()
    times, outputs = by_hand(recording, eeglab_bundle.spec, model, 200)
    assert_equal_tables((tmp_path / "out.tsv").read_text(), times, outputs)
    summary = json.loads(out)
    assert (summary["n_windows"], summary["hop"], summary["random_weights"]) == (len(times), 2.0, True)
    assert summary["steps"][0] == "band-passed 0.5 to 40 Hz, zero-phase FIR"
    assert "recording: resampled from 128 to 100 Hz\n" in err
    assert "random: the predictions mean nothing" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.tsv"]


def test_channels_named_on_the_command_line_are_decoded_as_pytorch_does(sjepa, eeglab, recording, tmp_path):
    """In the reverse order of the file, to show that names decide."""
    raw = recording.copy().pick(recording.ch_names[::-1])
    flags = ("--precision", "fp32", "--max-batch", "8", "--n-outputs", "2", "--seed", "4")
    channels = ("--channels", ",".join(raw.ch_names))
    assert sjepa("export", "--variant", "postlocal", *channels, *flags, "--out", tmp_path / "bundle")[0] == 0
    status, out, err = sjepa("run", tmp_path / "bundle", eeglab, "--hop", "1")
    assert status == 0
    spec = Bundle.open(tmp_path / "bundle").spec
    times, outputs = by_hand(raw, spec, build_model(spec, seed=4).double().eval(), 100)
    assert out.startswith("time\tprediction_0\tprediction_1\n1.990000\t")
    assert_equal_tables(out, times, outputs)
    assert err.endswith(f"decoded: {len(times)} windows of 2 s every 1 s\n")


def about_its_centre(positions):
    """Move positions so that the sphere |p - c| = r that fits them best in the least squares of |p|^2 has its centre at 0."""
    p = np.array(positions)
    solution = np.linalg.lstsq(np.column_stack([2 * p, np.ones(len(p))]), (p**2).sum(axis=1), rcond=None)[0]
    return p - solution[:3]


def test_a_recording_is_interpolated_to_129_channels_and_decoded_as_pytorch_does(sjepa, eeglab, recording, tmp_path):
    path, flags = tmp_path / "bundle", ("--precision", "fp32", "--max-batch", "8")
    assert sjepa("export", "--variant", "postlocal", *flags, "--out", path)[0] == 0
    status, out, err = sjepa("run", path, eeglab, "--interpolate", "1")
    assert status == 0
    assert "recording: interpolated 128 of 129 channels: E1, E2, E3, E4, E5, E6, E7, E8 and 120 more\n" in err
    raw, net = recording.copy().drop_channels(["EOG1", "EOG2"]), read_montage("GSN-HydroCel-129")  # no EEG, by their names
    digs = []
    for names, positions in ((raw.ch_names, [channel["loc"][:3] for channel in raw.info["chs"]]), (net.ch_names, net.positions)):
        ch_pos = dict(zip(names, about_its_centre(positions), strict=True))
        digs.append(mne.channels.make_dig_montage(ch_pos, coord_frame="head"))
    measured = raw.get_data(picks="Cz")
    raw.set_montage(digs[0])
    with mne.use_log_level("error"):
        raw = raw.interpolate_to(digs[1], origin=(0.0, 0.0, 0.0), method="spline")
    raw._data[raw.ch_names.index("Cz")] = measured  # what was measured is kept
    spec = Bundle.open(path).spec
    assert spec.ch_names == tuple(raw.ch_names)
    assert_equal_tables(out, *by_hand(raw, spec, build_model(spec, seed=0).double().eval(), 200))


def test_an_array_with_rate_and_unit_is_decoded(sjepa, make_bundle, tmp_path):
    """Without filter, reference and resampling only the cutting is left: each hop one window that NumPy can cut."""
    preprocessing = Preprocessing(reference="none", l_freq=None, h_freq=None)
    spec = small_spec(preprocessing=preprocessing)
    samples = eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0]
    np.save(tmp_path / "a.npy", samples / 1000)
    bundle = make_bundle("prelocal", preprocessing=preprocessing)
    status, out, _ = sjepa("run", bundle.path, tmp_path / "a.npy", "--sfreq", 100, "--unit", "mV", "--hop", "0.25")
    assert status == 0
    starts = np.arange(0, 801, 25)
    windows = np.stack([samples[:, start : start + 200] for start in starts]).astype(np.float64)
    with torch.no_grad():
        outputs = build_model(spec, seed=0).double().eval()(torch.from_numpy(windows)).numpy()
    assert_equal_tables(out, (starts + 199) / 100, outputs)


def test_a_recording_that_begins_flat_is_decoded_and_told(sjepa, bundle, tmp_path):
    """Its first windows hold what filter and reference round a constant to: the guard of units took it for another unit."""
    names = list(MONTAGE.ch_names)
    volts = np.random.default_rng(0).normal(0, 2e-5, (8, 4096))
    volts[:, :1280] = 3e-3
    np.save(tmp_path / "a.npy", volts)
    status, out, err = sjepa("run", bundle, tmp_path / "a.npy", "--sfreq", 128, "--unit", "V")
    assert status == 0, err
    assert "is flat in" in err
    raw = mne.io.RawArray(volts, mne.create_info(names, 128.0, "eeg"), verbose="error")
    assert_equal_tables(out, *by_hand(raw, small_spec(), build_model(small_spec(), seed=0).double().eval(), 200))
    np.save(tmp_path / "b.npy", np.full((8, 4096), 3e-3))
    status, _, err = sjepa("run", bundle, tmp_path / "b.npy", "--sfreq", 128, "--unit", "V")
    assert (status, "flat" in err, "another unit" in err) == (2, True, False)
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(0, 2e-5, (3, 8, 200)) * [[[1]], [[1e-6]], [[1e-6]]])
    status, _, err = sjepa("run", bundle, tmp_path / "c.npy", "--unit", "V")
    assert (status, "2 of its 3 windows, the first of them number 1" in err) == (2, True)


def test_the_table_is_headed_by_the_classes(sjepa, make_bundle, array):
    bundle = make_bundle("prelocal", class_names=("left", "right", "rest"))
    status, out, _ = sjepa("run", bundle.path, *array)
    assert (status, read_table(out)[0]) == (0, ["left", "right", "rest"])


def test_a_table_is_replaced_whole_or_not_at_all(sjepa, bundle, array, tmp_path, monkeypatch):
    table = tmp_path / "out.tsv"
    table.write_text("old")

    def fail(stream, *_, **__):
        stream.write("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sjepa_deploy.cli.run._write", fail)
        status, _, err = sjepa("run", bundle, *array, "--out", table, "--force")
    assert (status, err) == (2, f"sjepa-run: {table} cannot be written (No space left on device). Choose another --out, "
                                "or free some space.\n")  # fmt: skip
    assert table.read_text() == "old"
    assert sjepa("run", bundle, *array, "--out", table, "--force")[0] == 0
    assert table.read_text().startswith("time\t")
    assert {entry.name for entry in tmp_path.iterdir()} == {"bundle", "a.npy", "out.tsv"}


# ---------------------------------------------------------------- doctor, help, the group


def test_doctor_shows_versions_and_backends(sjepa):
    status, out, err = sjepa("doctor")
    assert (status, err) == (0, "")
    for package in ("numpy", "onnxruntime", "torch", "mne"):
        assert re.search(rf"{package}\W+{re.escape(importlib.metadata.version(package))}", out)
    assert "backend ort-cpu: runs here" in out
    answer = json.loads(sjepa("doctor", "--json")[1])
    reasons = answer["backends"]
    assert set(reasons) == set(BACKENDS)
    assert reasons["ort-cpu"] is reasons["torch"] is None
    assert all(reason is None or reason.endswith(".") for reason in reasons.values())
    assert answer["packages"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert int(answer["machine"]["cores"]) >= 1


def test_doctor_tells_which_kernels_were_faster(sjepa, make_bundle, tmp_path):
    copy_bundle(make_bundle("prelocal"), tmp_path / "b")
    status, _, err = sjepa("doctor", tmp_path)
    assert (status, "manifest" in err) == (2, True), "a folder that is no bundle is told"
    tmp_path /= "b"
    empty = KernelRecord(precision="fp16", gpu="a GPU", driver="580", choices=(), created="")
    assert "measured no batch" in " ".join(sjepa("doctor", tmp_path)[1].split())
    choices = Choices(tmp_path, empty, "key")
    choices.settle(8, {"window": lambda: time.sleep(0.01), "batch": lambda: None})
    choices.settle(2, {"batch": lambda: time.sleep(0.01), "window": lambda: None})
    told = " ".join(sjepa("doctor", tmp_path)[1].split())
    assert "cuda fp16 on a GPU, batch 2: one window at a time, " in told
    assert re.search(
        r"cuda fp16 on a GPU, batches 5 to 8: many windows at a time, \d us at 8 \(one window at a time 1\d,\d+ us", told
    )
    ((record,),) = json.loads(sjepa("doctor", "--json", tmp_path)[1])["kernels"].values()
    assert [choice["kernels"] for choice in record["choices"]] == ["window", "batch"]


@settings(max_examples=200)
@given(st.integers(2, 2000), st.integers(2, 2000))
def test_doctor_tells_the_batches_that_a_measured_size_settles(batch, largest):
    """Those whose size is the measured one, by the backend's own rule."""
    size = size_for(min(batch, largest), largest)
    choice = KernelChoice(batch=size, kernels="batch", medians_us={"batch": 1.0, "window": 2.0})
    (line,) = kernel_lines(KernelRecord(precision="fp16", gpu="a GPU", driver="580", choices=(choice,), created=""))
    told = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line.partition(":")[0])]
    assert [told[0], told[-1]] == [min(b for b in range(2, largest + 1) if size_for(b, largest) == size), size]


def test_doctor_tells_why_one_window_has_the_only_kernels(sjepa, tmp_path):
    export_small(tmp_path / "b", small_spec("prelocal", n_outputs=5))
    reason = "The kernels for batches do not take 5 outputs; those of PreLocal and PostLocal take up to 4."
    told = " ".join(sjepa("doctor", tmp_path / "b")[1].split())
    assert f"cuda runs every batch on its kernels of one window. {reason}" in told
    assert list(json.loads(sjepa("doctor", "--json", tmp_path / "b")[1])["one_kernel_family"].values()) == [reason]


def test_doctor_says_how_to_get_a_missing_backend(sjepa, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "(the extra [export])" in json.loads(sjepa("doctor", "--json")[1])["backends"]["torch"]
    assert "torch: does not run here: This needs torch" in " ".join(sjepa("doctor")[1].split())


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_a_help_page(sjepa, name, flag):
    status, out, err = sjepa(name, flag)
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: sjepa-{name} ")
    for option in _command(name).params:
        assert option.param_type_name == "argument" or option.help, f"{option.name} has no help"


def test_the_group_knows_all_commands(capsys, make_bundle):
    assert run_command(group, "sjepa", ["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in COMMANDS)
    assert run_command(group, "sjepa", ["--version"]) == 0
    assert importlib.metadata.version("sjepa-deploy") in capsys.readouterr().out
    assert run_command(group, "sjepa", ["verify", str(make_bundle("prelocal").path), "--backend", "ort-cpu"]) == 0
    assert "passed" in capsys.readouterr().out
    assert run_command(group, "sjepa", []) == 0
    assert capsys.readouterr().out == page
    assert run_command(group, "sjepa", ["decode"]) == 2
    assert capsys.readouterr().err == "sjepa: No such command 'decode'. See sjepa --help.\n"


def test_every_console_script_is_a_command():
    scripts = importlib.metadata.distribution("sjepa-deploy").entry_points.select(group="console_scripts")
    assert {script.name for script in scripts} == {"sjepa", *(f"sjepa-{name}" for name in COMMANDS)}
    for script in scripts:
        done = in_a_process(script.name, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Usage: {script.name} ")


def test_a_reader_that_has_seen_enough_is_no_error(bundle, array):
    """As in: sjepa-run BUNDLE RECORDING | head -1."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys, sjepa_deploy.cli.run as m; sys.argv[0] = 'sjepa-run'; m.main()"
    command = [sys.executable, "-c", code, str(bundle), *map(str, array)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert all(line.startswith("recording: ") for line in done.stderr.splitlines())  # what is told before decoding


# ---------------------------------------------------------------- bad input


@pytest.fixture
def array(tmp_path):
    """Return the arguments of a run on ten seconds of EEG in an array in microvolts."""
    np.save(tmp_path / "a.npy", eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0])
    return (tmp_path / "a.npy", "--sfreq", "100", "--unit", "uV")


@pytest.fixture
def refuses(sjepa, tmp_path):
    """Return a function that runs a command and checks the error: status 2, one line that matches, nothing written."""

    def check(message, *arguments, status=2):
        before = listing(tmp_path)
        found, out, err = sjepa(*arguments)
        assert (found, out) == (status, ""), err
        assert re.fullmatch(rf"sjepa-{arguments[0]}: .*{message}.*\n", err), err
        assert listing(tmp_path) == before

    return check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--variant transformer", "'transformer' is not one of 'prelocal', 'postlocal', 'contextual', 'base'"),
        ("", "Neither --variant nor --checkpoint was given. Name one"),
        ("--variant contextual --montage GSN-HydroCel-128x", "is neither a montage nor a file. Did you mean GSN-HydroCel-128"),
        ("--variant contextual --montage cap", "is neither a montage nor a file. There are GSN-HydroCel-129"),
        ("--variant contextual --montage sjepa-62 --channels Cz,E1", "has no channels E1. Pick from its 62 channels"),
        (
            "--variant contextual --montage sjepa-62 --channels 62",
            "contradict each other. Name the channels, or leave one flag out",
        ),
        ("--variant contextual --channels Cz,Pz", "needs the positions of its 2 channels.* Name their montage with --montage"),
        ("--variant prelocal --channels Cz,cz", "Channel names appear twice: Cz, cz. Name every channel once"),
        ("--variant prelocal --channels 0", "n_chans is 0. Use 1 or more"),
        ("--variant prelocal --n-times 151", "first time token needs 152 samples. Use windows of at least 152 samples"),
        ("--variant prelocal --sfreq nan", "sfreq is nan Hz. Use a positive sampling rate"),
        ("--variant prelocal --unit pV", "'pV' is not one of 'nV', 'uV', 'mV', 'V'"),
        ("--variant prelocal --band 40 1", "The band 40.0 to 1.0 Hz is not one. Use positive edges"),
        ("--variant prelocal --n-outputs 2 --class-names a,b,c", "3 class names for 2 outputs. Name every output once"),
        (
            "--variant prelocal --channels 8 --precision fp8",
            "'fp8' is not one of 'fp32', 'tf32', 'fp16'.* See sjepa-export",
        ),
        ("--variant prelocal --channels 8 --precision ,", "',' has an empty name. Separate names by one comma"),
        (
            "--variant prelocal --channels 8 --precision tf32",
            "'tf32' is not a precision of a graph. Use a list of fp32",
        ),
        ("--variant prelocal --channels 8 --opset 16", "Opset 16 is not supported. Use one of 17 to 21; 17 runs everywhere"),
        ("--variant prelocal --channels 8 --engine fp64", "'fp64' is not one of 'auto', 'none', 'fp32', 'tf32'"),
        ("--variant prelocal --channels Cz,,Pz", "'Cz,,Pz' has an empty name. Separate names by one comma"),
        ("--variant prelocal --max-batch 0", "'--max-batch': 0 is not in the range 1<=x<=65536. See sjepa-export --help"),
        ("--variant prelocal --checkpoint nowhere", "There is no checkpoint at nowhere. Check the path"),
        ("--variant all --checkpoint nowhere", "A checkpoint holds one variant. Leave --variant all out"),
        ("--variant prelocal --parity-data nowhere.npy", "nowhere.npy is missing or no array .* Give a .npy of windows"),
        ("--variant prelocal --outputs 2", "No such option.* See sjepa-export --help"),
    ],
)
def test_exports_that_cannot_be(refuses, tmp_path, flags, message):
    refuses(message, "export", *flags.split(), "--out", tmp_path / "out")


def test_checkpoints_that_do_not_fit(refuses, checkpoint, tmp_path):
    to = ("--out", tmp_path / "out")
    message = "variant = postlocal, which contradicts the prelocal asked for. Leave the flag out, or use another"
    refuses(message, "export", "--variant", "prelocal", "--checkpoint", checkpoint, *to)
    message = "n_chans = 8, which contradicts the 9 asked for. Leave the flag out, or use another"
    refuses(message, "export", "--checkpoint", checkpoint, "--channels", "9", *to)
    refuses("needs 152 samples. Use windows of at", "export", "--checkpoint", checkpoint, "--n-times", "100", *to)
    message = "give 2 time tokens, but the head of .* was made for 1. Use --n-times from 152 to 279"
    refuses(message, "export", "--checkpoint", checkpoint, "--n-times", "280", *to)


def test_a_truncated_checkpoint(refuses, checkpoint, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    message = r"model\.safetensors is truncated or not a safetensors file .*\. Get the file again"
    refuses(message, "export", "--checkpoint", damaged, "--out", tmp_path / "out")


def test_a_hostile_pickle_is_not_run(refuses, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    weights = {"feature_encoder.1.0.weight": torch.zeros(8, 1, 32), "more": Hostile()}
    torch.save(weights, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(weights))
    for name in ("zip.pth", "bare.pth"):
        message = r"could run code when it is loaded\. Save the state dict alone, best as safetensors"
        refuses(message, "export", "--checkpoint", tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_places_that_are_taken_or_cannot_be_written(refuses, bundle, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/diary.txt").touch()
    command = ("export", "--variant", "prelocal", *SMALL)
    refuses("There is a bundle at .* already. Use --force to replace it", *command, "--out", bundle)
    refuses("is a folder with other content. Choose another --out", *command, "--force", "--out", tmp_path / "folder")
    refuses("exists and is no folder. Choose another --out", *command, "--force", "--out", tmp_path / "file")
    refuses(r"cannot be written \(File exists\)\. Choose another --out", *command, "--out", tmp_path / "file/out")


@pytest.mark.parametrize("command", ["verify", "run"])
def test_bundles_that_were_tampered_with(refuses, bundle, array, command):
    arguments = (command, bundle, *(array if command == "run" else ()))
    flip_byte(bundle / "model.fp32.onnx")
    refuses(r"model\.fp32\.onnx of the bundle .* was changed after .*\. Copy or export the bundle again", *arguments)
    flip_byte(bundle / "model.fp32.onnx")
    edit_manifest(bundle, lambda m: m["spec"]["signal"].update(sfreq=128.0), sign=False)
    refuses(r"manifest\.json was changed after .*\. Copy or export the bundle again", *arguments)
    edit_manifest(bundle, lambda m: m["spec"]["signal"].update(sfreq=128.0))
    arguments = ["128" if argument == "100" else argument for argument in arguments]
    refuses("contract inside .* differs in sfreq. Copy or export", *arguments)


def test_a_graph_that_onnx_runtime_cannot_load(refuses, bundle, array):
    graph = onnx.load(bundle / "model.fp32.onnx")
    graph.opset_import[0].version = 99
    onnx.save(graph, bundle / "model.fp32.onnx")
    rehash(bundle, "model.fp32.onnx")
    refuses(r"cannot load model\.fp32\.onnx on CPUExecutionProvider: .*\. .*export with another --opset", "run", bundle, *array)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--precision fp8", "'fp8' is not one of 'fp32', 'tf32', 'fp16', 'bf16'. See sjepa-verify --help"),
        ("--backend tpu", "'tpu' is not a backend. Use one of ort-cpu, torch"),
        ("--precision fp16", "has no fp16 graph. Use fp32, or export with --precision fp16"),
        ("--precision tf32", "could be judged: tf32 on ort-cpu: .* Name another --backend or --precision"),
    ],
)
def test_verifications_that_cannot_be(refuses, bundle, flags, message):
    refuses(message, "verify", bundle, *flags.split())


def test_a_precision_that_does_not_load_when_both_are_named(refuses, make_bundle, eeglab):
    path = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path
    for command in (("verify", path, "--backend", "ort-cpu"), ("run", path, eeglab, "--interpolate", "1")):
        refuses("no bf16 kernels on the CPU. Use --precision fp32 or fp16", *command, "--precision", "bf16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--precision fp8", "'fp8' is not one of 'fp32', 'tf32', 'fp16', 'bf16'. See sjepa-run --help"),
        ("--precision fp16", "has no fp16 graph. Use fp32, or export with --precision fp16"),
        ("--backend tpu", "'tpu' is not a backend. Use one of ort-cpu, torch"),
        ("--hop 0", "--hop is 0 s, a sample of this model 0.01 s: use 0.01 or more"),
        ("--hop 0.004", "--hop is 0.004 s, a sample of this model 0.01 s: use 0.01 or more"),
        ("--hop -1", "--hop is -1 s"),
        ("--hop nan", "--hop is nan s"),
        ("--hop inf", "--hop is inf s"),
        ("--hop 1e300", r"--hop is 1e\+300 s"),
        ("--json", "--json needs --out: standard output cannot hold both. See sjepa-run --help"),
        ("--sfreq 64", "is sampled at 64 Hz, the model at 100 Hz. Record at the model's rate or above"),
        ("--unit V", "samples look like another unit's. State the unit they are stored in with `--unit`"),
    ],
)
def test_runs_that_cannot_be(refuses, bundle, array, flags, message):
    refuses(message, "run", bundle, *array, *flags.split())


def test_a_table_that_does_not_fit_on_the_disk(sjepa, bundle, array):
    status, _, err = sjepa("run", bundle, *array, "--out", "/dev/full")
    assert status == 2
    assert re.fullmatch(r"sjepa-run: .*cannot be written \(No space left on device\)\. Choose another --out.*\n", err)


def test_recordings_that_do_not_fit(refuses, bundle, eeglab, eeglab_bundle, make_bundle, array, written, tmp_path):
    volts = tmp_path / "volts.npy"
    np.save(volts, np.load(array[0]) * 1e-6)
    message = r"which is no EEG: .*\. State the unit they are stored in with `--unit` \(volts passed as microvolts\?\)"
    refuses(message, "run", bundle, volts, *array[1:])
    refuses("Give --sfreq and --unit", "run", bundle, volts)
    refuses("There is no recording .*nowhere.edf. Check the path", "run", bundle, tmp_path / "nowhere.edf")
    message = "lacks, or marks as bad, 20 of the model's 32 channels: .*make them from the others with `--interpolate`"
    refuses(message, "run", eeglab_bundle.path, written("biosig16.edf").path)
    refuses("Give exactly the model's channels in rows", "run", eeglab_bundle.path, *array)
    fast = make_bundle("prelocal", sfreq=250.0)
    message = "sampled at 128 Hz, the model at 250 Hz. Record at the model's rate or above"
    refuses(message, "run", fast.path, eeglab)
    refuses(r"cannot be written \(Is a directory\)", "run", bundle, *array, "--out", tmp_path)
    refuses(r"cannot be written \(No such file or directory\)", "run", bundle, *array, "--out", tmp_path / "no/out.tsv")


def test_ctrl_c_ends_an_export_without_a_trace(sjepa, bundle, tmp_path, monkeypatch):
    """The signal comes when the graphs are written and the old bundle still stands."""
    monkeypatch.setattr("sjepa_deploy.export.to_bundle.make_reference", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = listing(tmp_path)
    status, out, err = sjepa("export", "--variant", "prelocal", *SMALL, "--out", bundle, "--force")
    assert (status, out, err) == (130, "", "\nsjepa-export: interrupted\n")  # click first ends the line of the ^C
    assert listing(tmp_path) == before


def test_ctrl_c_in_a_process_of_its_own(bundle, array, tmp_path):
    code = (
        "import os, signal, sjepa_deploy.cli.run as m, sys\n"
        "m.fit_stretches = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv[0] = 'sjepa-run'; m.main()"
    )
    command = [sys.executable, "-c", code, str(bundle), *map(str, array), "--out", str(tmp_path / "out.tsv")]
    before = listing(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nsjepa-run: interrupted\n")
    assert listing(tmp_path) == before
