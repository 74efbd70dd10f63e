"""Small bundles that the engine tests share."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Variant

_FOLDER = tempfile.TemporaryDirectory(prefix="sjepa-engine-tests-")


@functools.cache
def small_bundle(variant: Variant) -> Bundle:
    """Return a bundle of a model with 10 channels, two transformer layers and three outputs."""
    positions = tuple(map(tuple, np.random.default_rng(0).uniform(-0.1, 0.1, (10, 3)).tolist()))
    spec = ModelSpec.of(
        variant=variant,
        n_chans=10,
        n_times=200,
        sfreq=100.0,
        n_outputs=3,
        positions=positions,
        ch_names=tuple("abcdefghij"),
        encoder=EncoderSpec(n_layers=2, n_decoder_layers=1),
    )
    weights = Provenance(source="random", format="initialisation", seed=0)
    return to_bundle(build_model(spec, seed=0), Path(_FOLDER.name) / variant, weights=weights, max_batch=8)
