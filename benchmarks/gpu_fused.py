"""The fused kernels on one NVIDIA GPU: parity, determinism, latency in each mode, where the time goes, sanitizers, PyTorch.

    python benchmarks/gpu_fused.py OUT.json [--only contextual:fp16:modes,contextual:all:grid ...] [--deadline 200] [--seconds 4]

Models are made on the spot, with random weights; needs PyTorch. A case is VARIANT:PRECISION:WHAT:

    modes      parity, latency launched, from a graph and persistent, paced, with keep-warm; of a stream's new samples alone
               (roll), and whether they give the bits of the whole window; repeated calls; throughput
    where      cycles from mark to mark in the kernel, and other layouts
    grid       parity on every case of the export grid that the backend accepts (PRECISION is ignored)
    tail       what the slow calls are made of: as they are, on a core of its own, with real-time priority, without the garbage
               collector; a loop of the same length without a GPU; the cycles in the kernel; paced, kept warm at several periods
    torch      PyTorch with a CUDA graph: latency, throughput at batch 64 and 1024
    long       --calls consecutive persistent calls, each compared to the bit
    memcheck, racecheck, ncu   the tools of the CUDA toolkit over a few calls

Every case runs in its own process with a time limit, and the result is written after each: a kernel that fails or hangs loses its
own case only. What would start after the deadline is left out and listed. Latencies are host wall times of `run` in us, both
transfers included.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sjepa_deploy.eeg.synthetic import hard_windows
from sjepa_deploy.errors import BackendError
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import Reference, check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.reference import run_reference
from sjepa_deploy.runtime.fused.backend import FusedBackend
from sjepa_deploy.runtime.fused.program import Layout
from sjepa_deploy.runtime.gpu.cuda import check
from sjepa_deploy.runtime.keep_warm import KeepWarm
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import ModelSpec

SECONDS = 60
TOOLS = ("memcheck", "racecheck", "ncu")
PRECISIONS = {"prelocal": ("fp32",), "postlocal": ("fp32",), "contextual": ("fp32", "fp16")}
GRID = [(129, 200, 4, 1), (129, 152, 4, 2), (62, 2048, 4, 4), (32, 408, 8, 2), (8, 280, 2, 3), (1, 200, 1, 1)]
"""Channels, samples, filters, outputs, as in parity.py."""

SIZES = (1, 2, 3, 8, 64)
METRICS = (
    "gpu__time_duration.sum", "sm__cycles_elapsed.max", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum", "lts__throughput.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",
    "smsp__inst_executed.sum", "l1tex__data_bank_conflicts_pipe_lsu.sum",
)  # fmt: skip


def make_case(variant: str, shape: tuple[int, int, int, int] = GRID[0], seed: int = 0) -> tuple[Any, Any, Reference]:
    """Return what the backend needs of a bundle, the model in float64, and windows with its outputs."""
    import torch

    n_chans, n_times, n_filters, n_outputs = shape
    points = np.random.default_rng(1).standard_normal((n_chans, 3))
    points /= 10 * np.linalg.norm(points, axis=1, keepdims=True)
    spec = ModelSpec.of(
        variant=variant, n_chans=n_chans, n_times=n_times, sfreq=100.0, n_outputs=n_outputs, n_spat_filters=n_filters,
        positions=tuple(tuple(map(float, point)) for point in points),
    )  # fmt: skip
    model = build_model(spec, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = Path(tempfile.mkdtemp(prefix="fused-"))
    write_weights(model, folder / "model.safetensors")
    windows = hard_windows(n_chans, n_times, 100.0, np.random.default_rng(seed))
    inputs = np.stack([np.asarray(window, np.float32) for window in windows.values()])
    model = model.double()
    outputs = np.concatenate([run_reference(model, window[None]) for window in inputs])
    max_batch = 8 if n_times > 1000 else 64
    graph = SimpleNamespace(max_batch=max_batch)
    bundle = SimpleNamespace(spec=spec, path=folder, checkpoint=folder, graph=lambda precision: graph)
    return bundle, model, Reference(kinds=tuple(windows), inputs=inputs, outputs=outputs)


def write_weights(model: Any, file: Path) -> None:
    """Write a safetensors file without its library, which not every GPU machine has."""
    header, parts, at = {}, [], 0
    for name, tensor in model.state_dict().items():
        data = tensor.detach().float().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + b"".join(parts))


def timed(call: Callable[[], object], n: int, pause: float = 0.0, warm: KeepWarm | None = None) -> np.ndarray:
    """Return the length of `n` calls in us, back to back or every `pause` seconds, after a hundred that are not timed."""
    for _ in range(100):
        call()
    times = np.empty(n)
    due = time.perf_counter()
    for i in range(n):
        due += pause
        if warm is not None:
            warm.wait_until(due)
        while pause and time.perf_counter() < due:
            time.sleep(max(0.0, due - time.perf_counter() - 0.001))
        start = time.perf_counter_ns()
        call()
        end = time.perf_counter_ns()
        if warm is not None:
            warm.saw(start / 1e9, end / 1e9)
        times[i] = (end - start) / 1000
    return times


def distribution(times: np.ndarray) -> dict[str, Any]:
    """Return what times are like."""
    p50, p90, p99, p999 = np.percentile(times, (50, 90, 99, 99.9))
    return {"median": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": times.max(), "mean": times.mean(), "n": len(times)}


def latency(call: Callable[[], object], n: int = 2000, pause: float = 0.0, warm: KeepWarm | None = None) -> dict[str, Any]:
    """Return the distribution of `n` calls, back to back or every `pause` seconds."""
    return distribution(timed(call, n, pause, warm))


def opened(bundle: Any, precision: Any, reference: Reference, layout: Layout | None = None, **options: Any) -> Any:
    """Return a backend and a call of it on a window in place."""
    backend = FusedBackend(bundle, precision, BackendOptions(**options), layout)
    buffer = backend.input_buffer(1)
    buffer[...] = reference.inputs[:1]
    return backend, lambda: backend.run(buffer)


def repeat(backend: Any, reference: Reference, seconds: float, most: int = 2**62) -> dict[str, Any]:
    """Return how many of consecutive calls with two windows in turn differ in any bit from the first."""
    windows = [np.ascontiguousarray(reference.inputs[i : i + 1]) for i in (0, 1)]
    buffer, first = backend.input_buffer(1), []
    for window in windows:
        buffer[...] = window
        first.append(backend.run(buffer).copy())
    calls = differ = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds and calls < most:
        for window, want in zip(windows, (w.tobytes() for w in first), strict=True):
            buffer[...] = window
            for _ in range(500):
                differ += backend.run(buffer).tobytes() != want
            calls += 500
    return {"calls": calls, "differ": int(differ), "seconds": time.perf_counter() - began}


def bits_of_rolls(backend: Any, spec: ModelSpec, hop: int, n_hops: int = 200) -> dict[str, Any]:
    """Return how many windows of a stream differ in any bit between `roll` and `run`."""
    began = time.perf_counter()
    samples = hard_windows(spec.n_chans, spec.n_times + n_hops * hop, spec.sfreq, np.random.default_rng(2))["eeg 0"]
    starts = range(0, n_hops * hop + 1, hop)
    want = [backend.run(samples[None, :, start : start + spec.n_times].copy()).tobytes() for start in starts]
    differ = backend.roll(samples[:, : spec.n_times].copy()).tobytes() != want[0]
    for start, bits in zip(starts[1:], want[1:], strict=True):
        stop = start + spec.n_times
        differ += backend.roll(samples[:, stop - hop : stop].copy()).tobytes() != bits
    return {"calls": n_hops + 1, "differ": int(differ), "seconds": time.perf_counter() - began}


def latency_of_rolls(backend: Any, window: Any, hop: int) -> dict[str, Any]:
    """Return the latency of `roll` with `hop` new samples."""
    backend.roll(window[0])
    new = window[0, :, :hop].copy()
    return latency(lambda: backend.roll(new), 5000)


def modes(bundle: Any, model: Any, reference: Reference, precision: Any, seconds: float) -> dict[str, Any]:
    """Parity and latency launched, from a graph, persistent; paced; throughput."""
    result: dict[str, Any] = {}
    for name, options in {"graph": {}, "persistent": {"persistent": True}, "launch": {"cuda_graph": False}}.items():
        entry: dict[str, Any] = {}
        began = time.perf_counter()
        backend, call = opened(bundle, precision, reference, **options)
        entry["load_s"] = time.perf_counter() - began
        entry["graphed"] = backend._lanes[1]._graph is not None
        result[name] = entry
        sizes = SIZES if name == "graph" else (1,)
        window = np.ascontiguousarray(reference.inputs[:1])
        steps = {
            "parity": lambda b=backend, sizes=sizes: encode(
                check_parity(b.run, reference, backend="cuda", precision=precision, sizes=sizes)
            ),
            "in place": lambda call=call: latency(call, 5000),
            "with copy": lambda b=backend, window=window: latency(lambda: b.run(window)),
            "paced 10 ms": lambda call=call: latency(call, 150, 0.01),
            "paced 10 ms, warm": lambda call=call: latency(call, 150, 0.01, KeepWarm(call, 0.001)),
        }
        for hop in (1, 10):
            steps[f"roll {hop}"] = lambda b=backend, window=window, hop=hop: latency_of_rolls(b, window, hop)
            steps[f"roll {hop}, bits"] = lambda b=backend, hop=hop: bits_of_rolls(b, bundle.spec, hop)
        if name == "launch":
            steps = {"in place": steps["in place"]}
        for key, work in steps.items():
            step(entry, key, work)
        if name != "launch":
            step(entry, "repeat", lambda b=backend: repeat(b, reference, seconds))
        if name == "graph":
            for batch in (8, 64):
                many = backend.input_buffer(batch)
                many[...] = reference.inputs[np.arange(batch) % (len(reference.inputs) - 1)]
                step(entry, f"batch {batch}", lambda b=backend, many=many: latency(lambda: b.run(many), 100))
        backend.close()
    return result


def grid(variant: str) -> dict[str, Any]:
    """Parity on every case of the grid in every precision that the backend accepts."""
    result: dict[str, Any] = {}
    for seed, shape in enumerate(GRID):
        try:
            bundle, _, reference = make_case(variant, shape, seed)
        except Exception as e:
            result[f"{shape}"] = {"failed": f"{type(e).__name__}: {e}"}
            continue
        for precision in ("fp32", "tf32", "fp16", "bf16"):
            key = f"{' x '.join(map(str, shape))} {precision}"

            def judge(bundle: Any = bundle, precision: Any = precision, reference: Any = reference) -> Any:
                try:
                    backend = FusedBackend(bundle, precision, BackendOptions())
                except BackendError as e:
                    return {"refused": e.problem}
                most = bundle.graph(precision).max_batch
                found = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(1, 2, 3, most))
                backend.close()
                return {
                    "passed": found.passed,
                    "max_error": found.max_error,
                    "worst": found.worst,
                    "nan_agrees": found.nan_agrees,
                }

            step(result, key, judge)
    return result


def torch_case(model: Any, reference: Reference, precision: Any) -> dict[str, Any]:
    """PyTorch with a CUDA graph and pinned copies inside, the fast path of its transformer on."""
    import torch
    from gpu_engines import _graphed

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.mha.set_fastpath_enabled(True)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    model = model.to("cuda", dtype)
    result: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in (1, 8, 64, 1024):
            host = torch.from_numpy(np.resize(reference.inputs[:4], (batch, *reference.inputs.shape[1:]))).pin_memory()
            calls = 1000 if batch == 1 else 30
            step(result, f"batch {batch}", lambda host=host, calls=calls: latency(_graphed(model, host, dtype), calls))
    return result


def stamps_of(bundle: Any, precision: Any, reference: Reference, layout: Layout, n: int) -> np.ndarray:
    """Return the cycle counter at each mark of each block in `n` launches, shape (n, blocks, marks)."""
    backend = FusedBackend(bundle, precision, BackendOptions(), dataclasses.replace(layout, profile=True))
    buffer = backend.input_buffer(1)
    buffer[...] = reference.inputs[:1]
    lane = backend._lanes[1]
    blocks, marks = lane.grid, 2 + 8 * bundle.spec.encoder.n_layers if bundle.spec.needs_positions else 6
    found = np.zeros((n + 10, blocks, marks), np.int64)
    source = backend._device.cu.CUdeviceptr(lane.buffers["profile"].address)
    for stamps in found:
        backend.run(buffer)
        backend._device.synchronize()
        check(backend._device.cu.cuMemcpyDtoH(stamps.ctypes.data, source, stamps.nbytes))
    backend.close()
    return found[10:]


def profile(bundle: Any, precision: Any, reference: Reference, layout: Layout) -> dict[str, Any]:
    """Return the cycles from mark to mark in the kernel, the median block of the median launch."""
    found = stamps_of(bundle, precision, reference, layout, 40)
    stamps = np.median(found - found[:, :, :1], axis=0)
    return {"median block": np.median(stamps, axis=0).tolist(), "slowest block": stamps.max(axis=0).tolist()}


def where(bundle: Any, reference: Reference, precision: Any) -> dict[str, Any]:
    """Cycles between marks, and the latencies of other layouts."""
    result: dict[str, Any] = {}
    backend, _ = opened(bundle, precision, reference)
    usual = backend.layout
    backend.close()
    step(result, "profile", lambda: profile(bundle, precision, reference, usual))

    def with_layout(**changes: Any) -> Any:
        other, call = opened(bundle, precision, reference, dataclasses.replace(usual, **changes))
        judged = check_parity(other.run, reference, backend="cuda", precision=precision, sizes=(1,))
        other.input_buffer(1)[...] = reference.inputs[:1]
        found = latency(call, 1000) | {"passed": judged.passed, "max_error": judged.max_error}
        other.close()
        return found

    variants: dict[str, list[dict[str, Any]]] = {
        "prelocal": [{"threads": 384}, {"threads": 512}, {"blocks": 4}, {"cluster": False}],
        "postlocal": [{"threads": 256}, {"threads": 1024}],
        "contextual": [{"threads": 256}, {"threads": 512}, {"qkv_in_shared": False}],
    }
    for changes in variants[bundle.spec.variant]:
        step(result, f"layout {changes}", lambda changes=changes: with_layout(**changes))
    return result


def spread(times: np.ndarray) -> dict[str, Any]:
    """Return what times in us are like, and how the slow ones, more than 1.3 times the median, lie in a run of such calls."""
    found = distribution(times)
    median = found["median"]
    slow = times > 1.3 * median
    apart = np.diff(np.cumsum(times)[slow])
    return found | {
        "p99 / median": found["p99"] / median,
        "share of slow calls": float(slow.mean()),
        "us between slow calls, quartiles": np.percentile(apart, (25, 50, 75)).tolist() if len(apart) else [],
        "us longer, quartiles": np.percentile(times[slow] - median, (25, 50, 75)).tolist() if slow.any() else [],
    }


def tail(bundle: Any, reference: Reference, precision: Any) -> dict[str, Any]:
    """What the slow calls are made of."""
    result: dict[str, Any] = {}
    cores = os.sched_getaffinity(0)
    for mode in ("graph", "persistent"):
        entry = result[mode] = {}
        backend, call = opened(bundle, precision, reference, persistent=mode == "persistent")
        timed(call, 2000)
        step(entry, "as it is", lambda call=call: spread(timed(call, 20_000)))
        gc.collect()
        gc.freeze()
        gc.disable()
        step(entry, "no garbage collector", lambda call=call: spread(timed(call, 20_000)))
        core = sorted(cores)[len(cores) // 2]
        os.sched_setaffinity(0, {core})
        step(entry, f"core {core} of {len(cores)} alone", lambda call=call: spread(timed(call, 20_000)))

        def in_real_time(call: Any = call) -> dict[str, Any]:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
            try:
                return spread(timed(call, 20_000))
            finally:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

        step(entry, "that, real-time priority", in_real_time)
        length = int(1000 * entry["as it is"]["median"])

        def spin(length: int = length) -> None:
            end = time.perf_counter_ns() + length
            while time.perf_counter_ns() < end:
                pass

        step(entry, "a loop of this length, no GPU", lambda spin=spin: spread(timed(spin, 20_000)))
        os.sched_setaffinity(0, cores)
        gc.enable()
        for period in (1e-3, 3e-4, 1e-4, 3e-5):
            key = f"every 10 ms, warm every {period * 1e3:g} ms"
            step(entry, key, lambda call=call, period=period: latency(call, 300, 0.01, KeepWarm(call, period)))
        backend.close()
    usual = FusedBackend(bundle, precision, BackendOptions())
    layout = usual.layout
    usual.close()
    step(result, "in the kernel", lambda: in_kernel(bundle, precision, reference, layout))
    return result


def in_kernel(bundle: Any, precision: Any, reference: Reference, layout: Layout) -> dict[str, Any]:
    """Return how many cycles launches take from the first mark to the last, in the block that takes longest."""
    found = stamps_of(bundle, precision, reference, layout, 2000)
    cycles = (found - found[:, :, :1]).max(axis=(1, 2)).astype(np.float64)
    to_input = (found[:, :, 1] - found[:, :, 0]).max(axis=1).astype(np.float64)
    return {"cycles": spread(cycles), "cycles until the input is there": spread(to_input)}


def quick(bundle: Any, reference: Reference, precision: Any, persistent: bool) -> dict[str, Any]:
    """A few calls, for tools under which a launch takes seconds."""
    backend, _ = opened(bundle, precision, reference, persistent=persistent)
    few = Reference(kinds=reference.kinds[:3], inputs=reference.inputs[:3], outputs=reference.outputs[:3])
    sizes = (1,) if persistent else (1, 2)
    judged = check_parity(backend.run, few, backend="cuda", precision=precision, sizes=sizes)
    backend.close()
    return {"parity": encode(judged)}


def step(result: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Do one step; its failure is a result."""
    try:
        result[name] = work()
    except Exception as e:
        result[name] = {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}


def run_case(case: str, seconds: float, calls: int, n_chans: int) -> None:
    """Do one case and print it as JSON."""
    variant, precision, what = case.split(":")
    try:
        if what == "grid":
            answer = grid(variant)
        else:
            bundle, model, reference = make_case(variant, (n_chans, *GRID[0][1:]))
            if what == "modes":
                answer = modes(bundle, model, reference, precision, seconds)
            elif what == "where":
                answer = where(bundle, reference, precision)
            elif what == "tail":
                answer = tail(bundle, reference, precision)
            elif what == "torch":
                answer = torch_case(model, reference, precision)
            elif what == "long":
                backend, _ = opened(bundle, precision, reference, persistent=True)
                answer = repeat(backend, reference, seconds, calls)
                backend.close()
            else:
                answer = quick(bundle, reference, precision, persistent=what == "quick-persistent")
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    print(json.dumps(answer), flush=True)


def tool(name: str) -> str:
    """Return the path of a tool of the CUDA toolkit."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer")
    if not found:
        raise FileNotFoundError(f"{name} is not here")
    return found


def run_tool(case: str, n_chans: int) -> dict[str, Any]:
    """Run a few calls of a case under compute-sanitizer or ncu."""
    variant, precision, what = case.split(":")
    inner = [sys.executable, __file__, "-", "--case", f"{variant}:{precision}:quick", "--channels", str(n_chans)]
    if what == "ncu":
        command = [tool("ncu"), "--clock-control", "none", "--kernel-name", variant, "--launch-skip", "1", "--launch-count", "2",
                   "--metrics", ",".join(METRICS), "--csv", *inner]  # fmt: skip
    else:
        command = [tool("compute-sanitizer"), "--tool", what, "--report-api-errors", "no", "--error-exitcode", "9", *inner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    lines = done.stdout.splitlines()
    keep = [line for line in lines if line.startswith("=====") or '","' in line]
    answer = {"exit": done.returncode, "output": keep[-60:], "stderr": done.stderr[-1500:]}
    parity = [json.loads(line) for line in lines if line.startswith('{"')]
    return answer | (parity[-1] if parity else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="cases, separated by commas, in this order")
    parser.add_argument("--deadline", type=float, default=200, help="seconds after which no case starts")
    parser.add_argument("--seconds", type=float, default=2, help="of repeated calls in each mode, and at most of a long run")
    parser.add_argument("--calls", type=int, default=10_000_000, help="of a long run")
    parser.add_argument(
        "--channels", type=int, default=GRID[0][0], help="of the model; racecheck takes minutes for Contextual's 129"
    )
    parser.add_argument("--case", help="one case in this process")
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case, arguments.seconds, arguments.calls, arguments.channels)
        return
    pairs = [f"{v}:{p}" for v, ps in PRECISIONS.items() for p in ps]
    cases = [f"{pair}:{what}" for what in ("modes", "where") for pair in pairs]
    cases += [f"{variant}:all:grid" for variant in (*PRECISIONS, "base")]
    cases += [f"{pair}:torch" for pair in pairs] + [f"{pair}:{what}" for what in TOOLS for pair in pairs]
    cases = arguments.only.split(",") if arguments.only else cases
    content: dict[str, Any] = {"python": platform.python_version(), "arguments": sys.argv[1:], "left_out": [], "cases": {}}
    content["nvidia-smi"] = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,pstate", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout if shutil.which("nvidia-smi") else None  # fmt: skip
    began = time.perf_counter()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        left = arguments.deadline - (time.perf_counter() - began)
        if left < 5:
            content["left_out"].append(case)
            continue
        started = time.perf_counter()
        limit = arguments.seconds + 30 if case.endswith(":long") else SECONDS
        command = [sys.executable, __file__, str(arguments.out), "--case", case, "--channels", str(arguments.channels)]
        command += ["--seconds", str(arguments.seconds), "--calls", str(arguments.calls)]
        try:
            if case.rpartition(":")[2] in TOOLS:
                answer = run_tool(case, arguments.channels)
            else:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
                answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            answer = {"failed": f"took more than {limit:.0f} s"}
        except FileNotFoundError as e:
            answer = {"failed": str(e)}
        except ValueError:
            answer = {"failed": done.stdout[-1000:] + done.stderr[-1000:]}
        answer["seconds"] = time.perf_counter() - started
        content["cases"][case] = answer
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
        print("\n".join(summary(case, answer)), flush=True)
    print("left out:", ", ".join(content["left_out"]) or "nothing")
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def summary(case: str, answer: dict[str, Any]) -> list[str]:
    """Return a few lines on one case."""
    lines = [f"{case} ({answer['seconds']:.1f} s) {answer.get('failed', '')}"]

    def add(name: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            if name in ("graphed", "exit", "calls", "differ"):
                lines.append(f"  {name}: {entry}")
        elif "failed" in entry:
            lines.append(f"  {name}: FAILED {entry['failed'][:300]}")
        elif "median block" in entry:
            for key, values in entry.items():
                lines.append(f"  {key}: " + " ".join(f"{v:.0f}" for v in values[:16]) + " ... " + f"{values[-1]:.0f}")
        elif "median" in entry:
            error = f", error {entry['max_error']:.1e} {entry['passed']}" if "max_error" in entry else ""
            lines.append(f"  {name}: {entry['median']:.1f} (p99 {entry['p99']:.1f}, max {entry['max']:.0f}){error}")
        elif "max_error" in entry:
            verdict = "passed" if entry["passed"] else "FAILED"
            lines.append(f"  {name}: {verdict} {entry['max_error']:.1e} {'' if entry['passed'] else entry['worst']}")
        elif "refused" in entry:
            lines.append(f"  {name}: refused: {entry['refused']}")
        elif "calls" in entry:
            lines.append(f"  {name}: {entry['calls']} calls, {entry['differ']} differ, {entry['seconds']:.1f} s")
        else:
            for key, value in entry.items():
                add(f"{name}, {key}", value)

    for name, entry in answer.items():
        add(name, entry)
    if "output" in answer:
        lines += ["  " + line[:200] for line in answer["output"][-3:]]
    return lines


if __name__ == "__main__":
    main()
