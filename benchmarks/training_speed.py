"""Samples per second of JEPA pretraining: ours against braindecode's modules in the same Lightning loop.

On a machine with GPUs, from a checkout, without installing anything but torch, lightning, numpy, safetensors:

    PYTHONPATH=. python benchmarks/training_speed.py --braindecode PATH --out benchmarks/results/training_speed_HARDWARE_DATE
    torchrun --nproc-per-node 2 benchmarks/training_speed.py --devices 2 --out ...     (with --skip-braindecode)

PATH holds braindecode/models/signal_jepa.py; what it imports and the loop does not need is stubbed (`load_braindecode`).
The same loss, masks, batches, optimiser and EMA drive both: only the networks differ. Ours is measured as it is and compiled
(``--compile`` of sjepa-pretrain); braindecode's as it is and, with --compile-braindecode, compiled too.
``--device cpu`` with small --batch-sizes is a dry run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

ROOT = Path(__file__).parents[1]


def import_sjepa() -> None:
    """Make `sjepa_deploy` importable from a checkout that is not installed, links or not."""
    try:
        import sjepa_deploy  # noqa: F401
    except ImportError:
        package = types.ModuleType("sjepa_deploy")
        package.__path__ = [str(ROOT / "sjepa_deploy")]
        sys.modules["sjepa_deploy"] = package


import_sjepa()

from sjepa_deploy.engine import Engine, SeedEpochs  # noqa: E402
from sjepa_deploy.masking import Masking  # noqa: E402
from sjepa_deploy.montage import read_montage  # noqa: E402
from sjepa_deploy.pretrain import JEPA, PretrainConfig, PretrainModule  # noqa: E402
from sjepa_deploy.spec import EncoderSpec, ModelSpec  # noqa: E402

MONTAGES = {129: "GSN-HydroCel-129", 62: "sjepa-62"}


def load_braindecode(path: Path) -> types.ModuleType:
    """Import braindecode/models/signal_jepa.py alone: its mixin, MNE and the hub are of no use to the loop."""
    for name in ("braindecode", "braindecode.models"):
        package = types.ModuleType(name)
        package.__path__ = []
        sys.modules[name] = package

    class EEGModuleMixin:
        """Keeps what braindecode's own keeps."""

        def __init__(self, n_outputs=None, n_chans=None, chs_info=None, n_times=None, input_window_seconds=None, sfreq=None):
            super().__init__()
            self._n_outputs, self._n_chans, self._chs_info, self._n_times, self._sfreq = (
                n_outputs,
                n_chans,
                chs_info,
                n_times,
                sfreq,
            )

        n_outputs = property(lambda self: self._n_outputs)
        n_chans = property(lambda self: self._n_chans or len(self._chs_info))
        chs_info = property(lambda self: self._chs_info)
        n_times = property(lambda self: self._n_times)
        sfreq = property(lambda self: self._sfreq)

    def stub(name: str, **content: object) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module

    stub("braindecode.models.base", EEGModuleMixin=EEGModuleMixin)
    stub("braindecode.models.interpolated", InterpolatedModel=lambda *args, **kwargs: None)
    if importlib.util.find_spec("einops") is None:
        stub("einops")
        stub("einops.layers")
        stub("einops.layers.torch", Rearrange=Rearrange)
    file = path / "braindecode/models/signal_jepa.py"
    file = file if file.is_file() else path / "models/signal_jepa.py"
    spec = importlib.util.spec_from_file_location("braindecode.models.signal_jepa", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Rearrange(nn.Module):
    """The two rearrangements of the feature encoder, where einops is not installed."""

    def __init__(self, pattern: str, **axes: int) -> None:
        super().__init__()
        self.splits, self.axes = pattern.startswith("b channels time"), axes
        assert self.splits or "-> b (channels time_out) emb_dim" in pattern, pattern

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` rearranged."""
        if self.splits:
            return x.reshape(-1, 1, x.shape[-1])
        channels = self.axes["channels"]
        return x.reshape(-1, channels, *x.shape[1:]).transpose(2, 3).reshape(x.shape[0] // channels, -1, x.shape[1])


class BraindecodeJEPA(JEPA):
    """The same step with braindecode's modules, each called as it comes."""

    def tokens(self, eeg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local embeddings and positions in our shapes."""
        n_chans = eeg.shape[1]
        local = self.base.feature_encoder(eeg)
        positions = self.base.pos_encoder(local)[0]
        return local.reshape(len(eeg), n_chans, -1, local.shape[-1]), positions.reshape(n_chans, -1, local.shape[-1])

    @torch.no_grad()
    def target(self, local: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the teacher's output."""
        return self.teacher((local + positions).flatten(1, 2)).reshape(local.shape)

    def encode_context(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """Return the encoder's output."""
        return self.base.transformer.encoder(tokens, src_key_padding_mask=padding)

    def decode(self, queries, context, padding, context_padding) -> torch.Tensor:
        """Return the predictor's output."""
        masks = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": context_padding}
        return self.base.transformer.decoder(queries, context, **masks)


class Batches(torch.utils.data.IterableDataset):
    """The same few batches over and over, already on the device: the loop is measured, not a disk."""

    def __init__(self, batch: int, shape: tuple[int, int], n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [(10 * torch.randn(batch, *shape, generator=generator)).to(device) for _ in range(2)]
        self.n, self.targets = n, torch.zeros(batch, device=device)

    def __iter__(self):
        for i in range(self.n):
            yield self.batches[i % 2], self.targets

    def __len__(self) -> int:
        return self.n


class Clock(lightning.Callback):
    """Seconds of every step after the warm-up, and of all of them together."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.times = warmup, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Start the clock after the warm-up."""
        if trainer.global_step == self.warmup:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()
        self.last = trainer.global_step

    def on_train_end(self, trainer, module) -> None:
        """Stop the clock."""
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = (time.perf_counter() - self.start) / (self.last - self.warmup)


class SpeedModule(PretrainModule):
    """The module of sjepa-pretrain without its logging."""

    def log(self, *args: object, **kwargs: object) -> None:
        """Drop it."""


def measure(kind: str, shape: tuple[int, int], batch: int, precision: str, args: argparse.Namespace, bd: types.ModuleType | None):
    """Return what one configuration takes."""
    n_chans, n_times = shape
    montage = read_montage(MONTAGES[n_chans])
    encoder = EncoderSpec(n_layers=args.layers, n_decoder_layers=min(4, args.layers))
    spec = ModelSpec(
        variant="base",
        n_chans=n_chans,
        n_times=n_times,
        sfreq=128.0,
        ch_names=montage.ch_names,
        positions=montage.positions,
        encoder=encoder,
    )
    compiled = kind.endswith("compiled")
    engine = Engine(batch_size=batch, weight_decay=0.01, compile=compiled and not kind.startswith("braindecode"))
    masking = Masking(mode=args.mask, radius=args.radius)
    module = SpeedModule(PretrainConfig(masking=masking, encoder=encoder, engine=engine), spec)
    if kind.startswith("braindecode"):
        assert bd is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chs_info = [{"ch_name": n, "loc": list(p)} for n, p in zip(montage.ch_names, montage.positions, strict=True)]
            theirs = bd.SignalJEPA(
                n_chans=n_chans,
                n_times=n_times,
                sfreq=128.0,
                chs_info=chs_info,
                transformer__num_encoder_layers=encoder.n_layers,
                transformer__num_decoder_layers=encoder.n_decoder_layers,
            )
        theirs.load_state_dict(module.jepa.base.state_dict())
        module.jepa = BraindecodeJEPA(theirs)
        if compiled:
            module.jepa.compile(dynamic=False)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" else torch.device("cpu")
    clock, steps = Clock(args.warmup), args.warmup + args.steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=args.devices,
            max_steps=steps,
            max_epochs=1,
            precision={"bf16": "bf16-mixed", "fp32": "32-true"}[precision],
            strategy=DDPStrategy() if args.devices > 1 else "auto",
            callbacks=[SeedEpochs(0), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        data = torch.utils.data.DataLoader(Batches(batch, shape, steps, device), batch_size=None)
        trainer.fit(module, train_dataloaders=data)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    with torch.no_grad():
        loss = float(trainer.callback_metrics.get("train_loss", math.nan))
    return {
        "network": kind,
        "n_chans": n_chans,
        "n_times": n_times,
        "batch": batch,
        "precision": precision,
        "devices": args.devices,
        "ms_per_step": clock.seconds * 1e3,
        "samples_per_s": batch * args.devices / clock.seconds,
        "peak_memory_mib": peak and peak / 2**20,
        "loss": None if math.isnan(loss) else loss,
    }


def same_loss(bd: types.ModuleType, device: str) -> float:
    """Return the difference of the two networks' losses for the same weights, batch and masks, without dropout."""
    montage = read_montage("sjepa-62")
    spec = ModelSpec(variant="base", n_chans=62, n_times=300, sfreq=128.0, ch_names=montage.ch_names, positions=montage.positions)
    module = PretrainModule(PretrainConfig(), spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chs_info = [{"ch_name": n, "loc": list(p)} for n, p in zip(montage.ch_names, montage.positions, strict=True)]
        theirs = bd.SignalJEPA(n_chans=62, n_times=300, sfreq=128.0, chs_info=chs_info)
    theirs.load_state_dict(module.jepa.base.state_dict())
    other = BraindecodeJEPA(theirs)
    eeg, masks = 10 * torch.randn(4, 62, 300), module.sampler(4)
    losses = []
    torch.backends.mha.set_fastpath_enabled(False)
    for jepa in (module.jepa, other):
        jepa.eval()
        losses.append(float(jepa(eeg, masks).detach()))
    torch.backends.mha.set_fastpath_enabled(True)
    return abs(losses[0] - losses[1])


def versions() -> dict[str, str]:
    """Return what was measured with."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        found["commit"] = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--braindecode", type=Path)
    parser.add_argument("--skip-braindecode", action="store_true")
    parser.add_argument("--compile-braindecode", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--shapes", default="129x200,62x2048")
    parser.add_argument("--batch-sizes", default="256,32", help="one a shape")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--mask", choices=["block", "fixed"], default="block")
    parser.add_argument("--radius", type=float, default=0.6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    bd = None
    if not args.skip_braindecode:
        if args.braindecode is None:
            parser.error("--braindecode PATH or --skip-braindecode")
        bd = load_braindecode(args.braindecode)
        print(f"losses for the same weights differ by {same_loss(bd, args.device):.1e}", flush=True)
    kinds = ["ours"] + ([] if args.no_compile else ["ours compiled"])
    if bd is not None:
        kinds = ["braindecode"] + (["braindecode compiled"] if args.compile_braindecode else []) + kinds
    rows, failures = [], []
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]
    for shape, batch in zip(shapes, map(int, args.batch_sizes.split(",")), strict=True):
        for precision in args.precisions.split(","):
            for repeat in range(args.repeats):
                for kind in kinds:
                    try:
                        row = measure(kind, shape, batch, precision, args, bd) | {"repeat": repeat}
                    except RuntimeError as e:  # out of memory, or the compiler: the others are still worth having
                        failures.append({"network": kind, "shape": shape, "precision": precision, "error": str(e)[:300]})
                        print("failed:", failures[-1], flush=True)
                        continue
                    finally:
                        gc.collect()
                        torch._dynamo.reset()
                        if args.device == "cuda":
                            torch.cuda.empty_cache()
                    rows.append(row)
                    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if args.out is not None and int(os.environ.get("RANK", 0)) == 0:
        # No path of the machine goes into a result.
        command = "python benchmarks/training_speed.py " + re.sub(
            r"(--(?:braindecode|out)) \S+", r"\1 PATH", " ".join(sys.argv[1:])
        )
        result = {"versions": versions(), "command": command, "rows": rows, "failures": failures}
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))


def table(result: dict) -> str:
    """Return the medians as Markdown."""
    lines = [
        "# Pretraining speed",
        "",
        ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        f"`{result['command']}`",
        "",
    ]
    lines += ["| shape | batch | precision | network | samples/s (median) | range | peak MiB | against braindecode |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    keys = list(dict.fromkeys((r["n_chans"], r["n_times"], r["batch"], r["precision"], r["network"]) for r in result["rows"]))
    medians = {}
    for key in keys:
        same = [r for r in result["rows"] if (r["n_chans"], r["n_times"], r["batch"], r["precision"], r["network"]) == key]
        speeds = sorted(r["samples_per_s"] for r in same)
        medians[key] = speeds[len(speeds) // 2]
        peak = max((r["peak_memory_mib"] or 0) for r in same)
        baseline = medians.get((*key[:4], "braindecode"))
        ratio = f"{medians[key] / baseline:.2f}" if baseline else ""
        lines.append(
            f"| {key[0]} x {key[1]} | {key[2]} | {key[3]} | {key[4]} | {medians[key]:.0f} | "
            f"{speeds[0]:.0f} to {speeds[-1]:.0f} | {peak:.0f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
