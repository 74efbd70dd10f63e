"""The ladder of the kernel for many windows: each variant's parity, time, where the cycles go, and copies in chunks beside it.

    PYTHONPATH=. python benchmarks/kernels/batches.py OUT.json [--model contextual] [--variants fp16,fp32,...] [--shape 129x200]

A variant is a precision, then macros that differ: fp16+SLOTS=2. Needs PyTorch on a GPU. Times are of the kernel alone between
events, inputs in device memory and no two launches on the same windows. README.md beside this file has the ladder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver as cu

from sjepa_deploy.eeg.synthetic import eeg_windows, hard_windows
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.fused.batch_program import make_batch_program
from sjepa_deploy.runtime.gpu import nvrtc
from sjepa_deploy.spec import ModelSpec


def check(result: Any) -> Any:
    """Return what a driver call gave."""
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


def make_spec(n_chans: int, n_times: int, variant: Any = "contextual") -> ModelSpec:
    """Return a model with electrodes on a sphere."""
    points = np.random.default_rng(1).standard_normal((n_chans, 3))
    points /= 10 * np.linalg.norm(points, axis=1, keepdims=True)
    return ModelSpec.of(
        variant=variant, n_chans=n_chans, n_times=n_times, sfreq=100.0, n_outputs=2, n_spat_filters=4,
        positions=tuple(tuple(map(float, point)) for point in points),
    )  # fmt: skip


class Kernel:
    """One variant, compiled and loaded."""

    def __init__(self, spec: ModelSpec, weights: Any, variant: str, profile: bool = False) -> None:
        precision, *changes = variant.split("+")
        self.program = program = make_batch_program(spec, weights, precision, profile=profile)  # type: ignore[arg-type]
        source = program.source
        for change in changes:
            name, value = change.split("=")
            source, n = re.subn(rf"#define {name} .*", f"#define {name} {value}", source)
            assert n == 1, change
        self.spec, self.profile = spec, profile
        major, minor = torch.cuda.get_device_capability()
        module = check(cu.cuModuleLoadData(nvrtc.compiled(source, 10 * major + minor)))
        self.function = check(cu.cuModuleGetFunction(module, program.name.encode()))
        size = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._launch(check(cu.cuModuleGetFunction(module, b"shared_bytes")), 1, 1, 0, 0, ctypes.c_void_p(size.data_ptr()))
        self.shared = int(size.item())
        attribute = cu.CUfunction_attribute
        check(cu.cuFuncSetAttribute(self.function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared))
        self.registers = check(cu.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, self.function))
        self.local = check(cu.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, self.function))
        self.weights = torch.from_numpy(program.weights.copy()).cuda()
        self.stamps = torch.zeros(4096 * program.marks, dtype=torch.int64, device="cuda") if profile else None

    @staticmethod
    def _launch(function: Any, grid: int, threads: int, shared: int, stream: int, argument: Any) -> None:
        params = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        check(cu.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(params), 0))

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Launch on the current stream."""
        names = ["input", "output", "weights"]
        fields = [(name, ctypes.c_void_p) for name in names] + [("batch", ctypes.c_uint), ("profile", ctypes.c_void_p)]
        kind = type("Arguments", (ctypes.Structure,), {"_fields_": fields})
        stamps = 0 if self.stamps is None else self.stamps.data_ptr()
        argument = kind(x.data_ptr(), out.data_ptr(), self.weights.data_ptr(), len(x), stamps)
        grid = -(-len(x) // self.program.windows)
        self._launch(self.function, grid, self.program.threads, self.shared, torch.cuda.current_stream().cuda_stream, argument)


def timed(run: Any, n: int = 20) -> list[float]:
    """Return times in us between events around each of `n` runs."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for _ in range(3):
        run(0)
    for i, (start, stop) in enumerate(events):
        start.record()
        run(i)
        stop.record()
    torch.cuda.synchronize()
    return sorted(1000 * start.elapsed_time(stop) for start, stop in events)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", default="fp16,fp32,bf16")
    parser.add_argument("--windows", default="1,64,132,256,1024")
    parser.add_argument("--shape", default="129x200")
    parser.add_argument("--model", default="contextual")
    args = parser.parse_args()
    n_chans, n_times = map(int, args.shape.split("x"))
    spec = make_spec(n_chans, n_times, args.model)
    model = build_model(spec, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    hard = hard_windows(n_chans, n_times, 100.0, np.random.default_rng(0))
    eeg = eeg_windows(140, n_chans, n_times, 100.0, np.random.default_rng(1))
    windows = np.float32(np.concatenate([np.stack(list(hard.values())), eeg]))
    with torch.inference_mode():
        model = model.double().cuda()
        want = torch.cat([model(torch.from_numpy(part).double().cuda()).cpu() for part in np.array_split(windows, 20)]).numpy()
    finite = np.isfinite(want)
    scale = float(np.sqrt(np.mean(want[finite] ** 2)))
    sizes = [int(n) for n in args.windows.split(",")]
    most = max(sizes)
    sizes_of = np.random.default_rng(3).uniform(0.5, 2, (most, 1, 1))
    random = torch.from_numpy(np.float32(np.resize(eeg, (most, n_chans, n_times)) * sizes_of)).cuda()
    on_gpu = [random, random.flip(0), random.roll(7, 0)]
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shape": args.shape}
    for variant in args.variants.split(","):
        try:
            kernel = Kernel(spec, weights, variant)
            entry: dict[str, Any] = {"registers": kernel.registers, "local": kernel.local, "shared": kernel.shared}
            result[variant] = entry
            out = torch.full((len(windows), 2), 7.0, device="cuda")
            kernel.run(torch.from_numpy(windows).cuda(), out)
            got = out.cpu().numpy()
            entry["error"] = float(np.abs(got - want)[finite].max() / scale)
            entry["nan agrees"] = bool((np.isfinite(got) == finite).all())
            alone = torch.full((len(windows), 2), 7.0, device="cuda")
            x = torch.from_numpy(windows).cuda()
            for i in range(len(windows)):
                kernel.run(x[i : i + 1], alone[i : i + 1])
            entry["bits alone"] = bool(np.array_equal(alone.cpu().numpy(), got, equal_nan=True))
            for size in sizes:
                out = torch.empty(size, 2, device="cuda")
                times = timed(lambda i, kernel=kernel, out=out, size=size: kernel.run(on_gpu[i % 3][:size], out))
                entry[f"us of {size}"] = [times[0], times[len(times) // 2]]
            seen = Kernel(spec, weights, variant, profile=True)
            seen.run(on_gpu[0][:132], torch.empty(132, 2, device="cuda"))
            torch.cuda.synchronize()
            blocks = -(-132 // seen.program.windows)
            assert seen.stamps is not None
            stamps = seen.stamps[: blocks * seen.program.marks].cpu().numpy().reshape(blocks, -1)
            entry["all cycles"] = float(np.median(stamps[:, -1] - stamps[:, 0]))
            if not spec.needs_positions:
                continue
            cycles = np.median(np.diff(stamps, axis=1), axis=0)
            layers = {"attend": cycles[1:-1:2].mean(), "feed": cycles[2:-1:2].mean()}
            entry["cycles"] = {"trunk": cycles[0], **layers, "head": cycles[-1]}
        except Exception as e:
            result[variant] = {**result.get(variant, {}), "failed": f"{type(e).__name__}: {e}"}
        finally:
            print(variant, json.dumps(result[variant]), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
