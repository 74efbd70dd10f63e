"""Which planted errors does the parity gate find, and which are too small for the tolerance of a precision?

    python parity_gate.py --out results/parity_gate_2-core-cpu_2026-11-28

Every error is planted into a graph that passed its export, or into what a backend returns, and judged as an export judges.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from machine import describe_machine, write_result
from onnx import TensorProto, helper, numpy_helper

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.export.emulate import emulate_bf16
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models import build_model
from sjepa_deploy.parity import FloatArray, ParityResult, Predict, batch_sizes, check_parity
from sjepa_deploy.spec import PRECISIONS, VARIANTS, ModelSpec, Precision

N_CHANS, N_TIMES, N_OUTPUTS, MAX_BATCH = 19, 200, 3, 64
RELATIVE = 1e-3
"""Share by which a weight is altered."""

Graph = onnx.ModelProto
Edit = Callable[[Graph], None]
Spoil = Callable[[Predict, FloatArray], FloatArray]


def make_bundle(variant: str, folder: Path) -> Bundle:
    montage = read_montage("sjepa-62")
    names = montage.ch_names[:N_CHANS]
    spec = ModelSpec.of(
        variant=variant, n_chans=N_CHANS, n_times=N_TIMES, sfreq=100.0, n_outputs=N_OUTPUTS,
        ch_names=names, positions=montage.pick(names).positions,
    )  # fmt: skip
    random = Provenance(source="random", format="initialisation", seed=0)
    return to_bundle(build_model(spec, seed=0), folder, weights=random, max_batch=MAX_BATCH)


def predictor(proto: Graph, precision: Precision, name: str) -> Predict:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    if precision == "bf16":
        proto = emulate_bf16(proto)
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would drop the rounding
    session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda eeg: session.run(None, {name: eeg})[0]


# Errors in a graph


def initializers(proto: Graph) -> dict[str, TensorProto]:
    """Return the floating-point constants of a graph by name."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return {i.name: i for i in proto.graph.initializer if i.data_type in kinds and np.prod(i.dims) > 0}


def altered(name: str, change: Callable[[np.ndarray], None]) -> Edit:
    def edit(proto: Graph) -> None:
        tensor = initializers(proto)[name]
        values = numpy_helper.to_array(tensor).astype(np.float32)
        change(values)
        tensor.CopyFrom(helper.make_tensor(name, tensor.data_type, tensor.dims, values.ravel().tolist()))

    return edit


def largest_element(values: np.ndarray) -> None:
    values.flat[np.abs(values).argmax()] *= 1 + RELATIVE


def all_elements(values: np.ndarray) -> None:
    values *= 1 + RELATIVE


def zeros(values: np.ndarray) -> None:
    values *= 0


def swap_two_channels(proto: Graph) -> None:
    order = np.arange(N_CHANS)
    order[:2] = 1, 0
    name = proto.graph.input[0].name
    for node in proto.graph.node:
        node.input[:] = ["swapped" if each == name else each for each in node.input]
    proto.graph.initializer.append(numpy_helper.from_array(order, "order"))
    proto.graph.node.insert(0, helper.make_node("Gather", [name, "order"], ["swapped"], axis=1))


def epsilon(value: float) -> Edit:
    """Set epsilon of every norm, be it an attribute or a constant of 1e-5."""

    def edit(proto: Graph) -> None:
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = value
        for tensor in initializers(proto).values():
            values = numpy_helper.to_array(tensor).astype(np.float32)
            if values.size == 1 and abs(values.item() - 1e-5) < 1e-8:
                tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, [value]))

    return edit


def tanh_gelu(proto: Graph) -> None:
    """Put tanh(sqrt(2/pi) (x + 0.044715 x^3)) in place of erf(x / sqrt(2))."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    first, nodes = 2 / np.sqrt(np.pi), []
    for node in proto.graph.node:
        if node.op_type != "Erf":
            nodes.append(node)
            continue
        (z,), (out,) = node.input, node.output
        for name, value in (("first", first), ("third", first * 0.044715 * 2)):
            proto.graph.initializer.append(helper.make_tensor(f"{out}_{name}", kinds[z], [], [value]))
        steps = [("square", "Mul", z, z), ("cube", "Mul", f"{out}_square", z), ("a", "Mul", f"{out}_cube", f"{out}_third")]
        steps += [("b", "Mul", z, f"{out}_first"), ("c", "Add", f"{out}_a", f"{out}_b")]
        nodes += [helper.make_node(step, [left, right], [f"{out}_{name}"]) for name, step, left, right in steps]
        nodes.append(helper.make_node("Tanh", [f"{out}_c"], [out]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


# Errors of a backend, such as a kernel with tiles makes


def repeats_16_rows(run: Predict, eeg: FloatArray) -> FloatArray:
    return run(eeg)[np.arange(len(eeg)) % 16]


def a_tile_late(run: Predict, eeg: FloatArray) -> FloatArray:
    out = run(eeg)
    return np.concatenate([out[:16], out[:-16]]) if len(out) > 16 else out


def last_of_a_full_batch(change: Callable[[np.ndarray], object]) -> Spoil:
    def spoil(run: Predict, eeg: FloatArray) -> FloatArray:
        out = run(eeg).copy()
        if len(out) == MAX_BATCH:
            out[-1] = change(out)
        return out

    return spoil


def batches_in_between(run: Predict, eeg: FloatArray) -> FloatArray:
    return run(eeg) if len(eeg) in (1, 2, 3, MAX_BATCH) else 0 * run(eeg)


def a_row_leaks(share: float) -> Spoil:
    def spoil(run: Predict, eeg: FloatArray) -> FloatArray:
        out = run(eeg)
        return out + np.where(np.isfinite(out[:1]), np.float32(share) * out[:1], 0)

    return spoil


def ignores_the_eeg(bundle: Bundle) -> Spoil:
    mean = np.nanmean(bundle.reference().outputs, axis=0).astype(np.float32)

    def spoil(run: Predict, eeg: FloatArray) -> FloatArray:
        return np.where(np.isfinite(run(eeg)), mean, np.nan)

    return spoil


def hides_nan(run: Predict, eeg: FloatArray) -> FloatArray:
    return np.nan_to_num(run(eeg))


def judge(bundle: Bundle, proto: Graph, precision: Precision, spoil: Spoil | None = None) -> ParityResult:
    run = predictor(proto, precision, bundle.spec.input_name)
    predict = run if spoil is None else lambda eeg: spoil(run, eeg)
    return check_parity(predict, bundle.reference(), backend="planted", precision=precision, sizes=batch_sizes(MAX_BATCH))


def found_in(bundle: Bundle, precision: Precision) -> dict[str, str]:
    """Return for each planted error whether it is found, or in how many constants of the graph."""
    proto = onnx.load(bundle.graph_path(precision))
    assert judge(bundle, proto, precision).passed
    found = {}

    def planted(edit: Edit) -> Graph:
        changed = copy.deepcopy(proto)
        edit(changed)
        return changed

    for what, change in (
        (f"largest weight of a tensor x {1 + RELATIVE}", largest_element),
        (f"whole tensor x {1 + RELATIVE}", all_elements),
        ("tensor of zeros", zeros),
    ):
        names = [name for name, tensor in initializers(proto).items() if numpy_helper.to_array(tensor).any()]
        n = sum(not judge(bundle, planted(altered(name, change)), precision).passed for name in names)
        found[what] = f"{n} of {len(names)}"
    edits: dict[str, Edit] = {
        "two channels swapped": swap_two_channels,
        "epsilon of the norms 0 for 1e-5": epsilon(0.0),
        "epsilon of the norms 1e-3 for 1e-5": epsilon(1e-3),
        "GELU by tanh for erf": tanh_gelu,
    }
    spoils: dict[str, Spoil] = {
        "16 rows computed and repeated": repeats_16_rows,
        "rows of the tile before": a_tile_late,
        "NaN in the last row of a full batch": last_of_a_full_batch(lambda out: np.nan),
        "last row of a full batch is the one before": last_of_a_full_batch(lambda out: out[-2]),
        "zeros at batches of 4 to 63": batches_in_between,
        "1 % of row 0 in every row": a_row_leaks(1e-2),
        "0.01 % of row 0 in every row": a_row_leaks(1e-4),
        "the EEG is ignored": ignores_the_eeg(bundle),
        "NaN is hidden": hides_nan,
    }
    for what, edit in edits.items():
        found[what] = _verdict(judge(bundle, planted(edit), precision))
    for what, spoil in spoils.items():
        found[what] = _verdict(judge(bundle, proto, precision, spoil))
    return found


def _verdict(result: ParityResult) -> str:
    if not result.passed:
        return "found"
    return f"passed: {result.max_error:.0e} of scale, {result.max_relative_to_spread:.0e} of spread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", default=",".join(VARIANTS[:3]), help="A,B,...")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in args.variants.split(","):
            bundle = make_bundle(variant, Path(folder) / variant)
            for precision in PRECISIONS:
                rows.append({"variant": variant, "precision": precision, "found": found_in(bundle, precision)})
                print(rows[-1], flush=True)
    lines = [
        f"Random models of {N_CHANS} channels x {N_TIMES} samples with {N_OUTPUTS} outputs; up to {MAX_BATCH} windows a call.",
        "",
        "| planted error | " + " | ".join(f"{row['variant']} {row['precision']}" for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
        *(f"| {what} | " + " | ".join(row["found"][what] for row in rows) + " |" for what in rows[0]["found"]),
    ]
    write_result(args.out, {"machine": describe_machine(), "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
