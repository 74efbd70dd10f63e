import json
from importlib import resources

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.bundle import Graph, Manifest, Provenance
from sjepa_deploy.eeg.steps import (
    BandPass,
    Baseline,
    Channels,
    Clip,
    ExponentialStandardise,
    Notch,
    Reference,
    Resample,
    RunningAlignment,
    Scale,
    ZScore,
)
from sjepa_deploy.errors import SpecError
from sjepa_deploy.parity import ParityResult
from sjepa_deploy.serialize import DecodeError, decode, encode, json_schema
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, Preprocessing, SignalSpec

SCHEMA = json_schema(Manifest)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
REGENERATE = (
    'python -c "import json; from sjepa_deploy.bundle import Manifest; from sjepa_deploy.serialize import json_schema; '
    'print(json.dumps(json_schema(Manifest), indent=1))" > sjepa_deploy/assets/manifest.schema.json'
)


def test_the_shipped_schema_describes_the_dataclasses():
    shipped = resources.files("sjepa_deploy").joinpath("assets", "manifest.schema.json").read_text(encoding="utf-8")
    assert shipped == json.dumps(SCHEMA, indent=1) + "\n", f"Write it again with: {REGENERATE}"


def test_the_schema_is_one_and_has_words_for_people():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(definition["description"] for definition in SCHEMA["$defs"].values())


def test_real_manifests_fit_the_schema(make_bundle, manifest_json):
    for text in (manifest_json, (make_bundle("contextual").path / "manifest.json").read_text()):
        VALIDATOR.validate(json.loads(text))
        assert encode(decode(Manifest, json.loads(text))) == json.loads(text)


# ---------------------------------------------------------------- there and back

positive = st.integers(1, 10**6)
finite = st.floats(allow_nan=False, allow_infinity=False)
coordinate = st.floats(-0.1, 0.1).filter(lambda x: abs(x) > 1e-3)
encoders = st.builds(
    EncoderSpec,
    conv_layers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), max_size=2).map(
        lambda layers: (*layers, (64, 3, 2))
    ),
    n_layers=st.integers(1, 12),
    n_heads=st.sampled_from([1, 2, 4, 8]),
    drop_prob=st.floats(0, 0.9),
)
edges = {"l_freq": st.none() | st.floats(0.1, 5), "h_freq": st.none() | st.floats(10, 40)}
named = st.lists(st.text(min_size=1), min_size=1, max_size=3, unique_by=str.casefold).map(tuple)
on_samples = st.one_of(
    st.builds(BandPass, **edges, order=st.integers(1, 8), design=st.sampled_from(["butterworth", "bessel"])),
    st.builds(Notch, freq=st.floats(5, 40), harmonics=st.none() | st.integers(1, 9), quality=st.floats(1, 100)),
    st.builds(Reference, channels=st.none() | named),
    st.builds(ExponentialStandardise, factor_new=st.floats(1e-5, 0.5), eps=st.floats(1e-9, 1)),
    st.builds(Clip, limit=st.floats(1e-6, 1e6)),
    st.builds(Scale, factors=st.tuples(st.floats(1e-6, 1e6))),
    st.builds(RunningAlignment, block=st.floats(1, 60), half_life=st.floats(1, 600), shrinkage=st.floats(0, 0.99)),
)
z_scores = st.builds(ZScore, eps=st.floats(1e-12, 1))
event_windows = st.builds(
    EventWindow, start=st.floats(-5, 5), events=st.lists(st.text(min_size=1), max_size=3, unique=True).map(tuple)
)


@st.composite
def signals(draw):
    n_chans, event_window = draw(st.integers(1, 5)), draw(st.none() | event_windows)
    names = st.lists(st.text(min_size=1), min_size=n_chans, max_size=n_chans, unique_by=str.casefold).map(tuple)
    positions = st.tuples(*[st.tuples(coordinate, coordinate, coordinate)] * n_chans)
    some = st.lists(on_samples, max_size=2)
    on_windows = z_scores if event_window is None else z_scores | st.just(Baseline(tmin=None, tmax=None))
    return SignalSpec(
        n_chans=n_chans,
        n_times=draw(st.integers(100, 600)),
        sfreq=draw(st.floats(81, 1000)),
        unit=draw(st.sampled_from(["nV", "uV", "mV", "V"])),
        ch_names=draw(st.none() | names),
        positions=draw(st.none() | positions),
        steps=(*draw(some), Resample(), *draw(some), Channels(), *draw(some), *draw(st.lists(on_windows, max_size=2))),
        phase=draw(st.sampled_from(["causal", "zero-phase"])),
        event_window=event_window,
    )


@st.composite
def specs(draw):
    variant, n_outputs = draw(st.sampled_from(["prelocal", "postlocal", "contextual", "base"])), draw(st.integers(1, 4))
    task = "features" if variant == "base" else draw(st.sampled_from(["classification", "regression"]))
    printed = st.text(min_size=1).filter(str.isprintable)  # a class heads a column of a table
    n_classes = draw(st.sampled_from([1, 2])) if n_outputs == 1 else n_outputs
    classes = st.lists(printed, min_size=n_classes, max_size=n_classes, unique=True).map(tuple)
    return ModelSpec(
        variant=variant,
        signal=draw(signals()),
        n_outputs=n_outputs,
        n_spat_filters=draw(positive),
        task=task,
        class_names=draw(st.none() | classes) if task == "classification" else None,
        output_unit=draw(st.none() | st.text()) if task == "regression" else None,
        encoder=draw(encoders),
    )


precisions = st.sampled_from(["fp32", "fp16", "bf16"])
graphs = st.builds(Graph, file=st.text(), precision=precisions, static_batch=st.none() | positive)
provenances = st.builds(Provenance, notes=st.lists(st.text(), max_size=3).map(tuple))
results = st.builds(
    ParityResult,
    precision=precisions,
    **dict.fromkeys(("tolerance", "max_abs", "max_error", "max_relative_to_spread", "scale", "spread", "cosine"), finite),
    flip_margin=st.none() | finite,
)
manifests = st.builds(
    Manifest,
    spec=specs(),
    graphs=st.lists(graphs, max_size=2).map(tuple),
    weights=provenances,
    parity=st.lists(results, max_size=2).map(tuple),
    tools=st.dictionaries(st.text(), st.text(), max_size=3),
    files=st.dictionaries(st.text(), st.text(), max_size=3),
)


@pytest.mark.parametrize(("cls", "strategy"), [(ModelSpec, specs()), (ParityResult, results), (Manifest, manifests)])
def test_what_is_written_is_read_again(cls, strategy):
    @settings(max_examples=30)
    @given(strategy)
    def there_and_back(value):
        stored = json.loads(json.dumps(encode(value), allow_nan=False))
        assert decode(cls, stored) == value
        jsonschema.Draft202012Validator(json_schema(cls)).validate(stored)

    there_and_back()


# ---------------------------------------------------------------- what does not fit


def test_numbers_of_json_are_of_one_kind():
    assert decode(Graph, {"file": "a", "precision": "fp32", "opset": 17.0, "n_nodes": 5, "max_batch": 1}).opset == 17
    assert isinstance(decode(Preprocessing, {"l_freq": 1}).l_freq, float)


def fits(data) -> bool:
    """Whether `data` is a manifest: what `decode` and the schema say, which must be the same."""
    try:
        decode(Manifest, data)
        decoded = True
    except DecodeError:
        decoded = False
    except SpecError:  # the types are right, and describe no model: a schema cannot know
        decoded = True
    assert VALIDATOR.is_valid(data) == decoded
    return decoded


def places(data, place=()):
    """Yield the path of every value inside `data`."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from places(value, (*place, key))


def parent_of(data, place):
    for key in place[:-1]:
        data = data[key]
    return data


def edited(text, place, value):
    data = json.loads(text)
    parent_of(data, place)[place[-1]] = value
    return data


# Positive numbers only: what is too small for a model is refused by the spec, and tested there.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(1, 2**53) | st.floats(1e-3, 1e300) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), value=json_values)
def test_any_value_at_any_place_is_judged_alike(manifest_json, data, value):
    place = data.draw(st.sampled_from(sorted(places(json.loads(manifest_json)), key=str)))
    fits(edited(manifest_json, place, value))


def test_every_key_is_needed_and_no_other_is_known(manifest_json):
    whole = json.loads(manifest_json)
    defaults = {
        "digest",
        "static_batch",
        "decision_flips",
        "flip_margin",
        "spread_tolerance",
        "sha256",
        "weights_sha256",
        "seed",
        "notes",
    }
    defaults |= {"n_outputs", "n_spat_filters", "task", "class_names", "output_unit", "encoder"}
    defaults |= {"unit", "ch_names", "positions", "steps", "phase", "event_window"}
    defaults |= {"l_freq", "h_freq", "order", "design", "channels"} | whole["spec"]["encoder"].keys()
    free = ("tools", "files")
    n_needed = 0
    for place in places(whole):
        data = json.loads(manifest_json)
        parent = parent_of(data, place)
        if isinstance(parent, dict):
            del parent[place[-1]]
            needed = place[-1] not in defaults and not (len(place) == 2 and place[0] in free)
            assert fits(data) != needed, place
            n_needed += needed
            parent |= {place[-1]: parent_of(whole, place)[place[-1]], "another": "key"}
            assert fits(data) == (len(place) == 2 and place[0] in free), place
    assert n_needed > 60


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("spec", "variant"), "transformer", "spec.variant must be one of prelocal, postlocal, contextual, base"),
        (("graphs", 0, "precision"), "fp8", r"graphs\[0\].precision must be one of fp32, fp16, bf16, not 'fp8'"),
        (("graphs", 0, "precision"), True, r"graphs\[0\].precision must be one of"),
        (("graphs", 0, "max_batch"), "64", r"graphs\[0\].max_batch must be of type integer, not str"),
        (("spec", "signal", "n_chans"), 2.5, "spec.signal.n_chans must be of type integer, not float"),
        (("spec", "signal", "n_chans"), True, "spec.signal.n_chans must be of type integer, not bool"),
        (("spec", "signal", "sfreq"), False, "spec.signal.sfreq must be of type number, not bool"),
        (("spec", "signal", "sfreq"), None, "spec.signal.sfreq must be of type number, not NoneType"),
        (("spec", "signal", "positions", 3), [0.1, 0.2], r"spec.signal.positions\[3\] must have 3 items, not 2"),
        (("spec", "encoder", "conv_layers", 0), [8, 32, 8, 1], r"spec.encoder.conv_layers\[0\] must have 3 items, not 4"),
        (("spec", "signal", "ch_names"), "Cz", "spec.signal.ch_names must be an array, not str"),
        (("spec", "signal", "ch_names", 1), 1, r"spec.signal.ch_names\[1\] must be of type string"),
        (
            ("spec", "signal", "steps", 0, "step"),
            "cubic",
            r"spec.signal.steps\[0\] has the unknown step 'cubic'; known are band-pass",
        ),
        (("spec", "signal", "steps", 0, "colour"), "blue", r"spec.signal.steps\[0\] has the unknown key 'colour'"),
        (("spec", "signal", "steps", 0), "band-pass", r"spec.signal.steps\[0\] must be an object, not str"),
        (("weights",), None, "weights must be an object, not NoneType"),
        (("weights", "colour"), "blue", "weights has the unknown key 'colour'"),
        (("tools", "torch"), 2, r"tools\['torch'\] must be of type string"),
        (("parity",), {}, "parity must be an array, not dict"),
        (("parity", 0, "passed"), 1, r"parity\[0\].passed must be of type boolean, not int"),
    ],
)
def test_the_error_names_the_place(manifest_json, place, value, message):
    data = edited(manifest_json, place, value)
    assert not fits(data)
    with pytest.raises(DecodeError, match=message):
        decode(Manifest, data)


def test_the_top_level_has_a_name_too(manifest_json):
    with pytest.raises(DecodeError, match="the top level must be an object, not list"):
        decode(Manifest, [])
    with pytest.raises(DecodeError, match="the top level lacks the key 'spec'"):
        decode(Manifest, {k: v for k, v in json.loads(manifest_json).items() if k != "spec"})


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(DecodeError, match="l_freq is too large a number"):
        decode(Preprocessing, {"l_freq": 10**400})
