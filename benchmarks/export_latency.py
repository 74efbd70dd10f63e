"""How much do the exact rewrites gain on a CPU, and what bounds each graph: calls or arithmetic?

Times ONNX Runtime on our fp32 graph and on a plain export of braindecode's model (same weights, same opset, position encoding
made constant, without which the export does not run), in one process, in blocks of random order. Beside the medians it measures
the cost of a node that does nothing and the rate of a large matrix product on this machine: nodes times the one, and
multiply-adds over the other, are lower bounds of a graph's time, and the larger one names what bounds it. The export of
Contextual with parity is timed in a process of its own, with its peak memory.

    python benchmarks/export_latency.py --out benchmarks/results/export_latency_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machine import describe_machine, write_result
from oracle import braindecode_model

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.export.rewrite import rewrite
from sjepa_deploy.export.to_onnx import DEFAULT_OPSET, to_onnx
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.spec import ModelSpec

VARIANTS = ("prelocal", "postlocal", "contextual")
MULTIPLY_ADDS = {"prelocal": 0.223e6, "postlocal": 3.90e6, "contextual": 308.4e6}
"""Multiply-adds of one window before the rewrites (129 channels, 200 samples, 4 filters, 1 output)."""


def spec_of(variant: str) -> ModelSpec:
    montage = read_montage("GSN-HydroCel-129")
    return ModelSpec.of(
        variant=variant, n_chans=129, n_times=200, sfreq=100.0, ch_names=montage.ch_names, positions=montage.positions
    )


class ConstantPositions(torch.nn.Module):
    def __init__(self, encoding: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("encoding", encoding)

    def forward(self, local_features: torch.Tensor) -> torch.Tensor:
        return self.encoding


def plain_export(spec: ModelSpec, file: Path) -> None:
    """Export braindecode's model as a user would, after the one change that makes it run."""
    ours = build_model(spec, seed=0)
    model = braindecode_model(spec)
    model.load_state_dict(ours.state_dict())
    model.eval()
    if model.pos_encoder is not None:
        tokens = torch.zeros(1, spec.n_chans * spec.n_tokens_per_channel, spec.encoder.emb_dim)
        model.pos_encoder = ConstantPositions(model.pos_encoder(tokens).detach())
    with reference_mode(model):
        torch.onnx.export(
            model,
            (torch.randn(2, *spec.input_shape),),
            file,
            input_names=["eeg"],
            output_names=["prediction"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            opset_version=DEFAULT_OPSET,
            dynamo=True,
            verbose=False,
            external_data=False,
        )


def session(model: Path | bytes, n_threads: int, optimized: Path | None = None) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = n_threads
    settings.log_severity_level = 3
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def time_blocks(calls: dict[str, Any], blocks: int, seconds: float) -> dict[str, list[float]]:
    """Time each call in blocks of about `seconds`, in random order, and return all samples in microseconds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for _ in range(blocks):
        for name in random.sample(list(calls), len(calls)):
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                calls[name]()
                samples[name].append((time.perf_counter() - start) * 1e6)
    return samples


def node_cost_us(n_nodes: int = 200) -> float:
    """Return the cost of one node that does nearly nothing, from a chain of them."""
    helper = onnx.helper
    names = ["x", *(f"v{i}" for i in range(n_nodes))]
    nodes = [helper.make_node("Sin", [a], [b]) for a, b in itertools.pairwise(names)]
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", DEFAULT_OPSET)], ir_version=8)
    chain = session(model.SerializeToString(), 1)
    x = np.ones(1, np.float32)
    samples = time_blocks({"chain": lambda: chain.run(None, {"x": x})}, blocks=3, seconds=0.3)["chain"]
    return float(np.median(samples)) / n_nodes


def multiply_adds_per_us(n: int = 512) -> float:
    """Return the rate of a large float32 matrix product in ONNX Runtime on one thread."""
    helper = onnx.helper
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [n, n]) for name in ("a", "c")]
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((n, n)).astype(np.float32), "b")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", info[:1], info[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", DEFAULT_OPSET)], ir_version=8)
    product = session(model.SerializeToString(), 1)
    a = np.random.default_rng(1).standard_normal((n, n)).astype(np.float32)
    samples = time_blocks({"product": lambda: product.run(None, {"a": a})}, blocks=3, seconds=0.3)["product"]
    return n**3 / float(np.median(samples))


def summary(samples: list[float]) -> dict[str, float]:
    values = np.array(samples)
    rng = np.random.default_rng(0)
    medians = [float(np.median(rng.choice(values, len(values)))) for _ in range(200)]
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "n": len(values),
        "p50": float(np.median(values)),
        "p50_low": float(low),
        "p50_high": float(high),
        "p95": float(np.percentile(values, 95)),
        "p99": float(np.percentile(values, 99)),
    }


def measure_export() -> dict[str, float]:
    """Export Contextual with parity in a process of its own; return seconds and peak memory in MiB."""
    code = (
        "import resource, sys\nfrom sjepa_deploy.cli import run_command\nfrom sjepa_deploy.cli.export import export\n"
        "status = run_command(export, 'sjepa-export', sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)\nsys.exit(status)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-c", code, "--variant", "contextual", "--out", f"{folder}/bundle"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": float(done.stderr.split()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    random.seed(0)
    result: dict[str, Any] = {"machine": describe_machine(), "export_contextual": measure_export()}
    result["node_cost_us"] = node_cost = node_cost_us()
    result["multiply_adds_per_us"] = rate = multiply_adds_per_us()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in VARIANTS:
            spec = spec_of(variant)
            plain_export(spec, folder / "plain.onnx")
            onnx.save(to_onnx(rewrite(build_model(spec, seed=0))), folder / "ours.onnx")
            window = np.random.default_rng(2).standard_normal((1, *spec.input_shape)).astype(np.float32) * 20
            for n_threads in (1, 2):
                calls, nodes, outputs = {}, {}, {}
                for graph in ("plain", "ours"):
                    opened = session(folder / f"{graph}.onnx", n_threads, folder / "optimized.onnx")
                    nodes[graph] = len(onnx.load(folder / "optimized.onnx").graph.node)
                    outputs[graph] = opened.run(None, {"eeg": window})[0]
                    calls[graph] = lambda opened=opened, window=window: opened.run(None, {"eeg": window})
                assert np.allclose(outputs["plain"], outputs["ours"], rtol=0, atol=1e-5), outputs
                samples = time_blocks(calls, args.blocks, args.seconds)
                for graph, values in samples.items():
                    calls_us = nodes[graph] * node_cost
                    arithmetic_us = MULTIPLY_ADDS[variant] / rate / n_threads
                    row = {"variant": variant, "graph": graph, "threads": n_threads, "optimized_nodes": nodes[graph]}
                    row |= summary(values) | {"calls_us": calls_us, "arithmetic_us": arithmetic_us}
                    rows.append(row)
                rows[-1]["speedup"] = float(np.median(samples["plain"]) / np.median(samples["ours"]))
    result["rows"] = rows
    write_result(args.out, result, table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| variant | threads | graph | nodes run | p50 us (95 % CI) | p99 us | calls us | arithmetic us | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["rows"]:
        speedup = f"{r['speedup']:.2f}" if "speedup" in r else ""
        lines.append(
            f"| {r['variant']} | {r['threads']} | {r['graph']} | {r['optimized_nodes']} "
            f"| {r['p50']:.1f} ({r['p50_low']:.1f} to {r['p50_high']:.1f}) | {r['p99']:.1f} "
            f"| {r['calls_us']:.1f} | {r['arithmetic_us']:.1f} | {speedup} |"
        )
    export = result["export_contextual"]
    lines += [
        "",
        f"A node that does nothing costs {result['node_cost_us']:.2f} us; one thread does {result['multiply_adds_per_us']:.0f} "
        "multiply-adds a microsecond in a 512 x 512 x 512 product. `calls us` is nodes run times the first, `arithmetic us` the "
        "multiply-adds of the network as published over the second: what is larger bounds the graph from below. The rewrites "
        "also compute fewer time steps (PostLocal, Contextual's trunk), so our arithmetic is less than stated.",
        "",
        f"`sjepa-export --variant contextual` with parity of three precisions: {export['seconds']:.1f} s, "
        f"{export['peak_mib']:.0f} MiB at most.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
