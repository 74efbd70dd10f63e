"""Makes the program that runs many windows of one model at a time: sizes as macros, source and weights.

The kernels are `contextual_batch.cu` and `local_batch.cu`. `tensor.cuh` says which numbers a lane of a warp holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.fused.program import FEED_FORWARD, HERE, needed_steps
from sjepa_deploy.runtime.fused.weights import Array, Packed, Weights, encoder_weights, head_weights, position_encoding
from sjepa_deploy.spec import ModelSpec, RunPrecision

THREADS = 256
UNITS = 128
"""Shared memory holds the weights of so many hidden units at a time."""

SCALE = 1024.0
"""Factor of the weights where a number is the sum of two halves. It keeps the lower half from being subnormal."""

LARGEST_HALF = 65504.0
TRUNK_BYTES = 100 * 1024
"""Shared memory in bytes of a block without a transformer. Two such blocks fit a multiprocessor."""

MOST_OUTPUTS = 4
"""Each thread of PreLocal's and PostLocal's kernel keeps its share of at most so many outputs in registers."""

MOST_TILES = 17
"""A warp's registers hold the keys and values of at most so many tiles of 16 tokens of a window."""


@dataclass(frozen=True, kw_only=True)
class BatchProgram:
    """Holds everything that is compiled, uploaded and launched for batches of one model.

    Attributes
    ----------
    name : str
        Name of the kernel.
    source : str
        CUDA C++.
    weights : array of float32
        All weights in one buffer.
    threads, windows : int
        Threads and windows of a block.
    marks : int
        Number of times that a block records when it is profiled (benchmarks/gpu_batches.py).
    """

    name: str
    source: str
    weights: NDArray[np.float32]
    threads: int
    windows: int
    marks: int


def refuse_batches(spec: ModelSpec) -> None:
    """Raise an error if the kernels of many windows cannot compute a model.

    Raises
    ------
    BackendError
        If these kernels cannot compute the model. The message gives the reason.
    """
    encoder = spec.encoder
    (first, _, _), *rest = encoder.conv_layers
    if not rest or any(kernel != stride for _, kernel, stride in rest):
        raise _unlike("convolutions after the first whose stride is not their kernel")
    inputs = [dim * kernel for (dim, _, _), (_, kernel, _) in zip(encoder.conv_layers, rest, strict=False)]
    if first % 8 or any(dim % 16 for dim, _, _ in rest) or any(n % 16 for n in inputs):
        dims = [dim for dim, _, _ in encoder.conv_layers]
        raise _unlike(f"convolutions of {dims} outputs; they take multiples of 16, first of 8")
    if not spec.needs_positions:
        if spec.n_outputs > MOST_OUTPUTS:
            raise _unlike(f"{spec.n_outputs} outputs; those of PreLocal and PostLocal take up to {MOST_OUTPUTS}")
        return
    if encoder.emb_dim not in (32, 64) or encoder.emb_dim // encoder.n_heads != 8:
        raise _unlike(f"an embedding of {encoder.emb_dim} with {encoder.n_heads} heads; they take 32 or 64, in heads of 8")
    if (n_tokens := spec.n_chans * spec.n_tokens_per_channel) > 16 * MOST_TILES:
        raise _unlike(f"windows of {n_tokens} tokens; they take up to {16 * MOST_TILES}")


def _unlike(what: str) -> BackendError:
    return BackendError(f"The kernels for batches do not take {what}.", "Use those of one window.")


def make_batch_program(spec: ModelSpec, weights: Weights, precision: RunPrecision, *, profile: bool = False) -> BatchProgram:
    """Return the program of a model.

    In fp32 and tf32 a number is the sum of two halves, and products are as exact as float32.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    weights : dict of str to array
        Checkpoint of the model.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Type of all products except the products of the first convolution.
    profile : bool
        Whether each block records the times of its phases.

    Raises
    ------
    BackendError
        If the kernel cannot compute the model.
    """
    refuse_batches(spec)
    split = precision in ("fp32", "tf32")
    if precision != "bf16":
        _refuse_range(spec, weights, scale=SCALE if split else 1.0)
    encoder, n_pieces = spec.encoder, 1 + split
    packed, layer = _pack(spec, weights, split=split, bfloat=precision == "bf16")
    macros: dict[str, object] = {
        "THREADS": THREADS,
        "PROFILE": int(profile),
        "CLUSTER": 1,
        "BFLOAT": int(precision == "bf16"),
        "PIECES": n_pieces,
        "SCALE": f"{SCALE if split else 1.0}f",
        "PRELOCAL": int(spec.variant == "prelocal"),
        "N_CHANS": spec.n_chans,
        "SIGNALS": spec.n_spat_filters if spec.variant == "prelocal" else spec.n_chans,
        "N_TIMES": spec.n_times,
        "N_TOKENS": spec.n_tokens_per_channel,
        "N_OUTPUTS": spec.n_outputs,
        "EMB": encoder.emb_dim,
        "N_CONVS": len(encoder.conv_layers),
        "CONV_DIMS": ", ".join(str(dim) for dim, _, _ in encoder.conv_layers),
        "CONV_KERNELS": ", ".join(str(kernel) for _, kernel, _ in encoder.conv_layers),
        "CONV_STEPS": ", ".join(map(str, needed_steps(spec))),
        "FIRST_STEPS": encoder.n_outputs_of_layers(spec.n_times)[0],
        "FIRST_STRIDE": encoder.conv_layers[0][2],
        "AT_HEAD": 0,
        "AT_BIAS": 0,
    }
    macros |= {f"AT_{name}": at for name, at in packed.offsets.items()}
    windows, marks = 1, 3
    if layer is None:
        macros |= {"TRUNK_BYTES": TRUNK_BYTES, "RESIDENT": 2}
    else:
        tiles = -(-spec.n_chans * spec.n_tokens_per_channel // 16)
        windows = max(1, 8 // tiles)
        slots = 2 if split else 3
        slot_bytes = n_pieces * 4 * UNITS * encoder.emb_dim + 4 * UNITS
        mixed_bytes = n_pieces * windows * tiles * 16 * (2 * encoder.emb_dim + 16)
        marks = 2 * encoder.n_layers + 3
        macros |= {f"AT_{name}": at for name, at in layer.offsets.items()}
        macros |= {
            "TRUNK_BYTES": slots * slot_bytes + mixed_bytes,
            "HEADS": encoder.n_heads,
            "LAYERS": encoder.n_layers,
            "LAYER_FLOATS": layer.size,
            "FEED_FORWARD": FEED_FORWARD,
            "WINDOWS": windows,
            "OWN": 1 if split or windows * tiles <= 4 else 2,
            "SLOTS": slots,
            "BASE": int(spec.variant == "base"),
        }
    macros["MARKS"] = marks
    name = "local_batch" if layer is None else "contextual_batch"
    code = [f"#define {key} {value}" for key, value in macros.items()]
    files = ("device.cuh", "block.cuh", "tensor.cuh", "trunk.cuh", "head.cuh", f"{name}.cu")
    code += [(HERE / file).read_text() for file in files]
    return BatchProgram(name=name, source="\n".join(code), weights=packed.words(), threads=THREADS, windows=windows, marks=marks)


# ---- weights --------------------------------------------------------------------------------------------------------------


def _pack(spec: ModelSpec, weights: Weights, *, split: bool, bfloat: bool) -> tuple[Packed, Packed | None]:
    """Return all weights in the order of the kernel, and the first transformer layer, for the offsets in a layer."""

    def operands(weight: Array) -> NDArray[np.uint16]:
        return _operands(weight, split=split, bfloat=bfloat)

    first, scale, shift, *convolutions = encoder_weights(spec.encoder, weights)
    packed = Packed()
    packed.add("FIRST", first, scale, shift)
    packed.add("CONVS", *(_in_pairs_of_outputs(operands(c.reshape(-1, c.shape[-1]).T)) for c in convolutions))
    if spec.variant == "prelocal":
        packed.add("FILTERS", weights["spatial_conv.1.weight"].reshape(spec.n_spat_filters, spec.n_chans))
        packed.add("HEAD", weights["final_layer.1.weight"])
        packed.add("BIAS", weights["final_layer.1.bias"])
        return packed, None
    layers = []
    if spec.needs_positions:
        packed.add("POSITIONS", position_encoding(spec, weights))
    for i in range(spec.encoder.n_layers if spec.needs_positions else 0):
        prefix = f"transformer.encoder.layers.{i}."
        w = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        query, key, value = np.split(w["self_attn.in_proj_weight"], 3)
        query_bias, _, value_bias = np.split(w["self_attn.in_proj_bias"], 3)
        factor = math.log2(math.e) / math.sqrt(len(query) // spec.encoder.n_heads)
        of_sums = SCALE if split else 1.0  # what is added to a product of scaled weights
        out = w["self_attn.out_proj.weight"]
        layer = Packed()
        layer.add("QKV", _in_pairs_of_inputs(operands(np.concatenate([query * factor, key, value]))))
        layer.add("QUERY_BIAS", query_bias * factor * of_sums)
        layer.add("OUT", _in_pairs_of_inputs(operands(out)))
        into = _in_pairs_of_inputs(operands(w["linear1.weight"])).reshape(FEED_FORWARD // UNITS, UNITS // 16, -1)
        outof = _in_pairs_of_outputs(operands(w["linear2.weight"])).swapaxes(0, 1).reshape(FEED_FORWARD // UNITS, UNITS // 16, -1)
        biases = np.float32(w["linear1.bias"] * of_sums).view(np.uint16).reshape(FEED_FORWARD // UNITS, -1)
        stages = np.concatenate([into, outof], axis=2).reshape(FEED_FORWARD // UNITS, -1)
        layer.add("STAGES", np.concatenate([stages, biases], axis=1))
        out_bias = (w["self_attn.out_proj.bias"] + out @ value_bias) * of_sums
        vectors = [out_bias, w["norm1.weight"], w["norm1.bias"], w["linear2.bias"], w["norm2.weight"], w["norm2.bias"]]
        layer.add("VECTORS", *vectors)
        layers.append(layer)
    folded = spec.variant != "base"  # the last normalisation's scale and shift, into the head
    if spec.needs_positions:
        packed.add("LAYERS", *(layer.words() for layer in layers))
        scale, shift = weights["transformer.encoder.norm.weight"], weights["transformer.encoder.norm.bias"]
        packed.add("NORM", np.ones_like(scale) if folded else scale, np.zeros_like(shift) if folded else shift)
    if folded:
        head, bias = head_weights(spec, weights)
        packed.add("HEAD", head)
        packed.add("BIAS", bias)
    return packed, layers[0] if layers else None


def _operands(weight: Array, *, split: bool, bfloat: bool) -> NDArray[np.uint16]:
    """Return a weight (outputs, inputs) as operands B of mma.m16n8k16, shape (outputs / 8, inputs / 16, pieces, 8, 4, 2, 2).

    Of 8 outputs and 16 inputs lane 4 g + t holds output g at inputs 2 t, 2 t + 1, then 2 t + 8, 2 t + 9.
    """
    if split:
        upper = (weight * SCALE).astype(np.float16)
        pieces = np.stack([upper, (weight * SCALE - upper).astype(np.float16)]).view(np.uint16)
    elif bfloat:
        bits = weight.astype(np.float32).view(np.uint32)
        pieces = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)[None]  # to nearest, ties to even
    else:
        pieces = weight.astype(np.float16).view(np.uint16)[None]
    n_pieces, n_outputs, n_inputs = pieces.shape
    parts = pieces.reshape(n_pieces, n_outputs // 8, 8, n_inputs // 16, 2, 4, 2)  # (p, output tile, g, input tile, b, t, pair)
    return parts.transpose(1, 3, 0, 2, 5, 4, 6)


def _in_pairs_of_inputs(operands: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Put the operands of two neighbouring tiles of inputs side by side in each lane."""
    n, k, p = operands.shape[:3]
    return operands.reshape(n, k // 2, 2, p, 8, 4, 2, 2).transpose(0, 1, 3, 4, 5, 2, 6, 7)


def _in_pairs_of_outputs(operands: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Put the operands of two neighbouring tiles of outputs side by side in each lane."""
    n, k, p = operands.shape[:3]
    return operands.reshape(n // 2, 2, k, p, 8, 4, 2, 2).transpose(0, 2, 3, 4, 5, 1, 6, 7)


def _refuse_range(spec: ModelSpec, weights: Weights, scale: float) -> None:
    """Raise an error if, for any window, a weight or a sum may leave the range of float16.

    The function carries an upper bound of a vector's length from layer to layer. A normalisation of n values gives at most the
    largest scale times sqrt(n), plus the length of the shift. A convolution whose stride equals its kernel gives at most its
    largest singular value times the length of its input. GELU makes no vector longer.
    """
    largest = 0.0

    def product(weight: Array, length: float, bias: Array | float = 0.0) -> None:
        nonlocal largest
        largest = max(
            largest,
            float((np.linalg.norm(weight, axis=1) * length + np.abs(bias)).max()),
            float(np.abs(weight).max()) * scale,
        )

    encoder = spec.encoder
    _, norm_scale, norm_shift, *convolutions = encoder_weights(encoder, weights)
    steps = encoder.n_outputs_of_layers(spec.n_times)[0]
    length = math.sqrt(steps) * float(np.linalg.norm(norm_scale) + np.linalg.norm(norm_shift))  # of all steps and dimensions
    for weight in convolutions:
        matrix = weight.reshape(-1, weight.shape[-1]).T
        product(matrix, length)
        length *= float(np.linalg.norm(matrix, 2))
    if spec.needs_positions:
        length += float(np.linalg.norm(position_encoding(spec, weights), axis=-1).max())
    for i in range(encoder.n_layers if spec.needs_positions else 0):
        w = {name: weights[f"transformer.encoder.layers.{i}.{name}"] for name in _BOUNDED}
        for part, bias in zip(np.split(w["self_attn.in_proj_weight"], 3), np.split(w["self_attn.in_proj_bias"], 3), strict=True):
            product(part, length, bias)
        product(w["self_attn.out_proj.weight"], 0.0)
        product(w["linear2.weight"], 0.0)
        length = float(np.abs(w["norm1.weight"]).max()) * math.sqrt(encoder.emb_dim) + float(np.linalg.norm(w["norm1.bias"]))
        product(w["linear1.weight"], length, w["linear1.bias"])
        length = float(np.abs(w["norm2.weight"]).max()) * math.sqrt(encoder.emb_dim) + float(np.linalg.norm(w["norm2.bias"]))
    if not largest <= LARGEST_HALF:
        raise BackendError(
            f"A number of this model may reach {largest:.2g}, beyond float16, in which the kernels for batches multiply.",
            "Use those of one window.",
        )


_BOUNDED = (
    "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "linear1.weight", "linear1.bias",
    "linear2.weight", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
)  # fmt: skip
