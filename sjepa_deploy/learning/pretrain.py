"""Pretrains the base model as a JEPA on unlabelled EEG (Guetschel, Moreau, Tangermann 2024).

A context encoder sees the visible channels, and a predictor guesses the embeddings of the hidden channels from its output. The
teacher, a slowly following copy of the encoder, made these embeddings from all channels. The local encoder and the positions are
shared.

The paper leaves learning rate and EMA open; the defaults are those of its author's later code: AdamW 1e-3, weight decay 0.01,
EMA from 0.999 to 0.9999, linear over 75,000 steps. Warm-up and clipping are ours: without them the embeddings collapse.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.errors import CollapseError, DataError, SpecError
from sjepa_deploy.files import write_atomically
from sjepa_deploy.learning import padded
from sjepa_deploy.learning.data import DataConfig, split_windows
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Batch, Engine, Fitted, WindowLoaders, check_enough, compile_if_wanted, fit
from sjepa_deploy.learning.masking import Masking, Masks, MaskSampler
from sjepa_deploy.learning.origin import ORIGIN_KEY, SPLIT_FILE, Origin, origin_of, split_table
from sjepa_deploy.learning.progress import Epoch
from sjepa_deploy.learning.report import DataReport, report_on
from sjepa_deploy.learning.run_folder import COLLAPSED_FOLDER, as_begun, check_run, saving_to
from sjepa_deploy.models.checkpoint import SPEC_KEY, write_checkpoint
from sjepa_deploy.models.networks import SignalJEPA, build_model
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import EncoderSpec, ModelSpec

COLLAPSE_SPREAD = 0.05
"""Spread below which embeddings hardly depend on the EEG; LayerNorm keeps their scale near 1."""

WARMUP_STEPS = 100
"""Steps of warm-up after which AdamW 1e-3 does not collapse; without warm-up it did in each of 3 runs, and with it in none of 10
(benchmarks/results/collapse_H200_2026-11-28.md)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Describes a pretraining run.

    Attributes
    ----------
    data : DataConfig
        Unlabelled windows.
    masking : Masking
        Configuration of the masks.
    encoder : EncoderSpec
        Sizes of the model.
    target_layers : int
        The target is the mean of the teacher's last so many layers (1: the paper, 4: the author's published configuration).
    ema_start, ema_end, ema_steps : float, float, int
        Momentum of the teacher, linear over so many steps.
    warmup_steps : int
        Steps over which the learning rate rises from 0 to its value.
    monitor : {"relative_l1", "l1"}
        Validation loss that decides which epoch is the best. "l1" is the paper's. It grows with the teacher's spread while the
        embeddings become richer; "relative_l1" divides it by the L1 of predicting the mean embedding.
    engine : Engine
        The loop.
    """

    data: DataConfig = field(default_factory=DataConfig)
    masking: Masking = field(default_factory=Masking)
    encoder: EncoderSpec = field(default_factory=EncoderSpec)
    target_layers: int = 1
    ema_start: float = 0.999
    ema_end: float = 0.9999
    ema_steps: int = 75_000
    warmup_steps: int = WARMUP_STEPS
    monitor: Literal["relative_l1", "l1"] = "relative_l1"
    engine: Engine = field(default_factory=lambda: Engine(patience=10, weight_decay=0.01, gradient_clip=1.0))

    def __post_init__(self) -> None:
        if not 1 <= self.target_layers <= self.encoder.n_layers:
            raise SpecError(f"target_layers is {self.target_layers}.", f"Use 1 to {self.encoder.n_layers}, the encoder's layers.")
        if self.encoder.n_decoder_layers < 1:
            raise SpecError("Without decoder layers there is no predictor.", "Use n_decoder_layers of 1 or more.")
        if not 0 <= self.ema_start <= self.ema_end <= 1 or self.ema_steps < 1:
            raise SpecError("The EMA's momentum does not rise from 0 or more to 1 or less.", "Use for example 0.999 and 0.9999.")
        if self.warmup_steps < 0:
            raise SpecError(f"warmup_steps is {self.warmup_steps}.", "Use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Holds the result of pretraining.

    Attributes
    ----------
    spec : ModelSpec
        The base model.
    fitted : Fitted
        How the run went; its ``val_loss`` is what the configuration monitors.
    val_l1 : float
        L1 between predicted and target embeddings of the hidden channels of validation windows.
    val_l1_mean : float
        L1 of predicting, for each token, its mean target embedding over the validation windows: what knowing the positions
        alone would give at best (nearly: the median would).
    spread : float
        Standard deviation of the target embeddings over the validation windows, averaged over tokens and dimensions.
    n_train, n_val : int
        Windows.
    split : str
        What the parts do not share.
    """

    spec: ModelSpec
    fitted: Fitted
    val_l1: float
    val_l1_mean: float
    spread: float
    n_train: int
    n_val: int
    split: str


class JEPA(nn.Module):
    """Joins context encoder, predictor and teacher around one base model.

    Parameters
    ----------
    base : SignalJEPA
        The model to pretrain: its encoder is the context encoder, its decoder the predictor.
    target_layers : int
        Layers of the teacher whose mean is the target.
    """

    def __init__(self, base: SignalJEPA, target_layers: int = 1) -> None:
        super().__init__()
        self.base = base
        self.target_layers = target_layers
        self.teacher = copy.deepcopy(base.transformer.encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> JEPA:
        """Set the mode of the base model; the teacher never drops out."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, eeg: Tensor, masks: Masks) -> Tensor:
        """Return the L1 between predicted and target embeddings of the hidden channels, a scalar.

        Parameters
        ----------
        eeg : Tensor, shape (B, C, T)
            Windows.
        masks : Masks
            G = B * contexts masks.
        """
        local, positions = self.tokens(eeg)
        target = self.target(local, positions)
        predicted = self.predict(local, positions, masks)
        return self.loss(predicted, target, masks)

    def tokens(self, eeg: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local embeddings, shape (B, C, N, E), and the position encodings, shape (C, N, E)."""
        n_chans = eeg.shape[1]
        local: Tensor = self.base.feature_encoder(eeg)
        positions: Tensor = self.base.pos_encoder()
        return local.reshape(len(eeg), n_chans, -1, local.shape[-1]), positions.reshape(n_chans, -1, positions.shape[-1])

    @torch.no_grad()
    def target(self, local: Tensor, positions: Tensor) -> Tensor:
        """Return the teacher's embeddings of all tokens, shape (B, C, N, E)."""
        tokens = _encode(self.teacher, (local + positions).flatten(1, 2), target_layers=self.target_layers)
        return tokens.reshape(local.shape)

    def predict(self, local: Tensor, positions: Tensor, masks: Masks) -> Tensor:
        """Return the predicted embeddings, shape (G, K, H, N, E), of the hidden channels.

        Only visible tokens go through the encoder, and only the queries of hidden ones through the predictor.
        """
        n_groups, n_targets, n_hidden = masks.hidden.shape
        n_tokens = local.shape[2]
        example = _example_of(masks, len(local))
        visible = (local[example[:, None], masks.visible] + positions[masks.visible]).flatten(1, 2)
        padding = _per_token(masks.visible_padding, n_tokens)
        context = self.encode_context(visible, padding)
        queries = positions[masks.hidden.flatten(0, 1)].flatten(1, 2)
        if n_targets > 1:
            context = context.repeat_interleave(n_targets, dim=0)
            padding = None if padding is None else padding.repeat_interleave(n_targets, dim=0)
        hidden_padding = None if masks.hidden_padding is None else _per_token(masks.hidden_padding.flatten(0, 1), n_tokens)
        predicted = self.decode(queries, context, hidden_padding, padding)
        return predicted.reshape(n_groups, n_targets, n_hidden, n_tokens, -1)

    def encode_context(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Return the context encoder's embeddings of visible tokens, shape (G, V * N, E)."""
        return _encode(self.base.transformer.encoder, tokens, padding)

    def decode(self, queries: Tensor, context: Tensor, padding: Tensor | None, context_padding: Tensor | None) -> Tensor:
        """Return the predictor's embeddings, shape (G * K, H * N, E)."""
        decoder = self.base.transformer.decoder
        if padding is None or context_padding is None:
            return decoder(queries, context)  # type: ignore[no-any-return]
        for layer in decoder.layers:
            assert isinstance(layer, nn.TransformerDecoderLayer)
            queries = padded.decoder_layer(layer, queries, context, padding, context_padding)
        assert decoder.norm is not None
        return decoder.norm(queries)  # type: ignore[no-any-return]

    def loss(self, predicted: Tensor, target: Tensor, masks: Masks) -> Tensor:
        """Return the mean absolute difference over the hidden channels."""
        wanted = target[_example_of(masks, len(target))[:, None, None], masks.hidden]
        error = (predicted.float() - wanted.float()).abs().mean(dim=(-1, -2))
        if masks.hidden_padding is None:
            return error.mean()
        counts = (~masks.hidden_padding).to(error.dtype)
        return (error * counts).sum() / counts.sum()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the teacher's weights towards the context encoder's."""
        mine = list(self.teacher.parameters())
        torch._foreach_lerp_(mine, list(self.base.transformer.encoder.parameters()), 1 - momentum)


def _encode(encoder: nn.TransformerEncoder, tokens: Tensor, padding: Tensor | None = None, *, target_layers: int = 1) -> Tensor:
    """Return the normalised mean of the encoder's last layers: with one of them, the encoder's output.

    `nn.TransformerEncoder` itself would turn padded rows into nested tensors where it evaluates.
    """
    outputs = []
    for layer in encoder.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        tokens = layer(tokens) if padding is None else padded.encoder_layer(layer, tokens, padding)
        outputs.append(tokens)
    assert encoder.norm is not None
    last = outputs[-1] if target_layers == 1 else torch.stack(outputs[-target_layers:]).mean(dim=0)
    return encoder.norm(last)  # type: ignore[no-any-return]


def _example_of(masks: Masks, batch: int) -> Tensor:
    return torch.arange(batch, device=masks.hidden.device).repeat_interleave(len(masks.hidden) // batch)


def _per_token(padding: Tensor | None, n_tokens: int) -> Tensor | None:
    return None if padding is None else padding.repeat_interleave(n_tokens, dim=-1)


class PretrainModule(lightning.LightningModule):
    """Trains a `JEPA` in Lightning's loop."""

    spread: Tensor
    val_l1: Tensor
    val_l1_mean: Tensor

    def __init__(self, config: PretrainConfig, spec: ModelSpec, origin: Origin | None = None) -> None:
        super().__init__()
        assert spec.positions is not None
        self.config, self.origin = config, origin
        base = build_model(spec, seed=config.engine.seed)
        assert isinstance(base, SignalJEPA)
        self.jepa = JEPA(base, config.target_layers)
        self.sampler = MaskSampler(config.masking, spec.positions)
        self.seen: list[Tensor] = []
        self.losses: list[tuple[Tensor, int]] = []
        for name in ("spread", "val_l1", "val_l1_mean"):  # of the last epoch; the best checkpoint brings back its own
            self.register_buffer(name, torch.zeros(()))
        compile_if_wanted(self.jepa, config.engine)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the description of the base model."""
        description = {SPEC_KEY: encode(self.jepa.base.spec), TRAINING_KEY: encode({ORIGIN_KEY: self.origin})}
        checkpoint["hyper_parameters"] = description

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW on everything but the teacher, and the warm-up of its learning rate."""
        engine = self.config.engine
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=engine.lr, weight_decay=engine.weight_decay, fused=fused)
        n = self.config.warmup_steps
        rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / n) if n else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch under fresh masks."""
        eeg, _ = batch
        loss: Tensor = self.jepa(eeg, self.sampler(len(eeg)))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(eeg))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher towards the context encoder."""
        c = self.config
        progress = min(1.0, self.global_step / c.ema_steps)
        self.jepa.follow(c.ema_start + (c.ema_end - c.ema_start) * progress)

    def on_validation_epoch_start(self) -> None:
        """Draw the same masks in every epoch."""
        self.generator = torch.Generator(self.device).manual_seed(self.config.engine.seed)
        self.seen, self.losses = [], []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss, and keep the targets for what follows."""
        eeg, _ = batch
        masks = self.sampler(len(eeg), self.generator)
        local, positions = self.jepa.tokens(eeg)
        target = self.jepa.target(local, positions)
        loss = self.jepa.loss(self.jepa.predict(local, positions, masks), target, masks)
        self.losses.append((loss, len(eeg)))
        if sum(map(len, self.seen)) < 256:  # windows: enough for a mean, and 60 MB of the longest
            self.seen.append(target.float())

    def on_validation_epoch_end(self) -> None:
        """Compare with the mean embedding, and watch for collapse. Each process saw a part of the windows, as large as any."""
        spread, val_l1_mean = spread_of(torch.cat(self.seen))
        val_l1 = torch.stack([loss * n for loss, n in self.losses]).sum() / sum(n for _, n in self.losses)
        self.spread, self.val_l1_mean, self.val_l1 = (
            torch.as_tensor(self.all_gather(x)).mean() for x in (spread, val_l1_mean, val_l1)
        )
        monitored = self.val_l1 / self.val_l1_mean if self.config.monitor == "relative_l1" else self.val_l1
        values = {"val_loss": monitored, "val_l1": self.val_l1, "val_l1_mean": self.val_l1_mean, "spread": self.spread}
        self.log_dict(values, sync_dist=True)
        self.seen, self.losses = [], []
        if self.global_rank == 0 and self.spread < COLLAPSE_SPREAD:
            log.warning(
                "The embeddings collapse: over windows they vary by %.3g only (epoch %d). "
                "If this lasts, use a smaller --lr or more --warmup-steps.",
                float(self.spread),
                self.current_epoch,
            )


def spread_of(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spread of embeddings, shape (B, C, N, E), over windows, and their mean distance from their mean (L1)."""
    from_mean = embeddings - embeddings.mean(dim=0)
    return from_mean.square().mean(dim=0).sqrt().mean(), from_mean.abs().mean()


def pretrain(
    config: PretrainConfig,
    out: Path | str,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: bool = False,
    tell: Callable[[DataReport], None] = lambda report: None,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> PretrainResult:
    """Pretrain a base model and write it into the folder `out`.

    Parameters
    ----------
    config : PretrainConfig
        The run.
    out : Path or str
        Gets ``config.json``, ``model.safetensors`` and ``split.tsv``; checkpoints and logs go into ``out/training``.
    resume : bool
        Go on with the run in `out`.
    replace : bool
        Remove the run and the model in `out` when training starts.
    progress : bool
        Show a progress bar.
    tell : callable
        Called with what the training learns from, before it starts.
    tell_epoch : callable
        Called at the end of each epoch.

    Raises
    ------
    DataError
        If there are too few windows, or channels without positions.
    TrainingError
        If `out` holds a run that is not to be resumed, or another one.
    CollapseError
        If the embeddings of the kept epoch hardly depend on the EEG (`COLLAPSE_SPREAD`), or no epoch was better than the first
        one. The model is in ``out/collapsed`` then.
    """
    out = Path(out)
    if resume:
        config = as_begun(config, out / "training")
    check_run(out / "training", config, resume=resume, replace=replace)
    windows = load_windows(config.data)
    if windows.signal.positions is None:
        raise DataError(
            "The channels have no positions, which the masks and the position encoder need.", "Name their montage with --montage."
        )
    split = split_windows(windows, config.data)
    check_enough(split, config.engine)
    spec = ModelSpec(variant="base", encoder=config.encoder, signal=windows.signal)
    origin = origin_of(windows, split)
    report = report_on(windows, split, config.engine.batch_size * config.engine.world_size)
    tell(report)
    module = PretrainModule(config, spec, origin)
    loaders = WindowLoaders(windows, split, config.engine)
    fitted, trainer = fit(
        module, loaders, out / "training", config, resume=resume, replace=replace, progress=progress, tell_epoch=tell_epoch
    )
    result = PretrainResult(
        spec=spec,
        fitted=fitted,
        val_l1=float(module.val_l1),
        val_l1_mean=float(module.val_l1_mean),
        spread=float(module.spread),
        n_train=len(split.train),
        n_val=len(split.val),
        split=split.by,
    )
    failure = _failure(result)
    if trainer.is_global_zero:
        training = {"pretraining": config, "data": report, "data_steps": windows.steps, ORIGIN_KEY: origin, "result": result}
        with saving_to(out):
            write_atomically(out / SPLIT_FILE, split_table(windows, split))
            write_checkpoint(module.jepa.base, out if failure is None else out / COLLAPSED_FOLDER, training=training)
    if failure is not None:
        raise CollapseError(
            f"{failure} The model is in {out / COLLAPSED_FOLDER}.",
            "Start again with --force and a smaller --lr, more --warmup-steps or a smaller --clip.",
        )
    return result


def _failure(result: PretrainResult) -> str | None:
    """Return why a base model is of no use, as a sentence, or None."""
    fitted = result.fitted
    if result.spread < COLLAPSE_SPREAD:
        return (
            f"The embeddings collapsed: at the best epoch, number {fitted.best_epoch + 1} of {fitted.epochs}, they vary over "
            f"windows by {result.spread:.2g} only, and {COLLAPSE_SPREAD:g} is the least."
        )
    if fitted.best_epoch == 0 and fitted.epochs > 1:
        return f"None of {fitted.epochs} epochs was better than the first one: nothing was learned."
    return None
