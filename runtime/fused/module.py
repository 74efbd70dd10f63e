"""Compiles a program and loads it on the GPU."""

from __future__ import annotations

import contextlib
import ctypes
from contextlib import closing

import numpy as np

from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.gpu import nvrtc
from sjepa_deploy.runtime.gpu.cuda import Device, HostBuffer, check


class Module:
    """Holds one compiled program on the GPU.

    Attributes
    ----------
    shared_bytes : int
        Shared memory of a block.
    blocks_at_once : int
        Blocks that the whole GPU holds at once. 0 if a block needs more shared memory than the GPU gives.
    """

    def __init__(self, device: Device, name: str, source: str, threads: int, architecture: int) -> None:
        self._cu = cu = device.cu
        code = nvrtc.compiled(source, architecture)
        result = cu.cuModuleLoadData(code)
        if result[0]:
            raise BackendError(
                f"The driver {device.gpu.driver} refuses the compiled kernels ({result[0]!r}).",
                "Install a newer driver, or use another backend.",
            )
        self._module = result[1]
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            self.function = check(cu.cuModuleGetFunction(self._module, name.encode()))
            self.shared_bytes = self._ask_size(device)
            self.blocks_at_once = 0
            if self.shared_bytes <= device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"):
                limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                check(cu.cuFuncSetAttribute(self.function, limit, self.shared_bytes))
                each = check(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, self.shared_bytes))
                self.blocks_at_once = each * device.attribute("MULTIPROCESSOR_COUNT")
            opened.pop_all()

    def _ask_size(self, device: Device) -> int:
        with closing(HostBuffer(device, (1,))) as answer:
            address = ctypes.c_void_p(answer.address)
            params = (ctypes.c_void_p * 1)(ctypes.addressof(address))
            function = check(self._cu.cuModuleGetFunction(self._module, b"shared_bytes"))
            check(self._cu.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, ctypes.addressof(params), 0))
            device.synchronize()
            return int(answer.array.view(np.uint32)[0])

    def close(self) -> None:
        """Unload the program."""
        check(self._cu.cuModuleUnload(self._module))
