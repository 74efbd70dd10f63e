"""Trains a model on few windows in memory: a plain loop without a folder, checkpoints and logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sjepa_deploy.learning.metrics import balanced_weights
from sjepa_deploy.models.networks import SignalJEPAModule


def train_briefly(
    model: SignalJEPAModule,
    eeg: NDArray[np.float32],
    targets: NDArray[Any],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    balanced: bool = True,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Train `model` in place with Adam, in the modes (training or not) in which its parts are.

    Classes are learned with the cross-entropy, numbers with the mean square error. All that is random follows from `seed`.

    Parameters
    ----------
    model : SignalJEPAModule
        The model.
    eeg : ndarray of float32, shape (n, n_chans, n_times)
        The windows.
    targets : ndarray, shape (n,)
        Numbers of the classes (int64), or numbers.
    epochs, lr, batch_size, seed
        Epochs, learning rate, windows of a step, and the seed of their order and of dropout.
    balanced : bool
        Whether each class counts alike, however rare it is.
    parameters : iterable of Parameter or None
        What learns; None for all weights that take a gradient.
    """
    learned = [each for each in (model.parameters() if parameters is None else parameters) if each.requires_grad]
    optimiser = torch.optim.Adam(learned, lr=lr)
    windows = torch.tensor(eeg)  # a copy: the caller's array may be read-only
    classify = targets.dtype.kind in "iu"
    wanted = torch.tensor(targets, dtype=torch.int64 if classify else torch.float32)
    weights = None
    if classify and balanced:
        weights = torch.from_numpy(balanced_weights(targets, max(2, model.spec.n_outputs))).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(windows)).split(batch_size):  # type: ignore[no-untyped-call]
                optimiser.zero_grad()
                outputs = model(windows[rows])
                if classify:
                    logits = torch.cat([torch.zeros_like(outputs), outputs], dim=1) if outputs.shape[1] == 1 else outputs
                    loss = nn.functional.cross_entropy(logits, wanted[rows], weights)
                else:
                    loss = nn.functional.mse_loss(outputs[:, 0], wanted[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
