"""Prepares a process for decoding: priority, garbage collection, signals."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder

COLLECT_EVERY_S = 60.0
"""Seconds from one garbage collection to the next: they run after a decision, never in the middle of one."""

SWITCH_S = 2e-4
"""Seconds that another thread may keep the interpreter while the decoder waits for it. Python's default is 5 ms."""


def set_real_time(priority: int) -> None:
    """Give this thread, and the threads that it starts, a priority before all others of the machine (SCHED_FIFO).

    Threads that write and draw have the priority too: one that is held up while it has the interpreter's lock would hold up the
    decoder.

    Parameters
    ----------
    priority : int
        1 to 99.

    Raises
    ------
    StreamError
        If this user may not set such a priority.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError as e:
        raise StreamError(
            "This user may not set a real-time priority.", "Run as root, or allow it (`ulimit -r`, or CAP_SYS_NICE)."
        ) from e


@contextlib.contextmanager
def undisturbed(decoder: Decoder) -> Iterator[None]:
    """Keep garbage collections and other threads' long turns out of the decisions of `decoder` while the context lasts.

    Parameters
    ----------
    decoder : Decoder
        Garbage is collected after one of its decisions, once every `COLLECT_EVERY_S`.
    """
    turn = sys.getswitchinterval()
    next_at = time.monotonic() + COLLECT_EVERY_S

    def collect(_: Decision) -> None:
        nonlocal next_at
        if time.monotonic() > next_at:
            gc.collect()
            next_at = time.monotonic() + COLLECT_EVERY_S

    decoder.on_decision(collect)
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def stopped_by_signals(decoder: Decoder) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP call `Decoder.stop` while the context lasts. To be used in the main thread.

    A SIGHUP that the process ignores, as under nohup, stays ignored.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: decoder.stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
