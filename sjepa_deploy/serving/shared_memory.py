"""Holds windows and outputs in memory that the client and the server of one host share."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
import uuid
from typing import Any

import numpy as np

from sjepa_deploy.errors import ServingError
from sjepa_deploy.runtime.backend import FloatArray

REST_S = 60.0
"""Seconds after which a server writes no more into the region of a request that it did not answer: it was told to drop it."""


class Region:
    """A Region is shared memory for one batch size: the windows, then the outputs.

    Attributes
    ----------
    name : str
        Name under which the server knows it.
    input_bytes, output_bytes : int
        Sizes of the two.
    """

    def __init__(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
        self._shm = importlib.import_module("tritonclient.utils.shared_memory")
        self.name = f"sjepa-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.input_bytes, self.output_bytes = (4 * math.prod(shape) for shape in (input_shape, output_shape))
        self._output_shape = output_shape
        try:
            self._handle = self._shm.create_shared_memory_region(
                self.name, self.name, self.input_bytes + self.output_bytes, create_only=True
            )
        except self._shm.SharedMemoryException as e:
            raise ServingError("There is no shared memory for the windows.", "Free some of /dev/shm, or use triton:.") from e

    def register(self, server: Any, timeout: float) -> None:
        """Tell the server of the region, within `timeout` seconds."""
        size = self.input_bytes + self.output_bytes
        server.register_system_shared_memory(self.name, self.name, size, client_timeout=timeout)

    def write(self, eeg: FloatArray) -> None:
        """Put windows into the region."""
        self._shm.set_shared_memory_region(self._handle, [eeg])

    def read(self) -> FloatArray:
        """Return a copy of the outputs in the region."""
        output: FloatArray = self._shm.get_contents_as_numpy(self._handle, np.float32, self._output_shape, self.input_bytes)
        return output.copy()

    def remove(self) -> None:
        """Let go of the region; the server keeps its mapping until it is told."""
        self._shm.destroy_shared_memory_region(self._handle)


class SharedWindows:
    """Keeps the regions of one client, each made when its batch size is first met.

    After a request without an answer the server may still write into its region. Such a region is never used again: an output
    that arrives late must not be taken for that of a later window. The server keeps it until `REST_S` later.
    """

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._resting: list[tuple[float, str]] = []

    def place(self, server: Any, eeg: FloatArray, output_shape: tuple[int, ...], timeout: float) -> Region:
        """Return a region that holds `eeg` and has room for its outputs, known to the server, which has `timeout` seconds."""
        region = self._regions.get(len(eeg))
        if region is None:
            self._unregister(server, time.monotonic() - REST_S, timeout)
            region = self._regions[len(eeg)] = Region(eeg.shape, output_shape)
            region.register(server, timeout)
        region.write(eeg)
        return region

    def forget(self) -> None:
        """Use none of the regions again: the server is another one, or may still write into one."""
        for region in self._regions.values():
            region.remove()
            self._resting.append((time.monotonic(), region.name))
        self._regions.clear()

    def close(self, server: Any) -> None:
        """Let go of all regions, and tell the server where it can be told."""
        self.forget()
        self._unregister(server, time.monotonic(), timeout=1.0)

    def _unregister(self, server: Any, until: float, timeout: float) -> None:
        """Tell the server to let go of what was forgotten by then; another server knows nothing of it."""
        error = importlib.import_module("tritonclient.utils").InferenceServerException
        with contextlib.suppress(error):  # a server that is gone has let go of all
            while self._resting and self._resting[0][0] <= until:
                _, name = self._resting.pop(0)
                server.unregister_system_shared_memory(name, client_timeout=timeout)
