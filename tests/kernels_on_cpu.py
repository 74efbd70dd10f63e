"""The fused kernels compiled with g++ and run on the CPU, thread by thread (gpu_on_cpu.h), behind the fake driver."""

import ctypes
import enum
import functools
import hashlib
import platform
import subprocess
import tempfile
import threading
from pathlib import Path

from fake_gpu import FakeDriver, needs_context

from sjepa_deploy.runtime.fused import program as fused_program

HERE = Path(__file__).parent
HALVES = ("-mf16c",) if platform.machine() == "x86_64" else ()  # in place of a function a conversion
FLAGS = (*HALVES, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kernels-"))


def compiled_for_cpu(source: str, architecture: int) -> bytes:
    """Compile the source of a program with g++, in place of `gpu.nvrtc.compiled`; returns the library's path."""
    on_gpu = (fused_program.HERE / "device.cuh").read_text()
    assert on_gpu in source
    source = source.replace(on_gpu, (HERE / "gpu_on_cpu.h").read_text()) + (HERE / "gpu_on_cpu_launch.h").read_text()
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    library = _folder() / f"{name}.so"
    if not library.exists():
        library.with_suffix(".cpp").write_text(source)
        subprocess.run(["g++", *FLAGS, "-o", str(library), str(library.with_suffix(".cpp"))], check=True)
    return str(library).encode()


class KernelDriver(FakeDriver):
    """A driver that launches kernels compiled by `compiled_for_cpu`."""

    class CUfunction_attribute(enum.IntEnum):
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.modules: dict[int, ctypes.CDLL] = {}
        self.functions: dict[int, tuple[ctypes.CDLL, str]] = {}
        self.shared_limit: dict[int, int] = {}
        self.descending = False  # in which order the threads run
        self.load_error = 0
        self.asynchronous = False  # whether launches run in a thread of their own, as a kernel that stays must
        self.running: threading.Thread | None = None
        self.n_kernels = 0

    @needs_context
    def cuModuleLoadData(self, code: bytes) -> tuple[int, int]:
        if self.load_error:
            return self.CUresult(self.load_error), 0
        handle = self._handle()
        self.modules[handle] = ctypes.CDLL(code.decode())
        return 0, handle

    def cuModuleUnload(self, module: int) -> tuple[int]:
        del self.modules[module]
        return (0,)

    @needs_context
    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int]:
        handle = self._handle()
        self.functions[handle] = self.modules[module], name.decode()
        return 0, handle

    @needs_context
    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[int]:
        ctypes.memmove(target, source, size)
        return (0,)

    cuMemcpyDtoH = cuMemcpyHtoD

    @needs_context
    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[int]:
        assert attribute == 8
        assert value <= self.shared
        self.shared_limit[function] = value
        return (0,)

    @needs_context
    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function: int, threads: int, shared_bytes: int) -> tuple[int, int]:
        return 0, self.shared // shared_bytes

    @needs_context
    def cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared_bytes, stream, params, extra) -> tuple[int]:
        assert (y, z, ty, tz, extra) == (1, 1, 1, 1, 0)
        library, name = self.functions[function]
        if name == "shared_bytes":
            size = ctypes.c_uint.in_dll(library, name)
            target = ctypes.cast(params, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0][0]
            ctypes.memmove(target, ctypes.byref(size), 4)
            return (0,)
        return self._launch(function, x, threads, shared_bytes, stream, params, resident=False)

    @needs_context
    def cuLaunchCooperativeKernel(self, function, x, y, z, threads, ty, tz, shared_bytes, stream, params) -> tuple[int]:
        assert (y, z, ty, tz) == (1, 1, 1, 1)
        assert x <= self.multiprocessors * (self.shared // shared_bytes), "the grid is not resident"
        return self._launch(function, x, threads, shared_bytes, stream, params, resident=True)

    def _launch(self, function, grid, threads, shared_bytes, stream, params, *, resident) -> tuple[int]:
        assert shared_bytes <= self.shared_limit[function]
        library, name = self.functions[function]
        size = ctypes.c_uint.in_dll(library, "argument_bytes").value
        pointer = ctypes.cast(params, ctypes.POINTER(ctypes.c_void_p))[0]
        arguments = ctypes.create_string_buffer(ctypes.string_at(pointer, size), size)  # a launch copies them

        def work() -> None:
            kernel = ctypes.cast(getattr(library, name), ctypes.c_void_p)
            if library.launch(kernel, grid, threads, shared_bytes, int(resident), int(self.descending), arguments):
                self.failed = True

        def start() -> None:
            self.n_kernels += 1
            self._join()
            if self.asynchronous:
                self.running = threading.Thread(target=work)
                self.running.start()
            else:
                work()

        self.submit(stream, start)
        return (0,)

    def _join(self) -> None:
        if self.running is not None:
            self.running.join()

    @needs_context
    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self._join()
        return super().cuStreamSynchronize(stream)

    @needs_context
    def cuCtxSynchronize(self) -> tuple[int]:
        self._join()
        return super().cuCtxSynchronize()

    failed = False

    @needs_context
    def cuStreamQuery(self, stream: int) -> tuple[int]:
        """Return an error once threads were left at a barrier, as a GPU never would: it would hang."""
        if self.running is not None and self.running.is_alive():
            return (self.CUresult.CUDA_ERROR_NOT_READY,)
        return (719,) if self.failed else super().cuStreamQuery(stream)

    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_OUT_OF_MEMORY = 2
        CUDA_ERROR_INVALID_CONTEXT = 201
        CUDA_ERROR_NO_BINARY_FOR_GPU = 209
        CUDA_ERROR_NOT_READY = 600
        CUDA_ERROR_LAUNCH_FAILED = 719
