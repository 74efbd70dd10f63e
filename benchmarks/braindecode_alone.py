"""braindecode's SignalJEPA from its one file, and the step of pretraining around its modules."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import nn

from sjepa_deploy.learning.pretrain import JEPA


def load_braindecode(file: Path) -> types.ModuleType:
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
