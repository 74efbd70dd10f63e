"""Whole runs of the benchmark: small, on the real clock, judged by what must hold however slow the machine is."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types
from functools import partial
from importlib import resources
from pathlib import Path
from typing import get_args

import jsonschema
import numpy as np
import planted
import pytest
import torch
from bench_reports import assert_as_measured, measure_quickly
from bundles import copy_bundle, flip_byte
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli.bench import Share
from sjepa_deploy.errors import BackendError, BenchmarkError
from sjepa_deploy.runtime import machine
from sjepa_deploy.runtime.backend import BackendOptions, _find
from sjepa_deploy.runtime.bench import cold_start, contenders, noise, scenarios
from sjepa_deploy.runtime.bench.baselines import ALL_BACKENDS, BASELINES, TORCH_DTYPES, TorchCompile, TorchEager, TorchEagerCuda
from sjepa_deploy.runtime.bench.cells import HARNESS, SCENARIOS, Estimate
from sjepa_deploy.runtime.bench.files import load_report, load_samples, write_report
from sjepa_deploy.runtime.bench.loops import Served
from sjepa_deploy.runtime.bench.measurement import Bench
from sjepa_deploy.runtime.bench.merge import merge, renamed, together
from sjepa_deploy.runtime.bench.report import to_markdown
from sjepa_deploy.runtime.bench.results import SCHEMA_VERSION, BenchReport, Disturbance, DisturbanceKind, Noise
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench
from sjepa_deploy.runtime.bench.words import why_noisy, why_partial
from sjepa_deploy.runtime.keep_warm import Clock
from sjepa_deploy.serialize import encode, json_schema
from sjepa_deploy.spec import RUN_PRECISIONS

SCHEMA = json.loads(resources.files("sjepa_deploy").joinpath("assets", "benchmark.schema.json").read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[1]
ONE_THREAD = BackendOptions(n_threads=1)  # on busy cores, threads of small models wait for each other
QUICK = {
    **{"seconds": 0.1, "n_blocks": 5, "processes": 1, "rates": (100.0,)},
    **{"backends": ("ort-cpu",), "precisions": ("fp32",), "options": ONE_THREAD},
}


@pytest.fixture(autouse=True)
def planted_backends(monkeypatch):
    planted.plant(monkeypatch.setitem)
    monkeypatch.setattr(planted.Interrupts, "calls_left", 3000)


@pytest.fixture(scope="module", autouse=True)
def quick_machine():
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        yield


def cells(report, **fields):
    return [c for c in report.cells if all(getattr(c.key, name) == value for name, value in fields.items())]


@pytest.fixture(scope="module")
def whole(make_bundle, tmp_path_factory, quick_machine):
    """A run of every scenario on two backends, written and read again, with its samples."""
    config = BenchConfig(
        **QUICK | {"backends": ("ort-cpu", "torch-eager"), "batches": (1, 3), "precisions": ("fp32",), "seed": 4}
    )
    bundles = (make_bundle("prelocal"), make_bundle("contextual"))
    report, samples = run_bench(bundles, config, command="sjepa-bench a b")
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    written = write_report(report, samples, path)
    read = load_report(path)
    assert read == written
    return read, load_samples(read, path), path


def test_the_shipped_schema_describes_the_dataclasses(whole):
    assert json_schema(BenchReport) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(definition["description"] for definition in SCHEMA["$defs"].values())
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(whole[2].read_text()))


def test_a_run_has_the_states_that_made_up_reports_have(whole):
    assert_as_measured(*whole[:2])


def test_every_cell_is_there_once(whole):
    report, samples, _ = whole
    assert (report.partial, report.left_out, report.seed, report.command) == ((), (), 4, "sjepa-bench a b")
    assert len({c.key for c in report.cells}) == len({c.id for c in report.cells}) == len(report.cells)
    assert [fact.label for fact in report.bundles] == ["bundle", "bundle-2"]
    assert [fact.variant for fact in report.bundles] == ["prelocal", "contextual"]
    for label in ("bundle", "bundle-2"):
        for backend in ("ort-cpu", "torch-eager"):
            mine = cells(report, bundle=label, backend=backend)
            count = {s: len([c for c in mine if c.key.scenario == s]) for s in SCENARIOS}
            assert count.pop("streams") >= 1
            assert count == {"back-to-back": 2, "paced": 2, "throughput": 2, "cold-start": 1}
            assert all(c.parity is True for c in mine)
    assert {name.partition(".")[0] for name in samples} == {c.id for c in report.cells if c.cold_start is None} | {"canary_us"}


def test_figures_are_those_of_the_samples(whole):
    """numpy finds the same in the raw samples."""
    report, samples, _ = whole
    checked = 0
    for cell in report.cells:
        if cell.cold_start is not None:
            continue
        values = samples[f"{cell.id}.latency_us"].astype(np.float64)
        if cell.latency is not None:
            assert cell.latency.n == len(values)
            assert cell.latency.max_us == pytest.approx(values.max(), rel=1e-6)
            for percentile in cell.latency.percentiles:
                assert (percentile.value is None) == (len(values) < percentile.n_needed)
                if percentile.value is not None:
                    expected = np.quantile(values, percentile.percent / 100, method="inverted_cdf")
                    assert percentile.value.value == pytest.approx(expected, rel=1e-6)
                    checked += 1
        if cell.open_loop is not None:
            assert cell.open_loop.n_done == len(values)
            late = values > cell.open_loop.deadline_s * 1e6
            assert abs(int(late.sum()) - cell.open_loop.missed) <= 1
            at, service = samples[f"{cell.id}.at_s"], samples[f"{cell.id}.service_us"]
            assert len(at) == len(service) == len(values)
            assert (service <= values * 1.0001 + 1).all()
            assert (at >= 0).all()
            assert at.max() <= report.seconds
        if cell.key.scenario in ("back-to-back", "throughput"):
            blocks = samples[f"{cell.id}.block"]
            rates = [cell.key.batch * 1e6 / values[blocks == block].mean() for block in np.unique(blocks)]
            assert cell.windows_per_s.value == pytest.approx(np.median(rates), rel=1e-3)
    assert checked > 20


def test_the_backend_that_does_nothing_is_in_every_report(whole):
    report, _, _ = whole
    closed, paced = cells(report, backend=HARNESS)
    assert report.cells[0] is closed
    assert closed.parity is None
    assert closed.latency.at(50.0).value < 10
    assert report.loop_us < 10
    assert paced.key.rate == 100.0


def test_cold_starts_have_their_phases_and_the_memory_of_the_process(whole):
    report, _, _ = whole
    for cell in cells(report, scenario="cold-start"):
        phases = [phase.name for phase in cell.cold_start.phases]
        assert phases == ["process", "import", "open bundle", "open backend", "first call", "steady call"]
        assert all(phase.seconds.value > 0 for phase in cell.cold_start.phases)
        assert cell.resources.host_bytes > 20e6
        assert cell.cold_start.calls_to_steady >= 1
    with_torch, without = (cells(report, scenario="cold-start", backend=b)[0] for b in ("torch-eager", "ort-cpu"))
    assert with_torch.resources.host_bytes > without.resources.host_bytes + 50e6


def test_braindecode_starts_in_a_process_of_its_own(make_bundle):
    """Its torchaudio may not load on a machine without CUDA, also where nothing was imported before."""
    started = cold_start.measure(make_bundle("prelocal").path, "braindecode", "fp32", ONE_THREAD)
    assert started.phases["import"] > started.phases["steady call"] > 0


def test_cold_starts_have_all_options_of_the_run(make_bundle, monkeypatch):
    bundle, asked = make_bundle("prelocal"), []
    with pytest.raises(BackendError, match="The backend ort-cpu keeps no kernel on the GPU"):
        cold_start.measure(bundle.path, "ort-cpu", "fp32", BackendOptions(persistent=True))

    def measure(path, backend, precision, options, *, cache):
        asked.append(options)
        return cold_start.Started(phases={"process": 0.1}, calls_to_steady=1, peak_bytes=None)

    monkeypatch.setattr(cold_start, "measure", measure)
    options = BackendOptions(n_threads=1, device=1, memory="copy", cuda_graph=False, wait="flag")
    run_bench((bundle,), BenchConfig(**QUICK | {"scenarios": ("cold-start",), "options": options}))
    assert asked == [options]


def test_environment_noise_and_recommendation_are_told(whole):
    report, samples, _ = whole
    assert report.environment.versions["numpy"] == (np.__version__,)
    assert report.environment.cores >= 1
    assert report.noise.canary_us.value == pytest.approx(np.median(samples["canary_us"]))
    assert {choice.bundle for choice in report.recommendations} <= {"bundle", "bundle-2"}
    assert len(report.parity) == 4
    assert all(judgement.result.backend in ("ort-cpu", "torch-eager") for judgement in report.parity)


@pytest.mark.alone
def test_streams_are_searched_for_until_one_more_is_refused(make_bundle):
    """A backend that sleeps 30 ms holds three streams of ten a second at batch one: batches make it more, never less."""
    config = BenchConfig(**QUICK | {"backends": ("sleeps",), "scenarios": ("streams",), "rates": (10.0,), "seconds": 2.0})
    report, _ = run_bench((make_bundle("prelocal"),), config)
    (found,) = report.capacity
    assert (found.rate, found.deadline_s) == (10.0, 0.1)
    tried = [c.key.n_streams for c in cells(report, scenario="streams")]
    assert found.n_held in [0, *tried]
    for cell in cells(report, scenario="streams"):
        assert cell.open_loop.mean_batch >= 1
        if cell.key.n_streams == found.n_held:
            assert cell.open_loop.held


def test_the_search_for_streams_ends_at_the_capacity(make_bundle):
    """The policy alone, with an oracle in place of a machine: 37 streams are held, 38 are not."""
    contender = contenders.harness(make_bundle("prelocal"), "b", seed=0)
    clock = Clock()
    for capacity, first in ((37, 30), (37, 300), (37, 1), (0, 5), (1, 1)):
        search = scenarios.Streams(
            Bench(clock=clock, nvml=None, began=0.0, seconds=0.1, seed=0), contender, 100, rate=10.0, deadline=None
        )
        search._next = first
        for _ in range(100):
            if search.finished:
                break
            n = search._next
            search._decide(n, n <= capacity, nearly=n <= capacity + 1)
        assert search.n_held <= capacity < search.n_refused
        assert search.n_refused <= max(search.n_held + 1, 1.05 * search.n_held)


@pytest.mark.parametrize(("call_s", "least", "most"), [(0.0, 200, 200), (0.01, 7, 10), (0.05, 5, 5)])
def test_splitting_calls_takes_no_longer_than_a_block(make_bundle, call_s, least, most):
    """200 calls of 1,024 windows on a GPU took longer than all that was measured of them."""
    asked = []

    class Sleeps(contenders.NothingBackend):
        def run(self, eeg):
            time.sleep(call_s)
            return super().run(eeg)

        def split(self, eeg, n):
            asked.append(n)

    bundle = make_bundle("prelocal")
    bench = Bench(clock=Clock(), nvml=None, began=0.0, seconds=0.1, seed=0)
    contender = contenders.Contender("b", bundle, Sleeps(bundle.spec), seed=0)
    scenarios.ClosedLoop(bench, contender, 1, "throughput", 1).run()
    assert least <= asked[0] <= most


def test_a_disturbed_probe_is_no_refusal(make_bundle):
    contender = contenders.harness(make_bundle("prelocal"), "b", seed=0)
    common = Bench(clock=Clock(), nvml=None, began=0.0, seconds=0.1, seed=0)
    search = scenarios.Streams(common, contender, 10, rate=10.0, deadline=None)
    search._next = 20
    search._decide(20, held=False, nearly=True)
    assert (search._next, search.n_refused) == (20, None)
    search._decide(20, held=True, nearly=True)
    assert (search.n_held, search.n_refused) == (20, None)


def test_a_probe_is_held_by_its_p99_and_its_backlog():
    due = np.arange(1000) / 100
    fields = {"due": due, "start": due, "batch": np.ones(1000, int), "n_due": 1000, "period": 0.01, "spacing": 0.01}
    late = np.where(np.arange(1000) % 100 == 0, 0.008, 0.002)
    assert scenarios.holds(Served(finish=due + late, **fields), deadline=0.005)
    assert not scenarios.holds(Served(finish=due + np.where(np.arange(1000) % 50 == 0, 0.008, 0.002), **fields), deadline=0.005)


# ---------------------------------------------------------------- faults


@pytest.mark.alone
def test_stalls_show_in_paced_latencies_and_misses_also_behind_them(make_bundle):
    """Real time: at 2000 windows a second a stall of 20 ms makes some forty windows late, the closed loop shows one call."""
    config = BenchConfig(
        **QUICK | {"backends": ("stalls",), "scenarios": ("back-to-back", "paced"), "rates": (2000.0,), "seconds": 4.0}
    )
    report, samples = run_bench((make_bundle("prelocal"),), config)
    (closed,) = cells(report, backend="stalls", scenario="back-to-back")
    paced, _ = cells(report, backend="stalls", scenario="paced")
    calls = samples[f"{closed.id}.latency_us"]
    stalled = calls > 20_000
    assert stalled.sum() >= len(calls) // 1000 - 1  # and some more where the machine itself stalls
    assert np.quantile(calls, 0.5) < 10_000
    values, service = samples[f"{paced.id}.latency_us"], samples[f"{paced.id}.service_us"]
    assert len(values) >= 5000 or not paced.open_loop.held
    n_stalls = int((service > 20_000).sum())
    assert n_stalls >= 3
    behind = (values > 10_000) & (service < 5_000)
    assert behind.sum() >= 3 * n_stalls, "windows that did not stall themselves, and waited for more than 10 ms"
    assert paced.open_loop.missed >= 10 * n_stalls
    assert paced.open_loop.longest_run >= 10
    if paced.latency is not None:
        assert paced.latency.at(99.9).value > 10_000


def test_fast_and_wrong_is_struck_out(make_bundle, sjepa_bench, tmp_path):
    options = ["--scenario", "back-to-back", "--duration", "0.05", "--backend", "wrong", "--backend", "ort-cpu"]
    status, out, _ = sjepa_bench(make_bundle("prelocal").path, *options, "--out", tmp_path / "o")
    assert status == 0
    report = load_report(tmp_path / "o" / "bench.json")
    assert [c.struck_out for c in report.cells if c.key.backend != HARNESS] == [True, False]
    assert re.search(r"wrong fp32\s+wrong", out)
    assert [choice.backend for choice in report.recommendations] == ["ort-cpu"]


def opened_on(bundle, *backends, precision="fp32", **more):
    """Return the contenders of `bundle` on these backends, or on all."""
    facts = contenders.bundle_facts((bundle,))
    found = contenders.open_contenders(
        (bundle,), facts, backends=backends, precisions=(precision,), options=ONE_THREAD, seed=0, **more
    )
    return list(found)


def test_pytorch_is_not_struck_out_for_electrode_offsets_but_said_to_lose_them(make_bundle):
    bundle = make_bundle("postlocal")
    opened = opened_on(bundle, "torch-eager", "ort-cpu", "wrong")
    judgements = [contender.judgement for contender in opened]
    eager, ours, wrong = judgements
    assert ours.result.passed
    assert (ours.caution, ours.without_offsets) == (None, None)
    assert (wrong.passed, wrong.caution) == (False, None)
    assert eager.passed
    if not eager.result.passed:
        assert re.match(r"Outputs differ by \de-\d\d of their scale on windows with electrode offsets", eager.caution)
        assert "offset" in eager.result.worst
    for contender in opened:
        contender.close()


@pytest.mark.parametrize("worst", ["eeg", "with offsets"])
def test_outputs_that_are_wrong_now_and_then_are_not_put_down_to_offsets(make_bundle, worst):
    """Wrong on one window the first time only: whether that window has offsets decides."""
    bundle = make_bundle("prelocal")
    reference = bundle.reference()
    kinds = contenders.without_offsets(reference, bundle.spec).kinds
    index = next(i for i, kind in enumerate(reference.kinds) if (kind in kinds) == (worst == "eeg") and "NaN" not in kind)
    (ours,) = opened_on(bundle, "ort-cpu")
    right, seen = ours.backend.run, 0

    def run(eeg):
        nonlocal seen
        is_it = np.array_equal(eeg, reference.inputs[index : index + 1])
        seen += is_it
        return right(eeg) + np.float32(is_it and seen == 1)

    ours.backend.run = run
    ours.judge(bundle)
    assert not ours.judgement.result.passed
    assert ours.judgement.passed == (worst != "eeg")
    ours.close()


def test_windows_with_offsets_are_told_by_their_samples(make_bundle):
    bundle = make_bundle("prelocal")
    reference = bundle.reference()
    rest = contenders.without_offsets(reference, bundle.spec)
    dropped = set(reference.kinds) - set(rest.kinds)
    assert {"eeg with 20 mV offsets", "channel flat at an offset"} <= dropped
    assert {kind for kind in reference.kinds if re.fullmatch(r"eeg \d", kind)} <= set(rest.kinds)
    only = dataclasses.replace(
        reference, kinds=("x",), inputs=reference.inputs[:1] + np.float32(5000), outputs=reference.outputs[:1]
    )
    assert contenders.without_offsets(only, bundle.spec) is None


@pytest.mark.alone
def test_a_rate_that_is_not_held_is_not_called_slow(make_bundle, sjepa_bench, tmp_path):
    options = ["--scenario", "paced", "--rate", "100", "--duration", "1", "--backend", "sleeps"]
    status, out, _ = sjepa_bench(make_bundle("prelocal").path, *options, "--out", tmp_path / "o")
    assert status == 0
    for cell in cells(load_report(tmp_path / "o" / "bench.json"), backend="sleeps"):
        assert cell.latency is None
        assert not cell.open_loop.held
        assert cell.open_loop.utilization > 2
    assert out.count("not held") == 2


def test_a_backend_that_breaks_ends_nothing_but_itself(make_bundle):
    config = BenchConfig(**QUICK | {"backends": ("breaks", "ort-cpu"), "scenarios": ("back-to-back",)})
    report, _ = run_bench((make_bundle("prelocal"),), config)
    (entry,) = report.left_out
    assert (entry.what, entry.kind) == (("back-to-back: bundle on breaks fp32",), "failed")
    assert entry.reason == "CUDA error: an illegal memory access was encountered"
    assert [c.key.backend for c in report.cells] == [HARNESS, "ort-cpu"]


@pytest.mark.parametrize("in_place", [False, True])
def test_in_place_nothing_is_copied_in_a_call(make_bundle, in_place):
    """And what is decoded is EEG: a buffer of NaN would be as fast."""
    bundle = make_bundle("prelocal")
    config = BenchConfig(**QUICK | {"backends": ("buffers",), "scenarios": ("throughput",), "batches": (1, 4)}, in_place=in_place)
    report, _ = run_bench((bundle,), config)
    found = cells(report, backend="buffers")
    assert [cell.key.batch for cell in found] == [1, 4]
    for cell in found:
        (median,) = [p.value.value for p in cell.latency.percentiles if p.percent == 50]
        assert (median > 5000) is not in_place
    (contender,) = opened_on(bundle, "buffers", in_place=in_place)
    assert all(np.isfinite(window).all() and window.std() > 0 for window in contender.inputs(4))
    contender.close()


def test_a_backend_that_cannot_be_released_costs_no_figures(make_bundle, caplog):
    """Neither one that broke while it was opened, nor one that broke later and was closed at the end."""
    config = BenchConfig(**QUICK | {"backends": ("sticks-at-once", "sticks", "ort-cpu"), "scenarios": ("back-to-back",)})
    report, _ = run_bench((make_bundle("prelocal"),), config)
    assert [c.key.backend for c in report.cells] == [HARNESS, "ort-cpu"]
    assert {entry.reason: entry.what for entry in report.left_out} == {
        "CUDA error: an illegal memory access was encountered":
            ("bundle on sticks-at-once fp32", "back-to-back: bundle on sticks fp32"),
        "CUDA error: the context is lost": ("closing: bundle on sticks fp32",),
    }  # fmt: skip
    closed = [record.getMessage() for record in caplog.records if "could not be closed" in record.getMessage()]
    assert closed == ["bundle on sticks-at-once fp32 could not be closed", "bundle on sticks fp32 could not be closed"]


@pytest.mark.alone
def test_ctrl_c_writes_what_there_is_and_says_so(make_bundle, sjepa_bench, tmp_path):
    options = ["--scenario", "back-to-back", "--backend", "interrupts", "--backend", "ort-cpu", "--duration", "60", "--json"]
    status, out, err = sjepa_bench(make_bundle("prelocal").path, *options, "--out", tmp_path / "o")
    assert (status, err.strip().splitlines()[-1]) == (130, "sjepa-bench: interrupted")
    report = load_report(tmp_path / "o" / "bench.json")
    assert report.interrupted
    assert [ending["kind"] for ending in json.loads(out)["partial"]] == ["interrupted"]
    assert load_samples(report, tmp_path / "o" / "bench.json").keys() >= {f"{c.id}.latency_us" for c in report.cells}


@pytest.mark.alone
def test_the_time_limit_ends_a_run_with_what_there_is(make_bundle):
    config = BenchConfig(**QUICK | {"seconds": 60.0, "n_blocks": 200, "scenarios": ("back-to-back",), "time_limit": 2.0})
    report, _ = run_bench((make_bundle("prelocal"),), config)
    (ending,) = report.partial
    assert (ending.kind, ending.limit, ending.of) == ("time limit", 2.0, 400)
    assert 0 < ending.n < 400
    assert re.match(rf"The time limit of 2 s passed after {ending.n} of 400 blocks.", why_partial(report))
    assert not report.interrupted
    assert len({c.latency.n_blocks for c in report.cells}) <= 2, "rounds: all have as many blocks, or one more"


def test_opening_takes_at_most_half_of_the_time(make_bundle, monkeypatch):
    """Opening one of two backends takes that long: the second is not opened, so that the first is measured."""

    class Late(Clock):
        late = 0.0

        def now(self):
            return time.perf_counter() + self.late

    clock = Late()
    opened = contenders.open_backend

    def slow(*arguments):
        clock.late += 600
        return opened(*arguments)

    monkeypatch.setattr(contenders, "open_backend", slow)
    plan = {"backends": ("ort-cpu", "torch-eager"), "scenarios": ("back-to-back",), "time_limit": 1100.0}
    report, _ = run_bench((make_bundle("prelocal"),), BenchConfig(**QUICK | plan), clock=clock)
    assert [ending.kind for ending in report.partial] == ["opened late"]
    assert "Half of the time limit passed" in why_partial(report)
    (late,) = report.left_out
    assert (late.what, late.kind, late.reason) == (("bundle on torch-eager fp32",), "too late", contenders.TOO_LATE)
    assert cells(report, backend="ort-cpu")[0].latency.n_blocks == 5


@pytest.mark.alone
def test_scenarios_have_times_of_their_own(make_bundle, sjepa_bench, tmp_path):
    options = [
        "--scenario",
        "back-to-back",
        "--scenario",
        "paced",
        "--rate",
        "100",
        "--backend",
        "ort-cpu",
        "--precision",
        "fp32",
    ]
    times = ["--duration", "0.1", "--duration", "paced=0.5"]
    assert sjepa_bench(make_bundle("prelocal").path, *options, *times, "--out", tmp_path / "o")[0] == 0
    report = load_report(tmp_path / "o" / "bench.json")
    assert "--duration 0.1 --duration paced=0.5" in report.command
    assert {c.open_loop.n_due for c in cells(report, scenario="paced")} == {50}
    samples = load_samples(report, tmp_path / "o" / "bench.json")
    (closed,) = cells(report, backend="ort-cpu", scenario="back-to-back")
    assert 0.05e6 < samples[f"{closed.id}.latency_us"].sum() < 0.3e6


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scenario gallop", "'gallop' is not one of 'back-to-back', 'paced', 'streams', 'throughput', 'cold-start'"),
        ("--backend none-such", "'none-such' is not a backend. Use one of ort-cpu, torch, "),
        ("--backend ort-cuda", "No backend can be measured here: ort-cuda: This onnxruntime .* Name another --backend"),
        ("--backend ort-cpu --precision bf16", "No backend can be measured here: .* no bf16 "),
        ("--rate -1", "A rate of -1 cannot be run. Use a positive number"),
        ("--rate nan", "A rate of nan cannot be run"),
        ("--duration 0", "A duration of 0 cannot be run"),
        ("--duration soon", "'soon' is not a duration. Use seconds, as in 2 or paced=50"),
        ("--duration gallop=2", "'gallop' is not a scenario. Use one of back-to-back"),
        ("--duration paced=-2", "A duration of -2 cannot be run"),
        ("--rate 10 --rate nan", "A rate of nan cannot be run"),
        ("--deadline 0", "A deadline of 0 cannot be run"),
        ("--time-limit 0", "A time limit of 0 cannot be run"),
        ("--batch 0", "A batch of 0 cannot be run"),
        ("--fail-above 10%", "--fail-above needs --compare"),
        ("--compare a.json b.json", "--compare takes two reports, and no bundle"),
    ],
)
def test_bad_input(make_bundle, sjepa_bench, tmp_path, arguments, message):
    status, out, err = sjepa_bench(make_bundle("prelocal").path, *arguments.split(), "--out", tmp_path / "o")
    assert status == 2
    assert out == ""
    assert re.search(message, err)
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o" / "bench.json").exists()


def test_a_bundle_that_fails_its_hash_is_not_measured(make_bundle, sjepa_bench, tmp_path):
    path = copy_bundle(make_bundle("prelocal"), tmp_path / "b")
    flip_byte(next(path.glob("*.onnx")))
    status, _, err = sjepa_bench(path, "--out", tmp_path / "o")
    assert status == 2
    assert "its hash differs" in err
    assert not (tmp_path / "o").exists()


def test_no_bundle_no_run(sjepa_bench):
    assert sjepa_bench()[0] == 2
    with pytest.raises(BenchmarkError, match="not a scenario"):
        BenchConfig(scenarios=("gallop",))


def test_a_recommendation_and_the_command_that_repeats_it(make_bundle, sjepa_bench, tmp_path):
    path = make_bundle("prelocal").path
    options = (
        "--recommend",
        "--backend",
        "ort-cpu",
        "--duration",
        "0.2",
        "--rate",
        "50",
        "--name",
        "x",
        "--out",
        tmp_path / "a b",
    )
    status, out, _ = sjepa_bench(path, *options)
    assert status == 0
    report = load_report(tmp_path / "a b" / "x.json")
    assert report.samples_file == "x.npz"
    assert {c.key.scenario for c in report.cells} == {"back-to-back", "paced"}
    assert "bundle: use ort-cpu in fp32. p" in out
    assert report.command == (
        f"sjepa-bench {path} --backend ort-cpu --rate 50.0 --duration 0.2 --out '{tmp_path / 'a b'}' --name x --recommend"
    )


@pytest.mark.alone
def test_two_reports_are_compared(make_bundle, sjepa_bench, tmp_path, monkeypatch):
    """A backend whose calls are three times as long: found on any machine; compared with itself, nothing is."""
    options = ["--scenario", "back-to-back", "--duration", "0.5", "--backend", "slow-10"]
    monkeypatch.setattr(planted.Slow10, "share", 0.0)
    assert sjepa_bench(make_bundle("prelocal").path, *options, "--out", tmp_path / "a")[0] == 0
    monkeypatch.setattr(planted.Slow10, "share", 3.0)
    assert sjepa_bench(make_bundle("prelocal").path, *options, "--out", tmp_path / "b")[0] == 0
    a, b = tmp_path / "a" / "bench.json", tmp_path / "b" / "bench.json"
    status, out, _ = sjepa_bench("--compare", a, a, "--fail-above", "0%")
    assert status == 0
    assert re.search(r"slow-10.*\+0\.0%.*Changes within 5% are not claimed", out, re.DOTALL)
    status, out, err = sjepa_bench("--compare", a, b, "--fail-above", "50%", "--json")
    assert status == 1
    assert "back-to-back batch 1: bundle slow-10 fp32 (slower)" in err
    (change,) = json.loads(out)["changes"]
    assert (change["verdict"], change["change"]["low"] > 0.5) == ("slower", True)
    assert sjepa_bench("--compare", a, b)[0] == 0, "no limit was set"
    assert sjepa_bench("--compare", b, a, "--fail-above", "0.1")[0] == 0, "faster is no failure"


def test_reports_that_cannot_be_compared(make_bundle, sjepa_bench, tmp_path, whole):
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema_version": 1}')
    newer = tmp_path / "newer.json"
    newer.write_text('{"schema_version": 99}')
    lonely = tmp_path / "lonely.json"
    lonely.write_text(whole[2].read_text())
    for path, message in (
        (bad, "is no benchmark report: the top level lacks the key"),
        (newer, f"has schema version 99; this release reads up to {SCHEMA_VERSION}"),
        (tmp_path / "none.json", "cannot be read"),
        (lonely, r"The samples of .* cannot be read .* Keep bench.npz beside it"),
        (whole[2].with_suffix(".npz"), "is not JSON"),
    ):
        status, _, err = sjepa_bench("--compare", whole[2], path)
        assert status == 2
        assert re.search(message, err), err


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), (" 5 %".replace(" %", "%"), 0.05), ("0", 0.0)])
def test_shares(text, share):
    assert Share().convert(text, None, None) == pytest.approx(share)


def test_a_share_must_be_one(sjepa_bench):
    for text in ("ten", "-1%", "nan"):
        status, _, err = sjepa_bench("--compare", "a", "b", "--fail-above", text)
        assert (status, "is not a share" in err) == (2, True)


# ---------------------------------------------------------------- baselines and machine


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual", "base"])
@pytest.mark.parametrize("name", ["torch-eager", "braindecode"])
def test_baselines_give_the_reference_outputs(make_bundle, variant, name):
    (contender,) = opened_on(make_bundle(variant), name)
    assert contender.judgement.passed, contender.judgement
    contender.close()


def operations(contender):
    """Return the names of PyTorch's operations in a call of `contender`."""
    contender.activate()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        contender.backend.run(contender.inputs(2)[0])
    return {event.key for event in profile.key_averages()}


def test_pytorch_runs_with_the_fast_path_and_without_it_each_by_its_name(make_bundle):
    """In turns, as a benchmark calls them: the switch is one for the whole process."""
    fused = "aten::_transformer_encoder_layer_fwd"
    fast, plain = opened_on(make_bundle("contextual"), "torch-eager", "torch-eager-no-fast-path")
    assert all(contender.judgement.passed for contender in (fast, plain))
    for _ in range(2):
        assert fused in operations(fast)
        assert fused not in operations(plain)
    assert "fast path of the transformer on" in fast.backend.setting
    assert "fast path of the transformer off" in plain.backend.setting
    plain.close()
    assert torch.backends.mha.get_fastpath_enabled(), "others find PyTorch as it is"
    fast.close()


@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_models_without_a_transformer_have_no_fast_path_to_switch_off(make_bundle, variant):
    (left_out,) = opened_on(make_bundle(variant), "torch-eager-no-fast-path")
    assert "no transformer" in left_out.reason
    (contender,) = opened_on(make_bundle(variant), "torch-eager")
    assert "fast path" not in contender.backend.setting
    contender.close()


def test_every_way_to_run_pytorch_is_there_with_the_fast_path_and_without():
    plain = {name.removesuffix("-no-fast-path") for name in BASELINES if name.endswith("-no-fast-path")}
    assert plain == {name for name in BASELINES if name.startswith("torch-") and not name.endswith("-no-fast-path")}
    for name in plain:
        on, off = (_find(BASELINES[n].target) for n in (name, f"{name}-no-fast-path"))
        assert (on.name, off.name) == (name, f"{name}-no-fast-path")
        assert (on.fast_path, off.fast_path, off.device, off.how) == (True, False, on.device, on.how)


def test_a_report_tells_the_settings_of_the_baselines(whole):
    report, samples, _ = whole
    told = [(setting.backend, setting.setting) for setting in report.settings]
    assert told == [("torch-eager", "eager, one thread"), ("torch-eager", "eager, fast path of the transformer on, one thread")]
    assert "| torch-eager | fp32 | eager, one thread |" in to_markdown(report)
    other = renamed(report, {"torch-eager": "mine", "ort-cpu": "ort"})
    assert {setting.backend for setting in other.settings} == {"mine"}
    merged, _ = merge([(report, samples), (other, samples)])
    assert merged.settings == report.settings + other.settings


@pytest.mark.alone
def test_torch_compile_gives_the_reference_outputs(make_bundle):
    """Once: it takes seconds."""
    (contender,) = opened_on(make_bundle("prelocal"), "torch-compile")
    assert contender.judgement.passed, contender.judgement
    contender.close()


def test_every_compiled_model_runs_compiled_however_many_there_are(make_bundle, monkeypatch):
    """PyTorch runs what is beyond its limit eagerly, and counts models whose forward has the same code together."""
    from torch._dynamo import config

    calls = []

    def backend(graph, inputs):
        return lambda *args: [calls.append(1), graph(*args)][1]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    bundle = make_bundle("prelocal")
    window = bundle.reference().inputs[:1]
    with config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):
        for n_threads in (1, 2, 1):  # PyTorch compiles anew for another number of threads
            compiled = TorchCompile(bundle, "fp32", BackendOptions(n_threads=n_threads))
            compiled.activate()
            before = len(calls)
            compiled.run(window)
            assert len(calls) > before
        compiled = TorchCompile(bundle, "fp32", BackendOptions(n_threads=3))
        config.recompile_limit = 1
        with pytest.raises(BackendError, match="limit"):
            compiled.run(window)
    torch.set_num_threads(1)


def test_what_cannot_be_measured_is_left_out_with_its_reason(make_bundle):
    found = opened_on(make_bundle("prelocal"), precision="tf32")
    reasons = {entry.label: entry.reason for entry in contenders.grouped(found)}
    everything = ", ".join(reasons)
    assert all(name in everything for name in ALL_BACKENDS if name not in planted.BACKENDS)
    assert "The float64 reference is slow by design" in reasons["torch"]
    baselines = ", ".join(f"bundle on {name} tf32" for name in BASELINES if "cuda" not in name)
    assert "fp32 on the CPU, not in tf32" in reasons[baselines]
    with pytest.raises(BackendError, match="is not a backend"):
        list(contenders.open_contenders((), (), backends=("x",), precisions=(), options=ONE_THREAD, seed=0))


@pytest.mark.parametrize("baseline", [TorchEager, TorchEagerCuda])
def test_baselines_refuse_a_precision_that_they_do_not_know(make_bundle, baseline):
    """It would be float32 that is timed, under another name."""
    with pytest.raises(BackendError, match="not measured in int8"):
        baseline(make_bundle("prelocal"), "int8", ONE_THREAD)


def test_baselines_have_a_type_for_every_precision():
    assert set(TORCH_DTYPES) == set(RUN_PRECISIONS)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in TORCH_DTYPES.values())


def test_baselines_name_what_installs_them():
    assert set(BASELINES) & {"ort-cpu", "tensorrt"} == set()
    for entry in BASELINES.values():
        assert entry.package in ("torch", "braindecode")


def test_nvml_is_asked_by_the_bus_and_answers_none_where_it_fails(monkeypatch):
    """NVML's functions as ctypes sees them; power is not supported here."""

    def figure(values):
        def answer(device, *arguments):
            arguments[-1]._obj.value = values[arguments[:-1]]
            return 0

        return answer

    library = types.SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByPciBusId_v2=lambda bus, device: 0 if bus == b"0000:4B:00.0" else 6,
        nvmlDeviceGetPowerUsage=lambda device, target: 3,
        nvmlDeviceGetClockInfo=figure({(1,): 1980, (2,): 3201}),
        nvmlDeviceGetTemperature=figure({(0,): 41}),
        nvmlDeviceGetTotalEnergyConsumption=figure({(): 5_000}),
    )
    monkeypatch.setattr(machine.ctypes, "CDLL", {"libnvidia-ml.so.1": library}.__getitem__)
    nvml = machine.Nvml("0000:4B:00.0")
    state = nvml.state()
    assert nvml.joules() == 5.0
    assert (state.gpu_mhz, state.gpu_memory_mhz, state.gpu_celsius, state.gpu_watts) == (1980.0, 3201.0, 41.0, None)
    assert machine.Nvml("0000:00:00.0").joules() is None


def test_without_a_driver_nvml_tells_nothing(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    nvml = machine.Nvml("0000:4B:00.0")
    assert (nvml.joules(), nvml.state()) == (None, machine.MachineState())


@pytest.mark.alone
def test_others_on_the_processor_are_counted():
    before = machine.CpuTimes(at=0.0, own=1.0, busy=10.0, stolen=0.5)
    after = machine.CpuTimes(at=2.0, own=2.0, busy=14.0, stolen=0.7)
    assert after.others_since(before) == pytest.approx(1.5)
    assert after.stolen_during(before) == (pytest.approx(0.2), 2.0)
    assert after.stolen_since(before) == pytest.approx(0.1)
    blind = dataclasses.replace(before, busy=None, stolen=None)
    assert (after.others_since(blind), after.stolen_during(blind), after.stolen_since(blind)) == (None, None, None)


def test_processor_times_are_those_that_the_system_counts(monkeypatch, tmp_path):
    """proc(5): user nice system idle iowait irq softirq steal guest guest_nice, in ticks."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "STAT", stat)
    assert machine.CpuTimes.now().stolen is None
    tick = os.sysconf("SC_CLK_TCK")
    stat.write_text(" ".join(["cpu ", *(str(n * tick) for n in (100, 20, 30, 4000, 5, 6, 7, 80, 9, 1))]) + "\ncpu0 1 2\n")
    now = machine.CpuTimes.now()
    assert (now.busy, now.stolen) == (163.0, 80.0)


@pytest.mark.alone
def test_what_the_hypervisor_took_from_a_cell_is_told_and_makes_the_run_noisy(make_bundle, monkeypatch, tmp_path):
    """A machine whose hypervisor takes half a core whenever one backend runs: on average over the run it would be little."""
    stat, ticks = tmp_path / "stat", [1000.0]

    def write():
        stat.write_text(f"cpu  0 0 0 0 0 0 0 {ticks[0]:.0f} 0 0\n")

    write()
    monkeypatch.setattr(machine, "STAT", stat)
    block = scenarios.ClosedLoop.run

    def run(self):
        began = time.perf_counter()
        block(self)
        if self.contender.backend.name == "sleeps":
            ticks[0] += 0.5 * (time.perf_counter() - began) * os.sysconf("SC_CLK_TCK")
            write()

    monkeypatch.setattr(scenarios.ClosedLoop, "run", run)
    config = BenchConfig(**QUICK | {"backends": ("sleeps", "ort-cpu"), "scenarios": ("back-to-back",), "seconds": 1.0})
    report, _ = run_bench((make_bundle("prelocal"),), config)
    robbed, spared = (cells(report, backend=name)[0] for name in ("sleeps", "ort-cpu"))
    assert robbed.stolen_cpu == pytest.approx(0.5, abs=0.1)
    assert spared.stolen_cpu == 0
    assert report.noise.noisy
    (found,) = (reason for reason in report.noise.reasons if reason.kind == "cells robbed")
    assert (found.n_cells, found.n_known, found.cell) == (1, 3, "back-to-back batch 1: bundle sleeps fp32")
    assert found.value == robbed.stolen_cpu
    text = to_markdown(report)
    assert re.search(r"during 1 of 3 cells, the most \(0\.[456]\d\) from back-to-back batch 1: bundle sleeps fp32", text)
    assert "stolen cores" in text


def test_a_machine_that_only_rests_is_quiet():
    cell = types.SimpleNamespace(stolen_cpu=0.04, key=types.SimpleNamespace(label="x"))
    steady = noise.judge([100.0, 101.0, 99.0, 100.0, 100.0, 101.0], 0.05, 0.01, [cell])
    assert (steady.noisy, steady.reasons) == (False, ())
    found = noise.judge([100.0, 140.0, 99.0, 130.0, 100.0, 101.0], 0.2, 0.03, [cell])
    assert [reason.kind for reason in found.reasons] == ["work varied", "others busy", "cores stolen"]
    assert [reason.value for reason in found.reasons] == [found.canary_spread, 0.2, 0.03]
    assert "Other processes kept 0.20 cores busy." in why_noisy(found)


def test_the_canary_does_not_time_a_core_that_wakes_up():
    class Waking:
        """A core that takes twice as long for 5 ms after it was idle."""

        def __init__(self):
            self.time = 0.0

        def now(self):
            self.time += 2e-4 if self.time < 0.005 else 1e-4
            return self.time

    canary = noise.Canary(Waking())
    canary.sing()
    assert canary.us == [pytest.approx(100.0)]


def test_reasons_of_several_runs_are_told_once():
    changes = ((1, -0.42), (3, -0.74), (4, 0.05), (5, 0.06), (7, 0.08), (8, 0.09))
    drift = [(run, Disturbance(kind="work drifted", value=change)) for run, change in changes]
    others = Disturbance(kind="others busy", value=0.2)
    found = together([drift[0], (2, others), *drift[1:]])
    assert [(each.kind, each.value, each.runs, each.worst_run) for each in found] == [
        ("work drifted", -0.74, (1, 3, 4, 5, 7, 8), 3),
        ("others busy", 0.2, (2,), 2),
    ]
    told = why_noisy(Noise(noisy=True, reasons=found, canary_us=Estimate(value=1.0), canary_spread=0.1))
    assert re.match(r"Runs 1, 3 to 5, 7 to 8, the most in run 3: .* changed by -74%", told)
    assert told.endswith("Run 2: Other processes kept 0.20 cores busy.")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(get_args(DisturbanceKind)), st.floats(-5, 5)), max_size=20))
def test_no_disturbance_of_a_run_is_lost_in_a_merged_report(drawn):
    reasons = [(run, Disturbance(kind=kind, value=value)) for run, kind, value in sorted(drawn)]
    found = {each.kind: each for each in together(reasons)}
    assert found.keys() == {reason.kind for _, reason in reasons}
    for kind, each in found.items():
        mine = [(run, reason.value) for run, reason in reasons if reason.kind == kind]
        assert sorted(each.runs) == sorted(run for run, _ in mine)
        assert abs(each.value) == max(abs(value) for _, value in mine)
        assert (each.worst_run, each.value) in mine


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("fp16", False)])
def test_baselines_on_the_gpu_have_tensorfloat_32_in_tf32_alone(precision, allowed):
    """Both products and convolutions: cuDNN's default is to use it."""
    baseline = TorchEagerCuda.__new__(TorchEagerCuda)
    baseline.device, baseline.precision, baseline._n_threads = "cuda:0", precision, torch.get_num_threads()
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = not allowed
        baseline.activate()
        assert [library.allow_tf32 for library in libraries] == [allowed, allowed]
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.allow_tf32 = value


def test_a_bundle_of_one_batch_is_measured_at_that_batch(make_bundle):
    bundle = make_bundle("prelocal", static_batch=4)
    config = BenchConfig(**QUICK | {"scenarios": ("back-to-back", "paced", "streams")})
    report, _ = run_bench((Bundle.open(bundle.path),), config)
    (cell,) = cells(report, backend="ort-cpu")
    assert (cell.key.scenario, cell.key.batch) == ("back-to-back", 4)
    assert [entry.what for entry in report.left_out] == [("paced: bundle on ort-cpu fp32", "streams: bundle on ort-cpu fp32")]


# ---------------------------------------------------------------- several Pythons


def test_runs_of_several_pythons_become_one_report(make_bundle):
    bundle = make_bundle("prelocal")
    plan = QUICK | {"scenarios": ("back-to-back", "paced")}
    runs = [
        run_bench((bundle,), BenchConfig(**plan | {"backends": (name, missing)}), command=name)
        for name, missing in (("ort-cpu", "ort-cuda"), ("torch-eager", "ort-tensorrt"))
    ]
    report, samples = merge(runs)
    assert report.command == "ort-cpu && torch-eager"
    keys = [c.key for c in report.cells]
    assert len(set(keys)) == len(keys) == 2 + 2 * 3
    for run, arrays in runs:
        for cell in run.cells:
            twin = report.cell(cell.key)
            if twin.key.backend != HARNESS:
                np.testing.assert_array_equal(samples[f"{twin.id}.latency_us"], arrays[f"{cell.id}.latency_us"])
                assert dataclasses.replace(twin, id=cell.id) == cell
    assert len(samples["canary_us"]) == sum(len(arrays["canary_us"]) for _, arrays in runs)
    assert {j.result.backend for j in report.parity} == {"ort-cpu", "torch-eager"}
    assert [entry.what for entry in report.left_out] == [("ort-cuda",), ("ort-tensorrt",)]
    jsonschema.Draft202012Validator(SCHEMA).validate(encode(report))
    with pytest.raises(BenchmarkError, match="Two reports have the cell"):
        merge([runs[0], runs[0]])
    other = dataclasses.replace(runs[1][0], environment=dataclasses.replace(runs[1][0].environment, gpu="another"))
    with pytest.raises(BenchmarkError, match="different machines"):
        merge([runs[0], (other, runs[1][1])])
    altered = dataclasses.replace(runs[1][0], bundles=(dataclasses.replace(runs[1][0].bundles[0], digest="0" * 64),))
    with pytest.raises(BenchmarkError, match="different bundles named bundle"):
        merge([runs[0], (altered, runs[1][1])])


def test_runs_of_some_bundles_each_become_one_report(make_bundle, tmp_path):
    plan = BenchConfig(**QUICK | {"scenarios": ("back-to-back",)})
    variants = ("prelocal", "postlocal")
    bundles = [Bundle.open(copy_bundle(make_bundle(name), tmp_path / name)) for name in variants]
    report, _ = merge([run_bench((bundle,), plan) for bundle in bundles])
    assert [fact.label for fact in report.bundles] == list(variants)
    assert {choice.bundle for choice in report.recommendations} == set(variants)


def test_the_script_for_gpu_machines_needs_no_click(make_bundle, tmp_path):
    """In a process of its own, as on a machine with NumPy and a runtime alone; its two reports are then merged."""
    copy_bundle(make_bundle("prelocal"), tmp_path / "bundles" / "prelocal")
    for name in ("click", "rich", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    script = ROOT / "benchmarks" / "gpu_latency.py"
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def run(*arguments):
        command = [sys.executable, "-W", "error", script, tmp_path / "bundles", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        return done.stdout

    plan = ("--backend", "ort-cpu", "--precision", "fp32", "--variant", "prelocal", "--duration", "0.1")
    a, b = tmp_path / "out" / "a", tmp_path / "out" / "b"
    assert "prelocal: ort-cpu fp32. p" in run(a, *plan, "--scenario", "back-to-back", "--scenario", "cold-start")
    run(b, *plan, "--scenario", "streams", "--deadline", "30")
    run(tmp_path / "all.v1", "--merge", f"{a}.json", f"{b}.json")
    report = load_report(tmp_path / "all.v1.json")
    assert {c.key.scenario for c in report.cells} == {"back-to-back", "cold-start", "streams"}
    assert load_samples(report, tmp_path / "all.v1.json").keys() >= {"canary_us", "c000.latency_us"}


@pytest.mark.alone
def test_the_report_of_a_gpu_machine_loses_only_what_hangs_and_goes_on(make_bundle, tmp_path, monkeypatch, capfd):
    """With CPU backends in place of those of a GPU: a part that hangs is ended, and one that is there is not measured again."""
    specification = importlib.util.spec_from_file_location("gpu_latency", ROOT / "benchmarks" / "gpu_latency.py")
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_latency", script)
    specification.loader.exec_module(script)
    assert len({part.name for part in script.PARTS}) == len(script.PARTS)
    words = ("memory=copy", "cuda_graph=false", "device=1", "persistent=true")
    asked = {"memory": "copy", "cuda_graph": False, "device": 1, "persistent": True}
    assert dict(map(script.option, words)) == asked
    for part in script.PARTS:
        assert set(part.backends.split()) <= set(ALL_BACKENDS)
        assert set(part.scenarios.split()) <= set(SCENARIOS)
    for name in ("prelocal", "postlocal", "contextual"):
        copy_bundle(make_bundle(name), tmp_path / "bundles" / name)
    one = script.Part("one", 60, "ort-cpu", "fp32", "back-to-back", "0.1")
    hangs = script.Part("hangs", 1, "tensorrt", "fp32", "back-to-back")  # runs in the other Python, here one that sleeps
    other = script.Part("other", 60, "ort-cpu", "fp32", "paced", "0.1", "--variant=prelocal --rate=100")
    monkeypatch.setattr(script, "PARTS", (one, hangs, other))
    monkeypatch.setattr(script, "GRACE_S", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "out" / "latency"
    command = ["gpu_latency.py", str(tmp_path / "bundles"), str(out), "--report", "--tensorrt-python", "sleep 60;"]
    monkeypatch.setattr(sys, "argv", command)
    began = time.perf_counter()
    script.main()
    assert time.perf_counter() - began < 60, "the hanging part was not waited for"
    printed = capfd.readouterr().out
    assert re.search(r"one: \d+ s, written\nhangs: \d+ s, NOTHING\nother: \d+ s, written", printed)
    report = load_report(out.with_suffix(".json"))
    assert {c.key.scenario for c in cells(report, backend="ort-cpu")} == {"back-to-back", "paced"}
    assert [fact.label for fact in report.bundles] == ["prelocal", "postlocal", "contextual"]
    monkeypatch.setattr(script, "PARTS", (one, other))
    monkeypatch.setattr(sys, "argv", [*command, "--deadline", "1"])
    script.main()
    assert "written" not in capfd.readouterr().out
    again = load_report(out.with_suffix(".json"))
    assert report.command == "python benchmarks/gpu_latency.py BUNDLES OUT/latency --report"
    lost = [entry for entry in report.left_out if entry.label.startswith("part hangs (back-to-back of tensorrt in fp32")]
    assert [entry.reason for entry in lost] == ["It ended without a result."]
    assert [(ending.kind, ending.n) for ending in report.partial] == [("parts lost", 1)]
    rest = tuple(entry for entry in report.left_out if entry not in lost)
    assert again == dataclasses.replace(report, left_out=rest, partial=())
