"""When windows are due, beside a list of all samples."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sjepa_deploy.runtime.live.schedule import HopCounter


@given(
    n_times=st.integers(1, 30),
    hop_share=st.floats(0.01, 1.0),
    pieces=st.lists(st.tuples(st.booleans(), st.integers(0, 70)), max_size=15),
)
def test_windows_are_due_on_the_grid_of_the_first_sample(n_times, hop_share, pieces):
    """The oracle marks every sample as there or lost, and looks at each stretch of `n_times` of them that ends on the grid."""
    hop = max(1, round(hop_share * n_times))
    schedule, there, whole, n_lost_windows = HopCounter(n_times, hop), [], [], 0
    for lost, n in pieces:
        there += [not lost] * n
        if lost and n:
            n_lost_windows += schedule.skip(n)
        while n and not lost:
            step = min(n, schedule.due_in)
            n -= step
            if schedule.advance(step):
                whole.append(schedule.whole)
        assert schedule.due_in >= 1
    assert schedule.elapsed == len(there)
    ends = np.arange(n_times, len(there) + 1, hop)
    assert whole == [all(there[end - n_times : end]) for end in ends if there[end - 1]]
    assert n_lost_windows == sum(not there[end - 1] for end in ends)


def test_a_loss_of_nothing_breaks_the_windows_across_it():
    schedule = HopCounter(10, 5)
    assert schedule.advance(10)
    assert schedule.whole
    assert schedule.skip(0) == 0
    assert schedule.advance(5)
    assert not schedule.whole
    assert schedule.advance(5)
    assert schedule.whole
