"""The fused kernels compiled with g++ and run on the CPU, thread by thread (gpu_on_cpu.h)."""

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-g", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kernels-"))


def build(program) -> ctypes.CDLL:
    """Compile `program` for the CPU and load it."""
    macros, _, code = program.source.partition("\n\n")
    parts = (macros, (HERE / "gpu_on_cpu.h").read_text(), code, (HERE / "gpu_on_cpu_launch.h").read_text())
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    source, library = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    if not library.exists():
        source.write_text("\n".join(parts))
        subprocess.run(["g++", *FLAGS, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def launch(library, name, grid, threads, cluster, shared_bytes, resident, params, *, descending=False) -> int:
    """Run one launch; returns 0 if all threads came to their end."""
    kernel = ctypes.cast(getattr(library, name), ctypes.c_void_p)
    return library.launch(kernel, grid, threads, cluster, shared_bytes, int(resident), int(descending), ctypes.c_void_p(params))
