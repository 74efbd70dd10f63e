"""Events of senders with clocks of their own, late markers and lost samples: benchmarks/events.py, in small."""

import shutil
import sys
from pathlib import Path

import pytest

import sjepa_deploy

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import event_senders
import events


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


def assert_right(found, plan):
    """Every event has its decision or its reason; each window has the bits of the one at MNE's sample of the record."""
    assert found["accounted"]
    assert found["came"] == plan.n_events
    assert found["same_bits"] == found["decisions"] > plan.n_events / 3
    assert not found["window_and_not_decided"]
    assert found["reasons"].keys() <= {"gap", "past end"}
    assert found["samples_lost"] > 0
    assert found["marker_delay_s"][-1] > 0.9 * plan.delay


def test_on_a_virtual_clock_events_get_the_windows_at_their_own_samples(predict):
    plan = event_senders.Plan(n_events=600, per_second=20.0, sfreq=250.0, lose_every=8.0, seed=3)
    found = events.virtual(predict, plan)
    assert_right(found, plan)
    assert found["samples_off"].keys() == {"0"}


@pytest.mark.alone
@pytest.mark.skipif(shutil.which("cc") is None, reason="the clock of another machine is compiled")
def test_over_lsl_events_get_the_windows_at_their_own_samples(predict, own_lsl):
    """Both senders' clocks are minutes off, and drift. A sample may be off where the machine was too busy to measure them."""
    from own_lsl import CONFIG

    plan = event_senders.Plan(n_events=200, per_second=50.0, sfreq=250.0, delay=1.5, lose_every=3.0, lead=1.0, tail=4.0, seed=2)
    found = events.live(predict, plan, CONFIG)
    assert_right(found, plan)
    assert found["samples_off"]["0"] > 0.9 * sum(found["samples_off"].values())
