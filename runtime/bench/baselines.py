"""Runs the alternatives to this toolkit: PyTorch eager, compiled and as a CUDA graph, and braindecode's module.

These baselines are backends to be measured beside the toolkit's own. The baselines run the checkpoint in the bundle with
PyTorch's defaults. One of the defaults is the fast path of its transformer encoder (`torch.backends.mha`), which is not the
faster one everywhere: the baselines whose names end in "no-fast-path" switch the fast path off. Importing this module never
imports PyTorch.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BACKENDS, Backend, BackendEntry, BackendOptions, FloatArray
from sjepa_deploy.runtime.machine import n_cores
from sjepa_deploy.spec import ModelSpec, RunPrecision

if TYPE_CHECKING:
    from torch import Tensor, nn

_HERE = "sjepa_deploy.runtime.bench.baselines"

BASELINES: dict[str, BackendEntry] = {
    "torch-eager": BackendEntry(target=f"{_HERE}:TorchEager", package="torch", extra="export"),
    "torch-eager-no-fast-path": BackendEntry(target=f"{_HERE}:TorchEagerNoFastPath", package="torch", extra="export"),
    "torch-compile": BackendEntry(target=f"{_HERE}:TorchCompile", package="torch", extra="export"),
    "torch-compile-no-fast-path": BackendEntry(target=f"{_HERE}:TorchCompileNoFastPath", package="torch", extra="export"),
    "braindecode": BackendEntry(
        target=f"{_HERE}:Braindecode", package="braindecode", extra="", probe=f"{_HERE}:probe_braindecode"
    ),
    "torch-eager-cuda": BackendEntry(
        target=f"{_HERE}:TorchEagerCuda", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "torch-compile-cuda": BackendEntry(
        target=f"{_HERE}:TorchCompileCuda", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "torch-cuda-graph": BackendEntry(
        target=f"{_HERE}:TorchCudaGraph", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "torch-eager-cuda-no-fast-path": BackendEntry(
        target=f"{_HERE}:TorchEagerCudaNoFastPath", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "torch-compile-cuda-no-fast-path": BackendEntry(
        target=f"{_HERE}:TorchCompileCudaNoFastPath", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "torch-cuda-graph-no-fast-path": BackendEntry(
        target=f"{_HERE}:TorchCudaGraphNoFastPath", package="torch", extra="export", probe=f"{_HERE}:probe_cuda"
    ),
    "braindecode-cuda": BackendEntry(
        target=f"{_HERE}:BraindecodeCuda", package="braindecode", extra="", probe=f"{_HERE}:probe_braindecode_cuda"
    ),
}

ALL_BACKENDS = BACKENDS | BASELINES
"""Every backend of the toolkit, and the baselines."""

REFERENCE_BACKEND = "torch"
"""The float64 reference: slow by design, and measured only where it is asked for."""

TORCH_DTYPES: dict[RunPrecision, str] = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""PyTorch's name of the type that each precision computes in."""

NO_FAST_PATH = "-no-fast-path"
"""End of the names of baselines that switch the fast path of PyTorch's transformer off."""

COMPILATIONS = 8
"""Number of times that a function may be compiled, for instance for other batch sizes: `recompile_limit` of PyTorch."""


class TorchEager(Backend):
    """Calls the PyTorch module on the CPU.

    Attributes
    ----------
    fast_path : bool
        Whether PyTorch may run a layer of its transformer encoder as one operation.

    Raises
    ------
    BackendError
        If a precision is asked for that PyTorch does not run, or that this device has no fast kernels for. If the fast path is
        to be off for a model without a transformer.
    """

    name = "torch-eager"
    device = "cpu"
    fast_path = True
    how = "eager"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        import torch

        if precision not in TORCH_DTYPES:
            raise BackendError(f"PyTorch is not measured in {precision}.", f"Use one of {', '.join(TORCH_DTYPES)}.")
        if self.device == "cpu" and precision != "fp32":
            raise BackendError(f"PyTorch is measured in fp32 on the CPU, not in {precision}.", "Use --precision fp32.")
        if not (self.fast_path or bundle.spec.needs_positions):
            name = self.name.removesuffix(NO_FAST_PATH)
            raise BackendError("The model has no transformer, whose fast path could be off.", f"Use the backend {name}.")
        self.precision, self._spec = precision, bundle.spec
        if self.device == "cuda":
            self.device = f"cuda:{options.device}"
        self._n_threads = options.n_threads or (n_cores() if bundle.spec.needs_positions else 1)
        self._dtype: torch.dtype = getattr(torch, TORCH_DTYPES[precision])
        self.activate()
        self._model = self._load(bundle).eval().to(self.device, self._dtype)
        self._host: dict[int, Tensor] = {}
        self._forward = self._prepare()
        self.setting = self._setting()

    def _load(self, bundle: Bundle) -> nn.Module:
        from sjepa_deploy.models.checkpoint import load_model, read_checkpoint

        return load_model(read_checkpoint(bundle.checkpoint), bundle.spec)

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        """Return the function that turns windows on the device into outputs in float32."""
        return lambda eeg: self._model(eeg.to(self._dtype)).float()

    def activate(self) -> None:
        """Set PyTorch's options of the whole process: threads, the fast path, and whether TensorFloat-32 is allowed."""
        import torch

        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        if torch.get_num_threads() != self._n_threads:
            torch.set_num_threads(self._n_threads)
        if self.device != "cpu":
            allowed = self.precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    def _setting(self) -> str:
        words = [self.how]
        if self._spec.needs_positions:
            words.append(f"fast path of the transformer {'on' if self.fast_path else 'off'}")
        if self.device == "cpu":
            words.append("one thread" if self._n_threads == 1 else f"{self._n_threads} threads")
        else:
            words += [f"TensorFloat-32 {'on' if self.precision == 'tf32' else 'off'}", "windows through pinned memory"]
        return ", ".join(words)

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times)."""
        import torch

        with torch.inference_mode():
            out: FloatArray = self._forward(self._upload(eeg)).cpu().numpy()
        return out

    def _upload(self, eeg: FloatArray) -> Tensor:
        import torch

        if self.device == "cpu":
            return torch.from_numpy(eeg)
        pinned = self._host.get(len(eeg))
        if pinned is None:
            pinned = self._host[len(eeg)] = torch.empty(eeg.shape, dtype=torch.float32, pin_memory=True)
        np.copyto(pinned.numpy(), eeg)
        return pinned.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Release the model, and let the process have PyTorch's default again."""
        import torch

        torch.backends.mha.set_fastpath_enabled(True)
        del self._model, self._forward
        self._host.clear()


class TorchCompile(TorchEager):
    """Calls the module compiled by ``torch.compile`` at the first call of a batch size, which needs a C++ compiler."""

    name = "torch-compile"
    engine = "cached"
    how = "torch.compile"
    mode: str | None = None

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        import torch

        with warnings.catch_warnings():  # torch's own modules warn about each other
            warnings.simplefilter("ignore")
            forward = torch.compile(super()._prepare(), mode=self.mode)
            from torch._dynamo import config
        # PyTorch counts compilations by the code of a function, which these backends share, and runs what is beyond its limit
        # eagerly: each adds its own share, and beyond that it is an error.
        config.recompile_limit += COMPILATIONS
        config.fail_on_recompile_limit_hit = True
        known: set[int] = set()

        def compiled(eeg: Tensor) -> Tensor:
            if len(eeg) in known:
                return forward(eeg)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    out = forward(eeg)
            except Exception as e:  # what is raised without a compiler, or by an unsupported model, differs between versions
                raise BackendError(f"torch.compile failed: {str(e).splitlines()[0]}", "Install a C++ compiler.") from e
            known.add(len(eeg))
            return out

        return compiled


class Braindecode(TorchEager):
    """Calls braindecode's module on the CPU."""

    name = "braindecode"

    def _load(self, bundle: Bundle) -> nn.Module:
        from sjepa_deploy.models.checkpoint import read_checkpoint

        model = braindecode_model(bundle.spec)
        model.load_state_dict(read_checkpoint(bundle.checkpoint).weights)
        return model


class TorchEagerCuda(TorchEager):
    """Calls the PyTorch module on the GPU: windows go there from pinned memory, and outputs come back."""

    name = "torch-eager-cuda"
    device = "cuda"


class TorchCompileCuda(TorchCompile):
    """Calls the module compiled by ``torch.compile(mode="reduce-overhead")`` on the GPU, which captures CUDA graphs by itself."""

    name = "torch-compile-cuda"
    device = "cuda"
    how = 'torch.compile(mode="reduce-overhead")'
    mode = "reduce-overhead"


class BraindecodeCuda(Braindecode):
    """Calls braindecode's module on the GPU."""

    name = "braindecode-cuda"
    device = "cuda"


class TorchCudaGraph(TorchEager):
    """Replays one CUDA graph for each batch size, with the module and both copies."""

    name = "torch-cuda-graph"
    device = "cuda"
    how = "CUDA graph with both copies"

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        self._graphs: dict[int, tuple[Any, FloatArray, Tensor, Tensor]] = {}
        return super()._prepare()

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call."""
        import torch

        graph, source, _, target = self._graphs.get(len(eeg)) or self._capture(eeg)
        if eeg is not source:
            np.copyto(source, eeg)
        graph.replay()
        torch.cuda.synchronize(self.device)
        out: FloatArray = target.numpy()
        return out

    def input_buffer(self, batch: int) -> FloatArray:
        """Return the pinned buffer that `run` reads, shape (batch, n_chans, n_times): fill it in place and pass it to `run`."""
        known = self._graphs.get(batch) or self._capture(np.zeros((batch, *self._spec.input_shape), np.float32))
        return known[1]

    def _capture(self, eeg: FloatArray) -> tuple[Any, FloatArray, Tensor, Tensor]:
        import torch

        self.activate()  # the graph keeps the options of this moment, whichever contender was called last
        with torch.inference_mode(), torch.cuda.device(self.device):
            target = self._forward(self._upload(eeg)).cpu().pin_memory()
            source = self._host[len(eeg)]
            static = torch.empty_like(source, device=self.device)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

            def body() -> None:
                static.copy_(source, non_blocking=True)
                target.copy_(self._forward(static), non_blocking=True)

            with torch.cuda.stream(stream):
                for _ in range(5):
                    body()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                body()
        array: FloatArray = source.numpy()  # with what else the graph touches: a later capture frees the rest
        self._graphs[len(eeg)] = (graph, array, static, target)
        return self._graphs[len(eeg)]

    def close(self) -> None:
        """Release the graphs and the model."""
        self._graphs.clear()
        super().close()


class TorchEagerNoFastPath(TorchEager):
    """Calls the module on the CPU, its transformer operation by operation."""

    name, fast_path = f"{TorchEager.name}{NO_FAST_PATH}", False


class TorchCompileNoFastPath(TorchCompile):
    """Calls the compiled module on the CPU, its transformer operation by operation, so that the compiler can fuse them."""

    name, fast_path = f"{TorchCompile.name}{NO_FAST_PATH}", False


class TorchEagerCudaNoFastPath(TorchEagerCuda):
    """Calls the module on the GPU, its transformer operation by operation."""

    name, fast_path = f"{TorchEagerCuda.name}{NO_FAST_PATH}", False


class TorchCompileCudaNoFastPath(TorchCompileCuda):
    """Calls the compiled module on the GPU, its transformer operation by operation, so that the compiler can fuse them."""

    name, fast_path = f"{TorchCompileCuda.name}{NO_FAST_PATH}", False


class TorchCudaGraphNoFastPath(TorchCudaGraph):
    """Replays a CUDA graph of the module, its transformer operation by operation."""

    name, fast_path = f"{TorchCudaGraph.name}{NO_FAST_PATH}", False


def braindecode_model(spec: ModelSpec, **kwargs: Any) -> nn.Module:
    """Build braindecode's model of `spec`, with random weights; `kwargs` go to its class."""
    encoder = spec.encoder
    heads = {} if spec.variant == "base" else {"n_outputs": spec.n_outputs, "n_spat_filters": spec.n_spat_filters}
    channels = None
    if spec.ch_names is not None and spec.positions is not None:
        channels = [{"ch_name": n, "loc": np.array(p)} for n, p in zip(spec.ch_names, spec.positions, strict=True)]
    classes = import_braindecode()
    name = {"prelocal": "_PreLocal", "postlocal": "_PostLocal", "contextual": "_Contextual", "base": ""}[spec.variant]
    model: nn.Module = getattr(classes, f"SignalJEPA{name}")(
        n_chans=spec.n_chans,
        n_times=spec.n_times,
        sfreq=spec.sfreq,
        chs_info=channels,
        **heads,
        feature_encoder__conv_layers_spec=encoder.conv_layers,
        drop_prob=encoder.drop_prob,
        pos_encoder__spat_dim=encoder.spat_dim,
        pos_encoder__time_dim=encoder.time_dim,
        pos_encoder__sfreq_features=encoder.sfreq_features,
        transformer__d_model=encoder.emb_dim,
        transformer__num_encoder_layers=encoder.n_layers,
        transformer__num_decoder_layers=encoder.n_decoder_layers,
        transformer__nhead=encoder.n_heads,
        **kwargs,
    )
    return model


def import_braindecode() -> Any:
    """Import ``braindecode.models.signal_jepa``, also where torchaudio's compiled half cannot load.

    braindecode imports torchaudio, whose usual wheel wants CUDA. No SignalJEPA model uses it, so that its extension is stood in
    for where it fails; its Python stays real.
    """
    with warnings.catch_warnings():  # braindecode's dependencies warn about each other
        warnings.simplefilter("ignore")
        try:
            import torchaudio  # noqa: F401
        except ModuleNotFoundError:
            pass
        except OSError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
                del sys.modules[name]
            extension: Any = types.ModuleType("torchaudio._extension")
            extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
            extension._IS_ALIGN_AVAILABLE = False
            extension.fail_if_no_align = lambda function: function
            extension._check_cuda_version = lambda: None
            sys.modules["torchaudio._extension"] = extension
        from braindecode.models import signal_jepa
    return signal_jepa


def probe_braindecode() -> None:
    """Raise what keeps braindecode from loading."""
    try:
        import_braindecode()
    except (ImportError, OSError) as e:
        raise BackendError(f"braindecode does not load: {str(e).splitlines()[0]}.", "See what importing it says.") from e


def probe_cuda() -> None:
    """Raise what keeps PyTorch from the GPU."""
    import torch

    if not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} sees no GPU.", "Install a build of PyTorch for CUDA, and a driver.")


def probe_braindecode_cuda() -> None:
    """Raise what keeps braindecode from the GPU."""
    probe_cuda()
    probe_braindecode()
