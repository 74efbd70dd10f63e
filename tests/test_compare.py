"""What `--compare` claims of simulated runs whose truth is known, and which backend is recommended."""

import dataclasses

import numpy as np
import pytest

from sjepa_deploy.runtime.bench import estimates
from sjepa_deploy.runtime.bench.cells import Cell, CellKey, OpenLoop
from sjepa_deploy.runtime.bench.compare import compare, recommend, regressions
from sjepa_deploy.runtime.bench.results import SCHEMA_VERSION, BenchReport, BundleFacts, Ending
from sjepa_deploy.runtime.machine import Environment

FACTS = BundleFacts(label="prelocal", variant="prelocal", n_chans=8, n_times=200, sfreq=100.0, digest="d", weights="random")
MACHINE = Environment(processor="A", cores=2, system="Linux", python=("3.11",), versions={"numpy": ("2.0",)})


def key(backend="ort-cpu", scenario="back-to-back", **more):
    return CellKey(scenario=scenario, bundle="prelocal", backend=backend, precision=more.pop("precision", "fp32"), **more)


def simulate(rng, level, n_blocks=10, n=60, between=0.01, run=0.008):
    """Latencies in us of one run: its own level, blocks around it, calls with a tail around those."""
    own = level * np.exp(rng.normal(0, run))
    blocks = own * np.exp(rng.normal(0, between, n_blocks))
    values = np.repeat(blocks, n) * (1 + rng.exponential(0.05, n_blocks * n))
    return values, np.repeat(np.arange(n_blocks), n)


def open_loop(k, pool):
    n = 1000 if pool is None else len(pool[0])
    fields = {"deadline_s": 1 / k.rate, "missed": 0, "longest_run": 0}
    return OpenLoop(n_due=n, n_done=n if pool else n // 2, held=pool is not None, utilization=0.5 if pool else 2.0, **fields)


def report(figures, *, canary=None, parity=None, caution=None, **more):
    """A report with a cell for each key of `figures`, whose values are samples and blocks, or None for a rate not held."""
    cells, samples = [], {}
    for i, (k, pool) in enumerate(figures.items()):
        samples |= {} if pool is None else {f"c{i}.latency_us": pool[0], f"c{i}.block": pool[1]}
        cells.append(
            Cell(
                id=f"c{i}",
                key=k,
                parity=(parity or {}).get(k.backend, True),
                caution=(caution or {}).get(k.backend),
                latency=None if pool is None else estimates.latency(*pool),
                open_loop=open_loop(k, pool) if k.scenario in ("paced", "streams") else None,
            )
        )
    if canary is not None:
        samples["canary_us"] = canary
    fields = {"environment": MACHINE, "partial": (), "bundles": (FACTS,)} | more
    return (
        BenchReport(
            schema_version=SCHEMA_VERSION,
            created="2026-11-22T00:00:00+00:00",
            seconds=1.0,
            command="sjepa-bench",
            seed=0,
            noise=None,
            cells=tuple(cells),
            **fields,
        ),
        samples,
    )


def claims(change, n_runs=40, **noise):
    """The verdicts over many pairs of simulated runs, the second slower by `change`."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(n_runs):
        pair = [report({key(): simulate(rng, level, **noise)}) for level in (500.0, 500.0 * (1 + change))]
        (verdict,) = compare(*pair).changes
        found.append(verdict.verdict)
    return found


@pytest.fixture(autouse=True)
def quick_bootstrap(monkeypatch):
    monkeypatch.setattr(estimates, "N_RESAMPLES", 500)


def test_a_planted_10_percent_is_found_and_a_planted_1_percent_is_not_claimed():
    """Runs differ by 0.8 % and blocks by 1 % for no reason (standard deviations), as on a quiet machine."""
    assert claims(0.10).count("slower") >= 39
    assert claims(0.01).count("no change shown") >= 39
    assert claims(0.0).count("no change shown") == 40
    assert claims(-0.10).count("faster") >= 39


def test_on_a_noisy_machine_nothing_is_claimed_for_nothing():
    """Blocks differ by 15 %: a difference of nothing is hardly ever claimed."""
    assert claims(0.0, between=0.15, run=0.0).count("no change shown") >= 37


def test_what_the_machine_became_slower_by_is_not_blamed_on_a_backend():
    rng = np.random.default_rng(1)
    canaries = [100 * scale * np.exp(rng.normal(0, 0.01, 60)) for scale in (1.0, 1.1)]
    figures = [{key(): simulate(rng, 500), key("torch-eager"): simulate(rng, 900)} for _ in range(2)]
    slower = {key(): simulate(rng, 550), key("torch-eager"): simulate(rng, 1260)}
    comparison = compare(report(figures[0], canary=canaries[0]), report(slower, canary=canaries[1]))
    assert [c.verdict for c in comparison.changes] == ["no change shown", "slower"]
    assert comparison.machine.value == pytest.approx(0.1, abs=0.01)
    assert comparison.changes[1].change.value == pytest.approx(0.4, abs=0.04)


def test_a_neighbour_that_came_and_went_is_not_blamed_on_a_backend():
    """In the second run, somebody kept the other core busy most of the time: everything took 45 % longer then."""
    rng = np.random.default_rng(11)
    busy = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    quiet, disturbed = simulate(rng, 500), simulate(rng, 500)
    disturbed = (disturbed[0] * (1 + 0.45 * busy[disturbed[1]]), disturbed[1])
    canaries = [100 * np.exp(rng.normal(0, 0.01, 60)) for _ in range(2)]
    canaries[1] *= 1 + 0.45 * np.repeat(busy, 6)
    blind = compare(report({key(): quiet}), report({key(): disturbed}))
    seeing = compare(report({key(): quiet}, canary=canaries[0]), report({key(): disturbed}, canary=canaries[1]))
    assert seeing.changes[0].verdict == "no change shown"
    assert seeing.changes[0].change == blind.changes[0].change
    assert seeing.changes[0].change.value > 0.4


def test_few_blocks_claim_nothing():
    rng = np.random.default_rng(2)
    pair = [report({key(): simulate(rng, level, n_blocks=3)}) for level in (100, 300)]
    (change,) = compare(*pair).changes
    assert change.verdict == "too few blocks"
    assert change.change.value == pytest.approx(2.0, abs=0.1)
    assert not regressions(compare(*pair), 0.1)


def test_what_is_wrong_or_not_held_any_more_is_a_regression():
    rng = np.random.default_rng(3)
    paced = key("torch-eager", "paced", rate=100.0)
    before = report({key(): simulate(rng, 100), paced: simulate(rng, 800)})
    after = report({key(): simulate(rng, 100), paced: None}, parity={"ort-cpu": False})
    comparison = compare(before, after)
    assert [c.verdict for c in comparison.changes] == ["wrong now", "not held any more"]
    assert len(regressions(comparison, 10.0)) == 2
    assert [c.verdict for c in compare(after, before).changes][1] == "held now"
    assert not regressions(compare(after, before), 0.0)


def test_regressions_are_claimed_slowdowns_above_the_limit():
    rng = np.random.default_rng(4)
    comparison = compare(report({key(): simulate(rng, 100)}), report({key(): simulate(rng, 120)}))
    assert len(regressions(comparison, 0.1)) == 1
    assert not regressions(comparison, 0.3)


def test_what_differs_beside_the_figures_is_listed():
    rng = np.random.default_rng(6)
    pool = simulate(rng, 100)
    versions = {"numpy": ("2.1",), "torch": ("2.12", "2.13")}
    other = dataclasses.replace(MACHINE, processor="B", python=("3.11", "3.13"), versions=versions)
    facts = BundleFacts(**{**vars(FACTS), "digest": "e"})
    streams = key(scenario="streams", rate=10.0, n_streams=7)
    before = report({key(): pool, streams: pool})
    after = report(
        {key("braindecode"): pool, key(): pool}, environment=other, bundles=(facts,), partial=(Ending(kind="interrupted"),)
    )
    comparison = compare(before, after)
    assert comparison.differs == (
        "processor: A -> B",
        "python: 3.11 -> 3.11 and 3.13",
        "numpy: 2.0 -> 2.1",
        "torch: not installed -> 2.12 and 2.13",
        "bundle prelocal: another export",
        "the run after is partial: It was interrupted.",
    )
    assert (comparison.only_before, len(comparison.only_after)) == ((), 1)


# ---------------------------------------------------------------- the recommendation


def test_the_fastest_that_is_right_is_recommended():
    rng = np.random.default_rng(7)
    figures = {key("wrong"): simulate(rng, 10), key("ort-cpu"): simulate(rng, 100), key("torch-eager"): simulate(rng, 500)}
    figures[key("braindecode")] = simulate(rng, 50)
    (choice,) = recommend(report(figures, parity={"wrong": False}, caution={"braindecode": "differs"})[0])
    assert (choice.backend, choice.precision) == ("ort-cpu", "fp32")
    assert "Next: torch-eager fp32" in choice.why
    assert "Struck out for wrong outputs: wrong fp32." in choice.why
    assert "electrode offsets: braindecode fp32." in choice.why


def test_what_cannot_be_told_apart_goes_to_the_higher_precision_and_to_ours():
    rng = np.random.default_rng(8)
    pool = simulate(rng, 100, between=0.05)
    half = (pool[0] * 0.995, pool[1])
    (choice,) = recommend(report({key("ort-cpu", precision="fp16"): half, key("ort-cpu"): pool, key("torch-eager"): half})[0])
    assert (choice.backend, choice.precision) == ("ort-cpu", "fp32")
    assert "2 more cannot be told from it" in choice.why


def test_a_paced_rate_that_is_held_decides_before_calls_back_to_back():
    """fast back to back, slow after a pause: what counts is the paced one, at the highest rate that somebody holds."""
    rng = np.random.default_rng(9)
    figures = {
        key("ort-cpu"): simulate(rng, 100),
        key("torch-eager"): simulate(rng, 200),
        key("ort-cpu", "paced", rate=10.0): simulate(rng, 400),
        key("torch-eager", "paced", rate=10.0): simulate(rng, 300),
        key("ort-cpu", "paced", rate=100.0): None,
        key("torch-eager", "paced", rate=100.0): None,
    }
    (choice,) = recommend(report(figures)[0])
    assert choice.backend == "torch-eager"
    assert "at 10 windows a second" in choice.why


def test_nothing_that_is_right_gives_no_recommendation():
    rng = np.random.default_rng(10)
    assert recommend(report({key("wrong"): simulate(rng, 10)}, parity={"wrong": False})[0]) == ()
    paced = key("ort-cpu", "paced", rate=10.0)
    assert recommend(report({paced: None})[0]) == ()
