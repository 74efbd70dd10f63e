"""Batches on one NVIDIA GPU: the backend "cuda" with its kernels of one window and of many, beside PyTorch at its best setting.

    python benchmarks/gpu_batches.py OUT.json [--only contextual:fp16:curve,...] [--deadline 400]

A case is VARIANT:PRECISION:WHAT. Models have random weights and 129 channels x 200 samples; every window is another one.

    parity     errors against the float64 model at each of SIZES, whether NaN stays in its rows, and whether the bits of a window
               depend on its batch
    curve      median wall time of a call at each batch size, windows in the backend's own pinned buffer, outputs back on the
               host; of windows on the GPU and in pageable memory; what the backend chooses by itself
    torch      PyTorch with a CUDA graph and pinned copies inside, the fast path of its attention on and off
    bits       1,000,000 windows in batches of random sizes, each compared to the bit with itself in another batch
    grid       parity of the kernels of many windows on the export grid, or why they refuse
    memcheck, racecheck   compute-sanitizer over a few small batches
    copies     pinned host memory to the GPU, alone

Needs PyTorch. Every case runs in its own process with a time limit, and the result is written after each.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_engines import _graphed
from gpu_fused import GRID, make_case, tool

from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import BackendError
from sjepa_deploy.parity import check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.fused.backend import FusedBackend
from sjepa_deploy.runtime.machine import commit
from sjepa_deploy.spec import RunPrecision

ROOT = Path(__file__).parents[1]
SECONDS = 110
SIZES = (1, 2, 3, 7, 64, 129, 1024)
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PAIRS = (("contextual", "fp16"), ("contextual", "bf16"), ("contextual", "fp32"), ("postlocal", "fp32"), ("prelocal", "fp32"))


def windows_and_outputs(variant: str, n: int) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Return bundle, model, `n` windows of EEG behind the hard ones, and what the model gives for them in float64."""
    import torch

    bundle, model, reference = make_case(variant)
    bundle.graph = lambda precision: SimpleNamespace(max_batch=1024)
    eeg = np.float32(eeg_windows(n, *bundle.spec.input_shape, bundle.spec.sfreq, np.random.default_rng(5)))
    windows = np.concatenate([reference.inputs, eeg])[:n]
    with torch.inference_mode():
        model = model.cuda()
        parts = [model(torch.from_numpy(part).double().cuda()).cpu().numpy() for part in np.array_split(windows, 32)]
    return bundle, model, windows, np.concatenate(parts)


def median_us(call: Callable[[], object], seconds: float = 0.25) -> dict[str, float]:
    """Return the median and the 99th percentile of calls, after three that are not timed."""
    for _ in range(3):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < seconds and len(times) < 2000):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return {"median": float(np.median(times)), "p99": float(np.percentile(times, 99)), "n": len(times)}


def parity(variant: str, precision: RunPrecision) -> dict[str, Any]:
    """Errors at each size, and bits."""
    bundle, _, windows, want = windows_and_outputs(variant, 1200)
    finite = np.isfinite(want)
    scale = float(np.sqrt(np.mean(want[finite] ** 2)))
    result: dict[str, Any] = {}
    for kernels in ("batch",) if precision == "bf16" else ("batch", "window"):
        backend = FusedBackend(bundle, precision, BackendOptions(kernels=kernels))
        entry: dict[str, Any] = {}
        first: np.ndarray | None = None
        for size in SIZES if kernels == "batch" else SIZES[:5]:
            n = min(len(windows) // size, 40) * size
            got = np.concatenate([backend.run(windows[i : i + size]).copy() for i in range(0, n, size)])
            error = np.abs(got - want[:n])[finite[:n]].max() / scale
            entry[str(size)] = {"rows": n, "error": float(error), "nan agrees": bool((np.isfinite(got) == finite[:n]).all())}
            same = first is None or np.array_equal(got[: len(first)], first[: len(got)], equal_nan=True)
            entry[str(size)]["bits as in other batches"] = bool(same)
            first = got if first is None or len(got) > len(first) else first
        backend.close()
        result[kernels] = entry
    return result


def curve(variant: str, precision: RunPrecision) -> dict[str, Any]:
    """Median wall times of both kinds of kernels, and which were chosen."""
    import torch

    bundle, _, windows, _ = windows_and_outputs(variant, 1100)
    windows = windows[-1024:]
    result: dict[str, Any] = {}
    for kernels in ("batch", "auto") if precision == "bf16" else ("batch", "window", "auto"):
        backend = FusedBackend(bundle, precision, BackendOptions(kernels=kernels))
        entry: dict[str, Any] = {}
        for size in CURVE:
            if kernels == "window" and variant == "contextual" and size not in (1, 2, 4, 8, 16, 64, 256, 1024):
                continue
            began = time.perf_counter()
            buffer = backend.input_buffer(size)
            buffer[...] = windows[:size]
            opened = time.perf_counter() - began
            entry[str(size)] = median_us(lambda b=backend, x=buffer: b.run(x)) | {"open s": opened}
            entry[str(size)]["windows/s"] = size / entry[str(size)]["median"] * 1e6
            if kernels == "auto":
                entry[str(size)]["kernels"] = type(backend._lanes[size]).__name__
            if kernels == "batch":
                on_gpu = torch.from_numpy(windows[:size]).cuda()
                entry[f"{size} on the GPU"] = median_us(lambda b=backend, x=on_gpu: b.run_on_gpu(x), 0.1)
                mine = windows[:size].copy()
                entry[f"{size} from pageable memory"] = median_us(lambda b=backend, x=mine: b.run(x), 0.1)
        backend.close()
        result[kernels] = entry
    return result


def torch_case(variant: str, precision: RunPrecision) -> dict[str, Any]:
    """PyTorch with a CUDA graph, with and without the fast path of its attention; fp32 with and without TensorFloat-32."""
    import torch

    _, model, windows, _ = windows_and_outputs(variant, 1100)
    windows = windows[-1024:]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    model = model.to("cuda", dtype).eval()
    result: dict[str, Any] = {}
    for tf32 in (False, True) if precision == "fp32" else (False,):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for fast in (True, False) if variant == "contextual" else (True,):
            torch.backends.mha.set_fastpath_enabled(fast)
            for size in (1, 64, 256, 1024):
                with torch.inference_mode():
                    host = torch.from_numpy(windows[:size]).pin_memory()
                    found = median_us(_graphed(model, host, dtype))
                name = f"{'tf32' if tf32 else precision}, fast path {'on' if fast else 'off'}"
                result.setdefault(name, {})[str(size)] = found | {"windows/s": size / found["median"] * 1e6}
    return result


def bits(variant: str, precision: RunPrecision, n: int = 1_000_000) -> dict[str, Any]:
    """Compare `n` windows with themselves in other batches."""
    bundle, _, windows, _ = windows_and_outputs(variant, 2048)
    backend = FusedBackend(bundle, precision, BackendOptions(kernels="batch"))
    want = np.concatenate([backend.run(windows[i : i + 1024]).copy() for i in (0, 1024)])
    rng = np.random.default_rng(0)
    seen = differ = calls = 0
    while seen < n:
        size = int(rng.choice([1, 2, 3, 7, 64, 129, 256, 700, 1024]))
        first = int(rng.integers(0, len(windows) - size + 1))
        got = backend.run(windows[first : first + size])
        differ += int((got.view(np.uint32) != want[first : first + size].view(np.uint32)).any(axis=1).sum())
        seen, calls = seen + size, calls + 1
    backend.close()
    return {"windows": seen, "calls": calls, "differ": differ}


def grid(variant: str) -> dict[str, Any]:
    """Parity of the kernels of many windows on the export grid."""
    result: dict[str, Any] = {}
    for seed, shape in enumerate(GRID):
        bundle, _, reference = make_case(variant, shape, seed)
        for precision in ("fp32", "tf32", "fp16", "bf16"):
            key = f"{' x '.join(map(str, shape))} {precision}"
            try:
                backend = FusedBackend(bundle, precision, BackendOptions(kernels="batch"))
            except BackendError as e:
                result[key] = {"refused": e.problem}
                continue
            most = bundle.graph(precision).max_batch
            found = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(1, 2, 3, 7, most))
            backend.close()
            result[key] = {"passed": found.passed, "error": found.max_error, "worst": found.worst}
    return result


def quick(variant: str, precision: RunPrecision) -> dict[str, Any]:
    """A few small batches, for tools under which a launch takes seconds."""
    bundle, _, reference = make_case(variant)
    backend = FusedBackend(bundle, precision, BackendOptions(kernels="batch"))
    found = [np.isfinite(backend.run(reference.inputs[:size])).all() for size in (1, 3)]
    backend.close()
    return {"finite": bool(np.all(found))}


def under(name: str, variant: str, precision: RunPrecision) -> dict[str, Any]:
    """Run `quick` under a tool of compute-sanitizer."""
    inner = [sys.executable, __file__, "-", "--case", f"{variant}:{precision}:quick"]
    command = [tool("compute-sanitizer"), "--tool", name, "--report-api-errors", "no", "--error-exitcode", "9", *inner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS - 5, check=False)
    kept = [line for line in done.stdout.splitlines() if line.startswith(("=====", "{"))]
    return {"exit": done.returncode, "output": kept[-8:]}


def copies() -> dict[str, Any]:
    """Pinned memory to the GPU, alone."""
    import torch

    result = {}
    for size in (64, 256, 1024):
        host = torch.randn(size, 129, 200).pin_memory()
        device = torch.empty_like(host, device="cuda")

        def call(host: Any = host, device: Any = device) -> None:
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize()

        found = median_us(call)
        result[str(size)] = found | {"windows/s": size / found["median"] * 1e6, "GB/s": host.nbytes / found["median"] / 1e3}
    return result


def run_case(case: str) -> dict[str, Any]:
    """Do one case."""
    variant, precision, what = case.split(":")
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: parity(variant, precision),  # type: ignore[arg-type]
        "curve": lambda: curve(variant, precision),  # type: ignore[arg-type]
        "torch": lambda: torch_case(variant, precision),  # type: ignore[arg-type]
        "bits": lambda: bits(variant, precision),  # type: ignore[arg-type]
        "grid": lambda: grid(variant),
        "quick": lambda: quick(variant, precision),  # type: ignore[arg-type]
        "memcheck": lambda: under("memcheck", variant, precision),  # type: ignore[arg-type]
        "racecheck": lambda: under("racecheck", variant, precision),  # type: ignore[arg-type]
        "copies": copies,
    }
    try:
        return cases[what]()
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="cases, separated by commas, in this order")
    parser.add_argument("--deadline", type=float, default=400, help="seconds after which no case starts")
    parser.add_argument("--case", help="one case in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case)), flush=True)
        return
    cases = ["all:all:copies"] + [
        f"{v}:{p}:{what}" for what in ("curve", "parity", "torch", "memcheck", "bits") for v, p in PAIRS
    ]
    cases += [f"{variant}:all:grid" for variant in ("contextual", "postlocal", "prelocal", "base")]
    cases += [f"{v}:{p}:racecheck" for v, p in PAIRS]
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    gpu = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    content: dict[str, Any] = {
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
    content |= {"commit": commit(ROOT), "arguments": sys.argv[1:], "left out": [], "cases": {}}
    began = time.perf_counter()
    for case in arguments.only.split(",") if arguments.only else cases:
        started = time.perf_counter()
        if started - began > arguments.deadline - 5:
            content["left out"].append(case)
            continue
        command = [sys.executable, __file__, str(arguments.out), "--case", case]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            answer = {"failed": f"took more than {SECONDS} s"}
        answer["seconds"] = time.perf_counter() - started
        content["cases"][case] = answer
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
        print(case, json.dumps(answer)[:700], flush=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print("left out:", ", ".join(content["left out"]) or "nothing")


if __name__ == "__main__":
    main()
