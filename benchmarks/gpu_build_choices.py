"""What the choices of a TensorRT build give on one NVIDIA GPU: types of the layers, parity, latency at batch 1.

    python benchmarks/gpu_build_choices.py BUNDLES OUT [--only prelocal:fp16,...] [--deadline 150] [--flavour tensorrt-rtx]

BUNDLES holds one bundle a folder (`benchmarks/pack_bundles.py` makes them on any machine). Every graph has a process of its own,
and OUT/choices.json is written after each choice: a build that ends its process or outlasts its time loses that choice alone.
OUT/layers.json has what the engine inspector says. Nothing is written into the bundles. Choices marked `otherwise` are tried only
where no choice before them gave an engine that computes in the precision and equals PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu_engines import timed

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.export.to_tensorrt import default_settings
from sjepa_deploy.parity import check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_judge import engine_batch_sizes
from sjepa_deploy.runtime.backends.engine_precision import judge_types, stored_weights, summarise_layers, weight_samples
from sjepa_deploy.runtime.backends.engine_runner import EngineRunner
from sjepa_deploy.runtime.backends.engines import BuildSettings
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT, graph_types
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import RunPrecision

MOVES = frozenset({"SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "SELECT"})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to build.

    Attributes
    ----------
    name : str
        For people.
    settings : dict
        Fields of `BuildSettings`.
    obey : bool
        Whether types that are asked for must be given, or the build fails (8.6).
    moves : bool
        Whether layers that only move values are asked for the graph's type too (8.6).
    own_tactics : bool
        Whether the convolutions that TensorRT brings itself are allowed, besides no tactic source at all (8.6).
    aux_streams : int or None
        Streams beside the main one; None for TensorRT's choice.
    graph : {"fp32"} or None
        The graph that is built, if not that of the precision: without casts, so that TensorRT may choose the types (8.6).
    free_transformer : bool
        Whether the layers of the transformer are asked for no type (8.6).
    otherwise : bool
        Whether it is only of interest where the choices before failed.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    obey: bool = False
    moves: bool = False
    own_tactics: bool = False
    aux_streams: int | None = None
    graph: RunPrecision | None = None
    free_transformer: bool = False
    otherwise: bool = False


DEFAULT = Choice(name="default")
HALF = (
    Choice(name="types of the graph preferred"),
    Choice(name="float32 held, the rest free", settings={"held_types": "float32"}),
    Choice(name="types of the graph preferred, moves too", moves=True, otherwise=True),
    Choice(name="float32 held, moves too, the rest free", settings={"held_types": "float32"}, moves=True, otherwise=True),
    Choice(name="types of the graph obeyed", obey=True, otherwise=True),
    Choice(name="all types free", settings={"held_types": "none"}, otherwise=True),
)
FAST = (
    DEFAULT,
    Choice(name="batch 1 alone", settings={"max_batch": 1}),
    Choice(name="one stream", aux_streams=0),
    Choice(name="own convolutions", own_tactics=True),
    Choice(name="level 5", settings={"optimization_level": 5}),
    Choice(name="batch 1 alone, level 5", settings={"max_batch": 1, "optimization_level": 5}),
)
HALF_TRANSFORMER = (
    HALF[0],
    Choice(name="batch 1 alone", settings={"max_batch": 1}),
    Choice(name="no casts, transformer free", graph="fp32", free_transformer=True),
    Choice(name="no casts, transformer free, batch 1 alone", settings={"max_batch": 1}, graph="fp32", free_transformer=True),
    Choice(name="no casts, all free", settings={"held_types": "none"}, graph="fp32"),
    Choice(name="level 5", settings={"optimization_level": 5}),
)
GROUPS: dict[str, tuple[Choice, ...]] = {
    "prelocal:fp16": HALF,
    "postlocal:fp16": HALF,
    "contextual:fp16": HALF_TRANSFORMER,
    "postlocal:fp32": FAST,
    "contextual:fp32": FAST,
    "prelocal:fp32": FAST,
}
SECONDS = {"prelocal": 60, "postlocal": 60, "contextual": 140}
"""How long the process of a graph may take."""


class Chosen(TensorRT):
    """TensorRT with one choice made."""

    choice = DEFAULT

    def configure(self, config: Any, network: Any, precision: RunPrecision, settings: BuildSettings) -> None:
        super().configure(config, network, precision, settings)
        trt, choice = self.module, self.choice
        if choice.own_tactics:
            sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if choice.aux_streams is not None:
            config.max_aux_streams = choice.aux_streams
        if choice.obey:
            config.clear_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if choice.moves:
            held = (trt.DataType.FLOAT,) if settings.held_types == "float32" else (trt.DataType.FLOAT, trt.DataType.HALF)
            for i, dtype in enumerate(graph_types(trt, network)):
                layer = network.get_layer(i)
                if layer.type.name in MOVES and dtype in held:
                    layer.precision = dtype
                    for k in range(layer.num_outputs):
                        layer.set_output_type(k, dtype)
        if choice.free_transformer:
            for i in range(first_of_transformer(network), network.num_layers):
                layer = network.get_layer(i)
                layer.reset_precision()
                for k in range(layer.num_outputs):
                    layer.reset_output_type(k)


def first_of_transformer(network: Any) -> int:
    """Return the index of the product that makes the first queries, keys and values: the second product before a softmax."""
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    products = [i for i, kind in enumerate(kinds[: kinds.index("SOFTMAX")]) if kind == "MATRIX_MULTIPLY"]
    return products[-2]


def try_choice(api: Chosen, bundle: Bundle, precision: RunPrecision, timings: bytes) -> tuple[dict[str, Any], str, bytes]:
    """Build as chosen, without keeping the engine. Return what came of it, the inspector's words and the timings."""
    settings = dataclasses.replace(default_settings(bundle, precision), **api.choice.settings)
    onnx = bundle.graph_path(api.choice.graph or precision).read_bytes()
    started = time.monotonic()
    built = api.build(onnx, precision, settings, timings=timings)
    result: dict[str, Any] = {"build_seconds": time.monotonic() - started, "plan_bytes": len(built.plan)}
    stored = stored_weights(built.plan, weight_samples(onnx))
    result["stored_weights"] = encode(stored)
    if api.flavour != "tensorrt":
        return result, "", built.timings
    inspected = api.inspect(api.deserialize(built.plan))
    layers = summarise_layers(inspected)
    computes_in, evidence = judge_types(layers, precision, stored)
    result |= {"layers": encode(layers), "computes_in": computes_in, "evidence": evidence}
    device = Device()
    runner = EngineRunner(api, device, [built.plan], bundle.spec, BackendOptions(wait="flag"))
    reference = bundle.reference()
    judged = check_parity(runner.run, reference, backend=api.flavour, precision=precision, sizes=engine_batch_sizes(settings))
    result["parity"] = encode(judged)
    result["not_finite"] = [
        {"window": kind, "here": bool(not np.isfinite(out).all()), "in PyTorch": bool(not np.isfinite(want).all())}
        for kind, window, want in zip(reference.kinds, reference.inputs, reference.outputs, strict=True)
        if np.isfinite(out := runner.run(window[None].copy()).copy()).all() != np.isfinite(want).all()
    ]
    buffer = runner.input_buffer(1)
    buffer[...] = reference.inputs[:1]
    result["us"] = timed(lambda: runner.run(buffer))
    runner.close()
    device.close()
    return result, inspected, built.timings


def run_group(group: str, bundles: Path, out: Path, flavour: str) -> None:
    """Try what is left of a group, one choice after another, in this process."""
    variant, _, precision = group.partition(":")
    bundle = Bundle.open(bundles / variant)
    api, timings = Chosen(flavour), b""
    choices = [c for c in GROUPS[group] if flavour == "tensorrt" or c in (DEFAULT, HALF[0])]
    for choice in choices:
        report = read(out / "choices.json")
        tried = report.setdefault(group, {})
        works = [name for name, r in tried.items() if r.get("computes_in") == precision and r["parity"]["passed"]]
        if choice.name in tried or (choice.otherwise and works):
            continue
        tried[choice.name] = {"error": "the process ended"}
        write(out / "choices.json", report)
        api.choice = choice
        try:
            tried[choice.name], inspected, timings = try_choice(api, bundle, precision, timings)  # type: ignore[arg-type]
            if inspected:
                layers = read(out / "layers.json")
                layers[f"{group} {choice.name}"] = json.loads(inspected, strict=False)
                write(out / "layers.json", layers)
        except (SjepaError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:  # the next one may work
            tried[choice.name] = {"error": f"{type(e).__name__}: {e}"}
        write(out / "choices.json", report)
        print(f"{group:16} {choice.name:42} {brief(tried[choice.name])}", flush=True)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}  # type: ignore[no-any-return]


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def brief(result: dict[str, Any]) -> str:
    if "us" not in result:
        return str(result)[:200]
    parity = result["parity"]
    return (
        f"{result['us']['median']:6.1f} us (p99 {result['us']['p99']:.1f}), built in {result['build_seconds']:.1f} s, "
        f"{result['computes_in']}, parity {'passed' if parity['passed'] else 'FAILED'} {parity['max_error']:.1e} at "
        f"{parity['worst']}, {result['evidence']}, not finite alike: {not result['not_finite']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="VARIANT:PRECISION, separated by commas, in this order")
    parser.add_argument("--deadline", type=float, default=150, help="seconds after which nothing runs any more")
    parser.add_argument("--flavour", default="tensorrt", choices=["tensorrt", "tensorrt-rtx"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    groups = arguments.only.split(",") if arguments.only else list(GROUPS)
    if arguments.here:
        run_group(groups[0], arguments.bundles, arguments.out, arguments.flavour)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.deadline
    for group in groups:
        command = [sys.executable, __file__, str(arguments.bundles), str(arguments.out), "--only", group, "--here"]
        until = min(time.monotonic() + SECONDS[group.partition(":")[0]], deadline)
        for _ in GROUPS[group]:  # what a process that ended left untried is tried by the next one
            left = until - time.monotonic()
            if left < 10:
                print(f"{group}: out of time", flush=True)
                break
            try:
                if subprocess.run([*command, "--flavour", arguments.flavour], timeout=left, check=False).returncode == 0:
                    break
            except subprocess.TimeoutExpired:
                pass  # the choice at work is recorded as such; no time is left


if __name__ == "__main__":
    main()
