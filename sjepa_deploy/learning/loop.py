"""Runs pretraining and fine-tuning on Lightning's loop, and makes a run repeatable and resumable.

Everything random in an epoch (order of the windows, masks, dropout) follows from the seed and the number of the epoch. A run
that was killed goes on from the last whole epoch and ends with the weights of a run that was not.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sjepa_deploy.errors import DataError, MissingDependencyError, TrainingError, TrainingStoppedError
from sjepa_deploy.learning.data import Split, Windows
from sjepa_deploy.learning.origin import data_hashes
from sjepa_deploy.learning.progress import Bar, Epoch, Watch
from sjepa_deploy.learning.run_folder import (
    BEST_FILE,
    KeepEpochs,
    WholeCheckpoints,
    check_data,
    check_run,
    go_on,
    read_checkpoint_file,
    saving_to,
    start_run,
)
from sjepa_deploy.serialize import DecodeError, decode

try:
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import callbacks, loggers
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities.exceptions import SIGTERMException
except ImportError as error:
    raise MissingDependencyError("Lightning", "train") from error

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

COMPILE: dict[str, Any] = {"dynamic": False, "mode": "reduce-overhead"}
"""Arguments of `torch.compile` for a training step.

The kernels of these small networks end before the host has launched the next ones: CUDA graphs, which the mode brings, double the
speed of the compiled step (benchmarks/results/training_speed_H100_2026-11-25.md). On a CPU the mode changes nothing.
"""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Says how a model is trained, whatever it learns.

    Attributes
    ----------
    max_epochs, patience : int
        Epochs at most, and epochs without a better validation loss after which training ends. The best epoch is kept.
    batch_size : int
        Windows of a step on each device.
    lr, weight_decay : float
        Of Adam (fine-tuning) and AdamW (pretraining).
    gradient_clip : float or None
        Largest norm of the gradient.
    seed : int
        Of everything random.
    precision : {"32-true", "bf16-mixed", "16-mixed"}
        Lightning's names.
    accelerator : {"auto", "cpu", "gpu"}
        Kind of device to train on.
    devices, num_nodes : int
        Devices of a host, and hosts; with more than one, start one process a device with torchrun.
    num_workers : int
        Processes that fetch windows.
    compile : bool
        Compile the training step with torch.compile: slow to start, then faster.
    """

    max_epochs: int = 500
    patience: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    num_workers: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("max_epochs", "patience", "batch_size", "devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}.", "Use 1 or more.")
        if not 0 < self.lr < math.inf:
            raise TrainingError(f"A learning rate of {self.lr:g} is none.", "Use a positive one.")
        for name in ("weight_decay", "seed", "num_workers"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{name} is {getattr(self, name)}.", "Use 0 or more.")
        if self.seed >= 2**62:
            raise TrainingError(f"seed is {self.seed}.", "Use a number below 2 to the power of 62.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise TrainingError(f"gradient_clip is {self.gradient_clip:g}.", "Use a positive norm, or none.")

    @property
    def world_size(self) -> int:
        """Return the number of devices of all hosts."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Says how a training run went.

    Attributes
    ----------
    best_epoch : int
        Epoch whose weights were kept, counted from 0.
    epochs : int
        Epochs that were run.
    steps : int
        Optimiser steps that were made.
    val_loss : float
        Of the best epoch.
    """

    best_epoch: int
    epochs: int
    steps: int
    val_loss: float


class WindowDataset(Dataset[Batch]):
    """Returns windows and targets for a batch of indices: one gather a batch, no loop over the windows."""

    def __init__(self, windows: Windows, indices: NDArray[Any]) -> None:
        self.indices = torch.from_numpy(indices)
        self.eeg = torch.from_numpy(windows.eeg)
        self.targets = torch.zeros(len(windows)) if windows.targets is None else torch.from_numpy(windows.targets)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, items: list[int]) -> Batch:
        """Return the EEG, shape (B, C, T), and the targets, shape (B,), of a batch."""
        rows = self.indices[items]
        return self.eeg[rows], self.targets[rows]


class WindowLoaders(lightning.LightningDataModule):
    """Makes the loaders of the three parts. Their order follows from the seed and the epoch alone."""

    def __init__(self, windows: Windows, split: Split, engine: Engine) -> None:
        super().__init__()
        self.windows, self.split, self.engine = windows, split, engine
        self.predicted = split.test

    def _loader(self, part: NDArray[Any], *, train: bool = False, whole: bool = False) -> DataLoader[Batch]:
        assert self.trainer is not None
        dataset = WindowDataset(self.windows, part)
        world, rank = (1, 0) if whole else (self.trainer.world_size, self.trainer.global_rank)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            dataset, world, rank, shuffle=train, seed=self.engine.seed, drop_last=train
        )
        return DataLoader(
            dataset,
            batch_size=self.engine.batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,
            drop_last=train,
            num_workers=self.engine.num_workers,
            persistent_workers=self.engine.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.engine.seed),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training windows, shuffled, in whole batches only."""
        return self._loader(self.split.train, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation windows in order."""
        return self._loader(self.split.val)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return all windows of `predicted`, by default those of the test part, in order, on every process."""
        return self._loader(self.predicted, whole=True)


def _as_it_is(batch: Any) -> Any:
    return batch


class SeedEpochs(callbacks.Callback):
    """Seeds every epoch by its number (and the process), so that a resumed run draws what an uninterrupted one does."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Seed PyTorch."""
        torch.manual_seed(((self.seed * 1_000_003 + trainer.current_epoch) * 4099 + trainer.global_rank) % 2**63)


class StopWhenNothingImproves(callbacks.EarlyStopping):
    """Stops a run early, and remembers the stop in a resumed run, which goes on only with more patience than it had."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of the run that is resumed, but for its patience."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop a run that had been stopped before."""
        trainer.should_stop = trainer.should_stop or (self.stopped_epoch > 0 and self.wait_count >= self.patience)


def is_first_process() -> bool:
    """Return whether this process writes and reports, of those that torchrun, or Lightning without it, started."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def check_enough(split: Split, engine: Engine) -> None:
    """Refuse a training set that does not fill one batch on every device.

    Raises
    ------
    DataError
        If so.
    """
    if len(split.train) < engine.batch_size * engine.world_size:
        raise DataError(
            f"{len(split.train)} windows to train on are fewer than a batch of {engine.batch_size} on {engine.world_size} "
            "device(s).",
            "Use a smaller --batch-size, or more data.",
        )


def compile_if_wanted(model: nn.Module, engine: Engine) -> None:
    """Compile `model` in place where `engine` says so; its weights keep their names."""
    if engine.compile:
        model.compile(**COMPILE)


def fit(
    module: lightning.LightningModule,
    loaders: WindowLoaders,
    folder: Path,
    config: object,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: bool = False,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
    unused_parameters: bool = False,
) -> tuple[Fitted, lightning.Trainer]:
    """Train `module` until its ``val_loss`` no longer falls, and give it the weights of its best epoch.

    Parameters
    ----------
    module : LightningModule
        Module to train.
    loaders : WindowLoaders
        What from.
    folder : Path
        Folder of checkpoints (``last.ckpt``, ``best.ckpt``) and logs (CSV, and TensorBoard where it is installed).
    config : dataclass
        The whole configuration of the run.
    resume : bool
        Go on from the last whole epoch of the run in `folder`.
    replace : bool
        Remove the run that is in `folder`, and the model beside it.
    progress : bool
        Show a progress bar.
    tell_epoch : callable
        Called at the end of each epoch.
    unused_parameters : bool
        Whether some parameters get no gradient in some steps, which DDP must know.

    Raises
    ------
    TrainingError
        If the folder holds a run that is not to be resumed, or another one, or one of other data or labels, or cannot be written;
        if there are no such devices here; or if the validation loss was never finite.
    TrainingStoppedError
        If a signal or a full disk stopped the run, which goes on with `resume`.
    """
    engine = loaders.engine
    last = check_run(folder, config, resume=resume, replace=replace)
    data = data_hashes(loaders.windows, loaders.split)
    if last is not None:
        check_data(folder, data)
    if is_first_process():
        with saving_to(folder):
            start_run(folder, config, data, replace=replace) if last is None else go_on(folder, config)
    kept = KeepEpochs(folder)
    watch = Watch(tell_epoch, lambda: kept.best_loss)
    log = [loggers.CSVLogger(folder, name="logs"), *_tensorboard(folder)]
    distributed = engine.world_size > 1
    with _quiet():
        try:
            trainer = lightning.Trainer(
                accelerator=engine.accelerator,
                devices=engine.devices,
                num_nodes=engine.num_nodes,
                strategy=DDPStrategy(find_unused_parameters=unused_parameters) if distributed else "auto",
                precision=engine.precision,
                max_epochs=engine.max_epochs,
                gradient_clip_val=engine.gradient_clip,
                callbacks=[
                    SeedEpochs(engine.seed),
                    StopWhenNothingImproves("val_loss", patience=engine.patience, check_on_train_epoch_end=True),
                    kept,
                    watch,
                    *([Bar(watch)] if progress else []),
                ],
                plugins=[WholeCheckpoints()],
                logger=log,
                log_every_n_steps=10,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                enable_progress_bar=progress,
                enable_model_summary=False,
            )
        except MisconfigurationException as e:
            raise TrainingError(
                f"Lightning cannot train with {engine.devices} x {engine.accelerator} here: {e}",
                "Choose another --accelerator or --devices.",
            ) from e
        with saving_to(folder), _stopping(trainer, folder):
            trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    if not math.isfinite(kept.best_loss):
        raise TrainingError("The validation loss was never finite.", "Use a smaller --lr, or look at the data.")
    best = read_checkpoint_file(folder / BEST_FILE)
    module.load_state_dict(best["state_dict"])
    fitted = Fitted(
        best_epoch=kept.best_epoch,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        val_loss=kept.best_loss,
    )
    return fitted, trainer


def predict(module: lightning.LightningModule, loaders: WindowLoaders, trainer: lightning.Trainer, rows: NDArray[Any]) -> Tensor:
    """Return the predictions of `module` for the windows of `rows`, on the CPU."""
    loaders.predicted = rows
    with _quiet():
        outputs = trainer.predict(module, datamodule=loaders)
    assert outputs is not None
    return torch.cat([output.float().cpu() for output in outputs])  # type: ignore[union-attr]


def read_config(cls: type[T], path: Path | None) -> T:
    """Read the dataclass `cls` from a YAML file, or from the one of that name in `sjepa_deploy.configs`.

    Without a `path`, return its defaults.

    Raises
    ------
    TrainingError
        If the file is missing, no YAML, or holds an unknown key or a value of the wrong type. The message names the place.
    """
    if path is None:
        return cls()
    import yaml

    configs = importlib.resources.files("sjepa_deploy") / "configs"
    shipped = sorted(file.name for file in configs.iterdir() if file.name.endswith(".yaml"))
    file = configs / path.name if not path.exists() and str(path) in shipped else path
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return decode(cls, {} if content is None else content)
    except OSError as e:
        raise TrainingError(f"{path} cannot be read ({e.strerror}).", f"Check the path, or use {', '.join(shipped)}.") from e
    except yaml.YAMLError as e:
        raise TrainingError(f"{path} is not YAML ({e}).", "Mend it.") from e
    except DecodeError as e:
        raise TrainingError(f"{path}: {e}.", "See sjepa_deploy/configs for what may be set.") from e


def _tensorboard(folder: Path) -> list[loggers.TensorBoardLogger]:
    there = importlib.util.find_spec("tensorboard") is not None
    return [loggers.TensorBoardLogger(folder, name="tensorboard")] if there else []


@contextmanager
def _stopping(trainer: lightning.Trainer, folder: Path) -> Iterator[None]:
    """Turn the exits that Lightning makes of SIGTERM and of Ctrl-C into a training that was stopped."""
    try:
        yield
    except SystemExit as e:
        name, number = ("SIGTERM", signal.SIGTERM) if isinstance(e, SIGTERMException) else ("Ctrl-C", signal.SIGINT)
        raise TrainingStoppedError(
            f"{name} stopped the training in epoch {trainer.current_epoch + 1}; the epochs before it are saved in {folder}.",
            "Go on with --resume.",
            exit_code=128 + number,
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice (workers, log intervals, folders that are not empty) out of the way of what matters."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for module in (r"lightning\..*", r"torch\.utils\.tensorboard.*", r"tensorboard\..*", r"torch\.jit.*"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        log.setLevel(level)
