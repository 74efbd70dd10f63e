import pytest
import torch
from oracle import make_spec

from sjepa_deploy.eeg.montage import Montage, read_montage
from sjepa_deploy.errors import CheckpointError, SpecError
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.spec import EncoderSpec, Preprocessing

NAMES = ("Fp1", "Cz", "Pz", "Oz")


def montage_of(ch_names, height=0.0):
    return Montage(ch_names=tuple(ch_names), positions=tuple((0.01 * i, 0.0, 0.08 + height) for i in range(len(ch_names))))


def known_spec(variant="contextual", **changes):
    """What a checkpoint may say of its model, nothing of it a default."""
    settled = {
        "ch_names": NAMES,
        "positions": montage_of(NAMES).positions,
        "sfreq": 250.0,
        "unit": "mV",
        "n_outputs": 3,
        "n_spat_filters": 2,
        "class_names": ("rest", "left", "right"),
        "preprocessing": Preprocessing(reference="none", l_freq=1.0, h_freq=30.0),
        "encoder": EncoderSpec(n_layers=1, n_decoder_layers=1),
    }
    return make_spec(variant, 4, 300, **(settled | changes))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One folder of ours a variant."""
    read = {}
    for variant in ("prelocal", "postlocal", "contextual"):
        folder = tmp_path_factory.mktemp(variant) / "trained"
        write_checkpoint(build_model(known_spec(variant), seed=0), folder)
        read[variant] = read_checkpoint(folder)
    return read


@pytest.fixture
def bare(tmp_path):
    """Return a function that makes the checkpoint of a state dict without any configuration."""

    def make(variant, n_chans, n_times=200):
        torch.save(build_model(make_spec(variant, n_chans, n_times), seed=0).state_dict(), tmp_path / "bare.pth")
        return read_checkpoint(tmp_path / "bare.pth")

    return make


# ---------------------------------------------------------------- what the checkpoint says


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_what_the_checkpoint_says_need_not_be_repeated(checkpoints, variant):
    assert resolve_spec({}, checkpoints[variant]) == (known_spec(variant), ())


@pytest.mark.parametrize(
    "field", ["variant", "n_chans", "n_times", "sfreq", "unit", "n_outputs", "n_spat_filters", "ch_names", "class_names"]
)
def test_it_may_be_repeated(checkpoints, field):
    asked = {field: getattr(known_spec(), field)}
    assert resolve_spec(asked, checkpoints["contextual"]) == (known_spec(), ())


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("variant", "prelocal", "variant = contextual, which contradicts the prelocal asked for"),
        ("n_chans", 5, "n_chans = 4, which contradicts the 5 asked for"),
        ("sfreq", 128.0, "sfreq = 250.0, which contradicts the 128.0 asked for"),
        ("unit", "V", "unit = mV, which contradicts the V asked for"),
        ("n_outputs", 1, "n_outputs = 3, which contradicts the 1 asked for"),
        ("n_spat_filters", 4, "n_spat_filters = 2, which contradicts the 4 asked for"),
        ("ch_names", ("Fp1", "Cz", "Pz", "O1"), "ch_names = Fp1, Cz, Pz, Oz, which contradicts the Fp1, Cz, Pz, O1 asked for"),
        ("ch_names", ("Cz", "Fp1", "Pz", "Oz"), "ch_names = Fp1, Cz, Pz, Oz, which contradicts the Cz, Fp1, Pz, Oz asked for"),
        ("class_names", ("a", "b", "c"), "class_names = rest, left, right, which contradicts the a, b, c asked for"),
    ],
)
def test_a_flag_that_contradicts_it_is_an_error(checkpoints, field, value, shown):
    with pytest.raises(CheckpointError, match=f"trained has {shown}.*Leave the flag out, or use another checkpoint") as caught:
        resolve_spec({field: value}, checkpoints["contextual"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "field"), [({"n_chans": 5}, "n_chans"), ({"n_outputs": 2}, "n_outputs"), ({"n_spat_filters": 1}, "n_spat_filters")]
)
@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_so_do_the_shapes_of_bare_weights(bare, variant, asked, field):
    with pytest.raises(CheckpointError, match=f"bare.pth has {field} = "):
        resolve_spec(asked, bare(variant, 7))


def test_channel_names_are_compared_without_case(checkpoints):
    spec, assumed = resolve_spec({"ch_names": ("FP1", "CZ", "pz", "OZ")}, checkpoints["contextual"])
    assert spec.positions == known_spec().positions
    assert [name.casefold() for name in spec.ch_names] == [name.casefold() for name in NAMES]
    assert assumed == ()


def test_the_positions_of_the_checkpoint_stay_beside_a_montage_of_the_same_names(checkpoints):
    spec, _ = resolve_spec({}, checkpoints["contextual"], asked_montage=montage_of(NAMES, height=0.01))
    assert spec.positions == known_spec().positions


def test_a_montage_of_other_channels_contradicts(checkpoints):
    with pytest.raises(CheckpointError, match="has ch_names = Fp1, Cz, Pz, Oz, which contradicts the Fp1, Cz, Pz, O1"):
        resolve_spec({}, checkpoints["contextual"], asked_montage=montage_of(("Fp1", "Cz", "Pz", "O1")))
    with pytest.raises(CheckpointError, match="which contradicts the E1, E2, E3, E4 and 125 more asked for"):
        resolve_spec({}, checkpoints["contextual"], asked_montage=read_montage("GSN-HydroCel-129"))


def test_preprocessing_may_be_asked_for_otherwise(checkpoints):
    spec, assumed = resolve_spec({"preprocessing": {"l_freq": 2.0, "h_freq": None}}, checkpoints["postlocal"])
    assert spec == known_spec("postlocal", preprocessing=Preprocessing(reference="none", l_freq=2.0, h_freq=None))
    assert not assumed


def test_neither_the_checkpoint_nor_the_flags_are_altered(checkpoints):
    asked, known = {"n_times": 290}, dict(checkpoints["contextual"].known)
    resolve_spec(asked, checkpoints["contextual"], asked_montage=montage_of(NAMES))
    assert asked == {"n_times": 290}
    assert checkpoints["contextual"].known == known


# ---------------------------------------------------------------- windows of another length


@pytest.mark.parametrize("n_times", [280, 299, 300, 407])
@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_another_length_with_as_many_tokens_runs_on_the_same_weights(checkpoints, variant, n_times):
    spec, _ = resolve_spec({"n_times": n_times}, checkpoints[variant])
    assert spec == known_spec(variant).replace(n_times=n_times)
    assert load_model(checkpoints[variant], spec)(torch.randn(1, 4, n_times)).shape == (1, 3)


@pytest.mark.parametrize(("n_times", "n_tokens"), [(200, 1), (279, 1), (408, 3), (2048, 15)])
@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_another_number_of_tokens_is_refused_with_the_range_that_is_not(checkpoints, variant, n_times, n_tokens):
    message = f"{n_times} samples give {n_tokens} time tokens, but the head of trained was made for 2.*--n-times from 280 to 407"
    with pytest.raises(CheckpointError, match=message):
        resolve_spec({"n_times": n_times}, checkpoints[variant])


def test_the_range_of_one_token_starts_where_the_encoder_can(bare):
    with pytest.raises(CheckpointError, match="from 152 to 279"):
        resolve_spec({"n_times": 280}, bare("prelocal", 3))
    with pytest.raises(SpecError, match="n_times is 151, but the first time token needs 152"):
        resolve_spec({"n_times": 151}, bare("prelocal", 3))


def test_a_base_model_takes_any_length(bare):
    spec, _ = resolve_spec({"n_times": 2048, "ch_names": NAMES, "positions": montage_of(NAMES).positions}, bare("base", 4))
    assert spec.output_shape == (4 * 15, 64)


# ---------------------------------------------------------------- what nobody says


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual", "base"])
def test_the_default_contract_is_129_channels_of_2_s_and_said(variant):
    spec, assumed = resolve_spec({"variant": variant}, None)
    hydrocel = read_montage("GSN-HydroCel-129")
    assert (spec.ch_names, spec.positions) == (hydrocel.ch_names, hydrocel.positions)
    assert (spec.n_chans, spec.n_times, spec.sfreq, spec.unit) == (129, 200, 100.0, "uV")
    assert (spec.n_outputs, spec.n_spat_filters, spec.signal.steps) == (1, 4, Preprocessing().steps)
    assert tuple(map(str, assumed)) == (
        "the channels are those of GSN-HydroCel-129 (--montage, --channels)",
        "a window has 200 samples (--n-times)",
        "the sampling rate is 100 Hz (--sfreq)",
        "the samples are in uV (--unit)",
        "recordings are band-passed from 0.5 to 40 Hz, as in the published pretraining (--band)",
        "recordings are referenced to the average of the model's channels (--reference)",
        "the model learned from zero-phase filtered recordings (--phase)",
    )
    assert all(each.of_signal for each in assumed)
    assert spec.signal.phase == "zero-phase"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n_times": 256}, "a window has"),
        ({"sfreq": 128.0}, "the sampling rate"),
        ({"ch_names": NAMES, "n_chans": 4}, "GSN-HydroCel"),
        ({"preprocessing": {"reference": "none"}}, "average"),
        ({"preprocessing": {"l_freq": 1.0, "h_freq": None}}, "published pretraining"),
        ({"phase": "causal"}, "zero-phase"),
        ({"unit": "V"}, "samples are in"),
    ],
)
def test_what_is_asked_for_is_not_assumed(asked, said):
    spec, assumed = resolve_spec({"variant": "postlocal"} | asked, None)
    assert len(assumed) == 6
    assert not [each for each in assumed if said in each.what]
    preprocessing = asked.pop("preprocessing", {})
    assert all(getattr(spec.signal, field) == value for field, value in asked.items())
    assert spec.signal.steps == Preprocessing(**preprocessing).steps


def test_one_channel_is_not_referenced_to_its_own_average():
    spec, assumed = resolve_spec({"variant": "postlocal", "ch_names": ("Cz",), "n_chans": 1}, None)
    assert spec.signal.steps == Preprocessing(reference="none").steps
    assert "one channel keeps its reference" in [each.what for each in assumed]


def test_129_unnamed_channels_are_taken_for_the_net_and_said(bare):
    checkpoint = bare("contextual", 129)
    assert "ch_names" not in checkpoint.known
    spec, assumed = resolve_spec({}, checkpoint)
    assert spec.ch_names == read_montage("GSN-HydroCel-129").ch_names
    assert "the channels are those of GSN-HydroCel-129" in [each.what for each in assumed]
    assert load_model(checkpoint, spec).spec == spec


@pytest.mark.parametrize("variant", ["contextual", "base"])
def test_32_unnamed_channels_must_be_named_where_positions_matter(bare, variant):
    message = f"The {variant} model needs the positions of its 32 channels.*--montage.*--channels"
    with pytest.raises(SpecError, match=message):
        resolve_spec({}, bare(variant, 32))
    with pytest.raises(SpecError, match=message):
        resolve_spec({"variant": variant, "n_chans": 32}, None)


@pytest.mark.parametrize("variant", ["contextual", "base"])
def test_names_alone_are_no_positions(variant):
    with pytest.raises(SpecError, match="needs the positions of its 4 channels"):
        resolve_spec({"variant": variant, "ch_names": NAMES, "n_chans": 4}, None)


def test_naming_their_montage_is_enough(bare):
    montage = read_montage("sjepa-62").pick(NAMES)
    checkpoint = bare("contextual", 4)
    spec, assumed = resolve_spec({}, checkpoint, asked_montage=montage)
    assert (spec.ch_names, spec.positions) == (montage.ch_names, montage.positions)
    assert not [each for each in assumed if "--channels" in each.flag]
    assert load_model(checkpoint, spec).spec == spec
    with pytest.raises(CheckpointError, match="n_chans = 4, which contradicts the 62 asked for"):
        resolve_spec({}, checkpoint, asked_montage=read_montage("sjepa-62"))


@pytest.mark.parametrize("n_chans", [1, 32, 129])
@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_a_channel_count_is_enough_where_positions_do_not_matter(bare, variant, n_chans):
    for spec, _ in (resolve_spec({}, bare(variant, n_chans)), resolve_spec({"variant": variant, "n_chans": n_chans}, None)):
        assert (spec.n_chans, spec.ch_names, spec.positions) == (n_chans, None, None)


# ---------------------------------------------------------------- values that do not fit each other


@pytest.mark.parametrize(("sfreq", "h_freq"), [(64.0, None), (80.0, None), (80.1, 40.0), (100.0, 40.0), (1000.0, 40.0)])
def test_a_slow_rate_leaves_the_upper_edge_open(sfreq, h_freq):
    spec, _ = resolve_spec({"variant": "postlocal", "sfreq": sfreq}, None)
    assert spec.signal.steps == Preprocessing(l_freq=0.5, h_freq=h_freq).steps


@pytest.mark.parametrize("class_names", [("left",), ("left", "right", "rest")])
def test_class_names_must_be_as_many_as_outputs(class_names):
    with pytest.raises(SpecError, match=f"There are {len(class_names)} class names for 2 outputs"):
        resolve_spec({"variant": "postlocal", "n_outputs": 2, "class_names": class_names}, None)
    spec, _ = resolve_spec({"variant": "postlocal", "n_outputs": 2, "class_names": ("left", "right")}, None)
    assert spec.class_names == ("left", "right")


def test_class_names_are_counted_against_the_checkpoints_outputs(bare):
    with pytest.raises(SpecError, match="There are 3 class names for 1 outputs"):
        resolve_spec({"class_names": ("left", "right", "rest")}, bare("prelocal", 3))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"variant": "midlocal"}, "'midlocal' is not a variant.*prelocal, postlocal"),
        ({"unit": "kV"}, "'kV' is not a unit"),
        ({"n_outputs": 0}, "n_outputs is 0"),
        ({"n_chans": 0}, "n_chans is 0"),
        ({"sfreq": 0.0}, "sfreq is 0"),
        ({"ch_names": ("Cz", "CZ"), "n_chans": 2}, "appear twice"),
    ],
)
def test_values_that_describe_no_model(asked, match):
    with pytest.raises(SpecError, match=match):
        resolve_spec({"variant": "postlocal"} | asked, None)
