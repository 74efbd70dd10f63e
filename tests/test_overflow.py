"""What is too large for float16 is named: a weight before the export, a product after it."""

import numpy as np
import pytest
import torch
from bundles import RANDOM, small_spec

from sjepa_deploy.errors import ExportError
from sjepa_deploy.export import to_bundle as exporting
from sjepa_deploy.export.to_bundle import ExportParityError, to_bundle
from sjepa_deploy.models.networks import build_model

LARGEST = float(np.finfo(np.float16).max)


def export(model, path, *precisions):
    return to_bundle(model, path, weights=RANDOM, precisions=precisions, max_batch=2)


def with_scaled(variant, changes):
    """Return a model whose named weights are multiplied."""
    model = build_model(small_spec(variant), seed=0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, factor in changes.items():
            parameters[name].mul_(factor)
    return model


def test_a_weight_beyond_float16_is_named_before_anything_is_exported(tmp_path, monkeypatch):
    model = with_scaled("postlocal", {"feature_encoder.4.0.weight": 1e7, "final_layer.linear.weight": 1e-6})
    largest = model.feature_encoder[4][0].weight.abs().max().item()
    assert largest > LARGEST
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "to_onnx", lambda *_, **__: pytest.fail("the weights are judged first"))
        with pytest.raises(ExportError) as caught:
            export(model, tmp_path / "b", "fp32", "fp16")
    for word in ("feature_encoder", "weight", f"{largest:.3g}", "65,504", "fp16", "bf16"):
        assert word in str(caught.value), word
    assert not list(tmp_path.iterdir())


def test_a_product_that_overflows_float16_is_named_with_its_window(tmp_path):
    """All its weights fit into float16, its results do not."""
    model = with_scaled("postlocal", {"feature_encoder.3.0.weight": 3e4, "final_layer.linear.weight": 1e-6})
    assert all(weight.abs().max() < LARGEST for weight in model.parameters())
    with pytest.raises(ExportParityError) as caught:
        export(model, tmp_path / "b", "fp32", "fp16")
    for word in ("products.", "65,504", "fp16", "eeg 0", "--precision fp32"):
        assert word in str(caught.value), word
    assert "report this" not in str(caught.value)
    assert export(model, tmp_path / "b", "fp32").precisions == ("fp32",)
