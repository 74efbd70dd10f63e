"""Real-time priority for the decoder's threads, and for nothing else."""

from __future__ import annotations

import contextlib
import os

from sjepa_deploy.errors import StreamError


def set_real_time(priority: int) -> None:
    """Give this thread, and those that it starts, the priority `priority` (1 to 99) of SCHED_FIFO.

    Raises
    ------
    StreamError
        If the user may not.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError as e:
        raise StreamError(
            "This user may not set a real-time priority.", "Run as root, or allow it (`ulimit -r`, or CAP_SYS_NICE)."
        ) from e


def leave_real_time() -> None:
    """Give this thread the ordinary priority: it writes or draws, and must not stand in a decision's way."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
