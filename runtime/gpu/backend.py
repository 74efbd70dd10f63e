"""What every GPU backend shares."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sjepa_deploy.runtime.backend import two_threads
from sjepa_deploy.runtime.gpu.cuda import Device, current


class Turn:
    """The right to call a backend on a GPU, which one thread has at a time, with the GPU's context its current one.

    Each call stands between `begin` and `end`.

    Parameters
    ----------
    device : Device
        The GPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._busy = threading.Lock()
        self.end: Callable[[], None] = self._busy.release

    def begin(self) -> None:
        """Take the turn.

        Raises
        ------
        BackendError
            If another thread has it.
        """
        if not self._busy.acquire(blocking=False):
            raise two_threads()
        try:
            if current.device is not self._device:
                self._device.make_current()
        except BaseException:
            self._busy.release()
            raise
