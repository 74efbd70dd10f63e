"""Fine-tunes a variant: it learns to decode, from a pretrained base model, a fine-tuned model or from scratch.

Frozen training changes only the spatial filters and the last layer. Full training changes these alone for ten epochs of warm-up,
then all parts. The defaults (Adam 1e-3, batches of 32, at most 500 epochs, patience 50) are the settings of the paper's author.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.errors import DataError, TrainingError, listed
from sjepa_deploy.files import write_atomically
from sjepa_deploy.learning.data import DataConfig, Split, Target, Windows, split_windows
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import (
    Batch,
    Engine,
    Fitted,
    WindowLoaders,
    check_enough,
    compile_if_wanted,
    fit,
    predict,
)
from sjepa_deploy.learning.metrics import CLASSIFICATION, REGRESSION, Score, balanced_weights, best_threshold, scores
from sjepa_deploy.learning.origin import ORIGIN_KEY, SPLIT_FILE, Origin, check_unseen, origin_of, split_table, stored_origin
from sjepa_deploy.learning.progress import Epoch
from sjepa_deploy.learning.report import DataReport, report_on
from sjepa_deploy.learning.run_folder import as_begun, check_run, saving_to
from sjepa_deploy.learning.start import settings_of, start_from
from sjepa_deploy.models.checkpoint import (
    SPEC_KEY,
    Checkpoint,
    in_target_unit,
    read_checkpoint,
    write_checkpoint,
)
from sjepa_deploy.models.networks import SignalJEPAModule, SignalJEPAWithTransformer, build_model
from sjepa_deploy.models.transfer import NEW_PARTS, TransferReport, base_encoder, transfer
from sjepa_deploy.serialize import encode, overridden
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Variant


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Describes a fine-tuning run.

    Attributes
    ----------
    variant : {"prelocal", "postlocal", "contextual"}
        What to train.
    pretrained : str or None
        Checkpoint of the base model; None trains from scratch.
    start : str or None
        Checkpoint of a fine-tuned model whose weights are the start, in place of a base model. Variant, filters, channels, rate,
        length, steps, phase and place after events are this model's.
    freeze_encoder : bool
        Train the spatial filters and the last layer only.
    encoder_to_prelocal : bool
        Take the feature encoder into PreLocal too.
    accept_sfreq : bool
        Take a base model of another sampling rate.
    allow_left_out : tuple of str
        Weights or modules beside the base model that may be left out.
    allow_overlap : bool
        Take a base model that has seen subjects or recordings of the test part.
    n_spat_filters : int
        Spatial filters.
    class_weights : {"balanced", "none"}
        "balanced": in the loss, each class counts alike, however rare it is. Regressions have no classes.
    warmup_epochs : int
        Epochs in which only the new layers learn, where others were pretrained.
    data : DataConfig
        Labelled windows.
    encoder : EncoderSpec or None
        Sizes of the encoder. With a base model they are that model's.
    engine : Engine
        The loop.
    """

    variant: Variant = "contextual"
    pretrained: str | None = None
    start: str | None = None
    freeze_encoder: bool = False
    encoder_to_prelocal: bool = False
    accept_sfreq: bool = False
    allow_left_out: tuple[str, ...] = ()
    allow_overlap: bool = False
    n_spat_filters: int = 4
    class_weights: Literal["balanced", "none"] = "none"
    warmup_epochs: int = 10
    data: DataConfig = field(default_factory=lambda: DataConfig(target=Target()))
    encoder: EncoderSpec | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if self.variant not in NEW_PARTS:
            raise TrainingError(f"{self.variant!r} cannot be fine-tuned.", f"Use one of {', '.join(NEW_PARTS)}.")
        if self.pretrained is not None and self.start is not None:
            raise TrainingError("Both a base model and a fine-tuned model are named.", "Start from one of them.")
        if self.data.target is None:
            raise DataError("The configuration names no target to learn.", "Describe it under data.target.")
        if self.warmup_epochs < 0:
            raise TrainingError(f"warmup_epochs is {self.warmup_epochs}.", "Use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """Holds what a decision layer needs to know of a classifier's training.

    Attributes
    ----------
    prevalence : tuple of float
        Share of each class among the training windows.
    weights : tuple of float
        Weight of each class in the loss: the model's probabilities are those of classes with the shares prevalence * weights.
    threshold : float or None
        Of two classes, the probability of the second one from which on it is chosen: the best balanced accuracy on the validation
        windows. Of more classes there is none.
    """

    prevalence: tuple[float, ...]
    weights: tuple[float, ...]
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """Holds the result of fine-tuning.

    Attributes
    ----------
    spec : ModelSpec
        The model.
    transfer : TransferReport or None
        What it took from the base model.
    fitted : Fitted
        How the run went.
    test : dict of str to Score
        R2, NRMSE and MAE, or balanced accuracy and AUC, on the test windows.
    baseline : dict of str to Score
        The same for predicting the training windows' mean, or class frequencies.
    n_train, n_val, n_test : int
        Windows.
    split : str
        What the parts do not share.
    classes : ClassFacts or None
        Prevalence, weights and threshold of a classification.
    """

    spec: ModelSpec
    transfer: TransferReport | None
    fitted: Fitted
    test: dict[str, Score]
    baseline: dict[str, Score]
    n_train: int
    n_val: int
    n_test: int
    split: str
    classes: ClassFacts | None = None


class FinetuneModule(lightning.LightningModule):
    """Trains a variant in Lightning's loop.

    A regression learns standardised targets, so that learning does not depend on their unit; `finished` folds their mean and
    standard deviation into the last layer.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        model: SignalJEPAModule,
        config: FinetuneConfig,
        targets: NDArray[Any],
        origin: Origin | None = None,
        *,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.config, self.origin, self.pretrained = model, config, origin, pretrained
        self.regression = model.spec.class_names is None
        mean, std = (targets.mean(), targets.std()) if self.regression else (0.0, 1.0)
        self.register_buffer("target_mean", torch.tensor(float(mean)))
        self.register_buffer("target_std", torch.tensor(float(std)))
        weights = class_weights(config, targets, model.spec.n_outputs)
        if self.regression and config.start is not None:  # its last layer gives the target in its unit
            model.load_state_dict(in_target_unit(model.state_dict(), -self.target_mean / self.target_std, 1 / self.target_std))
        self.class_weights = None if weights is None or self.regression else torch.from_numpy(weights).float()
        self.validated: list[tuple[Tensor, Tensor]] = []
        new = NEW_PARTS[model.spec.variant]
        parts = dict(model.named_children())
        self.new_parts = [parts[name] for name in new]
        self.old_parts = [part for name, part in parts.items() if name not in new]
        # The predictor of pretraining is never used; the rest of the encoder learns unless it is frozen for good.
        for part in self.old_parts:
            part.requires_grad_(not config.freeze_encoder)
        if isinstance(model, SignalJEPAWithTransformer):
            model.transformer.decoder.requires_grad_(False)
        self.encoder_parameters = [p for part in self.old_parts for p in part.parameters() if p.requires_grad]
        compile_if_wanted(model, config.engine)

    @property
    def frozen(self) -> bool:
        """Return whether only the new layers learn in the present epoch."""
        return self.config.freeze_encoder or (self.pretrained and self.current_epoch < self.config.warmup_epochs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with one group of new layers, and one of the encoder, which has no gradients while it is frozen."""
        engine = self.config.engine
        groups = [{"name": "new", "params": [p for part in self.new_parts for p in part.parameters()]}]
        if self.encoder_parameters:
            groups.append({"name": "encoder", "params": self.encoder_parameters})
        return torch.optim.Adam(groups, lr=engine.lr, weight_decay=engine.weight_decay)

    def on_train_epoch_start(self) -> None:
        """Freeze or unfreeze the encoder."""
        for parameter in self.encoder_parameters:
            parameter.requires_grad_(not self.frozen)
        for part in self.old_parts:
            part.train(not self.frozen)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean square error of standardised targets, or the cross-entropy, weighted as `torch.nn.CrossEntropyLoss`."""
        if self.regression:
            return nn.functional.mse_loss(outputs[:, 0].float(), (targets - self.target_mean) / self.target_std)
        weights = None if self.class_weights is None else self.class_weights.to(outputs.device)
        return nn.functional.cross_entropy(outputs.float(), targets, weights)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        eeg, targets = batch
        loss = self.loss(self.model(eeg), targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(eeg))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss; `forward` is not compiled, since modes and short batches would each compile anew."""
        eeg, targets = batch
        outputs = self.model.forward(eeg)
        self.validated.append((outputs.float().cpu(), targets.cpu()))
        loss = self.loss(outputs, targets)
        if self.class_weights is not None:  # the mean over all windows of weight * loss, whichever batches they came in
            loss = loss * self.class_weights.to(targets.device)[targets].mean()
        self.log("val_loss", loss, batch_size=len(eeg), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log R2, or the balanced accuracy, of the validation windows of this process."""
        if not self.validated:
            return
        outputs, targets = (torch.cat(each).numpy() for each in zip(*self.validated, strict=True))
        self.validated = []
        if len(np.unique(targets)) > 1:
            score = REGRESSION["r2"] if self.regression else CLASSIFICATION["balanced_accuracy"]
            mean, std = float(self.target_mean), float(self.target_std)
            value = score(targets, outputs[:, 0] * std + mean if self.regression else outputs)
            self.log("val_r2" if self.regression else "val_balanced_accuracy", value, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the predictions in the target's unit, shape (B,), or the probabilities, shape (B, O)."""
        outputs: Tensor = self.model.forward(batch[0]).float()
        return outputs[:, 0] * self.target_std + self.target_mean if self.regression else outputs.softmax(dim=-1)

    def finished(self) -> SignalJEPAModule:
        """Return the model whose last layer gives the target in its own unit. Call it once, after training."""
        self.model.load_state_dict(in_target_unit(self.model.state_dict(), self.target_mean, self.target_std))
        return self.model.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's description: a checkpoint of this training exports like the model written at the end."""
        checkpoint["hyper_parameters"] = {SPEC_KEY: encode(self.model.spec), TRAINING_KEY: encode({ORIGIN_KEY: self.origin})}


def finetune(
    config: FinetuneConfig,
    out: Path | str,
    *,
    resume: bool = False,
    replace: bool = False,
    data: tuple[Windows, Split] | None = None,
    progress: bool = False,
    tell: Callable[[DataReport], None] = lambda report: None,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FinetuneResult:
    """Fine-tune a variant and write it into the folder `out`.

    Parameters
    ----------
    config : FinetuneConfig
        The run.
    out : Path or str
        Gets ``config.json``, ``model.safetensors`` and ``split.tsv``; checkpoints and logs go into ``out/training``.
    resume : bool
        Go on with the run in `out`.
    replace : bool
        Remove the run and the model in `out` when training starts.
    data : (Windows, Split) or None
        Windows of ``config.data`` and their parts. None: they are loaded, and split as ``config.data`` says.
    progress : bool
        Show a progress bar.
    tell : callable
        Called with what the training learns from, before it starts.
    tell_epoch : callable
        Called at the end of each epoch.

    Raises
    ------
    DataError
        If windows or labels cannot be learned from: too few, a class or all spread missing in a part, no positions. If the base
        model has seen subjects or recordings of the test part.
    CheckpointError
        If the base model does not fit.
    TrainingError
        If `out` holds a run that is not to be resumed, or another one.
    """
    out = Path(out)
    if resume:
        config = as_begun(config, out / "training")
    start = None if config.start is None else read_checkpoint(config.start, allow_left_out=config.allow_left_out)
    if start is not None:
        config = overridden(config, settings_of(start, config.data))
    check_run(out / "training", config, resume=resume, replace=replace)
    if data is None:
        loaded = load_windows(config.data)
        data = loaded, split_windows(loaded, config.data)
    windows, split = data
    check_enough(split, config.engine)
    check_targets(windows, split)
    assert windows.targets is not None
    base = None if config.pretrained is None else read_checkpoint(config.pretrained, allow_left_out=config.allow_left_out)
    known_before = base or start
    before = None if known_before is None else stored_origin(known_before.training)
    if before is not None and not config.allow_overlap:
        check_unseen(before, windows, split)
    model, transferred = _build(config, windows, base) if start is None else (start_from(start, windows), None)
    origin = origin_of(windows, split, before)
    known = windows.targets[split.train]
    weights = None if windows.class_names is None else class_weights(config, known, len(windows.class_names))
    report = report_on(windows, split, config.engine.batch_size * config.engine.world_size, weights)
    tell(report)
    pretrained = transferred is not None and bool(transferred.taken)
    module = FinetuneModule(model, config, known, origin, pretrained=pretrained)
    loaders = WindowLoaders(windows, split, config.engine)
    fitted, trainer = fit(
        module,
        loaders,
        out / "training",
        config,
        resume=resume,
        replace=replace,
        progress=progress,
        tell_epoch=tell_epoch,
        unused_parameters=True,
    )
    predictions = predict(module, loaders, trainer, split.test).numpy()
    targets = windows.targets[split.test]
    classes = None
    if module.regression:
        constant = np.full(len(targets), known.mean())
    else:
        shares = np.bincount(known, minlength=model.spec.n_outputs) / len(known)
        constant = np.tile(shares, (len(targets), 1))
        threshold = None
        if model.spec.n_outputs == 2:
            threshold = best_threshold(windows.targets[split.val], predict(module, loaders, trainer, split.val).numpy())
        weighted = np.ones(len(shares)) if weights is None else weights
        classes = ClassFacts(prevalence=tuple(shares.tolist()), weights=tuple(weighted.tolist()), threshold=threshold)
    result = FinetuneResult(
        spec=model.spec,
        transfer=transferred,
        fitted=fitted,
        test=scores(targets, predictions),
        baseline=scores(targets, constant),
        n_train=len(split.train),
        n_val=len(split.val),
        n_test=len(split.test),
        split=split.by,
        classes=classes,
    )
    if trainer.is_global_zero:
        training = {"finetuning": config, "data": report, "data_steps": windows.steps, ORIGIN_KEY: origin, "result": result}
        with saving_to(out):
            write_atomically(out / SPLIT_FILE, split_table(windows, split))
            write_checkpoint(module.finished(), out, training=training)
    return result


def class_weights(config: FinetuneConfig, targets: NDArray[Any], n_classes: int) -> NDArray[np.float64] | None:
    """Return the weights of the classes in the loss, from the training windows' classes, or None where none is weighted."""
    return balanced_weights(targets, n_classes) if config.class_weights == "balanced" and targets.dtype.kind == "i" else None


def _build(config: FinetuneConfig, windows: Windows, base: Checkpoint | None) -> tuple[SignalJEPAModule, TransferReport | None]:
    assumed: tuple[str, ...] = ()
    encoder = config.encoder or EncoderSpec()
    if base is not None:
        encoder, assumed = base_encoder(base, config.encoder)
        if config.encoder not in (None, encoder):
            raise TrainingError("The configuration's encoder is not the base model's.", "Leave it out: the base model's is used.")
    if config.variant == "contextual" and windows.signal.positions is None:
        raise DataError("The channels have no positions, which the position encoder needs.", "Name their montage with --montage.")
    spec = ModelSpec(
        variant=config.variant,
        n_outputs=1 if windows.class_names is None else len(windows.class_names),
        n_spat_filters=config.n_spat_filters,
        class_names=windows.class_names,
        encoder=encoder,
        signal=windows.signal,
    )
    if base is None:
        return build_model(spec, seed=config.engine.seed), None
    model, report = transfer(
        base,
        spec,
        seed=config.engine.seed,
        encoder_to_prelocal=config.encoder_to_prelocal,
        accept_sfreq=config.accept_sfreq,
    )
    untold = () if stored_origin(base.training) else ("the base model does not tell whose EEG it has seen",)
    return model, replace(report, notes=base.notes + report.notes + assumed + untold)


def check_targets(windows: Windows, split: Split, fold: str | None = None) -> None:
    """Refuse a part that lacks a class, or in which all numbers are equal.

    Parameters
    ----------
    windows : Windows
        All windows.
    split : Split
        Their parts.
    fold : str or None
        Name of the fold, for the message.

    Raises
    ------
    DataError
        If there is such a part.
    """
    assert windows.targets is not None
    where = "" if fold is None else f" of {fold}"
    for name in ("train", "val", "test"):
        values = set(windows.targets[getattr(split, name)].tolist())
        if windows.class_names is not None and len(values) < len(windows.class_names):
            missing = [n for i, n in enumerate(windows.class_names) if i not in values]
            raise DataError(
                f"The {name} part{where} (split by {split.by}) has no window of {listed(missing)}.",
                "Split in another way, use another fold, or give more windows of each class.",
            )
        if windows.class_names is None and len(values) < 2:
            raise DataError(
                f"All labels of the {name} part{where} (split by {split.by}) are the same.",
                "Split in another way, or use another fold.",
            )
