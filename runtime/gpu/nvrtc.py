"""Compiles CUDA C++ to machine code at first use, with NVRTC, and keeps the code in a cache.

The cache of `cuda.core.Program` 1.2 does not serve: it stores machine code without a hash, hands out a damaged file as code, and
does not pass ``--diag-suppress``.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import time
from pathlib import Path
from typing import Any

from sjepa_deploy.errors import BackendError, MissingDependencyError
from sjepa_deploy.files import bytes_hash, cache_folder, write_atomically

logger = logging.getLogger(__name__)

OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--diag-suppress=177")
"""Options of every compilation. Warning 177 is off because no kernel uses all of the shared functions."""


def nvrtc() -> Any:
    """Return `cuda.bindings.nvrtc` with its library loaded.

    Raises
    ------
    MissingDependencyError
        If cuda-bindings or NVRTC is not installed.
    """
    try:
        module = importlib.import_module("cuda.bindings.nvrtc")
    except ModuleNotFoundError as e:
        raise MissingDependencyError("cuda-bindings", "gpu") from e
    try:
        module.nvrtcVersion()
    except Exception as e:  # what is raised without the library differs between versions of cuda-bindings
        raise MissingDependencyError("nvidia-cuda-nvrtc", "gpu") from e
    return module


def version() -> tuple[int, int]:
    """Return NVRTC's version, e.g. (13, 0)."""
    _, major, minor = nvrtc().nvrtcVersion()
    return major, minor


def architectures() -> tuple[int, ...]:
    """Return the compute capabilities that this NVRTC compiles for, times 10."""
    _, found = nvrtc().nvrtcGetSupportedArchs()
    return tuple(found)


def compiled(source: str, architecture: int) -> bytes:
    """Return the machine code of `source` for a compute capability (times 10), from the cache if the code is there.

    The name of a file in the cache is a hash of the source, the options and NVRTC's version.

    Raises
    ------
    BackendError
        If NVRTC does not know the GPU, refuses the source, or the cache cannot be written.
    MissingDependencyError
        If NVRTC is not installed.
    """
    major, minor = version()
    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS)
    key = bytes_hash("\0".join((source, *options, f"{major}.{minor}")).encode())
    file = cache_folder("kernels") / f"{key[:32]}.cubin"
    try:
        content = file.read_bytes()
        digest, code = content[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
        logger.warning("%s is damaged and is compiled again.", file)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise _unusable(file.parent, e) from e
    if architecture not in architectures():
        raise BackendError(
            f"NVRTC {major}.{minor} does not know compute capability {architecture / 10:.1f}.",
            "Install a newer nvidia-cuda-nvrtc, or use another backend.",
        )
    started = time.perf_counter()
    code, log = compile_source(source, options)
    logger.info("compiled %d bytes in %.1f s%s", len(code), time.perf_counter() - started, f"\n{log}" if log else "")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(code).digest() + code)
    except OSError as e:
        raise _unusable(file.parent, e) from e
    return code


def compile_source(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Return the machine code of `source` and the compiler's log.

    Raises
    ------
    BackendError
        If NVRTC refuses the source.
    """
    lib = nvrtc()
    status, program = lib.nvrtcCreateProgram(source.encode(), b"fused.cu", 0, [], [])
    assert status == 0, status
    try:
        (status,) = lib.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _, size = lib.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        lib.nvrtcGetProgramLog(program, log)
        text = log.rstrip(b"\0\n").decode(errors="replace")
        if status != 0:
            raise BackendError(f"NVRTC does not compile the kernels ({status.name}): {text}", "Report this with your GPU.")
        _, size = lib.nvrtcGetCUBINSize(program)
        code = bytearray(size)
        lib.nvrtcGetCUBIN(program, code)
        return bytes(code), text
    finally:
        lib.nvrtcDestroyProgram(program)


def _unusable(folder: Path, error: OSError) -> BackendError:
    return BackendError(
        f"The folder for compiled kernels, {folder}, cannot be used ({error.strerror or error}).",
        "Set XDG_CACHE_HOME to a folder that can be written.",
    )
