"""Draws the channels that a pretraining step hides: spatial masks, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sjepa_deploy.eeg.montage import fit_sphere
from sjepa_deploy.errors import SpecError
from sjepa_deploy.spec import Position


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Says how channels are hidden.

    Attributes
    ----------
    mode : {"block", "fixed"}
        "block" (the paper): a random centre channel and every channel within `radius` are hidden, all others are visible.
        "fixed" (the author's published configuration): every context sees exactly `n_visible` channels and predicts
        `n_targets` targets of exactly `n_hidden` channels each.
    radius : float
        Radius of a block in head radii; the paper's diameters of 40, 60 and 80 % of the head are 0.4, 0.6 and 0.8.
    n_contexts, n_targets : int or None
        Contexts per example, and targets per context. By default 1 and 1 ("block"), 8 and 2 ("fixed").
    n_visible, n_hidden : int
        Channels of a context and of a target in mode "fixed".
    """

    mode: Literal["block", "fixed"] = "block"
    radius: float = 0.6
    n_contexts: int | None = None
    n_targets: int | None = None
    n_visible: int = 8
    n_hidden: int = 8

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise SpecError(f"A mask's radius of {self.radius:g} head radii is none.", "Use a positive radius, such as 0.6.")
        counts = {n: getattr(self, n) for n in ("n_contexts", "n_targets", "n_visible", "n_hidden")}
        if low := [name for name, value in counts.items() if value is not None and value < 1]:
            raise SpecError(f"{low[0]} is {counts[low[0]]}.", "Use 1 or more.")
        if self.mode == "block" and (self.n_targets or 1) > 1:
            raise SpecError("A block mask has one target a context.", "Leave n_targets out, or use the mode 'fixed'.")

    @property
    def contexts(self) -> int:
        """Return the number of contexts per example."""
        return self.n_contexts or (1 if self.mode == "block" else 8)

    @property
    def targets(self) -> int:
        """Return the number of targets per context."""
        return self.n_targets or (1 if self.mode == "block" else 2)


class Masks(NamedTuple):
    """Holds the channels that G contexts see (V at most) and that their K targets hide (H at most each).

    Attributes
    ----------
    visible, hidden : Tensor of int64, shapes (G, V) and (G, K, H)
        Channel indices. G is batch * contexts, example-major.
    visible_padding, hidden_padding : Tensor of bool or None
        True where an index only fills up the row; None where every row is full. Same shapes.
    """

    visible: Tensor
    hidden: Tensor
    visible_padding: Tensor | None
    hidden_padding: Tensor | None


def within_radius(positions: tuple[Position, ...], radius: float) -> Tensor:
    """Return a mask of the channels that lie within `radius` head radii of each other, shape (C, C), the channel itself included.

    The head's radius is that of the sphere that fits the electrodes best: with it, blocks of radius 0.4/0.6/0.8 hold the
    3.8/7.1/12.2 of 62 and 6.3/14.1/23.4 of 129 HydroCel channels that the paper's masks hide.
    """
    points = np.array(positions)
    _, head_radius = fit_sphere(points)
    return torch.from_numpy(np.linalg.norm(points[:, None] - points, axis=-1) <= radius * head_radius)


class MaskSampler(nn.Module):
    """Draws masks for the channels at `positions`, on the device it is moved to, without a loop or a synchronisation.

    Parameters
    ----------
    masking : Masking
        Configuration of the masks.
    positions : tuple of (float, float, float)
        Positions of the channels in metres.

    Raises
    ------
    SpecError
        If a mask would leave no channel visible, or there are too few channels for the fixed sizes.
    """

    near: Tensor

    def __init__(self, masking: Masking, positions: tuple[Position, ...]) -> None:
        super().__init__()
        self.masking = masking
        self.n_chans = len(positions)
        near = within_radius(positions, masking.radius)
        if near.all(dim=1).any():
            raise SpecError(
                f"A block of radius {masking.radius:g} hides all {self.n_chans} channels.",
                "Use a smaller radius for this montage.",
            )
        if masking.mode == "fixed" and self.n_chans < masking.n_visible + masking.targets * masking.n_hidden:
            raise SpecError(
                f"{masking.n_visible} visible and {masking.targets} x {masking.n_hidden} hidden channels are more than the "
                f"montage's {self.n_chans}.",
                "Use fewer, or the mode 'block'.",
            )
        self.register_buffer("near", near, persistent=False)
        for name, members in (("hidden", near), ("visible", ~near)):
            indices, padding = _rows(members)
            self.register_buffer(name, indices, persistent=False)
            self.register_buffer(f"{name}_padding", padding, persistent=False)

    def forward(self, batch: int, generator: torch.Generator | None = None) -> Masks:
        """Draw the masks of `batch` examples."""
        groups = batch * self.masking.contexts
        if self.masking.mode == "block":
            centre = torch.randint(self.n_chans, (groups,), generator=generator, device=self.near.device)
            visible, visible_padding = self.get_buffer("visible")[centre], self.get_buffer("visible_padding")[centre]
            hidden, hidden_padding = self.get_buffer("hidden")[centre], self.get_buffer("hidden_padding")[centre]
            return Masks(visible, hidden[:, None], visible_padding, hidden_padding[:, None])
        return self._fixed(groups, generator)

    def _fixed(self, groups: int, generator: torch.Generator | None) -> Masks:
        """Draw targets out of blocks (topped up from outside where a block is too small), then contexts out of the rest."""
        device, n_targets = self.near.device, self.masking.targets
        centre = torch.randint(self.n_chans, (groups, n_targets), generator=generator, device=device)
        order = torch.rand((groups, n_targets, self.n_chans), generator=generator, device=device)
        blocks = self.near[centre]
        hidden = (order - blocks.float()).topk(self.masking.n_hidden, dim=-1, largest=False).indices
        taken = torch.zeros(blocks.shape, device=device).scatter_(-1, hidden, 1.0)
        # Never a hidden channel; another one of the blocks only where the rest of the head is too small.
        cost = torch.rand((groups, self.n_chans), generator=generator, device=device)
        cost = cost + blocks.any(dim=1).float() + 2 * taken.amax(dim=1)
        visible = cost.topk(self.masking.n_visible, dim=-1, largest=False).indices
        return Masks(visible, hidden, None, None)


def _rows(members: Tensor) -> tuple[Tensor, Tensor]:
    """Return the members of each row of a (C, C) table as indices, filled up to the longest row, and where that was done."""
    count = members.sum(dim=1)
    longest = int(count.max())
    indices = (~members).int().argsort(dim=1, stable=True)[:, :longest]
    return indices, torch.arange(longest) >= count[:, None]
