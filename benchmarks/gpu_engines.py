"""What this toolkit does on one NVIDIA GPU: engines built and judged, latencies, host overhead, a soak.

    python benchmarks/gpu_engines.py BUNDLES OUT --runtime tensorrt [--only contextual:fp16,...] [--deadline 540]
    python benchmarks/gpu_engines.py BUNDLES OUT --runtime ort
    python benchmarks/gpu_engines.py BUNDLES OUT --runtime torch

BUNDLES holds one bundle a folder (`benchmarks/pack_bundles.py` makes them on any machine). Every finished step is written to
OUT/RUNTIME.json at once, so that a run that is cut short still tells what it did. What would start after the deadline is left out
and listed. `--runtime tensorrt` needs Python 3.10 and NumPy, no torch and no onnxruntime.

Latencies are host wall times of `run` with both transfers, medians over back-to-back calls, batch 1 unless named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.parity import check_parity
from sjepa_deploy.runtime.backend import BackendOptions, open_backend
from sjepa_deploy.runtime.gpu.cuda import Device, check
from sjepa_deploy.serialize import encode

VARIANTS = ("prelocal", "postlocal", "contextual")
PRECISIONS = ("fp32", "tf32", "fp16")
N_CALLS = 2000
N_SOAK = 10_000


class Report:
    """Steps and what came of them, on the disk after each."""

    def __init__(self, file: Path, deadline: float) -> None:
        self.file, self.deadline = file, time.monotonic() + deadline
        self.content: dict[str, Any] = {"results": {}, "failed": {}, "left_out": []}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one step and record what it returns, or how it failed."""
        if time.monotonic() > self.deadline:
            self.content["left_out"].append(name)
            self.save()
            return None
        started = time.monotonic()
        try:
            result = work()
            self.content["results"][name] = result
        except Exception as e:  # the next step may work, and the GPU machine is here once
            result = None
            self.content["failed"][name] = {"error": str(e), "traceback": traceback.format_exc()}
        seconds = time.monotonic() - started
        shown = "FAILED: " + self.content["failed"][name]["error"] if name in self.content["failed"] else brief(result)
        print(f"{seconds:6.1f} s  {name}: {shown}", flush=True)
        self.save()
        return result

    def save(self) -> None:
        self.file.write_text(json.dumps(self.content, indent=1, default=str) + "\n")


def brief(result: Any) -> str:
    return json.dumps(result, default=str)[:300]


def machine() -> dict[str, Any]:
    device = Device()
    gpu = dataclasses.asdict(device.gpu)
    device.close()
    return {
        "gpu": gpu,
        "python": sys.version,
        "host": platform.platform(),
        "commit": said("git", "rev-parse", "HEAD"),
        "nvidia_smi": said("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv"),
    }


def said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def timed(call: Callable[[], Any], n: int = N_CALLS) -> dict[str, float]:
    """Return the latency of `call` in microseconds."""
    for _ in range(200):
        call()
    clock, samples = time.perf_counter_ns, []
    for _ in range(n):
        start = clock()
        call()
        samples.append(clock() - start)
    micro = np.array(samples) / 1000
    return {"median": float(np.median(micro)), "p99": float(np.quantile(micro, 0.99)), "max": float(micro.max()), "n": n}


def overhead(backend: Any, buffer: Any) -> dict[str, float]:
    """Return what a call costs beyond launch and wait, and what the copy of the window into pinned memory costs, in us."""
    lane = backend._lanes[1]
    wait = lane._wait

    def bare() -> None:
        check(lane.launch())
        wait()

    def medians(call: Callable[[], Any]) -> float:
        return timed(call, 1000)["median"]

    pairs = [(medians(lambda: backend.run(buffer)), medians(bare)) for _ in range(5)]
    nothing = {"launch": lane.launch, "wait": wait}
    lane.launch, lane._wait = (lambda: (0,)), (lambda: None)  # the Python around launch and wait alone
    python_only = medians(lambda: backend.run(buffer))
    lane.launch, lane._wait = nothing["launch"], nothing["wait"]
    window = np.array(buffer)
    return {
        "run_minus_launch_and_wait": statistics.median(a - b for a, b in pairs),
        "python_around_launch_and_wait": python_only,
        "copy_of_window": medians(lambda: np.copyto(buffer, window)),
        "empty_call": medians(lambda: None),
    }


def soak(backend: Any, windows: Any, n: int) -> dict[str, Any]:
    """Call `n` times with two windows in turn; memory must not grow, and equal inputs give equal outputs."""
    device = Device()
    first = [backend.run(windows[i : i + 1]).copy() for i in (0, 1)]
    for _ in range(200):
        backend.run(windows[:1])
    free, rss, differ = device.free_memory(), _rss(), 0
    blocks = sys.getallocatedblocks()
    for i in range(n):
        differ += not np.array_equal(backend.run(windows[i % 2 : i % 2 + 1]), first[i % 2])
    result = {
        "calls": n,
        "outputs_that_differ": differ,
        "device_bytes_grown": free - device.free_memory(),
        "host_rss_bytes_grown": _rss() - rss,
        "python_blocks_grown": sys.getallocatedblocks() - blocks,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    device.close()
    return result


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def windows_of(bundle: Bundle, n: int) -> Any:
    spec = bundle.spec
    return eeg_windows(n, spec.n_chans, spec.n_times, spec.sfreq, np.random.default_rng(1))


def latencies(
    report: Report, bundle: Bundle, name: str, backend: str, precision: Any, configurations: list[BackendOptions]
) -> None:
    """Measure one graph in several configurations, and larger batches in the first."""
    windows = windows_of(bundle, 64)
    for i, options in enumerate(configurations):
        label = f"{options.memory}, {'graph' if options.cuda_graph else 'no graph'}, {options.wait}"

        def measure(options: BackendOptions = options, first: bool = i == 0) -> Any:
            opened: Any = open_backend(bundle, backend, precision, options)
            try:
                opened.warmup((1,))
                window, buffer = windows[:1].copy(), opened.input_buffer(1)
                result = {"with_copy_to_pinned": timed(lambda: opened.run(window))}
                buffer[...] = window
                result["in_place"] = timed(lambda: opened.run(buffer))
                if first:
                    for batch in (3, 8, 64):
                        opened.warmup((batch,))
                        batched = windows[:batch].copy()
                        result[f"batch_{batch}"] = timed(lambda: opened.run(batched), 300)  # noqa: B023 - called here
            finally:
                opened.close()
            return result

        report.step(f"latency {name} [{label}]", measure)


OPTIONS = [
    BackendOptions(memory="mapped", cuda_graph=True, wait="flag"),
    BackendOptions(memory="mapped", cuda_graph=True, wait="spin"),
    BackendOptions(memory="copy", cuda_graph=True, wait="spin"),
    BackendOptions(memory="mapped", cuda_graph=True, wait="block"),
    BackendOptions(memory="mapped", cuda_graph=False, wait="spin"),
]


def run_tensorrt(report: Report, bundles: dict[str, Bundle], wanted: list[tuple[str, str]], arguments: Any) -> None:
    """Build, judge, reload, judge again, then measure; all builds of a kind before slower ones."""
    from sjepa_deploy.export.to_tensorrt import build_engine, default_settings
    from sjepa_deploy.runtime.backends.engine_judge import engine_batch_sizes
    from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
    from sjepa_deploy.runtime.backends.trt import machine_of

    layers: dict[str, Any] = {}
    report.step("tensorrt", lambda: TensorRT(arguments.flavour).version)
    for variant, precision in wanted:
        bundle, name = bundles[variant], f"{variant} {precision}"
        settings = dataclasses.replace(
            default_settings(bundle, precision), optimization_level=arguments.level, held_types=arguments.held_types
        )

        def build(bundle: Bundle = bundle, precision: Any = precision, settings: Any = settings) -> Any:
            return encode(
                build_engine(bundle, precision, flavour=arguments.flavour, settings=settings, rebuild=arguments.rebuild)
            )

        built = report.step(f"build {name}", build)
        if built is None:
            continue

        def inspect(bundle: Bundle = bundle, precision: Any = precision, settings: Any = settings, name: str = name) -> Any:
            from sjepa_deploy.runtime.backends.engines import EngineStore

            api, device = TensorRT(arguments.flavour), Device()
            store = EngineStore(bundle=bundle)
            identity = store.identity(precision, machine_of(api, device.gpu), settings, api.flags(precision, settings))
            record = store.find(identity)
            assert record is not None
            plan = store.plan(record)
            text = api.inspect(api.deserialize(plan))
            device.close()
            if arguments.plans:
                (report.file.parent / f"{name.replace(' ', '_')}.plan").write_bytes(plan)
            layers[name] = json.loads(text, strict=False)
            (report.file.parent / f"layers{arguments.tag}.json").write_text(json.dumps(layers))
            return encode(record.layers)

        if arguments.layers:
            report.step(f"inspect {name}", inspect)
        offered = built["computes_in"] == precision
        if not offered:
            report.content["results"][f"not offered {name}"] = built["evidence"]
            continue

        def judge_again(bundle: Bundle = bundle, precision: Any = precision, settings: Any = settings) -> Any:
            backend: Any = open_backend(bundle, arguments.flavour, precision)
            result = check_parity(
                backend.run, bundle.reference(), backend=backend.name, precision=precision, sizes=engine_batch_sizes(settings)
            )
            backend.close()
            return encode(result)

        report.step(f"parity in a new backend {name}", judge_again)
        latencies(report, bundle, name, arguments.flavour, precision, OPTIONS)

        def host(bundle: Bundle = bundle, precision: Any = precision) -> Any:
            backend: Any = open_backend(bundle, arguments.flavour, precision)
            backend.warmup((1,))
            buffer = backend.input_buffer(1)
            buffer[...] = windows_of(bundle, 1)
            result = overhead(backend, buffer)
            backend.close()
            return result

        report.step(f"host overhead {name}", host)

        def endure(bundle: Bundle = bundle, precision: Any = precision) -> Any:
            backend: Any = open_backend(bundle, arguments.flavour, precision)
            backend.warmup((1,))
            result = soak(backend, windows_of(bundle, 2), N_SOAK)
            backend.close()
            return result

        report.step(f"soak {name}", endure)


def run_ort(report: Report, bundles: dict[str, Bundle], wanted: list[tuple[str, str]], arguments: Any) -> None:
    """The same for ONNX Runtime's CUDA provider, plain and with its CUDA graph."""
    for variant, precision in wanted:
        bundle, name = bundles[variant], f"{variant} {precision} ort-cuda"

        def judge(bundle: Bundle = bundle, precision: Any = precision) -> Any:
            backend: Any = open_backend(bundle, "ort-cuda", precision)
            result = check_parity(
                backend.run, bundle.reference(), backend="ort-cuda", precision=precision, sizes=(1, 2, 3, 8, 64)
            )
            backend.close()
            return encode(result)

        report.step(f"parity {name}", judge)
        configurations = [BackendOptions(), BackendOptions(memory="copy"), BackendOptions(memory="copy", cuda_graph=False)]
        latencies(report, bundle, name, "ort-cuda", precision, configurations)

        def endure(bundle: Bundle = bundle, precision: Any = precision) -> Any:
            backend: Any = open_backend(bundle, "ort-cuda", precision)
            backend.warmup((1,))
            result = soak(backend, windows_of(bundle, 2), 2000)
            backend.close()
            return result

        report.step(f"soak {name}", endure)


def run_torch(report: Report, bundles: dict[str, Bundle], wanted: list[tuple[str, str]], arguments: Any) -> None:
    """PyTorch on the same GPU: eager, and one CUDA graph with its copies, with its transformer's fast path and without."""
    import torch

    from sjepa_deploy.models.checkpoint import load_model, read_checkpoint

    device = arguments.torch_device
    for variant, precision in wanted:
        bundle, name = bundles[variant], f"{variant} {precision} torch"
        dtype = torch.float16 if precision == "fp16" else torch.float32

        def measure(bundle: Bundle = bundle, precision: str = precision, dtype: Any = dtype) -> Any:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            model = load_model(read_checkpoint(bundle.checkpoint), bundle.spec).eval().to(device, dtype)
            host = torch.from_numpy(windows_of(bundle, 1))
            host = host.pin_memory() if device == "cuda" else host
            with torch.inference_mode():

                def eager() -> None:
                    model(host.to(device, non_blocking=True).to(dtype)).float().cpu()

                result = {}
                for fast, ending in ((True, ""), (False, ", no fast path")):
                    torch.backends.mha.set_fastpath_enabled(fast)
                    result[f"eager{ending}"] = timed(eager, 300)
                    if device == "cuda":
                        result[f"cuda_graph{ending}"] = timed(_graphed(model, host, dtype))
            return result

        report.step(f"latency {name}", measure)


def _graphed(model: Any, host: Any, dtype: Any) -> Callable[[], None]:
    import torch

    static, stream = torch.empty_like(host, device="cuda"), torch.cuda.Stream()
    out_host = model(host.to("cuda").to(dtype)).float().cpu().pin_memory()

    def body() -> None:
        static.copy_(host, non_blocking=True)
        out_host.copy_(model(static.to(dtype)).float(), non_blocking=True)

    with torch.cuda.stream(stream):
        for _ in range(5):
            body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runtime", choices=("tensorrt", "ort", "torch"), required=True)
    parser.add_argument("--flavour", default="tensorrt")
    parser.add_argument("--only", help="VARIANT:PRECISION, separated by commas, in this order")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which no step starts")
    parser.add_argument("--level", type=int, default=3, help="optimization level of the builder")
    parser.add_argument(
        "--held-types",
        choices=["all", "float32", "none"],
        default="all",
        help="which layers of an fp16 graph TensorRT 8.6 is asked to compute in the graph's type",
    )
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--layers", action="store_true", help="write what the engine inspector says of each engine to OUT")
    parser.add_argument("--plans", action="store_true", help="copy the plans to OUT too (with --layers)")
    parser.add_argument("--tag", default="", help="part of the result's name, for a second run into the same OUT")
    parser.add_argument("--torch-device", default="cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / f"{arguments.runtime}{arguments.tag}.json", arguments.deadline)
    report.content["arguments"] = {k: str(v) for k, v in vars(arguments).items()}
    report.step("machine", machine)
    wanted = [tuple(item.split(":")) for item in arguments.only.split(",")] if arguments.only else None
    wanted = wanted or [(variant, precision) for precision in PRECISIONS for variant in VARIANTS]
    bundles = {v: Bundle.open(arguments.bundles / v) for v in dict.fromkeys(v for v, _ in wanted)}
    run = {"tensorrt": run_tensorrt, "ort": run_ort, "torch": run_torch}[arguments.runtime]
    run(report, bundles, wanted, arguments)  # type: ignore[arg-type]
    summary(report)


def summary(report: Report) -> None:
    """Print one line a result, for a log that is cut from the front."""
    print("\nmedians in us (in place, batch 1)")
    for name, result in report.content["results"].items():
        if name.startswith("latency") and isinstance(result, dict):
            print(f"  {name[8:]}: " + ", ".join(f"{k} {v['median']:.1f} (p99 {v['p99']:.1f})" for k, v in result.items()))
        elif name.startswith(("host", "soak")):
            print(f"  {name}: {brief(result)}")
    for name, failure in report.content["failed"].items():
        print(f"FAILED {name}: {failure['error'][:300]}")
    print("left out:", ", ".join(report.content["left_out"]) or "nothing")


if __name__ == "__main__":
    main()
