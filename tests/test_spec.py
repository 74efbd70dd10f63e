import math
import re

import pytest
import torch
from bundles import small_spec
from hypothesis import assume, given
from hypothesis import strategies as st

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.errors import SpecError
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, Preprocessing

LAYER = (64, 4, 2)
HYDROCEL = read_montage("GSN-HydroCel-129")


# ---------------------------------------------------------------- what follows from a spec


@pytest.mark.parametrize(("n_times", "n_tokens"), [(152, 1), (200, 1), (256, 1), (280, 2), (408, 3), (2048, 15)])
def test_time_tokens_of_the_published_encoder(n_times, n_tokens):
    assert EncoderSpec().min_n_times == 152
    spec = small_spec(n_times=n_times)
    assert spec.n_tokens_per_channel == n_tokens == 1 + (n_times - 152) // 128


@given(
    layers=st.lists(st.tuples(st.just(64), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4),
    more=st.integers(0, 40),
)
def test_steps_equal_those_of_convolutions(layers, more):
    encoder = EncoderSpec(conv_layers=tuple(layers))
    x = torch.zeros(1, 1, encoder.min_n_times + more)
    shortest = torch.zeros(1, 1, encoder.min_n_times)
    steps = []
    for _, kernel, stride in layers:
        weight = torch.zeros(1, 1, kernel)
        x, shortest = (torch.nn.functional.conv1d(signal, weight, stride=stride) for signal in (x, shortest))
        steps.append(x.shape[-1])
    assert encoder.n_outputs_of_layers(encoder.min_n_times + more) == tuple(steps)
    assert shortest.shape[-1] == 1


@pytest.mark.parametrize("layers", [((64, 5, 2), (64, 3, 3)), ((64, 32, 8), (64, 2, 2))])
def test_one_sample_less_than_the_least_gives_no_token(layers):
    encoder = EncoderSpec(conv_layers=layers)
    assert encoder.n_outputs_of_layers(encoder.min_n_times)[-1] == 1
    assert encoder.n_outputs_of_layers(encoder.min_n_times - 1)[-1] == 0


def test_shapes_and_names_of_input_and_output():
    spec = small_spec("contextual", n_times=280)
    assert (spec.input_shape, spec.output_shape) == ((8, 280), (3,))
    assert (spec.input_name, spec.output_name) == ("eeg", "prediction")
    base = spec.replace(variant="base")
    assert (base.output_shape, base.output_name) == ((16, 64), "features")
    assert [small_spec(v).needs_positions for v in ("prelocal", "postlocal", "contextual", "base")] == [False, False, True, True]


def test_a_local_model_takes_any_length_and_a_transformer_600_seconds_of_tokens():
    longest = 152 + 599 * 128
    assert small_spec("contextual", n_times=longest + 127).n_tokens_per_channel == 600
    assert small_spec("postlocal", n_times=longest + 128).n_tokens_per_channel == 601
    with pytest.raises(SpecError, match=r"76952 samples make 601 time tokens.*\(600\)\. Use shorter windows"):
        small_spec("contextual", n_times=longest + 128)


@given(st.floats(1.0, 1e5))
def test_the_default_preprocessing_suits_any_rate(sfreq):
    assume(math.isfinite(sfreq))
    preprocessing = Preprocessing.default(sfreq)
    assert preprocessing.h_freq == (40.0 if sfreq > 80 else None)
    assert preprocessing.l_freq == (0.5 if sfreq > 1 else None)
    assert small_spec(sfreq=sfreq, preprocessing=preprocessing).signal.steps == preprocessing.steps


def test_specs_are_values():
    assert small_spec() == small_spec()
    assert len({small_spec(), small_spec(), small_spec(n_outputs=2)}) == 2
    with pytest.raises(AttributeError):
        small_spec().n_chans = 4


# ---------------------------------------------------------------- what is no spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_layers": ()}, "conv_layers must hold (dim, kernel, stride) of at least 1 each. Give at least one layer."),
        ({"conv_layers": ((0, 4, 2), LAYER)}, "conv_layers must hold"),
        ({"conv_layers": ((8, 0, 2), LAYER)}, "conv_layers must hold"),
        ({"conv_layers": ((8, 4, 0), LAYER)}, "conv_layers must hold"),
        ({"conv_layers": ((63, 4, 2),)}, "A position encoding of 30 + 34 dimensions does not fit 63. Use a spat_dim"),
        ({"spat_dim": 28}, "A position encoding of 28 + 34 dimensions"),
        ({"time_dim": 33}, "A position encoding of 30 + 33 dimensions"),
        ({"time_dim": 36}, "A position encoding of 30 + 36 dimensions does not fit 64"),
        ({"n_heads": 7}, "7 attention heads do not divide the embedding size 64. Use a number of heads that divides it."),
        ({"sfreq_features": 0.0}, "sfreq_features is 0.0 and drop_prob 0.0. Use a positive rate"),
        ({"sfreq_features": math.nan}, "sfreq_features is nan"),
        ({"drop_prob": 1.0}, "drop_prob 1.0. Use a positive rate and a dropout from 0 to below 1."),
        ({"drop_prob": -0.1}, "drop_prob -0.1."),
    ],
)
def test_encoders_that_cannot_be(fields, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        EncoderSpec(**fields)


@pytest.mark.parametrize("band", [(-1.0, 40.0), (0.0, 40.0), (40.0, 0.5), (5.0, 5.0), (math.nan, 40.0), (0.5, math.inf)])
def test_bands_that_are_none(band):
    with pytest.raises(SpecError, match=rf"The band {band[0]} to {band[1]} Hz is not one\. Use positive edges"):
        Preprocessing(l_freq=band[0], h_freq=band[1])


@pytest.mark.parametrize("band", [(None, None), (0.5, None), (None, 40.0), (0.5, 0.6)])
def test_bands_with_open_sides(band):
    assert Preprocessing(l_freq=band[0], h_freq=band[1]).reference == "average"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "transformer"}, "'transformer' is not a variant. Use one of prelocal, postlocal, contextual, base."),
        ({"unit": "kV"}, "'kV' is not a unit. Use one of nV, uV, mV, V."),
        ({"n_chans": 0}, "n_chans is 0. Use 1 or more."),
        ({"n_outputs": 0}, "n_outputs is 0. Use 1 or more."),
        ({"n_spat_filters": -4}, "n_spat_filters is -4. Use 1 or more."),
        ({"sfreq": 0.0}, "sfreq is 0.0 Hz. Use a positive sampling rate."),
        ({"sfreq": math.inf}, "sfreq is inf Hz."),
        ({"sfreq": math.nan}, "sfreq is nan Hz."),
        (
            {"n_times": 151},
            "n_times is 151, but the first time token needs 152 samples. Use windows of at least 152 samples: 1.52 s at 100 Hz.",
        ),
        (
            {"n_times": 100, "event_window": EventWindow(start=-0.5)},
            "Use windows of at least 152 samples: 1.52 s at 100 Hz, from --tmin -0.5 to --tmax 1.02.",
        ),
        ({"ch_names": ("Cz",)}, "There are 1 channel names for 129 channels. Name every channel once."),
        ({"n_chans": 2, "ch_names": ("Cz", ""), "positions": None}, "A channel has an empty name."),
        (
            {"n_chans": 3, "ch_names": ("Cz", "Pz", "CZ"), "positions": None},
            "Channel names appear twice: CZ, Cz. Name every channel once (case is ignored).",
        ),
        ({"positions": ((0.0, 0.0, 0.1),)}, "There are 1 positions for 129 channels. Give one position a channel."),
        ({"positions": ((0.0, 0.0, 0.0),) * 129}, "The positions are not finite, or all zero. Give positions in metres"),
        ({"positions": ((math.nan, 0.0, 0.1),) * 129}, "The positions are not finite"),
        ({"positions": ((0.0, 0.0, 95.0),) * 129}, "A position is 95 m from the head's centre. Give positions in metres, not in"),
        ({"class_names": ("left", "right", "rest")}, "There are 3 class names for 1 outputs. Name every output once."),
        ({"n_outputs": 3, "class_names": ("left", "right")}, "There are 2 class names for 3 outputs. Name every output once."),
        ({"n_outputs": 2, "class_names": ("left", "left")}, "A class has an empty name, or that of another one."),
        ({"n_outputs": 2, "class_names": ("left", "")}, "A class has an empty name"),
        ({"n_outputs": 2, "class_names": ("left", "a\tb")}, r"class name 'a\tb' breaks the lines of a table"),
        ({"n_outputs": 2, "class_names": ("left", "c\nd")}, "Leave tabs and line ends out"),
        ({"sfreq": 80.0}, "The upper band edge of 40 Hz is not below half the sampling rate of 80 Hz. Lower it"),
    ],
)
def test_models_that_cannot_be(fields, message):
    known = {"variant": "contextual", "n_chans": 129, "n_times": 200, "sfreq": 100.0}
    known |= {"ch_names": HYDROCEL.ch_names, "positions": HYDROCEL.positions}
    ModelSpec.of(**known)
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        ModelSpec.of(**known | fields)
    assert str(caught.value) == f"{caught.value.problem} {caught.value.mend}"


@pytest.mark.parametrize("name", ["n_heads", "n_layers", "n_decoder_layers"])
def test_an_encoder_has_at_least_one_of_each(name):
    with pytest.raises(SpecError, match=f"{name} is 0"):
        EncoderSpec(**{name: 0})


def test_a_lower_band_edge_above_nyquist_is_refused():
    with pytest.raises(SpecError, match="lower band edge of 60 Hz"):
        ModelSpec.of(
            variant="prelocal", n_chans=2, n_times=200, sfreq=100.0, preprocessing=Preprocessing(l_freq=60.0, h_freq=None)
        )
