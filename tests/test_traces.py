"""Traces say the same whatever the chunks are: the extremes of a bin are those of its samples."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sjepa_deploy.runtime.watch.traces import BIN_S, MOST_CHUNKS, Traces, spread_over


@given(
    sfreq=st.sampled_from([100.0, 128.0, 500.0, 2048.0]),
    cuts=st.lists(st.integers(1, 999), max_size=30),
    looks=st.sets(st.integers(0, 30)),
    dtype=st.sampled_from(["i2", "f4", "f8"]),
    lost=st.integers(0, 300),
)
def test_extremes_are_those_of_all_samples_of_a_bin(sfreq, cuts, looks, dtype, lost):
    samples = np.random.default_rng(0).normal(scale=100.0, size=(1000, 5)).astype(dtype)
    stamps = 12.3 + np.arange(1000) / sfreq
    stamps[500:] += lost / sfreq
    expected = {}
    for stamp, row in zip(stamps.tolist(), samples[:, [3, 1]].tolist(), strict=True):
        expected.setdefault(math.floor(stamp / BIN_S), []).append(row)
    traces, found = Traces([3, 1]), []
    for i, (start, stop) in enumerate(pairwise(sorted({0, 1000, *cuts}))):
        traces.take(stamps[start:stop], samples[start:stop])
        if i in looks:
            found.append(traces.thinned())
    found.append(traces.thinned())
    times, low, high = (np.concatenate(part) for part in zip(*found, strict=True))
    del expected[max(expected)]  # more may come
    np.testing.assert_allclose(times, np.array(list(expected)) * BIN_S)
    np.testing.assert_array_equal(low, [np.min(rows, axis=0) for rows in expected.values()])
    np.testing.assert_array_equal(high, [np.max(rows, axis=0) for rows in expected.values()])


def test_a_clock_that_was_set_and_samples_that_are_no_numbers():
    traces = Traces([0])
    traces.take(np.array([100.0, 100.01]), np.array([[1.0], [np.nan]]))
    traces.take(np.array([5.0, 5.1]), np.array([[3.0], [4.0]]))
    times, low, high = traces.thinned()
    np.testing.assert_allclose(times, [100.0, 5.0])
    np.testing.assert_array_equal(low, [[np.nan], [3.0]])
    np.testing.assert_array_equal(high, [[np.nan], [3.0]])


def test_nobody_who_does_not_look_makes_it_grow():
    traces = Traces([0])
    for i in range(3 * MOST_CHUNKS):
        traces.take(np.array([i / 500.0]), np.ones((1, 4)))
    assert len(traces.thinned()[0]) == pytest.approx(MOST_CHUNKS / 500.0 / BIN_S, abs=2)
    assert len(traces.thinned()[0]) == 0


def test_channels_are_spread():
    assert spread_over(("a", "b")) == ("a", "b")
    names = tuple(map(str, range(129)))
    assert (len(spread_over(names)), spread_over(names)[0], spread_over(names)[-1]) == (8, "0", "128")
