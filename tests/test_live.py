"""The live view fits a terminal of 80 x 24, says what is wrong, and is plain lines where nobody watches."""

import io

import numpy as np
import pytest
from monitors import Written
from rich.console import Console

from sjepa_deploy.cli.live import draw_snapshot, live_view, seconds
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.quality import ChannelState

HYDROCEL = read_montage("GSN-HydroCel-129").ch_names


def screen(*, terminal=True, encoding="utf-8"):
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding), width=80, height=24, force_terminal=terminal, color_system=None)


def drawn(monitor, on):
    on.print(draw_snapshot(monitor.snapshot(), on))
    on.file.flush()
    return on.file.buffer.getvalue().decode(on.encoding)


def busy_monitor(n_chans=8, n_outputs=2):
    written = Written(ch_names=HYDROCEL[:n_chans], output_names=tuple(f"output {i}" for i in range(n_outputs)))
    for index in range(120):
        prediction = np.linspace(-1, 1, n_outputs) * (index + 1)
        written.decide(index, transport=0.008, latency=0.012, prediction=prediction, bridged=True)
    written.decide(120, transport=0.008, latency=0.492, prediction=prediction, bridged=True)
    state = np.zeros(n_chans, np.uint8)
    state[:6] = list(ChannelState)
    written.monitor.set_quality(state, np.arange(n_chans) + 0.5, state == ChannelState.MISSING)
    written.count(windows=1, skipped_gap=1, samples_lost=3, misses=1, longest_misses=1)
    for i in range(9):
        written.happen(f"incident {i}")
    written.monitor.set_state("decoding")
    return written.monitor


@pytest.mark.parametrize("n_chans", [8, 32, 40, 129])
@pytest.mark.parametrize("n_outputs", [0, 1, 5, 40])
def test_fits_a_small_terminal(n_chans, n_outputs):
    lines = drawn(busy_monitor(n_chans, n_outputs), screen()).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_says_what_is_wrong(encoding):
    text = drawn(busy_monitor(), screen(encoding=encoding))
    for words in (
        "left-or-right  decoding",
        "age      p50 20 ms",
        "latency  p50 12 ms",
        "max 500 ms",
        "122 = 121 decisions + 1 skipped (gap 1)",
        "misses   1, at worst 1 in a row",
        "samples lost 3",
        "F E2 1.5",
        "?~E6 5.5",
        "1 saturated",
        "gap: incident 8",
        "flags    late, bridged",
    ):
        assert words in text, words


def test_many_channels_are_one_sign_each_and_the_bad_ones_are_named():
    lines = drawn(busy_monitor(129), screen()).splitlines()
    strip = "".join(line for line in lines if line.startswith("•"))
    assert strip == "•FSN!?" + 123 * "•"
    assert "bad: E2 flat, E3 saturated, E4 noisy, E5 nan, E6 missing (repaired)" in lines


def test_before_the_first_decision():
    text = drawn(Written().monitor, screen())
    assert "waiting" in text
    assert "no decision yet" in text


def test_plain_lines_where_there_is_no_terminal():
    monitor, on = busy_monitor(), screen(terminal=False)
    with live_view(monitor, on, line_every=3600):
        monitor.set_state("stopped")
    on.file.flush()
    (line,) = on.file.buffer.getvalue().decode().splitlines()
    assert ": stopped, 121 decisions, 1 skipped, 1 misses, age p50 20 ms" in line
    assert "\x1b" not in line


def test_a_terminal_is_drawn_over():
    monitor, on = busy_monitor(), screen()
    with live_view(monitor, on):
        pass
    on.file.flush()
    assert "left-or-right  decoding" in on.file.buffer.getvalue().decode()


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.2e-4, "720 us"), (0.013, "13 ms"), (1.5, "1.5 s"), (119, "119 s"), (600, "10 min"), (86400, "24 h"), (float("nan"), "-")],
)
def test_seconds(value, text):
    assert seconds(value) == text
