"""The fused kernels on one NVIDIA GPU: parity, determinism, latency beside the other GPU backends, where the time goes.

    python benchmarks/gpu_fused.py BUNDLES OUT.json [--only contextual:fp16,...] [--peers tensorrt,torch] [--deadline 100]

BUNDLES holds one bundle a folder (`benchmarks/pack_bundles.py` makes them on any machine). Every case runs in its own process
with 30 s to live, and the result is written after each: a kernel that fails or hangs loses its own case only. What would start
after the deadline is left out and listed. Latencies are host wall times of `run` in us, both transfers included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.backend import BACKENDS, BackendOptions, open_backend
from sjepa_deploy.runtime.cuda import check
from sjepa_deploy.runtime.fused import FusedBackend
from sjepa_deploy.runtime.fused_program import Layout
from sjepa_deploy.runtime.parity import check_parity
from sjepa_deploy.serialize import encode

SECONDS = 30
PRECISIONS = {"prelocal": ("fp32",), "postlocal": ("fp32",), "contextual": ("fp32", "tf32", "fp16")}
SIZES = (1, 2, 3, 8, 64)


def latency(call: Callable[[], object], n: int = 2000, pause: float = 0.0) -> dict[str, float]:
    """Return the distribution of `n` calls, back to back or every `pause` seconds."""
    for _ in range(100):
        call()
    times = np.empty(n)
    due = time.perf_counter()
    for i in range(n):
        due += pause
        while pause and time.perf_counter() < due:
            time.sleep(max(0.0, due - time.perf_counter() - 0.001))
        start = time.perf_counter_ns()
        call()
        times[i] = (time.perf_counter_ns() - start) / 1000
    p50, p90, p99, p999 = np.percentile(times, (50, 90, 99, 99.9))
    return {"median": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": times.max(), "mean": times.mean(), "n": n}


def latencies(backend: Any, reference: Any, *, batches: tuple[int, ...] = (1, 8, 64)) -> dict[str, Any]:
    """Return latencies with the window in place and copied, paced at 100 Hz, and of larger batches."""
    window = np.ascontiguousarray(reference.inputs[:1])
    buffer = backend.input_buffer(1)
    buffer[...] = window
    result = {
        "in place": latency(lambda: backend.run(buffer)),
        "with copy": latency(lambda: backend.run(window)),
        "in place, every 10 ms": latency(lambda: backend.run(buffer), 150, 0.01),
    }
    for batch in batches[1:]:
        many = backend.input_buffer(batch)
        many[...] = reference.inputs[np.arange(batch) % (len(reference.inputs) - 1)]
        result[f"batch {batch}"] = latency(lambda many=many: backend.run(many), 200)
    return result


def repeat(backend: Any, reference: Any, seconds: float) -> dict[str, Any]:
    """Return how many of consecutive calls with two windows in turn differ in any bit from the first."""
    windows = [np.ascontiguousarray(reference.inputs[i : i + 1]) for i in (0, 1)]
    buffer, first = backend.input_buffer(1), []
    for window in windows:
        buffer[...] = window
        first.append(backend.run(buffer).copy())
    calls = differ = 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for window, want in zip(windows, first, strict=True):
            buffer[...] = window
            for _ in range(50):
                differ += not np.array_equal(backend.run(buffer), want)
            calls += 50
    return {"calls": calls, "differ": int(differ)}


def profile(bundle: Bundle, precision: Any, layout: Layout) -> dict[str, Any]:
    """Return the cycles from mark to mark in the kernel, the median block of the median launch."""
    backend = FusedBackend(bundle, precision, BackendOptions(), dataclasses.replace(layout, profile=True))
    buffer = backend.input_buffer(1)
    buffer[...] = bundle.reference().inputs[:1]
    lane = backend._lanes[1]
    blocks, marks = lane.grid, 2 + 6 * bundle.spec.encoder.n_layers if bundle.spec.needs_positions else 6
    found = []
    for _ in range(50):
        backend.run(buffer)
        backend._stream.synchronize()
        stamps = np.zeros((blocks, marks), np.int64)
        source = backend._device.cu.CUdeviceptr(lane.buffers["profile"].address)
        check(backend._device.cu.cuMemcpyDtoH(stamps.ctypes.data, source, stamps.nbytes))
        found.append(stamps)
    stamps = np.median(np.stack(found[10:]) - np.stack(found[10:])[:, :, :1], axis=0)
    backend.close()
    return {"median block": np.median(stamps, axis=0).tolist(), "slowest block": stamps.max(axis=0).tolist()}


def quick_case(bundle: Bundle, precision: Any, reference: Any) -> dict[str, Any]:
    """Every window once, for compute-sanitizer, under which a launch takes seconds."""
    backend = FusedBackend(bundle, precision, BackendOptions())
    judged = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(1,))
    backend.close()
    return {"parity": encode(judged)}


def fused_case(bundle: Bundle, precision: Any, reference: Any) -> dict[str, Any]:
    """Everything about one variant in one precision."""
    result: dict[str, Any] = {}
    began = time.perf_counter()
    backend = FusedBackend(bundle, precision, BackendOptions())
    result["load_s"] = time.perf_counter() - began
    result["blocks"], result["shared_bytes"] = backend.module.blocks_at_once, backend.module.shared_bytes
    result["parity"] = encode(check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=SIZES))
    step(result, "latency", lambda: latencies(backend, reference))
    step(result, "repeat", lambda: repeat(backend, reference, 4.0))
    usual = backend.layout
    backend.close()

    def with_options(**options: Any) -> Any:
        other = FusedBackend(bundle, precision, BackendOptions(**options))
        buffer = other.input_buffer(1)
        buffer[...] = reference.inputs[:1]
        found = latency(lambda: other.run(buffer), 1000)
        other.close()
        return found

    step(result, "block", lambda: with_options(wait="block"))
    step(result, "copy in a graph", lambda: with_options(memory="copy"))

    def with_layout(**changes: Any) -> Any:
        other = FusedBackend(bundle, precision, BackendOptions(), dataclasses.replace(usual, **changes))
        buffer = other.input_buffer(1)
        judged = check_parity(other.run, reference, backend="cuda", precision=precision, sizes=(1,))
        buffer[...] = reference.inputs[:1]
        found = latency(lambda: other.run(buffer), 1000) | {"passed": judged.passed, "max_error": judged.max_error}
        other.close()
        return found

    step(result, "profile", lambda: profile(bundle, precision, usual))
    variants: list[dict[str, Any]] = [{"threads": 512}]
    if bundle.spec.variant == "prelocal":
        variants += [{"blocks": 4}, {"cluster": False}, {"cluster": False, "blocks": 16}, {"cluster": False, "blocks": 32}]
        variants += [{"cluster": False, "blocks": 32, "threads": 512}, {"threads": 1024}]
    if bundle.spec.variant == "postlocal":
        variants += [{"threads": 128}]
    for changes in variants:
        step(result, f"layout {changes}", lambda changes=changes: with_layout(**changes))
    return result


def peer_case(bundle: Bundle, precision: Any, reference: Any, name: str) -> dict[str, Any]:
    """The same latencies of another backend; of PyTorch, with a CUDA graph and pinned copies inside."""
    if name == "torch":
        import torch
        from gpu_engines import _graphed

        from sjepa_deploy.checkpoint import load_model, read_checkpoint

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.mha.set_fastpath_enabled(False)
        dtype = torch.float16 if precision == "fp16" else torch.float32
        model = load_model(read_checkpoint(bundle.checkpoint), bundle.spec).eval().to("cuda", dtype)
        result = {}
        with torch.inference_mode():
            for batch in (1, 64):
                host = torch.from_numpy(np.resize(reference.inputs[:4], (batch, *bundle.spec.input_shape))).pin_memory()
                result["in place" if batch == 1 else f"batch {batch}"] = latency(_graphed(model, host, dtype), 1000)
        return {"latency": result}
    if missing := BACKENDS[name].why_not():
        raise missing
    backend = open_backend(bundle, name, precision)
    return {"latency": latencies(backend, reference)}


def step(result: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Do one step; its failure is a result."""
    try:
        result[name] = work()
    except Exception as e:
        result[name] = {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}


def run_case(bundles: Path, case: str) -> None:
    """Do one case and print it as JSON: VARIANT:PRECISION:BACKEND, or VARIANT:PRECISION:quick."""
    variant, precision, name = case.split(":")
    try:
        bundle = Bundle.open(bundles / variant)
        reference = bundle.reference()
        run = {"cuda": fused_case, "quick": quick_case}.get(name, lambda *case: peer_case(*case, name))
        answer = run(bundle, precision, reference)
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="VARIANT:PRECISION, separated by commas, in this order")
    parser.add_argument("--peers", default="", help="other backends to time, separated by commas")
    parser.add_argument("--deadline", type=float, default=100, help="seconds after which no case starts")
    parser.add_argument("--case", help="one case in this process: VARIANT:PRECISION:BACKEND, or VARIANT:PRECISION:quick")
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.bundles, arguments.case)
        return
    wanted = arguments.only.split(",") if arguments.only else [f"{v}:{p}" for v, ps in PRECISIONS.items() for p in ps]
    cases = [f"{case}:cuda" for case in wanted]
    cases += [f"{case}:{peer}" for peer in filter(None, arguments.peers.split(",")) for case in wanted]
    content: dict[str, Any] = {"python": platform.python_version(), "arguments": sys.argv[1:], "left_out": [], "cases": {}}
    content["nvidia-smi"] = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,pstate", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout if Path("/usr/bin/nvidia-smi").exists() else None  # fmt: skip
    began = time.perf_counter()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if time.perf_counter() - began > arguments.deadline:
            content["left_out"].append(case)
            continue
        started = time.perf_counter()
        command = [sys.executable, __file__, str(arguments.bundles), str(arguments.out), "--case", case]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            answer = {"failed": f"took more than {SECONDS} s"}
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
    if "parity" in answer:
        parity = answer["parity"]
        lines.append(f"  parity {'passed' if parity['passed'] else 'FAILED'}: {parity['max_error']:.2e}, {parity['worst']}")
    for key, value in answer.items():
        entries = value.items() if key == "latency" and isinstance(value, dict) else [(key, value)]
        for name, entry in entries:
            if isinstance(entry, dict) and "median" in entry:
                error = f", error {entry['max_error']:.1e}" if "max_error" in entry else ""
                lines.append(f"  {name}: {entry['median']:.1f} (p99 {entry['p99']:.1f}){error}")
            elif isinstance(entry, dict) and "failed" in entry:
                lines.append(f"  {name}: FAILED {entry['failed'][:300]}")
            elif name in ("repeat", "load_s", "blocks", "shared_bytes"):
                lines.append(f"  {name}: {entry}")
    if isinstance(answer.get("profile"), dict) and "median block" in answer["profile"]:
        lines.append("  profile: " + " ".join(f"{v:.0f}" for v in answer["profile"]["median block"][:20]))
        lines.append("  slowest: " + " ".join(f"{v:.0f}" for v in answer["profile"]["slowest block"][:20]))
    return lines


if __name__ == "__main__":
    main()
