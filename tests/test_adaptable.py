"""A backend whose last layer can be replaced: its features are PyTorch's, its outputs those of the layer that it is given."""

import numpy as np
import pytest
import torch
from bundles import RANDOM, small_spec
from oracle import randomise

import sjepa_deploy
from sjepa_deploy.errors import BackendError
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.last_layer import LastLayer
from sjepa_deploy.learning.calibrate import features_of, last_layer_of, with_last_layer
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.onnx_file import input_of, with_output


@pytest.mark.parametrize(
    ("variant", "precision"), [("prelocal", "fp32"), ("prelocal", "fp16"), ("postlocal", "fp32"), ("contextual", "fp32")]
)
def test_features_are_those_of_the_pytorch_model(variant, precision, tmp_path):
    model = randomise(build_model(small_spec(variant), seed=1)).eval()
    to_bundle(model, tmp_path / "bundle", weights=RANDOM, precisions=(precision,), max_batch=4)
    eeg = np.random.default_rng(0).normal(0, 20, (3, *model.spec.input_shape)).astype(np.float32)
    expected = features_of(model, eeg)
    with sjepa_deploy.load(tmp_path / "bundle", precision=precision) as predict:
        before = predict(eeg)
        backend = predict.adaptable()
        scale = np.abs(before).max()
        np.testing.assert_allclose(predict(eeg), before, atol=1e-6 * scale)
        tolerance = 1e-5 if precision == "fp32" else 5e-3
        for batch in (3, 1, 2, 3, 1):
            predict(eeg[:batch])
            np.testing.assert_allclose(backend.features, expected[:batch], atol=tolerance * np.abs(expected).max())
        own = predict(eeg)
        rng = np.random.default_rng(1)
        layer = LastLayer(weight=rng.normal(size=(3, expected.shape[1])), bias=rng.normal(size=3))
        backend.last_layer = layer
        with reference_mode(model):
            wanted = with_last_layer(model, layer)(torch.from_numpy(eeg)).numpy()
        np.testing.assert_allclose(predict(eeg), wanted, atol=tolerance * np.abs(wanted).max())
        backend.last_layer = last_layer_of(model)
        np.testing.assert_allclose(predict(eeg), own, atol=tolerance * scale)
        backend.last_layer = None
        assert predict(eeg).tobytes() == own.tobytes()
        assert predict.adaptable() is backend


def test_what_has_no_last_layer_is_refused(make_bundle):
    with sjepa_deploy.load(make_bundle("base")) as predict, pytest.raises(BackendError, match="no last layer"):
        predict.adaptable()
    with sjepa_deploy.load(make_bundle("prelocal"), backend="torch") as predict, pytest.raises(BackendError, match="ort-cpu"):
        predict.adaptable()
    graph = make_bundle("prelocal").graph_path("fp32").read_bytes()
    with pytest.raises(ValueError, match="gives nothing"):
        input_of(graph, "nothing")
    assert with_output(graph, "x" * 300).startswith(graph)
