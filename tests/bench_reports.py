"""Benchmark reports whose content is known, without measuring anything."""

import dataclasses

import numpy as np

from sjepa_deploy.parity import ParityResult
from sjepa_deploy.runtime.backend import Split
from sjepa_deploy.runtime.bench.cells import (
    HARNESS,
    PERCENTS,
    Capacity,
    Cell,
    CellKey,
    ColdStart,
    Estimate,
    Latency,
    OpenLoop,
    Percentile,
    Phase,
    Resources,
)
from sjepa_deploy.runtime.bench.decision_age import decision_age, low_latency
from sjepa_deploy.runtime.bench.estimates import samples_needed
from sjepa_deploy.runtime.bench.results import (
    SCHEMA_VERSION,
    AgePart,
    BenchReport,
    BundleFacts,
    Judgement,
    LeftOut,
    Noise,
    Recommendation,
)
from sjepa_deploy.runtime.machine import Environment, MachineState
from sjepa_deploy.spec import ModelSpec

MEDIANS = {
    "prelocal": {"ort-cpu": 24.1, "torch-compile": 61.0, "torch-eager": 210.0, "braindecode": 260.0},
    "contextual": {"ort-cpu": 5100.0, "torch-compile": 6300.0, "torch-eager": 9800.0, "braindecode": 11200.0},
}
WRONG = ("contextual", "torch-compile")
CAREFUL = ("prelocal", "braindecode")
STORED_AS = {"latency_us": np.float32, "block": np.int32, "at_s": np.float64, "service_us": np.float32}


def measure_quickly(patch):
    """Warm up with two calls, and wait for nothing: for tests that look at what is written, not at how steady it is."""
    patch.setattr("sjepa_deploy.runtime.bench.loops.warm_up", lambda call, windows, clock: [call(w) for w in windows] != [])
    patch.setattr("sjepa_deploy.runtime.bench.run.SETTLE_S", 0.001)
    patch.setattr("sjepa_deploy.runtime.bench.estimates.N_RESAMPLES", 200)


def latency(values, jitter=None) -> Latency:
    def found(percent):
        if len(values) < samples_needed(percent):
            return None
        value = float(np.percentile(values, percent))
        return Estimate(value=value, low=value * 0.99, high=value * 1.02)

    return Latency(
        n=len(values),
        n_blocks=20,
        percentiles=tuple(Percentile(percent=p, value=found(p), n_needed=samples_needed(p)) for p in PERCENTS),
        min_us=float(values.min()),
        mean_us=float(values.mean()),
        max_us=float(values.max()),
        jitter_us=jitter,
    )


def parity_result(backend, passed=True, worst="eeg at batch 3") -> ParityResult:
    return ParityResult(
        backend=backend,
        precision="fp32",
        passed=passed,
        tolerance=1e-5,
        n_windows=20,
        n_rows=400,
        batch_sizes=(1, 2, 3, 8),
        max_abs=1e-6,
        max_error=2.1e-7 if passed else 0.31,
        max_relative_to_spread=1e-6,
        scale=1.0,
        spread=0.5,
        cosine=1.0,
        nan_agrees=True,
        worst=worst,
        decision_flips=None,
        flip_margin=None,
    )


def make_report(*, bundles=("prelocal", "contextual"), n=4000, **changes):
    """Return a report of two bundles with every scenario, and its samples. `WRONG` is fast and wrong."""
    rng = np.random.default_rng(0)
    cells, samples, judgements, ages, capacities = [], {}, [], [], []
    state = MachineState(cpu_mhz=2450.0, load=0.4)

    def draw(median, count):
        return median * (1 + rng.gamma(1.2, 0.04, count)) * np.where(rng.random(count) < 0.004, rng.uniform(1.5, 6, count), 1)

    def add(cell, values, **more):
        cells.append(cell)
        blocks = np.repeat(np.arange(20), -(-len(values) // 20))[: len(values)]
        arrays = {"latency_us": values, "block": blocks, **more}
        samples.update({f"{cell.id}.{name}": array.astype(STORED_AS[name]) for name, array in arrays.items()})

    values = rng.gamma(4, 0.02, n)
    key = CellKey(scenario="back-to-back", bundle=bundles[0], backend=HARNESS, precision="fp32")
    add(Cell(id="c000", key=key, parity=None, latency=latency(values), windows_per_s=Estimate(value=1e6)), values)
    for bundle, kind in zip(bundles, MEDIANS, strict=False):
        spec = ModelSpec.of(variant="prelocal", n_chans=129, n_times=200, sfreq=100.0)
        for backend, median in MEDIANS[kind].items():
            right = (kind, backend) != WRONG
            careful = (kind, backend) == CAREFUL
            judgement = Judgement(
                bundle=bundle,
                result=parity_result(
                    backend, right and not careful, "electrode offsets at batch 3" if careful else "eeg at batch 3"
                ),
                without_offsets=parity_result(backend) if careful else None,
            )
            judgements.append(judgement)
            common = {"bundle": bundle, "backend": backend, "precision": "fp32"}
            judged = {"parity": judgement.passed, "caution": judgement.caution}
            values = draw(median, n)
            memory = Resources(host_bytes=int(40e6 + median * 1e3))
            split = None
            if backend == "torch-eager":
                figures = {"enqueue_us": 20.0, "h2d_us": 4.0, "compute_us": median * 0.9, "d2h_us": 2.0, "host_us": 30.0}
                split = Split(n=500, **figures, overhead_us=1.2, how="stream, copies")
            cell = Cell(
                id=f"c{len(cells):03}",
                key=CellKey(scenario="back-to-back", **common),
                **judged,
                latency=latency(values),
                windows_per_s=Estimate(value=1e6 / median, low=0.99e6 / median, high=1.01e6 / median),
                resources=memory,
                before=state,
                after=state,
                split=split,
            )
            add(cell, values)
            for batch in (1, 8, 64):
                rate = 1e6 / median * batch**0.6
                cell = Cell(
                    id=f"c{len(cells):03}",
                    key=CellKey(scenario="throughput", **common, batch=batch),
                    **judged,
                    latency=latency(batch**0.4 * values[:500]),
                    windows_per_s=Estimate(value=rate, low=rate * 0.99, high=rate * 1.01),
                )
                add(cell, batch**0.4 * values[:500])
            for rate, keep_warm in ((10.0, False), (100.0, False), (100.0, True)):
                held = not (bundle == bundles[-1] and backend == "braindecode" and rate == 100.0)
                service = draw(median * 1.2, n)
                service[n // 2 : n // 2 + 3] = 25_000
                service = service if held else service[: n // 3]
                loop = OpenLoop(
                    n_due=n,
                    n_done=len(service),
                    held=held,
                    utilization=min(1.0, median * rate / 1e6),
                    deadline_s=1 / rate,
                    missed=(missed := int((service > 1e6 / rate).sum())),
                    longest_run=min(3, missed),
                    beats=100 if keep_warm else 0,
                    beats_busy=0.2 if keep_warm else 0.0,
                    cpu=0.5,
                )
                cell = Cell(
                    id=f"c{len(cells):03}",
                    key=CellKey(scenario="paced", **common, rate=rate, keep_warm=keep_warm),
                    **judged,
                    latency=latency(service, jitter=median / 10) if held else None,
                    open_loop=loop,
                )
                add(cell, service, at_s=np.arange(len(service)) / rate, service_us=service)
            phases = {"process": 0.05, "import": 0.4, "open bundle": 0.02, "open backend": 0.1, "first call": median * 3e-6}
            cold = ColdStart(
                n=5,
                phases=tuple(Phase(name=k, seconds=Estimate(value=v, low=v * 0.9, high=v * 1.2)) for k, v in phases.items()),
                engine=None,
                calls_to_steady=3,
            )
            key = CellKey(scenario="cold-start", **common)
            cells.append(Cell(id=f"c{len(cells):03}", key=key, **judged, cold_start=cold))
            for n_streams in (1, 8):
                values = draw(median * 1.5, 1000)
                loop = OpenLoop(
                    n_due=1000, n_done=1000, held=True, utilization=0.3, deadline_s=0.1, missed=0, longest_run=0, mean_batch=2.4
                )
                cell = Cell(
                    id=f"c{len(cells):03}",
                    key=CellKey(scenario="streams", **common, batch=8, rate=10.0, n_streams=n_streams),
                    **judged,
                    latency=latency(values),
                    open_loop=loop,
                )
                add(cell, values, at_s=np.arange(1000) / 100, service_us=values / 2)
            capacities.append(Capacity(**common, rate=10.0, deadline_s=0.1, n_held=8, n_refused=None))
            inference = AgePart(name="inference", seconds=median * 1.3e-6, source="measured: p99, paced 10/s")
            if backend == "ort-cpu":
                age = decision_age(spec, **common, hop=0.1, inference=inference)
                ages += [age, low_latency(age, spec)]
    report = BenchReport(
        schema_version=SCHEMA_VERSION,
        created="2026-11-22T18:00:00+00:00",
        seconds=612.0,
        command="sjepa-bench prelocal contextual --scenario all --out report",
        seed=0,
        partial=(),
        environment=Environment(
            processor="AMD EPYC",
            cores=2,
            system="Linux",
            python=("3.11.7",),
            versions={"sjepa-deploy": ("0.1.0",), "onnxruntime": ("1.32.0",)},
            commit="e21d756",
            governor="performance",
            clock="perf_counter_ns, 1 ns",
        ),
        noise=Noise(
            noisy=False, reasons=(), canary_us=Estimate(value=101.0, low=100.0, high=103.0), canary_spread=0.011, others_cpu=0.03
        ),
        bundles=tuple(
            BundleFacts(
                label=bundle, variant=kind, n_chans=129, n_times=200, sfreq=100.0, digest="0123456789abcdef" * 4, weights="a.ckpt"
            )
            for bundle, kind in zip(bundles, MEDIANS, strict=False)
        ),
        cells=tuple(cells),
        loop_us=0.12,
        parity=tuple(judgements),
        capacity=tuple(capacities),
        decision_age=tuple(ages),
        recommendations=tuple(
            Recommendation(bundle=b, backend="ort-cpu", precision="fp32", why="Lowest paced p99 of those that pass parity.")
            for b in bundles
        ),
        left_out=(LeftOut(what=("tensorrt",), reason="tensorrt is not installed", kind="not here"),),
        samples_file="report.npz",
    )
    return (dataclasses.replace(report, **changes) if changes else report), samples


def assert_as_measured(report, samples):
    """Assert what holds of every report that `run_bench` makes: reports that tests make up must not have other states."""
    judgements = {(j.bundle, j.result.backend, j.result.precision): j for j in report.parity}
    arrays = {}
    for name, array in samples.items():
        cell, _, kind = name.partition(".")
        arrays.setdefault(cell, {})[kind] = array
    arrays.pop("canary_us", None)
    assert [cell.id for cell in report.cells] == [f"c{i:03}" for i in range(len(report.cells))]
    assert len({cell.key for cell in report.cells}) == len(report.cells)
    for cell in report.cells:
        key, of = cell.key, arrays.pop(cell.id, {})
        judgement = judgements.get((key.bundle, key.backend, key.precision))
        assert (judgement is None) == (key.backend == HARNESS)
        told = (None, None) if judgement is None else (judgement.passed, judgement.caution)
        assert (cell.parity, cell.caution) == told
        if judgement is not None and judgement.without_offsets is not None:
            assert not judgement.result.passed
            assert "offset" in judgement.result.worst
        is_open = key.scenario in ("paced", "streams")
        assert (cell.open_loop is not None, key.rate is not None) == (is_open, is_open)
        assert (key.n_streams is not None) == (key.scenario == "streams")
        assert (cell.cold_start is not None) == (key.scenario == "cold-start")
        assert (cell.windows_per_s is not None) == (key.scenario in ("back-to-back", "throughput"))
        if cell.cold_start is not None:
            assert (cell.latency, of) == (None, {})
            continue
        kinds = ("latency_us", "block", *(("at_s", "service_us") if is_open else ()))
        assert set(of) == set(kinds)
        assert {len(array) for array in of.values()} == {len(of["latency_us"])}
        assert all(array.dtype == STORED_AS[kind] for kind, array in of.items())
        assert (cell.latency is None) == (is_open and not cell.open_loop.held)
        if cell.latency is not None:
            assert (cell.latency.jitter_us is not None) == (key.scenario == "paced")
            assert cell.latency.n == len(of["latency_us"])
        if is_open:
            assert cell.open_loop.missed <= cell.open_loop.n_done == len(of["latency_us"]) <= cell.open_loop.n_due
            assert cell.open_loop.longest_run <= cell.open_loop.missed
            assert key.keep_warm or cell.open_loop.beats == 0
    assert arrays == {}
    for found in report.capacity:
        streams = [c for c in report.cells if c.key.scenario == "streams" and c.key.backend == found.backend]
        assert found.n_held in [0, *(c.key.n_streams for c in streams if c.key.bundle == found.bundle)]
