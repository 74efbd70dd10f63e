import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.runtime.bench import estimates
from sjepa_deploy.runtime.bench.estimates import (
    bootstrap,
    has_trend,
    interval,
    latency,
    medians,
    of_blocks,
    percentile,
    ratio,
    samples_needed,
)
from sjepa_deploy.runtime.intervals import quotient, t_quantile


def clustered(rng, n_blocks=12, n=200, between=0.03, within=0.1, level=100.0):
    """Latencies whose blocks differ: log-normal around a level that each block has for itself."""
    levels = level * np.exp(rng.normal(0, between, n_blocks))
    values = np.repeat(levels, n) * np.exp(rng.normal(0, within, n_blocks * n))
    return values, np.repeat(np.arange(n_blocks), n)


@pytest.mark.parametrize("df", [4, 5, 7, 9, 11, 19, 40])
def test_quantiles_of_t_are_those_of_scipy(df):
    assert t_quantile(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=0.003)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 50), min_size=5, max_size=60),
    st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]),
    st.integers(0, 2**32 - 1),
)
def test_resampled_percentiles_are_those_of_the_pooled_blocks(numbers, percent, seed):
    """The weighted search equals numpy's quantile of the blocks that were drawn, put together."""
    values, blocks = np.array(numbers, float), np.arange(len(numbers)) % 5
    resampled = bootstrap(values, blocks, [percent], np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    for row in resampled[:20]:
        drawn = rng.integers(5, size=5)
        pool = np.concatenate([values[blocks == block] for block in drawn])
        assert row[0] == np.quantile(pool, percent / 100, method="inverted_cdf")


def test_large_pools_are_thinned_without_a_change_of_their_distribution(monkeypatch):
    values, blocks = clustered(np.random.default_rng(3), n_blocks=8, n=4000)
    shuffled = np.random.default_rng(0).permutation(len(values))
    monkeypatch.setattr(estimates, "N_RESAMPLES", 200)
    whole = bootstrap(values[shuffled], blocks[shuffled], [50.0, 99.0], np.random.default_rng(1))
    monkeypatch.setattr(estimates, "MAX_RESAMPLED", len(values))
    exact = bootstrap(values[shuffled], blocks[shuffled], [50.0, 99.0], np.random.default_rng(1))
    assert np.abs(whole / exact - 1).max() < 0.002


def coverage(blocks_of, n_runs=300):
    """Share of runs whose interval holds the true median, 100."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(n_runs):
        values, blocks = clustered(rng, n=40)
        blocks = blocks_of(values, blocks)
        column = bootstrap(values, blocks, [50.0], rng)[:, 0]
        low, high = interval(column, len(np.unique(blocks)))
        hits += low <= 100.0 <= high
    return hits / n_runs


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    """95 % of the time though calls of a block go together; an interval that takes them for independent does far worse."""
    monkeypatch.setattr(estimates, "N_RESAMPLES", 400)
    honest = coverage(lambda values, blocks: blocks)
    naive = coverage(lambda values, blocks: np.arange(len(values)), n_runs=60)
    assert 0.92 <= honest <= 0.99
    assert naive < 0.85


def test_a_percentile_without_enough_samples_is_left_out():
    assert [samples_needed(p) for p in (50.0, 90.0, 95.0, 99.0, 99.9)] == [10, 50, 100, 500, 5000]
    values, blocks = clustered(np.random.default_rng(0), n_blocks=6, n=80)
    found = latency(values, blocks)
    assert [p.value is not None for p in found.percentiles] == [True, True, True, False, False]
    assert found.at(95.0).value == np.quantile(values, 0.95, method="inverted_cdf")
    assert found.at(99.0) is None
    assert (found.n, found.n_blocks, found.max_us) == (480, 6, values.max())


def test_few_blocks_give_no_interval():
    values, blocks = clustered(np.random.default_rng(0), n_blocks=4)
    assert latency(values, blocks).at(50.0).low is None
    assert of_blocks(np.array([1.0, 3.0, 2.0])).high is None
    assert ratio((values, blocks), (values, blocks), 50.0).low is None
    assert of_blocks(np.array([1.0, 3.0, 2.0, 5.0, 4.0])).value == 3.0


def test_the_interval_of_a_change_holds_it():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(40):
        change = ratio(clustered(rng), clustered(rng, level=110.0), 50.0)
        assert change.low < change.value < change.high
        hits += change.low <= 0.1 <= change.high
    assert hits >= 34


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=6, max_size=30, unique=True))
def test_trends_are_those_of_kendall(series):
    """scipy's tau has an exact p-value for short series: where that is clear, the normal approximation agrees."""
    p = scipy.stats.kendalltau(np.arange(len(series)), series).pvalue
    if p < 0.005 or p > 0.02:
        assert has_trend(np.array(series, float)) == (p < 0.01)


def test_what_stands_still_has_no_trend():
    assert not has_trend(np.ones(20))
    assert not has_trend(np.arange(5.0))
    assert has_trend(np.arange(8.0))


def test_medians_of_blocks():
    assert medians(np.array([1.0, 5.0, 3.0, 7.0]), np.array([0, 0, 2, 2])).tolist() == [3.0, 5.0]
    assert percentile(np.arange(1.0, 101.0), 99.0) == 99.0


def test_the_interval_of_a_quotient_holds_the_truth_of_clustered_counts():
    """20 blocks whose shares differ: the interval of 95 % holds the share that they were drawn around in about 95 % of 400."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        totals = rng.integers(20, 60, 20)
        share = np.clip(rng.normal(0.7, 0.08, 20), 0, 1)
        value, low, high = quotient(rng.binomial(totals, share).astype(float), totals.astype(float))
        assert low < value < high
        held += low <= 0.7 <= high
    assert 0.91 <= held / 400 <= 0.985
    assert quotient(np.array([1.0, 2.0]), np.array([4.0, 4.0])) == (3 / 8, None, None)
    assert quotient(np.zeros(6), np.zeros(6)) == (None, None, None)
