"""braindecode, the reference implementation of the networks, imported for real, and what the tests of models share.

A missing braindecode is a failure and not a skip: without it nothing says that our networks are the published ones.
"""

import contextlib
import os
import warnings

import numpy as np
import torch
from torch import nn

from sjepa_deploy.models.networks import reference_mode
from sjepa_deploy.runtime.bench.baselines import braindecode_model as braindecode_model
from sjepa_deploy.runtime.bench.baselines import import_braindecode
from sjepa_deploy.spec import ModelSpec

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when braindecode imports it: only local folders are loaded here

signal_jepa = import_braindecode()

CLASSES = {
    "prelocal": signal_jepa.SignalJEPA_PreLocal,
    "postlocal": signal_jepa.SignalJEPA_PostLocal,
    "contextual": signal_jepa.SignalJEPA_Contextual,
    "base": signal_jepa.SignalJEPA,
}


def chs_info(spec: ModelSpec) -> list[dict] | None:
    """Return the channels of `spec` as MNE's ``info["chs"]`` has them, as far as braindecode looks."""
    if spec.ch_names is None or spec.positions is None:
        return None
    return [{"ch_name": n, "loc": np.array(p)} for n, p in zip(spec.ch_names, spec.positions, strict=True)]


def from_pretrained(variant: str, folder) -> nn.Module:
    """Load `folder` as braindecode's users do."""
    with quiet():
        return CLASSES[variant].from_pretrained(str(folder), strict=True)


@contextlib.contextmanager
def quiet():
    """Silence what braindecode says whenever positions are lists, as in its own table and in every config.json."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Modifying chs_info argument", category=UserWarning)
        yield


def make_spec(variant: str, n_chans: int = 5, n_times: int = 200, **changes) -> ModelSpec:
    """Return a spec with `n_chans` electrodes somewhere on a head of 9 cm."""
    directions = np.random.default_rng(n_chans).normal(size=(n_chans, 3))
    places = 0.09 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    defaults = {
        "sfreq": 100.0,
        "ch_names": tuple(f"C{i}" for i in range(n_chans)),
        "positions": tuple((float(x), float(y), float(z)) for x, y, z in places),
    }
    return ModelSpec.of(variant=variant, n_chans=n_chans, n_times=n_times, **(defaults | changes))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight anew, norms and biases too: at their initial 1 and 0 a mistake could hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            elif "pos_encoder" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * (2 / weight[0].numel()) ** 0.5)
        first_norm = model.feature_encoder[1][2]  # the one norm whose name does not say so
        first_norm.weight.add_(1.0)
    return model


def eeg(spec: ModelSpec, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Return windows like EEG in microvolts, float64: a 1/f spectrum of about 20 uV, with offsets."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(batch, spec.n_chans, spec.n_times)))
    spectrum /= np.sqrt(np.maximum(1, np.arange(spectrum.shape[-1])))
    signal = np.fft.irfft(spectrum, n=spec.n_times)
    signal *= 20 / signal.std()
    return torch.from_numpy(signal + rng.normal(0, 50, (batch, spec.n_chans, 1)))


def outputs(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return what `model` makes of `windows` in the type of its weights, with the arithmetic of the reference."""
    with reference_mode(model):
        return model(windows.to(next(model.parameters()).dtype))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the scale (largest magnitude) of `expected`."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual - expected).abs().max() / expected.abs().max())
