"""The backend "fastest": what is chosen from planted reports, and real runs that are kept, read again and decoded with."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from bench_reports import measure_quickly
from bundles import copy_bundle

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import BackendError, BenchmarkError, InputError
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.runtime import machine as environment
from sjepa_deploy.runtime.backend import BACKENDS, Backend, BackendEntry, BackendOptions, open_backend
from sjepa_deploy.runtime.backends import fastest
from sjepa_deploy.runtime.backends.fastest import FastestRecord, find
from sjepa_deploy.runtime.backends.ort import OrtCpuBackend
from sjepa_deploy.runtime.backends.reference import TorchBackend
from sjepa_deploy.runtime.bench import contenders
from sjepa_deploy.runtime.bench.cells import Cell, CellKey, Estimate, Latency, Percentile
from sjepa_deploy.runtime.bench.files import load_report, write_report
from sjepa_deploy.runtime.bench.keep_fastest import choose, keep
from sjepa_deploy.runtime.bench.results import Ending, LeftOut
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench

ROOT = Path(__file__).parents[1]
ONE_THREAD = BackendOptions(n_threads=1)
QUICK = {"scenarios": ("throughput",), "seconds": 0.1, "precisions": ("fp32",), "batches": (1, 3), "options": ONE_THREAD}


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    measure_quickly(monkeypatch)


def cell(backend, batch, median, *, within=0.02, scenario="throughput", precision="fp32", bundle="b", **more):
    figure = None if median is None else Estimate(value=median, low=median * (1 - within), high=median * (1 + within))
    return Cell(
        id="",
        key=CellKey(scenario=scenario, bundle=bundle, backend=backend, precision=precision, batch=batch),
        latency=Latency(
            n=100,
            n_blocks=10,
            percentiles=(Percentile(percent=50.0, value=figure, n_needed=10),),
            **dict.fromkeys(("min_us", "mean_us", "max_us"), 1.0),
        ),
        **{"parity": True} | more,
    )


def chosen(*cells):
    return {choice.batch: choice.backend for choice in choose(cells)}


@pytest.fixture(scope="module")
def measured(make_bundle):
    """A bundle, and a report of its throughput on two real backends."""
    bundle = make_bundle("contextual")
    report, samples = run_bench((bundle,), BenchConfig(**QUICK | {"backends": ("ort-cpu", "torch")}))
    return bundle, report, samples


def with_medians(report, medians):
    """Return `report` as if its cells had these medians, by batch and backend."""
    cells = []
    for each in report.cells:
        name = each.key.backend, each.key.batch
        cells.append(dataclasses.replace(each, latency=cell(*name, medians[name]).latency) if name in medians else each)
    return dataclasses.replace(report, cells=tuple(cells))


CROSSING = {("ort-cpu", 1): 100.0, ("torch", 1): 400.0, ("ort-cpu", 3): 900.0, ("torch", 3): 500.0}


@pytest.fixture
def crossing(measured, tmp_path):
    """A bundle of its own, and a report in which ort-cpu is the fastest at batch 1 and torch at batch 3."""
    bundle, report, _ = measured
    return Bundle.open(copy_bundle(bundle, tmp_path / "b")), with_medians(report, CROSSING)


def in_pytorch(spec, windows):
    with torch.no_grad():
        return build_model(spec, seed=0).double().eval()(torch.from_numpy(windows).double()).numpy()


def eeg(spec, n):
    return eeg_windows(n, *spec.input_shape, spec.sfreq, np.random.default_rng(0))


# ---------------------------------------------------------------- the choice


def test_each_batch_goes_to_the_fastest_there():
    """The medians in us of Contextual on an H100: our kernels win small batches, TensorRT large ones."""
    times = {"cuda": (118.9, 365.5, 1385.7, 6191.0), "tensorrt": (381.6, 570.4, 1139.8, 3718.0)}
    cells = [cell(name, batch, t) for name, ts in times.items() for batch, t in zip((1, 4, 16, 64), ts, strict=True)]
    assert chosen(*cells) == {1: "cuda", 4: "cuda", 16: "tensorrt", 64: "tensorrt"}
    assert choose(cells)[2].medians_us == {"cuda": 1385.7, "tensorrt": 1139.8}


def test_what_cannot_be_told_apart_stays_on_the_backend_of_most_sizes():
    """The medians of PreLocal there: at batch 64 TensorRT may be ahead by nothing, which is no reason to open it."""
    times = {"cuda": (25.0, 64.2, 755.2), "tensorrt": (62.0, 96.8, 752.9)}
    cells = [cell(name, batch, t) for name, ts in times.items() for batch, t in zip((1, 4, 64), ts, strict=True)]
    assert chosen(*cells) == dict.fromkeys((1, 4, 64), "cuda")
    sure = [dataclasses.replace(c, latency=cell("x", 1, c.latency.at(50.0).value, within=0.001).latency) for c in cells]
    assert chosen(*sure) == {1: "cuda", 4: "cuda", 64: "tensorrt"}


def test_what_is_wrong_or_careless_is_not_chosen():
    cells = [cell("ort-cpu", 1, 100.0), cell("cuda", 1, 10.0, parity=False), cell("tensorrt", 1, 20.0, caution="differs")]
    assert chosen(*cells) == {1: "ort-cpu"}
    assert choose(cells)[0].medians_us == {"ort-cpu": 100.0}
    with pytest.raises(BenchmarkError, match="No backend is right: throughput batch 1: b cuda fp32, throughput batch 1: b ten"):
        choose(cells[1:])


def test_a_cell_that_is_not_whole_chooses_nothing():
    too_few_blocks = cell("tensorrt", 4, 10.0)
    (median,) = too_few_blocks.latency.percentiles
    median = dataclasses.replace(median, value=Estimate(value=10.0))
    too_few_blocks = dataclasses.replace(
        too_few_blocks, latency=dataclasses.replace(too_few_blocks.latency, percentiles=(median,))
    )
    for bad, what in ((too_few_blocks, "blocks"), (cell("tensorrt", 4, None), "calls")):
        with pytest.raises(BenchmarkError, match=rf"throughput batch 4: b tensorrt fp32 has too few {what} to be compared"):
            choose([cell("cuda", 4, 100.0), bad])


def record(**backends):
    choices = tuple(fastest.Choice(batch=int(name[1:]), backend=backend, medians_us={}) for name, backend in backends.items())
    return FastestRecord(precision="fp32", bundle="", machine={}, choices=choices, created="")


def test_sizes_that_were_not_measured_go_to_the_next_larger_one():
    """What a call takes there bounds what it takes with fewer windows."""
    at = record(b1="cuda", b4="cuda", b16="tensorrt", b64="ort-cuda").backend_at
    assert [at(n) for n in (1, 2, 4, 5, 16, 17, 64, 65, 1000)] == [
        *("cuda", "cuda", "cuda", "tensorrt", "tensorrt", "ort-cuda", "ort-cuda", "ort-cuda", "ort-cuda")
    ]


@pytest.mark.parametrize(
    ("backends", "text"),
    [
        ({"b1": "cuda", "b4": "cuda"}, "cuda from batch 1 on"),
        ({"b1": "cuda", "b4": "cuda", "b16": "tensorrt"}, "cuda at batch 1 to 4, tensorrt from batch 5 on"),
        ({"b1": "cuda", "b2": "torch", "b3": "cuda"}, "cuda at batch 1, torch at batch 2, cuda from batch 3 on"),
    ],
)
def test_a_record_says_what_it_chose(backends, text):
    assert str(record(**backends)) == text


# ---------------------------------------------------------------- measured, kept, read again, decoded with


@pytest.mark.alone
def test_measures_keeps_and_decodes(make_bundle, sjepa_bench, tmp_path):
    """On real backends, whichever is the fastest here."""
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "b")
    digest = Bundle.open(path).manifest.digest
    options = (
        "--backend",
        "ort-cpu",
        "--backend",
        "torch",
        "--batch",
        "1",
        "--batch",
        "3",
        "--threads",
        "1",
        "--duration",
        "0.1",
    )
    status, out, err = sjepa_bench(path, *options, "--keep-fastest", "--out", tmp_path / "o")
    assert (status, err) == (0, "")
    report = load_report(tmp_path / "o" / "bench.json")
    assert {c.key.scenario for c in report.cells if c.key.backend != "nothing"} == {"throughput"}
    assert report.command.endswith("--keep-fastest")
    bundle = Bundle.open(path)
    assert bundle.manifest.digest == digest
    kept = find(bundle, "fp32")
    assert re.search(f"/b: the fastest in fp32 is {re.escape(str(kept))}", out)
    assert [choice.batch for choice in kept.choices] == [1, 3]
    for choice in kept.choices:
        medians = {c.key.backend: c.latency.at(50.0).value for c in report.cells if c.key.batch == choice.batch}
        assert choice.medians_us == {name: medians[name] for name in ("ort-cpu", "torch")}
    windows = eeg(bundle.spec, 4)
    wanted = in_pytorch(bundle.spec, windows)
    with sjepa_deploy.load(path, backend="fastest", n_threads=1) as predict:
        assert predict.backend.name == "fastest"
        assert predict.backend.record == kept
        for n in (1, 2, 3, 4):
            assert np.abs(predict(windows[:n]) - wanted[:n]).max() < TOLERANCE["fp32"] * np.sqrt(np.mean(wanted**2))


def test_each_batch_runs_on_the_backend_that_was_chosen(crossing, monkeypatch):
    bundle, report = crossing
    (kept,) = keep(report, bundle)
    assert str(kept) == "ort-cpu at batch 1, torch from batch 2 on"
    assert kept.machine == {
        "processor": environment.processor(),
        "cores": str(environment.n_cores()),
        **{name: environment.versions()[name] for name in ("onnxruntime", "torch")},
    }
    ran, closed = [], []
    for backend in (OrtCpuBackend, TorchBackend):
        run, close = backend.run, backend.close
        monkeypatch.setattr(backend, "run", lambda self, eeg, run=run: ran.append((self.name, len(eeg))) or run(self, eeg))
        monkeypatch.setattr(backend, "close", lambda self, close=close: closed.append(self.name) or close(self))
    windows = eeg(bundle.spec, 4)
    wanted = in_pytorch(bundle.spec, windows)
    with sjepa_deploy.load(bundle, backend="fastest", n_threads=1) as predict:
        for n in (1, 2, 3, 4, 1):
            assert np.abs(predict(windows[:n]) - wanted[:n]).max() < TOLERANCE["fp32"] * np.sqrt(np.mean(wanted**2))
        assert predict.backend.input_buffer(1) is None
        assert predict.backend.split(windows[:1], 1) is None
        with pytest.raises(InputError, match="The backend torch does not read arrays on the GPU"):
            predict(types.SimpleNamespace(shape=(2, 1, 1), __dlpack_device__=lambda: (2, 0)))
    assert ran == [("ort-cpu", 1), ("torch", 2), ("torch", 3), ("torch", 4), ("ort-cpu", 1)]
    assert sorted(closed) == ["ort-cpu", "torch"]


def test_the_benchmark_judges_it_where_it_is_asked_for_and_never_chooses_it(crossing):
    bundle, report = crossing
    keep(report, bundle)
    facts = contenders.bundle_facts((bundle,))
    by_default = contenders.open_contenders((bundle,), facts, backends=(), precisions=("bf16",), options=ONE_THREAD, seed=0)
    reasons = {each.label: each.reason for each in by_default if isinstance(each, LeftOut)}
    assert "ask for it with --backend fastest" in reasons["fastest"]
    again, _ = run_bench((bundle,), BenchConfig(**QUICK | {"backends": ("ort-cpu", "fastest")}))
    assert {(j.result.backend, j.passed) for j in again.parity} == {("ort-cpu", True), ("fastest", True)}
    with pytest.raises(BenchmarkError, match=r"backends with a measured throughput that decode are ort-cpu fp32\. Measure"):
        keep(again, bundle)


def test_a_report_that_is_there_is_kept_without_a_run(crossing, measured, sjepa_bench, tmp_path):
    bundle, report = crossing
    write_report(report, measured[2], tmp_path / "bench.json")
    status, out, err = sjepa_bench(bundle.path, "--keep-fastest", "--from", tmp_path / "bench.json")
    assert (status, err) == (0, "")
    assert out.endswith("b: the fastest in fp32 is ort-cpu at batch 1, torch from batch 2 on\n")
    assert find(bundle, "fp32").backends == ("ort-cpu", "torch")
    assert not list(Path().glob("bench-2*"))
    # the newest measurement is what counts
    turned = with_medians(report, {key: 1000 - value for key, value in CROSSING.items()})
    write_report(turned, measured[2], tmp_path / "bench.json")
    assert sjepa_bench(bundle.path, "--keep-fastest", "--from", tmp_path / "bench.json")[0] == 0
    assert find(bundle, "fp32").backends == ("torch", "ort-cpu")
    assert len(list((bundle.path / "engines" / "fastest").iterdir())) == 1


def test_a_bundle_on_several_machines_has_a_record_of_each(crossing, monkeypatch):
    bundle, report = crossing
    keep(report, bundle)
    elsewhere = dataclasses.replace(report, environment=dataclasses.replace(report.environment, processor="another"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastest, "processor", lambda: "another")
        keep(with_medians(elsewhere, {key: 1000 - value for key, value in CROSSING.items()}), bundle)
        assert find(bundle, "fp32").backends == ("torch", "ort-cpu")
    assert find(bundle, "fp32").backends == ("ort-cpu", "torch")


class OnGpu(Backend):
    """A backend with all that those of GPUs have."""

    name = "first"

    def __init__(self, bundle, precision, options):
        self.precision, self.calls = precision, []

    def run(self, eeg):
        return self.calls.append(("run", len(eeg))) or eeg

    def run_on_gpu(self, eeg):
        return self.calls.append(("run_on_gpu", eeg)) or np.array(self.name)

    def input_buffer(self, batch):
        return self.calls.append(("input_buffer", batch)) or np.zeros(batch)

    def warmup(self, batches=(1,), n_runs=10):
        self.calls.append(("warmup", batches, n_runs))

    def close(self):
        self.calls.append("close")


class OnGpuToo(OnGpu):
    name = "second"


def test_what_the_chosen_backends_offer_is_handed_on_by_the_batch(crossing, monkeypatch):
    bundle, report = crossing
    for cls in (OnGpu, OnGpuToo):
        monkeypatch.setitem(BACKENDS, cls.name, BackendEntry(target=f"{__name__}:{cls.__name__}", package="numpy", extra=""))
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(OnGpu=OnGpu, OnGpuToo=OnGpuToo))
    cells = [cell(n, b, t) for n, b, t in (("first", 1, 1.0), ("second", 1, 2.0), ("first", 3, 2.0), ("second", 3, 1.0))]
    label = report.bundles[0].label
    cells = [dataclasses.replace(each, key=dataclasses.replace(each.key, bundle=label)) for each in cells]
    keep(dataclasses.replace(report, cells=tuple(cells)), bundle)
    with sjepa_deploy.load(bundle, backend="fastest") as predict:
        backend = predict.backend
        assert len(backend.input_buffer(1)) == 1
        assert len(backend.input_buffer(2)) == 2
        windows = types.SimpleNamespace(shape=(3, 1, 1), __dlpack_device__=lambda: (2, 0))
        assert predict(windows).item() == "second"
        window = types.SimpleNamespace(__cuda_array_interface__={"shape": (1, 1, 1)})
        assert predict(window).item() == "first"
        backend.warmup((1, 2, 4), n_runs=5)
        first, second = backend._at[1], backend._at[2]
    assert first.calls == [("input_buffer", 1), ("run_on_gpu", window), ("warmup", (1,), 5), "close"]
    assert second.calls == [("input_buffer", 2), ("run_on_gpu", windows), ("warmup", (2,), 5), ("warmup", (4,), 5), "close"]


# ---------------------------------------------------------------- refused


def test_without_a_record_nothing_is_loaded(make_bundle):
    bundle = make_bundle("prelocal")
    mend = re.escape(f"Measure here with: sjepa-bench {bundle.path} --keep-fastest --precision fp32")
    with pytest.raises(BackendError, match=rf"has no record of the fastest backends in fp32\. {mend}"):
        sjepa_deploy.load(bundle, backend="fastest")
    with pytest.raises(BackendError, match="The backend fastest keeps no kernel on the GPU"):
        sjepa_deploy.load(bundle, backend="fastest", options=BackendOptions(persistent=True))


@pytest.mark.parametrize(
    ("what", "there", "message"),
    [
        ("processor", lambda: "Z80", r"processor is .+ in the record and Z80 here\. Measure here with: sjepa-bench"),
        ("n_cores", lambda: 999, r"cores is \d+ in the record and 999 here"),
        ("versions", lambda names: dict.fromkeys(names, "0.1"), r"onnxruntime is [\d.]+ in the record and 0\.1 here; torch is "),
        ("versions", lambda names: dict.fromkeys(names), r"onnxruntime is [\d.]+ in the record and missing here"),
    ],
)
def test_a_record_of_another_machine_is_refused_and_says_what_differs(crossing, monkeypatch, what, there, message):
    bundle, report = crossing
    keep(report, bundle)
    monkeypatch.setattr(fastest, what, there)
    with pytest.raises(BackendError, match=f"The record of the fastest backends in fp32 is stale: {message}"):
        sjepa_deploy.load(bundle, backend="fastest")


def test_a_record_of_another_gpu_or_driver_is_refused(crossing, monkeypatch):
    """The GPU counts for backends on it alone."""
    bundle, report = crossing
    keep(report, bundle)
    h100 = {"GPU": "H100", "driver": "580"}
    monkeypatch.setattr(fastest, "gpu", lambda device: h100)
    find(bundle, "fp32")
    monkeypatch.setitem(BACKENDS, "torch", dataclasses.replace(BACKENDS["torch"], depends_on=("gpu", "driver", "torch")))
    there = dataclasses.replace(report, environment=dataclasses.replace(report.environment, gpu="H100", gpu_driver="580"))
    keep(there, bundle)
    find(bundle, "fp32")
    monkeypatch.setitem(h100, "driver", "590")
    monkeypatch.setitem(h100, "GPU", "A100")
    with pytest.raises(BackendError, match="stale: gpu is H100 in the record and A100 here; driver is 580 in the record and 590"):
        find(bundle, "fp32")


def test_a_record_of_another_export_is_refused(crossing, make_bundle, tmp_path):
    bundle, report = crossing
    keep(report, bundle)
    other = Bundle.open(copy_bundle(make_bundle("contextual", model_seed=1), tmp_path / "other"))
    shutil.copytree(bundle.path / "engines", other.path / "engines")
    with pytest.raises(BackendError, match=f"the bundle's digest is {bundle.manifest.digest[:12]} in the record and "):
        sjepa_deploy.load(other, backend="fastest")


def test_an_altered_record_is_refused(crossing):
    bundle, report = crossing
    keep(report, bundle)
    (file,) = (bundle.path / "engines" / "fastest").iterdir()
    text = file.read_text()
    for altered, message in (
        (
            text.replace('"backend": "torch"', '"backend": "ort-cpu"'),
            r"was changed after it was kept \(its digest differs\)\. Del",
        ),
        (text[:-20], "is damaged: it is not readable as JSON"),
        (text.replace('"choices"', '"chosen"'), "is damaged: the top level has the unknown key 'chosen'"),
    ):
        assert altered != text
        file.write_text(altered)
        with pytest.raises(BackendError, match=message):
            sjepa_deploy.load(bundle, backend="fastest")
    keep(report, bundle)  # measuring again mends it
    assert find(bundle, "fp32").backends == ("ort-cpu", "torch")


def test_a_backend_that_cannot_be_opened_is_named_and_the_others_are_released(crossing, monkeypatch):
    bundle, report = crossing
    keep(report, bundle)
    closed, close = [], OrtCpuBackend.close
    monkeypatch.setattr(OrtCpuBackend, "close", lambda self: closed.append(self.name) or close(self))
    monkeypatch.setitem(sys.modules, "torch", None)
    message = r"torch, the fastest for some batches, cannot be opened: This needs torch, which is not installed\. Install it with"
    with pytest.raises(BackendError, match=message):
        sjepa_deploy.load(bundle, backend="fastest")
    assert closed == ["ort-cpu"]
    monkeypatch.setattr(
        "sjepa_deploy.runtime.backends.fastest.BACKENDS", {name: BACKENDS[name] for name in BACKENDS if name != "torch"}
    )
    with pytest.raises(BackendError, match="stale: torch is no backend of this release"):
        sjepa_deploy.load(bundle, backend="fastest")


@pytest.mark.alone
def test_fast_and_wrong_is_never_chosen(make_bundle, monkeypatch, sjepa_bench, tmp_path):
    planted.plant(monkeypatch.setitem)
    for name in ("wrong", "sleeps"):
        monkeypatch.setitem(BACKENDS, name, contenders.ALL_BACKENDS[name])
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "b")
    options = ("--backend", "sleeps", "--backend", "wrong", "--threads", "1", "--duration", "0.1", "--batch", "1")
    assert sjepa_bench(path, *options, "--keep-fastest", "--out", tmp_path / "o")[0] == 0
    (choice,) = find(Bundle.open(path), "fp32").choices
    assert (choice.backend, list(choice.medians_us)) == ("sleeps", ["sleeps"])


@pytest.mark.alone
def test_nothing_is_kept_of_an_interrupted_run(make_bundle, crossing, monkeypatch, sjepa_bench, tmp_path):
    planted.plant(monkeypatch.setitem)
    monkeypatch.setattr(planted.Interrupts, "calls_left", 3000)
    monkeypatch.setitem(BACKENDS, "interrupts", contenders.ALL_BACKENDS["interrupts"])
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "p")
    options = ("--backend", "interrupts", "--backend", "ort-cpu", "--duration", "60", "--keep-fastest", "--out", tmp_path / "o")
    assert sjepa_bench(path, *options)[0] == 130
    assert load_report(tmp_path / "o" / "bench.json").interrupted
    assert not (path / "engines").exists()
    bundle, report = crossing
    with pytest.raises(BenchmarkError, match="The run was interrupted, and nothing is kept of it"):
        keep(
            dataclasses.replace(
                report, partial=(Ending(kind="time limit", limit=9.0, n=1, of=2, run=1), Ending(kind="interrupted", run=2))
            ),
            bundle,
        )
    late = dataclasses.replace(report, partial=(Ending(kind="time limit", limit=75.0, n=85, of=100),))
    assert len(keep(late, bundle)) == 1, "all cells have enough blocks"


def test_a_report_of_another_machine_or_bundle_is_not_kept(crossing, make_bundle):
    bundle, report = crossing
    for change, message in (
        ({"processor": "Z80"}, "The report is of another machine or Python: processor is Z80 in the report and "),
        ({"versions": report.environment.versions | {"torch": ("0.1",)}}, r"torch is 0\.1 in the report and "),
        ({"versions": {}}, "onnxruntime is missing in the report and "),
    ):
        other = dataclasses.replace(report, environment=dataclasses.replace(report.environment, **change))
        with pytest.raises(BenchmarkError, match=message):
            keep(other, bundle)
    with pytest.raises(BenchmarkError, match="The report is not of the bundle .* as it is now"):
        keep(report, make_bundle("prelocal"))
    assert not (bundle.path / "engines").exists()
    # a report of several Pythons has the versions of all: what is kept is what is here
    (here,) = report.environment.versions["onnxruntime"]
    several = dataclasses.replace(report.environment, versions=report.environment.versions | {"onnxruntime": ("0.1", here)})
    (kept,) = keep(dataclasses.replace(report, environment=several), bundle)
    assert kept.machine["onnxruntime"] == here


def test_precisions_of_one_backend_are_told(crossing):
    bundle, report = crossing
    label = report.bundles[0].label
    half = cell("ort-cpu", 1, 10.0, precision="fp16", bundle=label)
    both = dataclasses.replace(report, cells=(*report.cells, half))
    kept, left_out = keep(both, bundle)
    assert (kept.precision, left_out) == ("fp32", LeftOut(what=(f"{label} in fp16",), reason="Only ort-cpu was measured."))
    assert len(keep(both, bundle, precisions=("fp32",))) == 1
    with pytest.raises(BenchmarkError, match="backends with a measured throughput that decode are torch fp32"):
        keep(both, bundle, backends=("torch", "tensorrt"))
    closed = [dataclasses.replace(c, key=dataclasses.replace(c.key, scenario="back-to-back")) for c in report.cells]
    with pytest.raises(BenchmarkError, match=r"that decode are none\. Measure --scenario throughput on two or more"):
        keep(dataclasses.replace(report, cells=tuple(closed)), bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--keep-fastest --scenario paced", "--keep-fastest needs --scenario throughput"),
        ("--keep-fastest --backend ort-cpu", "--keep-fastest needs two backends or more that decode"),
        ("--keep-fastest --backend ort-cpu --backend torch-eager --backend fastest", "needs two backends or more that decode"),
        ("--from bench.json", "--from needs --keep-fastest"),
        ("--keep-fastest --from nowhere.json", "nowhere.json cannot be read"),
    ],
)
def test_bad_input(make_bundle, sjepa_bench, tmp_path, arguments, message):
    status, out, err = sjepa_bench(make_bundle("prelocal").path, *arguments.split(), "--out", tmp_path / "o")
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_bundle_that_cannot_be_written_is_told(crossing):
    bundle, report = crossing
    (bundle.path / "engines").write_text("not a folder")
    with pytest.raises(BenchmarkError, match=r"cannot be written \(.+\)\. Give the bundle's folder room and rights"):
        keep(report, bundle)


# ---------------------------------------------------------------- what a choice depends on


def test_every_backend_says_what_its_speed_depends_on():
    known = {"processor", "cores", "gpu", "driver", *environment.PACKAGES}
    for name, entry in BACKENDS.items():
        assert set(entry.depends_on) <= known
        assert bool({"processor", "gpu"} & set(entry.depends_on)) == (name != "fastest")


def test_a_package_under_another_name_has_the_version_of_what_was_imported(monkeypatch):
    """TensorRT 8.6 of some sources, and Jetson's, have no distribution named tensorrt."""
    names = ("tensorrt-rtx", "none-such")
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: environment.importlib.metadata.distribution("?"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="1.2"))
    assert environment.versions(names) == {"tensorrt-rtx": "1.2", "none-such": None}


def test_the_script_for_gpu_machines_keeps_of_a_run_and_of_merged_reports(make_bundle, tmp_path):
    """In a process of its own, without click; the backends were measured in two."""
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "bundles" / "prelocal")
    for name in ("click", "rich"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")

    def run(out, *arguments, status=0):
        command = [sys.executable, ROOT / "benchmarks" / "gpu_latency.py", tmp_path / "bundles", tmp_path / out, *arguments]
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
        assert done.returncode == status, done.stderr
        return done.stdout

    run("r", "--report", "--keep-fastest", status=2)
    plan = ("--precision=fp32", "--variant=prelocal", "--scenario=throughput", "--batch=1", "--duration=0.1", "--keep-fastest")
    assert "prelocal: There is nothing to choose from on prelocal: " in run("a", "--backend=ort-cpu", *plan)
    run("b", "--backend=torch", *plan[:-1])
    assert not (path / "engines").exists()
    out = run("all", "--merge", f"{tmp_path}/a.json", f"{tmp_path}/b.json", "--variant=prelocal", "--keep-fastest")
    kept = find(Bundle.open(path), "fp32")
    assert f"the fastest for prelocal in fp32 is {kept}" in out
    assert set(kept.choices[0].medians_us) == {"ort-cpu", "torch"}
    open_backend(Bundle.open(path), "fastest", "fp32").close()
    assert json.loads((tmp_path / "all.json").read_text())["cells"]
