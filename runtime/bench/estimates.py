"""Estimates percentiles and their confidence intervals from latencies that are not independent.

Calls that follow each other share the state of the machine (clock, caches, what else runs), so that thousands of calls hold far
less than thousands of independent samples. A run is therefore cut into blocks that lie apart in time, and the bootstrap draws
whole blocks (cluster bootstrap), see `sjepa_deploy.runtime.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.runtime.bench.cells import PERCENTS, Estimate, Latency, Percentile
from sjepa_deploy.runtime.intervals import MIN_BLOCKS, N_RESAMPLES, interval

Array = NDArray[np.float64]
Blocks = NDArray[np.integer]

MAX_RESAMPLED = 20_000
"""Larger pools are thinned for the bootstrap: of every block each m-th of its sorted samples, which is the same distribution."""

TREND_LEVEL = 0.01


def samples_needed(percent: float) -> int:
    """Return how many samples a percentile needs: five beyond it, as fewer say nothing about where the tail ends."""
    return math.ceil(round(5 / (1 - percent / 100), 6))


def percentile(values: Array, percent: float) -> float:
    """Return the smallest value that at least `percent` of `values` do not exceed."""
    return float(np.quantile(values, percent / 100, method="inverted_cdf"))


def bootstrap(values: Array, blocks: Blocks, percents: Sequence[float], rng: np.random.Generator) -> Array:
    """Return percentiles of `N_RESAMPLES` pools of resampled blocks.

    Parameters
    ----------
    values : array, shape (n,)
        Samples.
    blocks : array of int, shape (n,)
        Number of the block in which each sample was taken.
    percents : sequence of float
        Which percentiles.
    rng : numpy.random.Generator
        What draws.

    Returns
    -------
    array, shape (N_RESAMPLES, len(percents))
        Of each pool.
    """
    values, blocks = _thinned(values, blocks)
    names, block = np.unique(blocks, return_inverse=True)
    n_blocks = len(names)
    order = np.argsort(values)
    ordered = values[order]
    seen = (block[order, None] == np.arange(n_blocks)).cumsum(axis=0)  # of each block, the samples up to each one
    drawn = np.stack([np.bincount(row, minlength=n_blocks) for row in rng.integers(n_blocks, size=(N_RESAMPLES, n_blocks))])
    # the first value at which enough of the pool is reached; the rounding would ask for one sample more
    wanted = np.ceil(np.asarray(percents) / 100 * (drawn @ seen[-1])[:, None] - 1e-9)
    low, high = np.zeros(wanted.shape, np.intp), np.full(wanted.shape, len(ordered) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        enough = np.einsum("rb,rpb->rp", drawn, seen[middle]) >= wanted
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return ordered[low]


def _thinned(values: Array, blocks: Blocks) -> tuple[Array, Blocks]:
    step = -(-len(values) // MAX_RESAMPLED)
    if step == 1:
        return values, blocks
    order = np.lexsort((values, blocks))
    _, first = np.unique(blocks[order], return_index=True)
    keep = np.concatenate([part[step // 2 :: step] for part in np.split(order, first[1:])])
    return values[keep], blocks[keep]


def latency(values: Array, blocks: Blocks, *, stable: bool = True, jitter_us: float | None = None, seed: int = 0) -> Latency:
    """Return the distribution of pooled samples.

    Parameters
    ----------
    values : array, shape (n,)
        Latencies in microseconds.
    blocks : array of int, shape (n,)
        Number of the block in which each sample was taken, rising with time.
    stable : bool
        Whether the warm-up ended well.
    jitter_us : float or None
        Jitter of the outputs.
    seed : int
        Of the bootstrap.
    """
    n_blocks = len(np.unique(blocks))
    known = [p for p in PERCENTS if len(values) >= samples_needed(p)]
    found = {p: Estimate(value=percentile(values, p)) for p in known}
    if n_blocks >= MIN_BLOCKS and known:
        resampled = bootstrap(values, blocks, known, np.random.default_rng(seed))
        for p, column in zip(known, resampled.T, strict=True):
            low, high = interval(column, n_blocks)
            found[p] = Estimate(value=found[p].value, low=low, high=high)
    return Latency(
        n=len(values),
        n_blocks=n_blocks,
        percentiles=tuple(Percentile(percent=p, value=found.get(p), n_needed=samples_needed(p)) for p in PERCENTS),
        min_us=float(values.min()),
        mean_us=float(values.mean()),
        max_us=float(values.max()),
        jitter_us=jitter_us,
        stable=stable,
        drifting=has_trend(medians(values, blocks)),
    )


def medians(values: Array, blocks: Blocks) -> Array:
    """Return the median of each block, in order."""
    return np.array([np.median(values[blocks == block]) for block in np.unique(blocks)])


def of_blocks(values: Array) -> Estimate:
    """Return the median of figures that each describe one block, with its interval."""
    middle = float(np.median(values))
    if len(values) < MIN_BLOCKS:
        return Estimate(value=middle)
    rng = np.random.default_rng(0)
    resampled = np.median(values[rng.integers(len(values), size=(N_RESAMPLES, len(values)))], axis=1)
    low, high = interval(resampled, len(values))
    return Estimate(value=middle, low=low, high=high)


def ratio(before: tuple[Array, Blocks], after: tuple[Array, Blocks], percent: float) -> Estimate:
    """Return the relative change of a percentile from one pool of blocks to another, 0.1 for 10 % more, with its interval."""
    value = percentile(after[0], percent) / percentile(before[0], percent) - 1
    n_blocks = min(len(np.unique(blocks)) for _, blocks in (before, after))
    if n_blocks < MIN_BLOCKS:
        return Estimate(value=value)
    first, second = (
        bootstrap(values, blocks, [percent], np.random.default_rng(seed))[:, 0]
        for seed, (values, blocks) in enumerate((before, after))
    )
    low, high = interval(second / first - 1, n_blocks)
    return Estimate(value=value, low=low, high=high)


def has_trend(series: Array) -> bool:
    """Return whether a series rises or falls (Mann-Kendall, two-sided, 1 %). Fewer than six values never do."""
    n = len(series)
    if n < 6:
        return False
    first, second = np.triu_indices(n, 1)
    score = float(np.sign(series[second] - series[first]).sum())
    _, ties = np.unique(series, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0:
        return False
    z = (abs(score) - 1) / math.sqrt(variance)  # the continuity correction
    return 2 * NormalDist().cdf(-z) < TREND_LEVEL
