"""How long do the things take that a fused kernel is made of? The five numbers that decide its design, on one NVIDIA GPU.

    python benchmarks/gpu_primitives.py OUT.json [--only gap,barrier,...]

Gap between dependent kernels in a graph with and without programmatic dependent launch, a barrier of the grid and of a cluster, a
read of 103 kB of mapped host memory by 1 to 132 blocks, and a round trip through words in host memory; beside them, what a launch
costs until the host knows of it. Needs Python 3.10, NumPy, cuda-bindings and NVRTC. Each part runs in a process of its own with
20 s to live, and the result is written after each. All times are medians in us.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.runtime.gpu import nvrtc
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, HostBuffer, Stream, check

SOURCE = Path(__file__).with_suffix(".cu")
SECONDS = 20
WINDOW = 129 * 200


class Bench:
    """A GPU with the kernels loaded."""

    def __init__(self) -> None:
        self.device = Device()
        self.cu = self.device.cu
        self.stream = Stream(self.device)
        gpu = self.device.gpu
        self.architecture = round(float(gpu.compute_capability) * 10)
        self.n_multiprocessors = self.device.attribute("MULTIPROCESSOR_COUNT")
        code, _ = nvrtc.compile_source(SOURCE.read_text(), (f"--gpu-architecture=sm_{self.architecture}", *nvrtc.OPTIONS))
        self.module = check(self.cu.cuModuleLoadData(code))
        self.words = DeviceBuffer(self.device, 1 << 20)
        self.host = HostBuffer(self.device, (1024,))
        self.host_words = memoryview(self.host.array.view(np.uint32))
        check(self.cu.cuMemcpyHtoD(self.cu.CUdeviceptr(self.words.address), np.zeros(1 << 18, np.uint32).ctypes.data, 1 << 20))
        self.device.synchronize()

    def kernel(self, name: str) -> Any:
        return check(self.cu.cuModuleGetFunction(self.module, name.encode()))

    def launch(self, function: Any, grid: int, threads: int, *values: Any, cooperative: bool = False) -> None:
        """Launch with values of NumPy types and addresses."""
        arrays = [np.array(v, v.dtype if isinstance(v, np.generic) else np.uint64) for v in values]
        pointers = np.array([a.ctypes.data for a in arrays], np.uint64)
        shape = (function, grid, 1, 1, threads, 1, 1, 0, self.stream.stream, pointers.ctypes.data)
        check(self.cu.cuLaunchCooperativeKernel(*shape) if cooperative else self.cu.cuLaunchKernel(*shape, 0))

    def elapsed(self, work: Callable[[], Any]) -> float:
        """Return the us between two events around `work`."""
        start, end = (check(self.cu.cuEventCreate(0)) for _ in range(2))
        check(self.cu.cuEventRecord(start, self.stream.stream))
        work()
        check(self.cu.cuEventRecord(end, self.stream.stream))
        check(self.cu.cuEventSynchronize(end))
        result = 1000 * float(check(self.cu.cuEventElapsedTime(start, end)))
        check(self.cu.cuEventDestroy(start))
        check(self.cu.cuEventDestroy(end))
        return result

    def read(self, buffer: DeviceBuffer, n: int, dtype: Any) -> Any:
        out = np.zeros(n, dtype)
        self.stream.synchronize()
        check(self.cu.cuMemcpyDtoH(out.ctypes.data, self.cu.CUdeviceptr(buffer.address), out.nbytes))
        return out

    def warm_up(self) -> None:
        """Keep the GPU busy for a while, so that its clock rises."""
        function, until = self.kernel("link"), time.perf_counter() + 0.3
        while time.perf_counter() < until:
            for _ in range(100):
                self.launch(function, self.n_multiprocessors, 256, self.words.address)
            self.stream.synchronize()


def slope(measure: Callable[[int], float], few: int, many: int, repeats: int = 31) -> float:
    """Return what one more costs: the difference of the medians at `few` and `many`."""
    measure(few)
    measure(many)
    low, high = (statistics.median(measure(n) for _ in range(repeats)) for n in (few, many))
    return (high - low) / (many - few)


def gap(bench: Bench) -> dict[str, float]:
    """From one kernel of a graph to the next."""
    cu, result = bench.cu, {}
    for name, dependent in (("link", False), ("dependent_link", True)):
        if dependent and bench.architecture < 90:
            continue
        function = bench.kernel(name)
        for blocks in (1, bench.n_multiprocessors):

            def chain(n: int, function: Any = function, blocks: int = blocks, dependent: bool = dependent) -> Any:
                def enqueue() -> None:
                    for _ in range(n):
                        if not dependent:
                            bench.launch(function, blocks, 256, bench.words.address)
                            continue
                        attribute = cu.CUlaunchAttribute()
                        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                        attribute.value.programmaticStreamSerializationAllowed = 1
                        config = cu.CUlaunchConfig()
                        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
                        config.blockDimX, config.blockDimY, config.blockDimZ = 256, 1, 1
                        config.hStream, config.attrs, config.numAttrs = bench.stream.stream, [attribute], 1
                        word = np.array([bench.words.address], np.uint64)
                        pointer = np.array([word.ctypes.data], np.uint64)
                        check(cu.cuLaunchKernelEx(config, function, pointer.ctypes.data, 0))

                return bench.stream.capture(enqueue)

            graphs = {n: chain(n) for n in (20, 60)}
            key = f"{'dependent launch' if dependent else 'plain'}, {blocks} blocks"
            result[key] = slope(lambda n, graphs=graphs: bench.elapsed(lambda: check(graphs[n].launch())), 20, 60)
    return result


def barrier(bench: Bench) -> dict[str, float]:
    """Barriers of the grid, and of a cluster of 8 blocks."""
    result: dict[str, float] = {}
    function, base = bench.kernel("grid_barriers"), 0
    counter, failed = bench.words.address + 65536, bench.words.address + 131072  # words that nothing else has touched
    for threads in (256, 512):

        def rounds(n: int, threads: int = threads) -> float:
            nonlocal base
            blocks = bench.n_multiprocessors
            values = (counter, np.uint32(base), np.int32(n), failed)
            us = bench.elapsed(lambda: bench.launch(function, blocks, threads, *values, cooperative=True))
            base = (base + n * blocks) % 2**32
            return us

        result[f"grid, {bench.n_multiprocessors} blocks of {threads}"] = slope(rounds, 50, 250)
    words = bench.read(bench.words, 32769, np.uint32)
    result["grid failed"], result["grid arrivals missing"] = float(words[32768]), float(int(base) - int(words[16384]))
    if bench.architecture >= 90:
        function = bench.kernel("cluster_barriers")
        for clusters in (1, bench.n_multiprocessors // 8):
            for threads in (256, 512):

                def rounds(n: int, clusters: int = clusters, threads: int = threads) -> float:
                    return bench.elapsed(lambda: bench.launch(function, 8 * clusters, threads, bench.words.address, np.int32(n)))

                result[f"cluster of 8, {clusters} of them, {threads} threads"] = slope(rounds, 50, 550)
        exchange = bench.kernel("cluster_exchanges")

        def exchanges(n: int) -> float:
            values = (bench.words.address, bench.words.address + 8192, np.int32(n))
            return bench.elapsed(lambda: bench.launch(exchange, 8, 256, *values))

        result["cluster of 8, barrier and 8 remote reads a thread"] = slope(exchanges, 50, 550)
    return result


def mapped(bench: Bench) -> dict[str, float]:
    """103 kB of mapped host memory, each time others, by different numbers of blocks; the slowest block's cycles."""
    rounds = 64
    buffer = HostBuffer(bench.device, (rounds, WINDOW))
    buffer.array[...] = np.random.default_rng(0).standard_normal(buffer.array.shape)
    function, result = bench.kernel("read_mapped"), {}
    clock = bench.device.attribute("CLOCK_RATE") / 1000 if hasattr(
        bench.cu.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_CLOCK_RATE") else 1980.0  # fmt: skip
    for blocks in (1, 2, 4, 8, 16, 33, 66, bench.n_multiprocessors):
        cycles, total, empty = [], [], []
        for i in range(rounds):
            out = bench.words.address + 65536

            def go(n: int, i: int = i, blocks: int = blocks, out: int = out) -> float:
                source = buffer.address + 4 * WINDOW * i
                values = (source, np.int32(n), out, bench.words.address)
                return bench.elapsed(lambda: bench.launch(function, blocks, 256, *values))

            empty.append(go(0))
            total.append(go(WINDOW // 4))
            cycles.append(int(bench.read(bench.words, blocks, np.int64).max()))
        result[f"{blocks} blocks, in the kernel, at {clock:.0f} MHz"] = statistics.median(cycles) / clock
        result[f"{blocks} blocks, between events, beyond reading nothing"] = statistics.median(total) - statistics.median(empty)
    buffer.close()
    return result


def flag(bench: Bench) -> dict[str, float]:
    """Host to a running kernel and back, through words in host memory that both see."""
    function, rounds = bench.kernel("answer"), 3000
    question, reply = bench.host.address, bench.host.address + 2048
    words = bench.host_words
    words[0] = words[512] = 0
    bench.launch(function, 1, 32, question, reply, np.uint32(rounds))
    times = []
    for i in range(1, rounds + 1):
        start = time.perf_counter_ns()
        words[0] = i
        while words[512] != i:
            if time.perf_counter_ns() - start > 2_000_000_000:
                raise TimeoutError(f"no answer to {i}")
        times.append((time.perf_counter_ns() - start) / 1000)
    bench.stream.synchronize()
    times = times[100:]
    start = time.perf_counter_ns()
    for i in range(10000):
        words[0] = 0
        if words[512] == i:
            pass
    python = (time.perf_counter_ns() - start) / 1e7
    return {
        "round trip, median": statistics.median(times),
        "round trip, p99": float(np.percentile(times, 99)),
        "of which Python, about": python,
    }


def start(bench: Bench) -> dict[str, float]:
    """From the call of the launch until the host knows that the kernel ran, in each way."""
    cu, words, result = bench.cu, bench.host_words, {}
    word, value = np.array([bench.host.address + 2048], np.uint64), np.zeros(1, np.uint32)
    pointers = np.array([word.ctypes.data, value.ctypes.data], np.uint64)
    function = bench.kernel("tell")

    def launches(grid: int, cooperative: bool) -> Callable[[], Any]:
        shape = (function, grid, 1, 1, 256, 1, 1, 0, bench.stream.stream, int(pointers.ctypes.data))
        if cooperative:
            return lambda: cu.cuLaunchCooperativeKernel(*shape)
        return lambda: cu.cuLaunchKernel(*shape, 0)

    def times(launch: Callable[[], Any], wait: Callable[[], Any], each: Callable[[int], None]) -> dict[str, float]:
        found, enqueued = [], []
        for i in range(1, 2001):
            each(i)
            began = time.perf_counter_ns()
            status = launch()
            enqueued.append((time.perf_counter_ns() - began) / 1000)
            wait()
            found.append((time.perf_counter_ns() - began) / 1000)
            check(status)
        bench.stream.synchronize()
        return {"median": statistics.median(found), "p99": float(np.percentile(found, 99)), "call": statistics.median(enqueued)}

    def spin() -> None:
        target = int(value[0])
        for _ in range(10_000_000):
            if words[512] == target:
                return
        raise TimeoutError

    def number(i: int) -> None:
        value[0] = i

    def clear(i: int) -> None:
        words[512], value[0] = 0, 1

    for grid in (1, 8, bench.n_multiprocessors):
        for cooperative in (False, True):
            name = f"{'cooperative ' if cooperative else ''}launch of {grid} blocks"
            launch = launches(grid, cooperative)
            result |= {f"{name}, word in host memory, {k}": v for k, v in times(launch, spin, number).items()}
            result |= {f"{name}, stream query, {k}": v for k, v in times(launch, bench.stream.wait, number).items()}
        value[0] = 1
        graph = bench.stream.capture(lambda grid=grid: check(launches(grid, False)()))
        result |= {f"graph of {grid} blocks, word in host memory, {k}": v for k, v in times(graph.launch, spin, clear).items()}
        result |= {
            f"graph of {grid} blocks, stream query, {k}": v for k, v in times(graph.launch, bench.stream.wait, clear).items()
        }
    return result


PARTS: dict[str, Callable[[Bench], dict[str, float]]] = {f.__name__: f for f in (start, gap, barrier, mapped, flag)}


def run_part(name: str) -> None:
    """Measure one part and print it as JSON; the last line of the output is the result."""
    try:
        bench = Bench()
        bench.warm_up()
        gpu = bench.device.gpu
        answer = {"gpu": gpu.name, "driver": gpu.driver, "result": PARTS[name](bench)}
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"python": platform.python_version(), "nvrtc": None, "parts": {}}
    for name in arguments.only.split(","):
        command = [sys.executable, __file__, str(arguments.out), "--part", name]
        began = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            answer = {"failed": f"took more than {SECONDS} s"}
        except ValueError:
            answer = {"failed": done.stdout[-1000:] + done.stderr[-1000:]}
        answer["seconds"] = time.perf_counter() - began
        content["parts"][name] = answer
        try:
            content["nvrtc"] = nvrtc.version()
        except Exception as e:
            content["nvrtc"] = str(e)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name} ({answer['seconds']:.1f} s): {answer.get('failed', '')}")
        for key, us in answer.get("result", {}).items():
            print(f"  {key}: {us:.2f}")


if __name__ == "__main__":
    main()
