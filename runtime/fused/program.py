"""Makes the program of one model for the fused kernels: sizes as macros, source, weights and buffers."""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.fused.weights import Weights, pack
from sjepa_deploy.spec import ModelSpec, RunPrecision

HERE = Path(__file__).parent
CLUSTER_CAPABILITY = 90
"""Compute capability, times 10, of the first GPUs whose blocks read each other's shared memory."""

FEED_FORWARD = 2048
"""Hidden units of a layer, PyTorch's default, which all SignalJEPA models have."""

SLICES = 16
"""Parts of the hidden units of a layer, each computed by a block."""

LARGEST_GROUP = 40
"""Tokens that a block takes through the feed-forward product at a time: 5 tiles of 8."""

LINE = 32
"""Float32 numbers in a line of memory: new samples of two channels share none (`apart` in runtime/fused/encoder.cuh)."""

IDLE_MS = 2000
"""A kernel that stays ends by itself after so many milliseconds without a call."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Says how work is spread over a GPU.

    Attributes
    ----------
    n_multiprocessors : int
        Multiprocessors of the GPU.
    threads : int
        Threads of a block.
    blocks : int
        PreLocal: blocks that share the channels of a window.
    cluster : bool
        PreLocal: whether these blocks exchange sums in their shared memory (compute capability 9.0 and later) and not in L2.
    encoder_in_shared, qkv_in_shared : bool
        Whether these weights are fetched into shared memory before they are needed; of query, key and value the first layer's.
    key_values : int
        Contextual: at most so many numbers of keys does a thread hold at a time, as registers allow.
    profile : bool
        Whether each block records the times of its phases (benchmarks/gpu_fused.py).
    """

    n_multiprocessors: int
    threads: int = 256
    blocks: int = 8
    cluster: bool = True
    encoder_in_shared: bool = True
    qkv_in_shared: bool = True
    key_values: int = 40
    profile: bool = False


@dataclass(frozen=True, kw_only=True)
class Program:
    """Holds everything that is compiled, uploaded and launched for one model.

    Attributes
    ----------
    name : str
        Name of the kernel.
    source : str
        CUDA C++: sizes as macros, runtime/fused/device.cuh, runtime/fused/encoder.cuh, the kernel.
    weights : array of float32
        All weights in one buffer.
    buffers : tuple of (str, int)
        Scratch buffers in the order of the kernel's arguments: name, and number of float32 values for one window.
    marks : bool
        Whether the kernel can write the call's number beside its outputs.
    cooperative : bool
        Whether all blocks must be resident at once.
    cluster : int
        Blocks of a cluster.
    blocks : int or None
        Blocks for each window; None: as many as the GPU holds at once.
    items : int
        Channels or tokens of a window: more blocks have nothing to do.
    least_blocks : int
        How many blocks must be resident at once.
    rolls : bool
        Whether the input holds only the newest samples of a stream's window. The kernel has kept the other samples.
    """

    name: str
    source: str
    weights: NDArray[np.float32]
    buffers: tuple[tuple[str, int], ...]
    marks: bool
    cooperative: bool
    cluster: int
    blocks: int | None
    items: int
    least_blocks: int
    rolls: bool = False

    def rolling(self) -> Program:
        """Return the program of the same model that takes the newest samples of a stream.

        A branch in the usual program would take registers from every call, so rolling has a program of its own.
        """
        return dataclasses.replace(self, source=f"#define ROLLS 1\n#define LINE {LINE}\n{self.source}", rolls=True)

    def grid(self, batch: int, blocks_at_once: int) -> int:
        """Return how many blocks run `batch` windows on a GPU that holds `blocks_at_once`."""
        if self.blocks is not None:
            return self.blocks * batch
        return max(min(blocks_at_once, self.items * batch), self.least_blocks)

    def arguments(self) -> type[ctypes.Structure]:
        """Return the type of the kernel's argument."""
        pointers = ["input", "output", "weights", *(name for name, _ in self.buffers)]
        fields = [(name, ctypes.c_void_p) for name in [*pointers, "request", "marked", "counters", "report"]]
        numbers = [(name, ctypes.c_uint) for name in ("last", "residency", "batch")]
        stream = [("fresh", ctypes.c_uint), ("history", ctypes.c_void_p)] if self.rolls else []
        return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, *numbers, *stream]})


THREADS = {"prelocal": 1024, "postlocal": 512, "contextual": 256, "base": 256}
"""Threads of a block: the fastest measured numbers (benchmarks/results/gpu_fused_*)."""


def best_layout(spec: ModelSpec, precision: RunPrecision, n_multiprocessors: int, architecture: int) -> Layout:
    """Return the fastest layout of a model on a GPU of compute capability `architecture` (times 10)."""
    recent = architecture >= CLUSTER_CAPABILITY
    threads, key_values = THREADS[spec.variant], 40 if recent else 16
    return Layout(n_multiprocessors=n_multiprocessors, threads=threads, cluster=recent, key_values=key_values)


def refuse_spec(spec: ModelSpec, precision: RunPrecision) -> None:
    """Raise an error if the kernels cannot compute a model.

    Raises
    ------
    BackendError
        If the kernels cannot compute the model. The message gives the reason.
    """
    encoder = spec.encoder
    if precision not in (("fp32", "tf32", "fp16") if spec.needs_positions else ("fp32",)):
        why = "tf32 and fp16 for the transformer's feed-forward alone" if precision != "bf16" else "no bf16"
        raise BackendError(f"The fused kernels have {why}.", "Use --precision fp32, or another backend.")
    if any(kernel != stride for _, kernel, stride in encoder.conv_layers[1:]):
        raise _unlike("convolutions after the first whose stride is not their kernel")
    if not spec.needs_positions:
        return
    if encoder.emb_dim % 16 or encoder.emb_dim > 128:
        raise _unlike(f"an embedding of {encoder.emb_dim}; they take multiples of 16 up to 128")
    if encoder.emb_dim // encoder.n_heads > 64:
        raise _unlike(f"heads of {encoder.emb_dim // encoder.n_heads}; they take up to 64")


def _unlike(what: str) -> BackendError:
    return BackendError(f"The fused kernels do not take {what}.", "Use another backend.")


def make_program(spec: ModelSpec, weights: Weights, precision: RunPrecision, max_batch: int, layout: Layout) -> Program:
    """Return the program of a model.

    Raises
    ------
    BackendError
        If the kernels cannot compute the model.
    """
    refuse_spec(spec, precision)
    encoder = spec.encoder
    half = precision == "fp16"
    slices = SLICES
    packed, layer = pack(spec, weights, half=half, slices=slices)
    steps = encoder.n_outputs_of_layers(spec.n_times)
    cluster = layout.blocks if layout.cluster and spec.variant == "prelocal" else 1
    macros: dict[str, object] = {
        "THREADS": layout.threads,
        "PROFILE": int(layout.profile),
        "CLUSTER": cluster,
        "BLOCKS": layout.blocks,
        "N_CHANS": spec.n_chans,
        "N_TIMES": spec.n_times,
        "N_TOKENS": spec.n_tokens_per_channel,
        "N_OUTPUTS": spec.n_outputs,
        "FILTERS": spec.n_spat_filters,
        "EMB": encoder.emb_dim,
        "MAX_BATCH": max_batch,
        "IDLE_MS": IDLE_MS,
        "N_CONVS": len(encoder.conv_layers),
        "CONV_DIMS": ", ".join(str(dim) for dim, _, _ in encoder.conv_layers),
        "CONV_KERNELS": ", ".join(str(kernel) for _, kernel, _ in encoder.conv_layers),
        "CONV_STEPS": ", ".join(map(str, needed_steps(spec))),
        "FIRST_STEPS": steps[0],
        "FIRST_STRIDE": encoder.conv_layers[0][2],
        "ENCODER_IN_SHARED": int(layout.encoder_in_shared),
        "ENCODER_FLOATS": packed.sizes["ENCODER"],
    }
    macros |= {f"AT_{name}": at for name, at in packed.offsets.items()}
    window, n_tokens = spec.n_outputs, spec.n_chans * spec.n_tokens_per_channel
    blocks, items = None, spec.n_chans
    if spec.variant == "prelocal":
        buffers = [("sums", layout.blocks * spec.n_spat_filters * spec.n_times)]
        blocks = layout.blocks
    elif spec.variant == "postlocal":
        buffers = [("shares", 2 * spec.n_chans * spec.n_outputs)]
    else:
        assert layer is not None
        group = min(LARGEST_GROUP, -(-n_tokens // max(1, layout.n_multiprocessors // slices)))
        macros |= {f"AT_{name}": at for name, at in layer.offsets.items()}
        macros |= {
            "LAYERS": encoder.n_layers,
            "LAYER_FLOATS": layer.size,
            "HEADS": encoder.n_heads,
            "FEED_FORWARD": FEED_FORWARD,
            "SLICES": slices,
            "GROUP": group,
            "HALF": int(half),
            "TENSOR_FLOAT": int(precision == "tf32"),
            "QKV_IN_SHARED": int(layout.qkv_in_shared),
            "MOST_KEYS": max(1, layout.key_values // (encoder.emb_dim // encoder.n_heads)),
            "BASE": int(spec.variant == "base"),
        }
        macros = {"AT_HEAD": 0, "AT_BIAS": 0} | macros
        rows = n_tokens * encoder.emb_dim
        per = 6 if half else 4  # numbers that 16 bytes hold with their mark
        units = 4 * n_tokens * -(-encoder.emb_dim // per)
        pairs = 4 * n_tokens * encoder.n_heads * -(-2 * (encoder.emb_dim // encoder.n_heads) // per)
        buffers = [("tokens", 2 * rows), ("residual", rows), ("attended", units), ("query", 2 * rows), ("key_value", 2 * pairs)]
        buffers += [("shares", 2 * slices * rows), ("head_shares", 2 * n_tokens * window)]
        items = n_tokens
    if layout.profile:
        macros["MARKS"] = 6 if not spec.needs_positions else 2 + 8 * encoder.n_layers
        buffers.append(("profile", 2 * int(str(macros["MARKS"])) * max(layout.n_multiprocessors, items, layout.blocks)))
    name = "contextual" if spec.needs_positions else spec.variant
    code = [f"#define {key} {value}" for key, value in macros.items()]
    code += [(HERE / file).read_text() for file in ("device.cuh", "block.cuh", "encoder.cuh", f"{name}.cu")]
    return Program(
        name=name,
        source="\n".join(code),
        weights=packed.words(),
        buffers=tuple(buffers),
        marks=spec.variant != "base",
        cooperative=spec.variant != "prelocal",
        cluster=cluster,
        blocks=blocks,
        items=items,
        least_blocks=slices if spec.needs_positions else 1,
    )


def needed_steps(spec: ModelSpec) -> list[int]:
    """Return the time steps of each convolution that reach a token."""
    steps = [spec.n_tokens_per_channel]
    for _, kernel, _ in reversed(spec.encoder.conv_layers[1:]):
        steps.append(steps[-1] * kernel)
    return steps[::-1]
