import copy

import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import braindecode_model, difference, eeg, make_spec, outputs, randomise

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.errors import SpecError
from sjepa_deploy.models.networks import MODELS, SignalJEPA_Contextual, build_model, encode_positions, encode_time, reference_mode
from sjepa_deploy.spec import VARIANTS, EncoderSpec, ModelSpec

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-6
POSITION_TOLERANCE = 5e-6  # braindecode's float32 rounding of phases up to 53

# (channels, samples, spatial filters, outputs, batch): time tokens
SHAPES = {
    (1, 152, 1, 1, 3): 1,
    (1, 200, 4, 2, 2): 1,
    (2, 279, 3, 1, 2): 1,
    (3, 280, 4, 4, 2): 2,
    (8, 408, 2, 3, 4): 3,
    (19, 256, 4, 1, 2): 1,
    (32, 200, 8, 5, 2): 1,
    (22, 600, 5, 2, 2): 4,
    (64, 300, 1, 26, 1): 2,
    (129, 200, 4, 1, 2): 1,
    (1, 2048, 4, 1, 2): 15,
    (62, 2048, 4, 4, 1): 15,
}


def twins(spec, seed=0):
    """Return our model and braindecode's with the same random weights."""
    ours, theirs = build_model(spec, seed=seed), braindecode_model(spec)
    randomise(ours, seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def hydrocel_spec(variant, **changes):
    montage = read_montage("GSN-HydroCel-129")
    return make_spec(variant, 129, ch_names=montage.ch_names, positions=montage.positions, **changes)


# ---------------------------------------------------------------- the same function as braindecode


@pytest.mark.parametrize(("shape", "n_tokens"), list(SHAPES.items()), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_braindecodes(variant, shape, n_tokens):
    n_chans, n_times, n_spat_filters, n_outputs, batch = shape
    spec = make_spec(variant, n_chans, n_times, n_spat_filters=n_spat_filters, n_outputs=n_outputs)
    ours, theirs = twins(spec, seed=n_chans + n_times)
    windows = eeg(spec, batch)
    actual, expected = outputs(ours, windows), outputs(theirs, windows)
    assert actual.shape == (batch, *spec.output_shape)
    assert difference(actual, expected) <= FLOAT32_TOLERANCE
    actual, expected = outputs(ours.double(), windows), outputs(theirs.double(), windows)
    assert difference(actual, expected) <= FLOAT64_TOLERANCE
    assert expected.std() > 1e-3  # outputs that do not move would prove nothing
    assert spec.n_tokens_per_channel == n_tokens


def test_the_grid_is_as_large_as_promised():
    assert len(VARIANTS) * len(SHAPES) >= 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_braindecodes_dropout_and_gradients(variant):
    spec = make_spec(variant, 4, 280, n_outputs=2, encoder=EncoderSpec(drop_prob=0.2, n_layers=2, n_decoder_layers=1))
    ours, theirs = (model.train().double() for model in twins(spec))
    windows = eeg(spec)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        result = model(windows)
        result.square().sum().backward()
        results.append(result.detach())
    assert difference(*results) <= FLOAT64_TOLERANCE
    assert difference(results[0], outputs(ours, windows)) > 0.01  # dropout acts
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        if name.startswith("transformer.decoder"):
            assert weight.grad is None
            assert gradients[name] is None
        else:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-9, atol=1e-12 * float(weight.grad.abs().max()))


@st.composite
def specs(draw):
    """Models of any shape, small enough to build many."""
    variant = draw(st.sampled_from(VARIANTS))
    spat_dim = draw(st.sampled_from([6, 12, 30]))
    time_dim = draw(st.integers(1, 8)) * 4 + (-spat_dim) % 4
    kernels = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)), max_size=3))
    last = (spat_dim + time_dim, draw(st.integers(1, 5)), draw(st.integers(1, 3)))
    encoder = EncoderSpec(
        conv_layers=(*kernels, last),
        spat_dim=spat_dim,
        time_dim=time_dim,
        sfreq_features=draw(st.sampled_from([0.5, 1.0, 2.0])),
        n_layers=draw(st.integers(1, 2)),
        n_decoder_layers=draw(st.integers(1, 2)),
        n_heads=draw(st.sampled_from([2, 4])),  # torch warns of an odd number
    )
    return make_spec(
        variant,
        draw(st.integers(1, 9)),
        encoder.min_n_times + draw(st.integers(0, 40)),
        n_outputs=draw(st.integers(1, 5)),
        n_spat_filters=draw(st.integers(1, 5)),
        encoder=encoder,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=specs(), batch=st.integers(1, 3))
def test_any_model_has_braindecodes_shapes_and_values(spec, batch):
    assume(spec.encoder.n_outputs_of_layers(spec.n_times)[0] > 1)  # torch refuses to normalise a single value
    ours, theirs = (model.double() for model in twins(spec))
    windows = eeg(spec, batch)
    actual, expected = outputs(ours, windows), outputs(theirs, windows)
    assert actual.shape == expected.shape == (batch, *spec.output_shape)
    assert difference(actual, expected) <= FLOAT64_TOLERANCE


# ---------------------------------------------------------------- the same parameters as braindecode


@pytest.mark.parametrize(
    ("variant", "n_parameters"), [("base", 3_458_862), ("prelocal", 14_617), ("postlocal", 14_617), ("contextual", 3_459_639)]
)
def test_parameters_with_129_channels(variant, n_parameters):
    model = build_model(hydrocel_spec(variant), seed=0)
    assert sum(weight.numel() for weight in model.parameters()) == n_parameters
    decoder = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith("transformer.decoder."))
    assert decoder == (1_191_808 if variant in ("base", "contextual") else 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_move_both_ways(variant):
    spec = make_spec(variant, 7, 280, n_outputs=3, n_spat_filters=2)
    ours, theirs = build_model(spec, seed=0), braindecode_model(spec)
    shapes = [{key: tuple(weight.shape) for key, weight in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    windows = eeg(spec)
    for seed, source, target in ((1, ours, theirs), (2, theirs, ours)):
        randomise(source, seed)
        shuffled = dict(reversed(source.state_dict().items()))
        assert difference(outputs(target, windows), outputs(source, windows)) > 0.01
        target.load_state_dict(shuffled, strict=True)
        assert difference(outputs(target, windows), outputs(source, windows)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["GSN-HydroCel-129", "sjepa-62"])
def test_initial_channel_embedding_equals_braindecodes(name):
    montage = read_montage(name)
    n_chans = len(montage.ch_names)
    spec = make_spec("base", n_chans, ch_names=montage.ch_names, positions=montage.positions)
    expected = braindecode_model(spec).pos_encoder.pos_encoder_spat.weight.detach()
    ours = build_model(spec, seed=0).pos_encoder.pos_encoder_spat.weight.detach()
    torch.testing.assert_close(ours, expected, rtol=0, atol=POSITION_TOLERANCE)
    torch.testing.assert_close(encode_positions(montage.positions, 30), ours, rtol=0, atol=0)
    assert len(ours.unique(dim=0)) == n_chans


def test_the_shipped_62_channels_are_braindecodes():
    montage = read_montage("sjepa-62")
    expected = oracle.signal_jepa._PRETRAIN_CHS_INFO
    assert montage.ch_names == tuple(ch["ch_name"] for ch in expected)
    torch.testing.assert_close(torch.tensor(montage.positions), torch.tensor([ch["loc"] for ch in expected]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["conv", "linear", "transformer"])
def test_initial_weights_have_braindecodes_spread(name):
    key = {"conv": "feature_encoder.5.0.weight", "linear": "final_layer.linear.weight", "transformer": "linear1.weight"}[name]
    spec = make_spec("contextual", n_outputs=20)
    spreads = []
    for model in (build_model(spec, seed=1), braindecode_model(spec)):
        spreads.append(next(weight for k, weight in model.state_dict().items() if k.endswith(key)).std())
    assert spreads[0] == pytest.approx(float(spreads[1]), rel=0.05)


@pytest.mark.parametrize(
    ("n_tokens", "dim", "max_n_tokens"), [(1, 34, 600), (15, 34, 600), (600, 34, 600), (7, 2, 10), (9, 64, 1200)]
)
def test_time_encoding_equals_braindecodes(n_tokens, dim, max_n_tokens):
    expected = oracle.signal_jepa._pos_encode_time(n_tokens, dim, max_n_tokens)
    torch.testing.assert_close(encode_time(n_tokens, dim, max_n_tokens), expected, rtol=0, atol=0)


def test_dimensions_beyond_the_position_encoding_are_zero():
    """braindecode leaves them uninitialised (`new_empty`), so it is no oracle here."""
    encoder = EncoderSpec(conv_layers=((8, 32, 8), (80, 2, 2)), n_layers=1)
    encoding = build_model(make_spec("base", encoder=encoder), seed=0).pos_encoder()
    assert encoding.shape[1] == 80
    assert not encoding[:, 64:].any()
    assert encoding[:, :64].any(dim=0).sum() > 60


# ---------------------------------------------------------------- what the inputs do (the traps that were measured)


def change(model, windows, changed):
    """Return the relative change of the outputs (RMS), in float64."""
    before, after = outputs(model.double(), windows), outputs(model, changed)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("variant", ["postlocal", "contextual", "base"])
def test_gain_and_offset_of_a_channel_do_not_matter_where_it_is_normalised_alone(variant):
    spec = make_spec(variant, 19, n_outputs=3)
    model = randomise(build_model(spec, seed=0))
    gain = torch.linspace(0.5, 3, 19, dtype=torch.float64)[:, None]
    windows = eeg(spec)
    assert change(model, windows, windows * gain) < 1e-6
    assert change(model, windows, windows + 1000 * gain) < 1e-6


def test_prelocal_reacts_to_the_gain_of_a_channel():
    spec = make_spec("prelocal", 19, n_outputs=3)
    windows = eeg(spec)
    gain = torch.linspace(0.5, 3, 19, dtype=torch.float64)[:, None]
    assert change(randomise(build_model(spec, seed=0)), windows, windows * gain) > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_volts_for_microvolts_change_the_outputs_without_an_error(variant):
    spec = make_spec(variant, 19, n_outputs=3)
    windows = eeg(spec)
    assert change(randomise(build_model(spec, seed=0)), windows, windows * 1e-6) > 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_after_the_last_token_act_only_through_the_norm(variant):
    """Of 200 samples the token is made of 152: the newest 0.48 s carry a few percent of the gradient."""
    spec = make_spec(variant, 19, n_times=200)
    model = randomise(build_model(spec, seed=0)).double().eval()
    windows = eeg(spec).requires_grad_()
    model(windows).sum().backward()
    share = windows.grad[..., 152:].abs().sum() / windows.grad.abs().sum()
    assert 0.001 < share < 0.15


@pytest.mark.parametrize("variant", VARIANTS)
def test_152_samples_run_on_the_weights_of_200(variant):
    spec = make_spec(variant, n_times=200)
    shorter = build_model(spec.replace(n_times=152), seed=1)
    shorter.load_state_dict(build_model(spec, seed=0).state_dict(), strict=True)
    assert spec.replace(n_times=152).output_shape == spec.output_shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_of_a_batch_do_not_see_each_other(variant):
    spec = make_spec(variant, 6, 280, n_outputs=2)
    model = randomise(build_model(spec, seed=0)).double()
    windows = eeg(spec, batch=3)
    alone = torch.cat([outputs(model, window[None]) for window in windows])
    assert difference(outputs(model, windows), alone) <= FLOAT64_TOLERANCE


# ---------------------------------------------------------------- building, and the mode of the reference


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_makes_the_same_weights_and_leaves_the_generator_alone(variant):
    spec = make_spec(variant, encoder=EncoderSpec(n_layers=1, n_decoder_layers=1))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second, other = (build_model(spec, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["feature_encoder.1.0.weight"], other["feature_encoder.1.0.weight"])


def test_without_a_seed_the_generator_decides():
    spec = make_spec("prelocal")
    key = "feature_encoder.1.0.weight"
    first, second = (build_model(spec).state_dict()[key] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_class_is_the_variants_and_knows_its_spec(variant):
    model = build_model(make_spec(variant), seed=0)
    assert type(model) is MODELS[variant]
    assert model.spec == make_spec(variant)
    assert type(model).__name__ == type(braindecode_model(make_spec(variant))).__name__


@pytest.mark.parametrize("variant", ["contextual", "postlocal"])
def test_the_spatial_filter_is_reached_by_the_cards_name(variant):
    model = build_model(make_spec(variant, 9, n_spat_filters=3), seed=0)
    assert model.spatial_filter.weight.shape == (3, 1, 9, 1, 1)
    assert model.spatial_filter.weight is model.get_parameter("final_layer.spat_conv.weight")


@pytest.mark.parametrize("variant", ["contextual", "base"])
def test_positions_are_asked_for_where_they_are_needed(variant):
    spec = make_spec(variant).replace(positions=None)
    with pytest.raises(SpecError, match=f"The {variant} model needs the positions of its channels.*Name a montage"):
        build_model(spec)


@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_a_channel_count_is_enough_without_a_position_encoder(variant):
    spec = ModelSpec.of(variant=variant, n_chans=3, n_times=200, sfreq=100.0)
    assert outputs(build_model(spec), eeg(spec)).shape == (2, 1)


class TestReferenceMode:
    @pytest.fixture
    def model(self):
        return build_model(make_spec("contextual", encoder=EncoderSpec(n_layers=1, n_decoder_layers=1)), seed=0)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("fast_path", [True, False])
    def test_everything_is_restored(self, model, training, fast_path):
        before = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            model.train(training)
            with reference_mode(model):
                assert not model.training
                assert not model.transformer.encoder.layers[0].dropout.training
                assert not torch.is_grad_enabled()
                assert not torch.backends.mha.get_fastpath_enabled()
            assert model.training == model.transformer.encoder.layers[0].dropout.training == training
            assert torch.is_grad_enabled()
            assert torch.backends.mha.get_fastpath_enabled() == fast_path
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    def test_also_after_an_error(self, model):
        model.train()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(RuntimeError), reference_mode(model):
            model(torch.zeros(1, 5, 10))
        assert model.training
        assert torch.backends.mha.get_fastpath_enabled() == fast_path

    def test_nothing_is_random(self, model):
        model.train()
        windows = eeg(model.spec)
        assert torch.equal(outputs(model, windows), outputs(copy.deepcopy(model), windows))

    def test_it_is_the_function_that_is_trained(self, model):
        """The fast path computes the same up to rounding; a mode that differed by more would be another model."""
        model = randomise(model).eval()
        windows = eeg(model.spec).float()
        with torch.no_grad():
            fast = model(windows)
        assert isinstance(model, SignalJEPA_Contextual)
        assert difference(outputs(model, windows), fast) < 1e-4
