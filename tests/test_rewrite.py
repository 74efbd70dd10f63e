"""Each exact rewrite leaves the model's function as it is: compared with the untouched model in float64."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sjepa_deploy.export.rewrite import (
    REWRITES,
    ConstantPositions,
    EncoderLayer,
    LinearHead,
    OffsetFree,
    Product,
    RowFeatureEncoder,
    SpatialProduct,
    constant_positions,
    convolutions_as_products,
    drop_decoder,
    fold_head,
    fold_last_norm,
    fuse_attention,
    gelu,
    needed_steps,
    remove_offset,
    rewrite,
    set_precision,
    spatial_conv_as_product,
)
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.spec import EncoderSpec, ModelSpec

SMALL = EncoderSpec(n_layers=2, n_decoder_layers=1)
EXACT = 1e-13
"""Float64 rounding through a few layers; the rewrites measured at most 8e-15 of the outputs' scale."""


def random_model(variant, n_chans=5, n_times=290, encoder=SMALL, seed=0, **fields):
    """Return a float64 model whose norms and biases are random too: at their initial values a wrong rewrite could hide."""
    rng = np.random.default_rng(seed)
    positions = tuple(map(tuple, rng.uniform(-0.1, 0.1, (n_chans, 3)).tolist()))
    spec = ModelSpec.of(
        variant=variant, n_chans=n_chans, n_times=n_times, sfreq=100.0, positions=positions, encoder=encoder, **fields
    )
    model = build_model(spec, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name or name == "feature_encoder.1.2.weight" else 0.0
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def windows(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(batch, *model.spec.input_shape, generator=generator, dtype=torch.float64)


def difference(model, changed, eeg):
    with reference_mode(model), reference_mode(changed):
        want, got = model(eeg), changed(eeg)
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual", "base"])
@pytest.mark.parametrize("steps", [(step,) for step in REWRITES if step is not fold_last_norm] + [(fold_head, fold_last_norm)])
def test_a_rewrite_is_exact_in_float64(variant, steps):
    model = random_model(variant, n_outputs=2)
    changed = copy.deepcopy(model)
    for step in steps:
        step(changed)
    assert difference(model, changed, windows(model)) < EXACT


@pytest.mark.parametrize(
    ("variant", "step", "place", "kind"),
    [
        ("contextual", constant_positions, "pos_encoder", ConstantPositions),
        ("contextual", fuse_attention, "transformer.encoder.layers.1", EncoderLayer),
        ("contextual", fold_head, "final_layer", LinearHead),
        ("postlocal", fold_head, "final_layer", LinearHead),
        ("prelocal", spatial_conv_as_product, "spatial_conv", SpatialProduct),
        ("prelocal", convolutions_as_products, "feature_encoder", RowFeatureEncoder),
        ("prelocal", remove_offset, "spatial_conv", OffsetFree),
        ("postlocal", remove_offset, "feature_encoder", OffsetFree),
    ],
)
def test_a_rewrite_takes_its_place(variant, step, place, kind):
    model = random_model(variant)
    step(model)
    assert isinstance(model.get_submodule(place), kind)


def test_the_last_norm_has_no_affine_part_and_no_decoder_is_left():
    model = random_model("contextual")
    for step in (fold_head, fold_last_norm, drop_decoder):
        step(model)
    assert not model.transformer.encoder.norm.elementwise_affine
    assert not hasattr(model.transformer, "decoder")


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual", "base"])
@settings(max_examples=10, deadline=None)
@given(
    n_chans=st.integers(1, 9),
    n_times=st.integers(152, 700),
    n_outputs=st.integers(1, 3),
    n_spat_filters=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_all_rewrites_together_are_exact_for_any_spec(variant, n_chans, n_times, n_outputs, n_spat_filters, seed):
    model = random_model(variant, n_chans, n_times, seed=seed, n_outputs=n_outputs, n_spat_filters=n_spat_filters)
    changed = copy.deepcopy(model)
    for step in REWRITES:
        step(changed)
    assert difference(model, changed, windows(model)) < EXACT


def test_an_encoder_with_overlapping_convolutions_is_left_as_it_is():
    overlapping = EncoderSpec(conv_layers=((8, 32, 8), (64, 4, 2)), n_layers=1, n_decoder_layers=1)
    model = random_model("postlocal", encoder=overlapping)
    changed = copy.deepcopy(model)
    for step in REWRITES:
        step(changed)
    assert not any(isinstance(module, RowFeatureEncoder) for module in changed.modules())
    assert difference(model, changed, windows(model)) < EXACT


def test_needed_steps_of_the_default_encoder():
    """Only 16, 8, 4, 2 and 1 outputs of the five convolutions reach a token (22 are computed for the statistics)."""
    assert needed_steps([2, 2, 2, 2], 1) == (16, 8, 4, 2, 1)
    assert needed_steps([2, 2, 2, 2], 3) == (48, 24, 12, 6, 3)


def test_rewrite_leaves_the_model_alone_and_rounds_once():
    model = random_model("contextual").float()
    before = copy.deepcopy(model.state_dict())
    rewritten = rewrite(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {p.dtype for p in rewritten.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_electrode_offsets_cost_no_digits(variant):
    """With 20 mV offsets the rewritten float32 model stays within 1e-5 of float64."""
    model = random_model(variant)
    eeg = windows(model) + 20_000 * torch.rand(3, model.spec.n_chans, 1, dtype=torch.float64)
    eeg = eeg.float()
    rewritten = rewrite(model.float())
    with reference_mode(model), reference_mode(rewritten):
        want = model.double()(eeg.double())
        error = (rewritten(eeg) - want).abs().max() / want.square().mean().sqrt()
    assert error < 1e-5


def test_gelu_is_exact():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert torch.allclose(gelu(x), nn.functional.gelu(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_set_precision_types_the_products_and_nothing_else(precision, dtype):
    model = rewrite(random_model("contextual").float())
    products = {f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, Product) for p, _ in m.named_parameters()}
    set_precision(model, precision)
    typed = {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}
    assert typed == products
    assert any(name.startswith("transformer") for name in typed)
    assert any(name.startswith("feature_encoder") for name in typed)
    assert not any(name.startswith("final_layer") for name in typed)
