"""Tells how a training goes: a line for each epoch, or a bar with losses, score and an estimate of the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import lightning
from lightning.pytorch import callbacks


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Holds what one epoch brought.

    Attributes
    ----------
    number, of : int
        Number of the epoch from 1, and the largest number of epochs.
    values : dict of str to float
        Losses and score by the names that they are logged under.
    best : float
        Lowest validation loss so far.
    seconds : float
        Duration of the epoch.
    rest_s : float
        Seconds to the last epoch, if the run does not end before because nothing improves.
    """

    number: int
    of: int
    values: dict[str, float]
    best: float
    seconds: float
    rest_s: float

    def __str__(self) -> str:
        """Return the epoch as a line."""
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        rest = f"at most {clock(self.rest_s)} left" if self.number < self.of else "the last one"
        return f"epoch {self.number} of {self.of}: {values} (best val_loss {self.best:.4g}), {self.seconds:.1f} s, {rest}"


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _values(trainer: lightning.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Watch(callbacks.Callback):
    """Times epochs, and hands each to `tell`. `best` returns the lowest validation loss of the epochs before."""

    def __init__(self, tell: Callable[[Epoch], None], best: Callable[[], float]) -> None:
        self.tell, self.best = tell, best
        self.durations: list[float] = []
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell the epoch: its validation has been done."""
        self.durations.append(time.monotonic() - self._start)
        values = _values(trainer)
        if trainer.is_global_zero:
            self.tell(
                Epoch(
                    number=trainer.current_epoch + 1,
                    of=trainer.max_epochs or 0,
                    values=values,
                    best=min(self.best(), values["val_loss"]),
                    seconds=self.durations[-1],
                    rest_s=self.rest(trainer),
                )
            )

    def rest(self, trainer: lightning.Trainer) -> float:
        """Return the seconds to the last epoch, by the mean of the last five."""
        recent = self.durations[-5:]
        left = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        return sum(recent) / len(recent) * left if recent else 0.0


class Bar(callbacks.RichProgressBar):
    """Shows losses, score and the rest beside the bar of an epoch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands beside the bar."""
        shown: dict[str, int | str | float | dict[str, float]] = {
            name: f"{value:.3g}" for name, value in _values(trainer).items()
        }
        return shown | ({"left at most": clock(self.watch.rest(trainer))} if self.watch.durations else {})
