"""Files that people have: each is made by braindecode, and what is read of it must compute what braindecode does, in float64."""

import dataclasses
import math

import oracle
import pytest
import torch
from oracle import difference, eeg, outputs, randomise
from torch import nn

from sjepa_deploy import load
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.errors import CheckpointError
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.models.transfer import base_encoder

NAMES = ("Fz", "C3", "Cz", "C4", "Pz", "Oz")
MONTAGE = read_montage("sjepa-62").pick(NAMES)
CHANNELS = [{"ch_name": n, "loc": torch.tensor(p).numpy()} for n, p in zip(NAMES, MONTAGE.positions, strict=True)]
SMALL = {"transformer__num_encoder_layers": 2, "transformer__num_decoder_layers": 1}
STRIDED = [(8, 32, 4), (16, 2, 2), (32, 2, 2), (64, 2, 2), (64, 2, 2)]
TOLERANCE = 1e-6
"""Of the largest output, in float64: the position encoding is kept in float32."""


def make(variant="contextual", n_times=280, **changes):
    """Return a model of braindecode's with random weights."""
    arguments = {"chs_info": CHANNELS, "n_times": n_times, "sfreq": 128, **SMALL, **changes}
    if variant != "base":
        arguments["n_outputs"] = 3
    with oracle.quiet():
        return randomise(oracle.CLASSES[variant](**arguments)).eval()


def read(path, *, encoder=None, n_times=280, **kwargs):
    """Read `path` as sjepa-export does with --montage and --n-times; return our model in float64 and what was assumed."""
    checkpoint = read_checkpoint(path, **kwargs)
    asked = {"encoder": encoder or {}} | ({"n_times": n_times} if n_times else {})
    spec, assumed = resolve_spec(asked, checkpoint, asked_montage=MONTAGE)
    return load_model(checkpoint, spec).double(), (*(each.what for each in assumed if not each.of_signal), *checkpoint.notes)


def error(ours, theirs):
    """Return the largest difference from what `theirs` computes in float64."""
    windows = eeg(ours.spec, batch=4)
    return difference(outputs(ours, windows), outputs(theirs.double(), windows))


def save(content, path):
    torch.save(content, path)
    return path


def named(sentences, word):
    return [sentence for sentence in sentences if word in sentence]


HIDDEN = {
    "heads": ("contextual", {"transformer__nhead": 4}, {"n_heads": 4}, {}, "heads (--n-heads)"),
    "rate of the tokens": ("contextual", {"pos_encoder__sfreq_features": 2.0}, {"sfreq_features": 2.0}, {}, "--sfreq-features"),
    "max_norm": ("contextual", {"pos_encoder__spat_kwargs": {"max_norm": 1.0}}, {}, {"max_norm": 1.0}, "--max-norm"),
    "strides": (
        "postlocal",
        {"feature_encoder__conv_layers_spec": STRIDED, "n_times": 160},
        {"strides": (4, 2, 2, 2, 2)},
        {},
        "--strides",
    ),
}
"""What no shape tells: variant, argument of braindecode, the same asked for (as a size, on reading), the assumption's words."""


@pytest.mark.parametrize("what", HIDDEN)
def test_what_no_shape_tells_is_assumed_by_name_and_may_be_said(tmp_path, what):
    variant, argument, encoder, reading, words = HIDDEN[what]
    theirs = make(variant, **argument)
    path = save(theirs.state_dict(), tmp_path / "bare.pth")
    n_times = argument.get("n_times", 280)
    said, notes = read(path, encoder=encoder, n_times=n_times, **reading)
    assert error(said, theirs) <= TOLERANCE
    assert not named(notes, words)
    if what == "strides":
        with pytest.raises(CheckpointError, match="--n-times from .*, or name other strides with --strides"):
            read(path, n_times=n_times)
        return
    assumed, notes = read(path, n_times=n_times)
    assert error(assumed, theirs) > 1e-3  # a mistake that nothing shows but the sentence
    assert len(named(notes, words)) == 1


def test_an_activation_that_cannot_be_said_is_assumed_by_name(tmp_path):
    theirs = make("postlocal", activation=nn.ReLU)
    ours, notes = read(save(theirs.state_dict(), tmp_path / "bare.pth"))
    assert error(ours, theirs) > 1e-3
    assert named(notes, "GELU")


@pytest.mark.parametrize(("variant", "n_sentences"), [("prelocal", 2), ("postlocal", 2), ("contextual", 5), ("base", 5)])
def test_only_what_the_predictions_depend_on_is_named(tmp_path, variant, n_sentences):
    """Strides and activation of any model; heads, rate of the time tokens and max_norm of those with a transformer."""
    path = save(make(variant).state_dict(), tmp_path / "bare.pth")
    _, assumed = resolve_spec({"n_times": 280, "sfreq": 128.0}, read_checkpoint(path), asked_montage=MONTAGE)
    assert len([each for each in assumed if not each.of_signal and not each.flag]) == n_sentences
    one_token = resolve_spec({"n_times": 200}, read_checkpoint(path), asked_montage=MONTAGE)[1] if variant == "base" else ()
    assert not named(map(str, one_token), "--sfreq-features")  # the first token is encoded alike at every rate


def test_with_one_token_its_rate_changes_nothing(tmp_path):
    theirs = make(n_times=200, pos_encoder__sfreq_features=2.0)
    ours, _ = read(save(theirs.state_dict(), tmp_path / "bare.pth"), n_times=200)
    assert error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("what", HIDDEN)
def test_a_configuration_settles_it(tmp_path, what):
    variant, argument, *_ = HIDDEN[what]
    theirs = make(variant, **argument)
    theirs._save_pretrained(tmp_path)
    ours, notes = read(tmp_path, n_times=argument.get("n_times", 280))
    assert error(ours, theirs) <= TOLERANCE
    assert not named(notes, "--")
    assert not named(notes, "GELU")


@pytest.mark.parametrize("place", ["top", "inside", "tuple"])
@pytest.mark.parametrize("what", HIDDEN)
def test_hyper_parameters_of_lightning_settle_it(tmp_path, what, place):
    variant, argument, *_, words = HIDDEN[what]
    theirs = make(variant, **argument)
    told = {"sfreq": 128, "n_times": argument.get("n_times", 280), **argument}
    if "feature_encoder__conv_layers_spec" in told and place == "top":
        told["feature_encoder__conv_layers_spec"] = [list(layer) for layer in STRIDED]
    settings = {"lr": 1e-3, "optimizer": {"name": "adam"}, **({"model_kwargs": told} if place == "inside" else told)}
    content = {"state_dict": {f"model.{k}": w for k, w in theirs.state_dict().items()}, "hyper_parameters": settings}
    ours, notes = read(save(content, tmp_path / "last.ckpt"), n_times=told["n_times"])
    assert error(ours, theirs) <= TOLERANCE
    assert not named(notes, words)
    assert ours.spec.sfreq == 128.0


@pytest.mark.parametrize(
    ("told", "asked", "match"),
    [
        ({"activation": "torch.nn.modules.activation.ReLU"}, {}, "the hyper-parameters in .* sets activation = .*ReLU"),
        ({"feature_encoder__mode": "layer_norm"}, {}, "feature_encoder__mode = 'layer_norm', which is not supported"),
        ({"n_outputs": 2}, {}, "says n_outputs = 2, but the weights have 3"),
        ({"transformer__num_encoder_layers": 3}, {}, "missing transformer.encoder.layers.2"),
        ({"transformer__nhead": 4, "model": {"transformer__nhead": 8}}, {}, "say transformer__nhead = 4 and 8"),
        ({"transformer__nhead": 4}, {"encoder": {"n_heads": 8}}, "has n_heads = 4, which contradicts the 8 asked for"),
        ({"pos_encoder__spat_kwargs": None}, {"max_norm": 1.0}, "says max_norm = inf, not 1"),
        ({"n_times": 200}, {"n_times": None}, "200 samples give 1 time tokens"),
        ({}, {"encoder": {"strides": (8, 2)}}, "2 strides for 5 convolutions"),
    ],
)
def test_what_contradicts_is_an_error(tmp_path, told, asked, match):
    content = {"state_dict": make().state_dict(), "hyper_parameters": told}
    path = save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=match):
        read(path, **asked)


def test_kernels_that_are_not_the_published_ones_need_their_strides(tmp_path):
    layers = [(8, 16, 4), (32, 4, 4), (32, 2, 2)]
    sizes = {"transformer__d_model": 32, "pos_encoder__spat_dim": 12, "pos_encoder__time_dim": 20, "transformer__nhead": 2}
    theirs = make(feature_encoder__conv_layers_spec=layers, **sizes)
    path = save(theirs.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="nothing tells their strides.*--strides"):
        read(path)
    ours, _ = read(path, encoder={"strides": (4, 4, 2), "n_heads": 2})
    assert error(ours, theirs) <= TOLERANCE


def test_what_braindecodes_transfer_says_of_the_parts_that_it_copied_is_not_believed(tmp_path):
    """`SignalJEPA_Contextual.from_pretrained(base)` copies a transformer and saves the defaults beside it (1.8.1)."""
    base = make("base", transformer__nhead=4, pos_encoder__sfreq_features=2.0)
    theirs = randomise(oracle.CLASSES["contextual"].from_pretrained(base, n_outputs=2, chs_info=CHANNELS)).eval()
    theirs._save_pretrained(tmp_path)
    ours, notes = read(tmp_path, encoder={"n_heads": 4, "sfreq_features": 2.0})
    assert error(ours, theirs) <= TOLERANCE
    _, notes = read(tmp_path)
    assert all(named(notes, words) for words in ("--n-heads", "--sfreq-features", "--max-norm", "GELU"))


def test_the_export_prints_and_keeps_what_it_assumed(tmp_path, capsys):
    theirs = make(n_times=200, transformer__nhead=4)
    path = save(theirs.state_dict(), tmp_path / "bare.pth")
    command = ["--checkpoint", path, "--montage", "sjepa-62", "--channels", ",".join(NAMES), "--precision", "fp32"]
    command += ["--max-batch", "1", "--engine", "none", "--assume-signal"]
    for name, flags, is_assumed in (("assumed", [], True), ("said", ["--n-heads", "4"], False)):
        arguments = [str(a) for a in (*command, *flags, "--out", tmp_path / name)]
        assert run_command(export, "sjepa-export", arguments) == 0
        printed = " ".join(capsys.readouterr().out.split())
        notes = Bundle.open(tmp_path / name).manifest.weights.notes
        assert bool(named(notes, "heads (--n-heads)")) == is_assumed
        assert ("note: the transformer has 8 heads" in printed) == is_assumed
    windows = eeg(Bundle.open(tmp_path / "said").spec, batch=1)
    with load(tmp_path / "said") as predict:
        got = torch.from_numpy(predict(windows.float().numpy())).double()
    assert difference(got, outputs(theirs.double(), windows)) <= 1e-4


def test_a_base_model_is_transferred_with_its_assumptions_named(tmp_path):
    theirs = make("base", transformer__nhead=4)
    base = read_checkpoint(save(theirs.state_dict(), tmp_path / "bare.pth"))
    encoder, assumed = base_encoder(base)
    assert (encoder.n_heads, len(named(assumed, "8 heads"))) == (8, 1)
    encoder, assumed = base_encoder(base, dataclasses.replace(encoder, n_heads=4))
    assert (encoder.n_heads, named(assumed, "heads")) == (4, [])


# ---------------------------------------------------------------- wrappers


def wrapped_inside(state, part):
    return {key.replace(f"{part}.", f"{part}._orig_mod.", 1) if key.startswith(part) else key: w for key, w in state.items()}


FORMS = {
    "tutorial": lambda s: {"epoch": 1, "model_state_dict": s, "optimizer_state_dict": {"state": {0: {"step": torch.ones(3)}}}},
    "key model": lambda s: {"model": s, "epoch": 1, "args": {"lr": 0.1}},
    "key net": lambda s: {"net": s},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": w for k, w in s.items()}, "epoch": 3},
    "DDP": lambda s: {f"module.{k}": w for k, w in s.items()},
    "compiled": lambda s: {f"module._orig_mod.{k}": w for k, w in s.items()},
    "compiled transformer": lambda s: wrapped_inside(s, "transformer"),
    "compiled feature encoder": lambda s: wrapped_inside(s, "feature_encoder"),
    "compiled parts of a trainer": lambda s: {"state_dict": {f"net.{k}": w for k, w in wrapped_inside(s, "final_layer").items()}},
    "FSDP": lambda s: {k.replace("layers.0.", "layers.0._fsdp_wrapped_module."): w for k, w in s.items()},
    "counter": lambda s: {**s, "step": torch.tensor(5), "n_averaged": torch.tensor(3)},
    "averaged": lambda s: {f"module.{k}": w for k, w in s.items()} | {"n_averaged": torch.tensor(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_common_wrappers_are_read(tmp_path, form):
    theirs = make()
    path = save(FORMS[form](theirs.state_dict()), tmp_path / "model.pt")
    ours, notes = read(path)
    assert error(ours, theirs) <= TOLERANCE
    assert bool(named(notes, "wrappers")) == (form.startswith("compiled ") or form == "FSDP")
    assert bool(named(notes, "counters")) == (form in ("counter", "averaged"))


@pytest.mark.parametrize("names", [("model", "ema"), ("state_dict", "state_dict_ema")])
def test_of_two_models_in_mappings_one_must_be_chosen(tmp_path, names):
    one, other = make(), randomise(make(), seed=1)
    path = save({names[0]: one.state_dict(), names[1]: other.state_dict()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"holds 2 models under '{min(names)}.', '{max(names)}.'.*--prefix"):
        read(path)
    for name, theirs in zip(names, (one, other), strict=True):
        assert error(read(path, prefix=f"{name}.")[0], theirs) <= TOLERANCE


# ---------------------------------------------------------------- what stands beside the model


def test_a_layer_in_front_or_behind_is_not_left_out_in_silence(tmp_path):
    theirs = make("prelocal")
    layers = {
        "batch norm in front": (nn.Sequential(nn.BatchNorm1d(6), theirs), "0.weight, 0.bias, 0.running_mean", "0"),
        "layer behind": (nn.Sequential(theirs, nn.Linear(3, 2)), "1.weight, 1.bias", "1"),
    }
    aligned = {f"model.{k}": w for k, w in theirs.state_dict().items()} | {"align": torch.eye(6)}
    states = {name: (module.state_dict(), keys, allowed) for name, (module, keys, allowed) in layers.items()}
    states["alignment matrix"] = (aligned, "align", "align")
    states["temperature"] = (dict(theirs.state_dict()) | {"temperature": torch.tensor(2.0)}, "temperature", "temperature")
    for state, keys, allowed in states.values():
        path = save(state, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=f"of no SignalJEPA model: {keys}.*--allow-left-out {allowed}"):
            read(path)
        ours, notes = read(path, allow_left_out=(allowed,))
        assert error(ours, theirs) <= TOLERANCE
        assert named(notes, "left out, as allowed")


def test_an_averaged_copy_is_another_model_and_no_layer_of_this_one(tmp_path):
    theirs, ema = make("prelocal"), randomise(make("prelocal"), seed=1)
    state = {f"model.{k}": w for k, w in theirs.state_dict().items()}
    state |= {f"ema_model.module.{k}": w for k, w in ema.state_dict().items()} | {"ema_model.n_averaged": torch.tensor(3)}
    path = save({"state_dict": state}, tmp_path / "last.ckpt")
    for prefix, one in (("model.", theirs), ("ema_model.module.", ema)):
        ours, notes = read(path, prefix=prefix)
        assert error(ours, one) <= TOLERANCE
        assert named(notes, "of another model")


# ---------------------------------------------------------------- models that interpolate


def interpolated(**changes):
    """Return a base model behind an interpolation from 16 channels, as many as MNE wants for a fit of the head."""
    some = read_montage("sjepa-62").ch_names[::4]
    positions = read_montage("sjepa-62").pick(some).positions
    channels = [{"ch_name": n, "loc": torch.tensor(p).numpy()} for n, p in zip(some, positions, strict=True)]
    with oracle.quiet():
        return oracle.signal_jepa.InterpolatedSignalJEPA(chs_info=channels, n_times=280, sfreq=128, **SMALL, **changes)


@pytest.mark.filterwarnings("ignore:.*fit.*from head frame origin:RuntimeWarning")
def test_a_model_that_interpolates_its_channels_is_refused_and_the_way_out_works(tmp_path):
    theirs = interpolated()
    theirs._save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"interpolates its channels.*--montage sjepa-62.*--interpolate"):
        read_checkpoint(tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    spec, _ = resolve_spec({"n_times": 280}, checkpoint, asked_montage=read_montage("sjepa-62"))
    ours = load_model(checkpoint, spec).double()
    windows = eeg(spec)
    backbone = theirs.double().eval()
    backbone.interpolation_layer = nn.Identity()
    assert difference(outputs(ours, windows), outputs(backbone, windows)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*fit.*from head frame origin:RuntimeWarning")
def test_a_trained_interpolation_is_a_layer_in_front(tmp_path):
    theirs = interpolated(trainable=True)
    path = save(theirs.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="interpolation_layer.matrix.*--allow-left-out interpolation_layer"):
        read_checkpoint(path)


# ---------------------------------------------------------------- files that are something else


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_programs_are_told_as_programs(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    (tmp_path / "empty.pt").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    for name, match in (("script.pt", "TorchScript"), ("program.pt2", "torch.export"), ("empty.pt", "empty zip file")):
        with pytest.raises(CheckpointError, match=match) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_max_norm_is_that_of_torch(tmp_path):
    """Rows that are shorter stay; longer ones are scaled as `torch.nn.Embedding` does in every forward."""
    table = make().state_dict()["pos_encoder.pos_encoder_spat.weight"]
    path = save(make().state_dict(), tmp_path / "bare.pth")
    norms = table.norm(dim=1)
    limit = float(norms.median())
    assert norms.min() < limit < norms.max()
    embedding = nn.Embedding(*table.shape, max_norm=limit, _weight=table.clone())
    with torch.no_grad():
        expected = embedding(torch.arange(len(table)))
    taken = read_checkpoint(path, max_norm=limit).weights["pos_encoder.pos_encoder_spat.weight"]
    torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    assert torch.equal(read_checkpoint(path, max_norm=math.inf).weights["pos_encoder.pos_encoder_spat.weight"], table)
