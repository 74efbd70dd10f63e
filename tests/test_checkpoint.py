import dataclasses
import hashlib
import json
import pickle

import numpy as np
import oracle
import pytest
import torch
from oracle import braindecode_model, difference, eeg, make_spec, outputs, randomise
from safetensors.torch import load_file, save_file

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.signal_file import write_signal
from sjepa_deploy.eeg.steps import BandPass, Channels, Notch, Resample, ZScore
from sjepa_deploy.errors import CheckpointError, SjepaError, SpecError
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.spec import VARIANTS, EncoderSpec, EventWindow, Preprocessing

SMALL = EncoderSpec(n_layers=2, n_decoder_layers=1)
POSITION_TABLE = "pos_encoder.pos_encoder_spat.weight"
LINEAR = "final_layer.linear.weight"


def small_spec(variant="postlocal", **changes):
    """A model that is quick to build, unlike the defaults in every number that a checkpoint may settle."""
    return make_spec(variant, 6, 280, **({"n_outputs": 3, "n_spat_filters": 2, "sfreq": 128.0, "encoder": SMALL} | changes))


def small_model(variant="postlocal", seed=0, **changes):
    return randomise(build_model(small_spec(variant, **changes), seed=0), seed)


def small_state(variant="postlocal", seed=0):
    return dict(small_model(variant, seed).state_dict())


def load(path, **kwargs):
    """Load as a user does who says nothing about the model."""
    checkpoint = read_checkpoint(path, **kwargs)
    spec, _ = resolve_spec({}, checkpoint)
    return load_model(checkpoint, spec)


def save(content, path):
    torch.save(content, path)
    return path


def same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[key], expected[key]) for key in expected)


def refusal(path, match, error=CheckpointError, **kwargs):
    """Check that loading `path` is an error of ours, of one line, and return its text."""
    with pytest.raises(error, match=match) as caught:
        load(path, **kwargs)
    assert isinstance(caught.value, SjepaError)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    assert caught.value.mend.endswith(".")
    return text


def change_config(folder, **changes):
    """Rewrite braindecode's arguments in config.json, and take our spec out, which would win, and the signal."""
    (folder / "signal.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config.pop("sjepa_deploy", None)
    path.write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- our folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read_again(tmp_path, variant):
    classes = {} if variant == "base" else {"class_names": ("rest", "left", "right")}
    spec = small_spec(variant, unit="mV", preprocessing=Preprocessing(reference="none", l_freq=None, h_freq=30.0), **classes)
    model = randomise(build_model(spec, seed=0))
    write_checkpoint(model, tmp_path / "new" / "folder")
    checkpoint = read_checkpoint(tmp_path / "new" / "folder")
    resolved, assumed = resolve_spec({}, checkpoint)
    assert (resolved, assumed) == (spec, ())
    loaded = load_model(checkpoint, resolved)
    assert same_weights(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert difference(outputs(loaded, eeg(spec)), outputs(model, eeg(spec))) == 0
    assert (checkpoint.variant, checkpoint.file_name, checkpoint.file_format) == (variant, "folder", "folder, safetensors")
    content = (tmp_path / "new" / "folder" / "model.safetensors").read_bytes()
    assert checkpoint.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_a_model_without_channel_names_is_read_again(tmp_path, variant):
    spec = small_spec(variant, ch_names=None, positions=None)
    write_checkpoint(build_model(spec, seed=0), tmp_path)
    assert load(tmp_path).spec == spec
    reloaded = oracle.from_pretrained(variant, tmp_path)
    assert outputs(reloaded, eeg(spec)).shape == (2, 3)


def test_weights_of_any_type_are_written_as_float32(tmp_path):
    model = small_model()
    expected = {key: weight.clone() for key, weight in model.state_dict().items()}
    write_checkpoint(model.double(), tmp_path)
    assert same_weights(load_file(tmp_path / "model.safetensors"), expected)
    assert next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_braindecode_loads_our_folder(tmp_path, variant):
    model = small_model(variant)
    write_checkpoint(model, tmp_path)
    theirs = oracle.from_pretrained(variant, tmp_path)
    assert type(theirs) is oracle.CLASSES[variant]
    assert same_weights(dict(theirs.state_dict()), dict(model.state_dict()))
    assert difference(outputs(theirs, eeg(model.spec)), outputs(model, eeg(model.spec))) <= 1e-6
    assert (theirs.n_chans, theirs.n_times, theirs.sfreq) == (6, 280, 128.0)
    assert [ch["ch_name"] for ch in theirs.chs_info] == list(model.spec.ch_names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_signal_outlives_a_save_by_braindecode(tmp_path, variant):
    """braindecode loads our folder and saves into it: our key of config.json is gone, the signal is not."""
    steps = (Notch(), BandPass(), Resample(), Channels(), ZScore())
    model = small_model(variant, unit="V", steps=steps, phase="causal", event_window=EventWindow(start=0.5, events=("a", "b")))
    write_checkpoint(model, tmp_path)
    theirs = oracle.from_pretrained(variant, tmp_path)
    with oracle.quiet():
        theirs.save_pretrained(tmp_path)
    assert "sjepa_deploy" not in json.loads((tmp_path / "config.json").read_text())
    spec, assumed = resolve_spec({}, read_checkpoint(tmp_path))
    assert spec.signal == model.spec.signal
    assert not [each for each in assumed if each.of_signal]
    assert difference(outputs(load(tmp_path), eeg(spec)), outputs(model, eeg(spec))) <= 1e-6


def test_where_both_are_lost_it_is_said(tmp_path):
    write_checkpoint(small_model(), tmp_path / "ours")
    theirs = oracle.from_pretrained("postlocal", tmp_path / "ours")
    with oracle.quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = read_checkpoint(tmp_path / "theirs")
    assert [note for note in checkpoint.notes if "signal.json" in note]
    assert {each.flag for each in resolve_spec({}, checkpoint)[1] if each.of_signal} >= {"--band", "--phase", "--unit"}
    (tmp_path / "ours/signal.json").unlink()  # a folder of an older release
    before = read_checkpoint(tmp_path / "ours")
    assert not before.notes
    assert resolve_spec({}, before) == (small_spec(), ())


@pytest.mark.parametrize("ours", [True, False])
def test_a_signal_of_another_model_is_refused(tmp_path, ours):
    write_checkpoint(small_model(), tmp_path)
    if not ours:
        change_config(tmp_path)
    write_signal(tmp_path / "signal.json", small_spec(sfreq=256.0).signal)
    refusal(tmp_path, r"config.json and signal.json in .* tell another sfreq")
    (tmp_path / "signal.json").write_text("{")
    refusal(tmp_path, "neither JSON", SpecError)


# ---------------------------------------------------------------- braindecode's folder


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_we_load_braindecodes_folder(tmp_path, variant, weights):
    spec = small_spec(variant)
    theirs = randomise(braindecode_model(spec))
    theirs._save_pretrained(tmp_path)
    for name in {"model.safetensors", "pytorch_model.bin"} - {weights}:
        (tmp_path / name).unlink()
    ours = load(tmp_path)
    for field in ("variant", "n_chans", "n_times", "sfreq", "ch_names", "positions"):
        assert getattr(ours.spec, field) == getattr(spec, field)
    if variant != "base":
        assert (ours.spec.n_outputs, ours.spec.n_spat_filters) == (3, 2)
    assert difference(outputs(ours, eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6


def test_a_window_in_seconds_is_enough(tmp_path):
    kwargs = {"n_chans": 4, "input_window_seconds": 2.5, "sfreq": 128, "n_outputs": 2}
    theirs = randomise(oracle.CLASSES["prelocal"](**kwargs))
    theirs._save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert (ours.spec.n_times, ours.spec.sfreq) == (320, 128.0)
    assert difference(outputs(ours, eeg(ours.spec)), outputs(theirs, eeg(ours.spec))) <= 1e-6


def pick(ch_names):
    """Return these channels of the 62 as `ModelSpec` and as braindecode take them."""
    montage = read_montage("sjepa-62").pick(ch_names)
    spec = make_spec("base", len(ch_names), ch_names=montage.ch_names, positions=montage.positions, sfreq=128.0, encoder=SMALL)
    return spec, oracle.chs_info(spec)


ALL_62 = read_montage("sjepa-62").ch_names


class TestPositionTableOfThePretraining:
    """The table has 62 rows; the model uses those of its channels, which braindecode picks at run time."""

    @staticmethod
    def theirs(spec, chs_info, variant="base"):
        kwargs = {} if variant == "base" else {"n_outputs": 2}
        return randomise(
            oracle.CLASSES[variant](
                chs_info=chs_info,
                n_times=spec.n_times,
                sfreq=spec.sfreq,
                channel_embedding="pretrain_aligned",
                transformer__num_encoder_layers=2,
                transformer__num_decoder_layers=1,
                **kwargs,
            )
        )

    @pytest.mark.parametrize("variant", ["base", "contextual"])
    @pytest.mark.parametrize(
        "ch_names", [("Cz", "Fp1", "PO4"), ALL_62, ALL_62[::-1], ("Oz",)], ids=["three", "all", "all reversed", "one"]
    )
    def test_rows_are_taken_by_name(self, tmp_path, variant, ch_names):
        spec, chs_info = pick(ch_names)
        theirs = self.theirs(spec, chs_info, variant)
        theirs._save_pretrained(tmp_path)
        ours = load(tmp_path)
        assert ours.spec.ch_names == ch_names
        assert ours.get_parameter(POSITION_TABLE).shape == (len(ch_names), 30)
        assert difference(outputs(ours, eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6
        picked = [note for note in read_checkpoint(tmp_path).notes if "rows of the position table" in note]
        assert bool(picked) == (ch_names != ALL_62)

    def test_all_62_are_meant_where_none_is_named(self, tmp_path):
        spec, _ = pick(ALL_62)
        with oracle.quiet():
            theirs = self.theirs(spec, None)
        theirs._save_pretrained(tmp_path)
        assert load(tmp_path).spec.ch_names == ALL_62
        change_config(tmp_path, chs_info=None)  # as on the hub
        ours = load(tmp_path)
        assert ours.spec.ch_names == ALL_62
        assert difference(outputs(ours, eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6

    def test_names_are_compared_without_case(self, tmp_path):
        spec, chs_info = pick(("Cz", "Fp1", "PO4"))
        theirs = self.theirs(spec, [ch | {"ch_name": ch["ch_name"].upper()} for ch in chs_info])
        theirs._save_pretrained(tmp_path)
        assert difference(outputs(load(tmp_path), eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6

    def test_a_channel_without_a_row_is_named(self, tmp_path):
        spec, chs_info = pick(("Cz", "Fp1", "PO4"))
        self.theirs(spec, chs_info)._save_pretrained(tmp_path)
        channels = [{"ch_name": name, "loc": [0.0, 0.0, 0.1]} for name in ("Cz", "E7", "E8")]
        refusal(change_config(tmp_path, chs_info=channels), "no row for E7, E8")

    def test_a_contextual_model_made_from_a_base_model_keeps_its_table(self, tmp_path):
        """braindecode's transfer saves a configuration that says "scratch" beside the 62 rows; 1.8.1 cannot load it itself."""
        spec, chs_info = pick(("Cz", "Fp1", "PO4"))
        base = self.theirs(spec, chs_info)
        theirs = oracle.CLASSES["contextual"].from_pretrained(base, n_outputs=2, chs_info=chs_info)
        theirs._save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["channel_embedding"] == "scratch"
        change_config(tmp_path, transformer__num_encoder_layers=2, transformer__num_decoder_layers=1)
        assert difference(outputs(load(tmp_path), eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6

    def test_such_a_model_of_all_62_in_another_order_is_not_guessed_at(self, tmp_path):
        spec, chs_info = pick(ALL_62[::-1])
        base = self.theirs(spec, chs_info)
        theirs = oracle.CLASSES["contextual"].from_pretrained(base, n_outputs=2, chs_info=chs_info)
        theirs._save_pretrained(tmp_path)
        change_config(tmp_path, transformer__num_encoder_layers=2, transformer__num_decoder_layers=1)
        refusal(tmp_path, "does not tell whether the position table has its channels' order or the pretraining's")
        change_config(tmp_path, channel_embedding="pretrain_aligned")  # what the error says
        assert difference(outputs(load(tmp_path), eeg(spec)), outputs(theirs, eeg(spec))) <= 1e-6


# ---------------------------------------------------------------- files of PyTorch and of Lightning


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("variant", ["prelocal", "postlocal"])
def test_a_bare_state_dict_settles_what_its_shapes_do(tmp_path, variant, name):
    state = small_state(variant)
    path = tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    checkpoint = read_checkpoint(path)
    known = {key: value for key, value in checkpoint.known.items() if key != "encoder"}
    assert known == {"variant": variant, "n_chans": 6, "n_outputs": 3, "n_spat_filters": 2}
    assert checkpoint.n_tokens == 2
    assert same_weights(checkpoint.weights, state)
    assert checkpoint.file_format == ("safetensors" if name.endswith("safetensors") else "PyTorch state dict")
    assert checkpoint.notes == ()


@pytest.mark.parametrize("variant", ["contextual", "base"])
def test_a_bare_state_dict_loads_once_its_channels_are_named(tmp_path, variant):
    model = small_model(variant)
    checkpoint = read_checkpoint(save(dict(model.state_dict()), tmp_path / "model.pth"))
    assert checkpoint.known["n_chans"] == 6
    named = {"ch_names": model.spec.ch_names, "positions": model.spec.positions, "n_times": 280}
    spec, _ = resolve_spec(named, checkpoint)
    assert (spec.encoder.n_layers, spec.encoder.n_decoder_layers) == (2, 1)
    assert difference(outputs(load_model(checkpoint, spec), eeg(spec)), outputs(model, eeg(spec))) == 0


def test_the_old_format_of_torch_is_read_too(tmp_path):
    torch.save(small_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same_weights(read_checkpoint(tmp_path / "old.pth").weights, small_state())


def lightning(state, **others):
    """What Lightning's trainer writes, as far as a reader may trip over it."""
    return {
        "epoch": 12,
        "global_step": 3456,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state | others,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 13}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.3), "kth_best": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"lr": 1e-3, "n_outputs": 3, "channels": ["Cz", "Pz"]},
    }


def prefixed(prefix, state):
    return {prefix + key: weight for key, weight in state.items()}


@pytest.mark.parametrize("prefix", ["model.", "net.encoder.", "_orig_mod.", "model._orig_mod.", ""])
def test_the_prefix_of_a_trainer_is_taken_off(tmp_path, prefix):
    content = lightning(prefixed(prefix, small_state()))
    checkpoint = read_checkpoint(save(content, tmp_path / "last.ckpt"))
    assert same_weights(checkpoint.weights, small_state())
    assert checkpoint.file_format == "Lightning checkpoint"
    assert checkpoint.notes == ((f"the prefix {prefix!r} was taken off the keys",) if prefix else ())


def test_what_is_not_the_model_is_left_out_only_where_the_user_says_so(tmp_path):
    others = {"criterion.weight": torch.ones(3), "train_acc.confmat": torch.ones(2, 2)}
    path = save(lightning(prefixed("model.", small_state()), **others), tmp_path / "last.ckpt")
    refusal(path, "criterion.weight, train_acc.confmat.*--allow-left-out criterion,train_acc")
    checkpoint = read_checkpoint(path, allow_left_out=("criterion", "train_acc.confmat"))
    assert same_weights(checkpoint.weights, small_state())
    assert "left out, as allowed: criterion.weight, train_acc.confmat" in checkpoint.notes
    refusal(path, "train_acc.confmat", allow_left_out=("criterion",))
    refusal(path, "leaves out no weight of the name net", allow_left_out=("criterion", "train_acc", "net"))


@pytest.mark.parametrize("prefixes", [("model.", "ema_model."), ("", "ema."), ("model.", "model.ema.module.")])
def test_of_two_models_one_must_be_chosen(tmp_path, prefixes):
    states = {prefix: small_state(seed=i) for i, prefix in enumerate(prefixes)}
    both = {key: weight for prefix in prefixes for key, weight in prefixed(prefix, states[prefix]).items()}
    path = save(lightning(both), tmp_path / "ema.ckpt")
    text = refusal(path, "holds 2 models under .*Choose one with --prefix")
    assert all(repr(prefix) in text for prefix in prefixes)
    for prefix in prefixes:
        assert same_weights(read_checkpoint(path, prefix=prefix).weights, states[prefix])
    text = refusal(path, "no model under the prefix 'teacher.'", prefix="teacher.")
    assert all(repr(prefix) in text for prefix in prefixes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_other_floating_point_types_become_float32(tmp_path, dtype, name):
    state = {key: weight.to(dtype) for key, weight in small_state().items()}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    weights = read_checkpoint(tmp_path / name).weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert same_weights(weights, {key: weight.to(torch.float32) for key, weight in state.items()})


# ---------------------------------------------------------------- refused: code


class Hostile:
    """Creates a file when it is unpickled without care."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=4))


def write_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, write_old_torch, write_pickle])
@pytest.mark.parametrize("place", ["alone", "state dict", "hyper-parameters", "pytorch_model.bin"])
def test_a_hostile_pickle_does_not_run(tmp_path, write, place):
    target, path = tmp_path / "owned", tmp_path / "model.ckpt"
    hostile = Hostile(target)
    content = {
        "alone": hostile,
        "state dict": small_state() | {"extra": hostile},
        "hyper-parameters": lightning(prefixed("model.", small_state())) | {"hyper_parameters": hostile},
        "pytorch_model.bin": small_state() | {"extra": hostile},
    }[place]
    if place == "pytorch_model.bin":
        write_checkpoint(small_model(), tmp_path / "folder")
        (tmp_path / "folder" / "model.safetensors").unlink()
        write(content, tmp_path / "folder" / "pytorch_model.bin")
        path = tmp_path / "folder"
    else:
        write(content, path)
    refusal(path, "is a pickle that holds more than tensors.* and could run code.*state dict alone")
    assert not target.exists()


def test_the_hostile_pickle_would_run_if_it_were_let(tmp_path):
    """Otherwise the test above would prove nothing."""
    torch.save(Hostile(tmp_path / "owned"), tmp_path / "model.pth")
    torch.load(tmp_path / "model.pth", weights_only=False).close()
    assert (tmp_path / "owned").exists()


def test_a_pickled_module_is_refused_by_the_name_of_its_class(tmp_path):
    refusal(
        save(small_model(), tmp_path / "model.pth"),
        r"\(sjepa_deploy\.models\.networks\.SignalJEPA_PostLocal\) and could run code",
    )


# ---------------------------------------------------------------- refused: damaged files


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "old.pth", "model.ckpt"])
def test_truncated_files(tmp_path, name, fraction):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(small_state(), path)
    else:
        torch.save(small_state(), path, _use_new_zipfile_serialization=name != "old.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refusal(path, f"{name} is truncated or not a .* file.*Get the file again")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.ckpt", "model"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is a text file\n" * 10,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13800000\n",
        b"<!DOCTYPE html><html>Not found</html>",
        b'{"a": 1}',
        b"PK\x03\x04" + bytes(400),
        bytes(500),
        bytes(range(256)) * 4,
    ],
    ids=["text", "git-lfs", "html", "json", "zip", "zeros", "bytes"],
)
def test_other_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name, f"{name} is (truncated or )?not a .* file")


def test_altered_bytes_never_pass_for_another_error(tmp_path):
    """Bits flipped in the pickle: whatever torch raises then is told as ours, or the file still loads."""
    torch.save(small_state(), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "whole.pth").read_bytes()
    header = content.index(b"feature_encoder.5.0.weight")  # tensors and their names, not their values
    rng = np.random.default_rng(0)
    told = []
    for _ in range(100):
        altered = bytearray(content)
        for at in rng.integers(0, header, size=3):
            altered[at] = rng.integers(256)
        (tmp_path / "altered.pth").write_bytes(altered)
        try:
            load(tmp_path / "altered.pth")
        except SjepaError as error:
            told.append(str(error))
    assert len(told) > 50
    assert not [text for text in told if "\n" in text]


def test_missing_paths(tmp_path):
    refusal(tmp_path / "nowhere.pth", "There is no checkpoint at .*nowhere.pth")
    save_file(small_state(), tmp_path / "model.safetensors")
    refusal(tmp_path, "holds no config.json.*Name the weights file itself")
    (tmp_path / "config.json").write_text("{}")
    assert read_checkpoint(tmp_path).variant == "postlocal"
    (tmp_path / "model.safetensors").unlink()
    refusal(tmp_path, "holds no model.safetensors")


@pytest.mark.parametrize(
    "content", [None, [1], {}, {"a": 1}, torch.zeros(3), {"state_dict": {}}, {"state_dict": {"weight": torch.zeros(1)}}]
)
def test_files_without_a_model(tmp_path, content):
    refusal(save(content, tmp_path / "a.pth"), "holds no (state dict|SignalJEPA model)")


# ---------------------------------------------------------------- refused: configurations


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"", "is not JSON"), (b"[1]", "is not a configuration")],
)
def test_configurations_that_are_none(tmp_path, content, match):
    write_checkpoint(small_model(), tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refusal(tmp_path, f"config.json {match}")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("feature_encoder__mode", "layer_norm", "feature_encoder__mode = 'layer_norm', which is not supported"),
        ("feature_encoder__conv_bias", True, "feature_encoder__conv_bias = True, which is not supported"),
        ("activation", "torch.nn.modules.activation.ReLU", "activation = '.*ReLU', which is not supported"),
        (
            "pos_encoder__spat_kwargs",
            {"max_norm": 1.0, "norm_type": 1.0},
            "pos_encoder__spat_kwargs = .*, which is not supported",
        ),
        ("n_outputs", 2, "says n_outputs = 2, but the weights have 3"),
        ("n_spat_filters", 4, "says n_spat_filters = 4, but the weights have 2"),
        ("n_chans", 7, "says n_chans = 7, but describes 6 channels"),
        ("n_times", 200, "200 samples give 1 time tokens, but the head of .* was made for 2.*from 280 to 407"),
        ("transformer__num_encoder_layers", 1, "unexpected transformer.encoder.layers.1"),
        ("transformer__num_decoder_layers", 2, "missing transformer.decoder.layers.1"),
        ("pos_encoder__spat_dim", 24, r"weight is \(6, 30\) instead of \(6, 24\)"),
        ("n_times", "280", "n_times must be of type integer, not str"),
        ("sfreq", [128], "sfreq must be of type number, not list"),
        ("chs_info", "Cz", "chs_info must be an array"),
        ("chs_info", [{"loc": [0.0, 0.0, 0.1]}], r"chs_info\[0\] lacks the key 'ch_name'"),
        ("feature_encoder__conv_layers_spec", [[8, 32]], "must have 3 items"),
    ],
)
def test_configurations_that_are_unsupported_or_contradict_the_weights(tmp_path, name, value, match):
    write_checkpoint(small_model("contextual"), tmp_path)
    assert load(change_config(tmp_path)).spec.n_outputs == 3
    refusal(change_config(tmp_path, **{name: value}), match)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"signal": {"n_chans": 7}}, SpecError, "6 channel names for 7 channels"),
        ({"variant": "base", "task": "features"}, CheckpointError, "says variant = base, but the weights have contextual"),
        ({"n_outputs": 2}, CheckpointError, "says n_outputs = 2, but the weights have 3"),
        ({"signal": {"unit": "kV"}}, CheckpointError, "unit must be one of nV, uV, mV, V"),
        ({"colour": "red"}, CheckpointError, "unknown key 'colour'"),
        ({"signal": {"colour": "red"}}, CheckpointError, "signal has the unknown key 'colour'"),
        ({"signal": {"n_times": 10}}, SpecError, "first time token needs 152"),
    ],
)
def test_our_own_spec_is_checked(tmp_path, changes, error, match):
    write_checkpoint(small_model("contextual"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config["sjepa_deploy"]
    (tmp_path / "signal.json").unlink()
    config["sjepa_deploy"] = stored | changes | {"signal": stored["signal"] | changes.get("signal", {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal(tmp_path, match, error)


# ---------------------------------------------------------------- refused: weights


def test_missing_unexpected_and_misshapen_keys_are_all_listed(tmp_path):
    write_checkpoint(small_model("contextual"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.encoder.norm.bias"]
    state["transformer.encoder.layers.0.extra"] = torch.zeros(2)
    state["feature_encoder.2.0.weight"] = torch.zeros(16, 8, 3)
    save_file(state, tmp_path / "model.safetensors")
    text = refusal(tmp_path, "does not fit a contextual model of 6 channels")
    assert "missing transformer.encoder.norm.bias;" in text
    assert "unexpected transformer.encoder.layers.0.extra;" in text
    assert "misshapen: feature_encoder.2.0.weight is (16, 8, 3) instead of (16, 8, 2)." in text


def test_of_many_wrong_keys_eight_are_named_and_the_rest_counted(tmp_path):
    state = small_state("contextual")
    kept = {key: weight for key, weight in state.items() if "transformer.encoder.layers.0" not in key}
    checkpoint = read_checkpoint(save(kept, tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match=r"missing (transformer\S+, ){7}transformer\S+ and 4 more"):
        load_model(checkpoint, small_spec("contextual"))


@pytest.mark.parametrize(
    ("key", "weight", "match"),
    [
        (LINEAR, torch.zeros(256), r"misshapen weights: final_layer.linear.weight is \(256,\)"),
        (LINEAR, torch.zeros(0, 256), r"misshapen weights: final_layer.linear.weight is \(0, 256\)"),
        (LINEAR, torch.zeros(3, 255), "head of 255 inputs"),
        (LINEAR, None, "lacks final_layer.linear.weight, which a postlocal model has"),
        ("final_layer.spat_conv.weight", torch.zeros(2), r"misshapen weights: final_layer.spat_conv.weight is \(2,\)"),
        ("feature_encoder.5.0.weight", torch.tensor(1.0), r"misshapen weights: feature_encoder.5.0.weight is \(\)"),
        ("feature_encoder.1.0.weight", torch.zeros(8, 1, 31), r"is \(8, 1, 31\) instead of \(8, 1, 32\)"),
        (LINEAR, torch.full((3, 256), torch.nan), "not finite in final_layer.linear.weight.*earlier checkpoint"),
        (LINEAR, torch.full((3, 256), -torch.inf), "not finite in final_layer.linear.weight"),
        (LINEAR, torch.full((3, 256), 1e300, dtype=torch.float64), "not finite in final_layer.linear.weight"),
        (LINEAR, torch.ones(3, 256, dtype=torch.int8), "not plain floating-point numbers: final_layer.linear.weight"),
        (LINEAR, torch.ones(3, 256, dtype=torch.complex64), "not plain floating-point numbers"),
        (LINEAR, torch.ones(3, 256).to_sparse(), "not plain floating-point numbers"),
    ],
)
def test_weights_that_are_no_model(tmp_path, key, weight, match):
    state = {k: v for k, v in small_state().items() if k != key} | ({} if weight is None else {key: weight})
    path = save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(read_checkpoint(path), small_spec())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", VARIANTS)
@pytest.mark.parametrize("held", VARIANTS)
def test_another_variant_is_refused(tmp_path, held, asked):
    checkpoint = read_checkpoint(save(small_state(held), tmp_path / "a.pth"))
    assert checkpoint.variant == held
    if asked != held:
        with pytest.raises(CheckpointError, match=f"a.pth holds a {held} model, not a {asked} one.*--variant {held}"):
            load_model(checkpoint, small_spec(asked))


def test_half_a_model_is_no_variant(tmp_path):
    state = {key: weight for key, weight in small_state().items() if key.startswith("feature_encoder")}
    refusal(save(state, tmp_path / "a.pth"), "no known variant: it has only the feature encoder")
    refusal(save(state | small_state("prelocal") | small_state("base"), tmp_path / "b.pth"), "it has spatial_conv, transformer")


def test_a_checkpoint_is_not_altered_by_loading_it(tmp_path):
    checkpoint = read_checkpoint(save(small_state(), tmp_path / "a.pth"))
    before = {key: weight.clone() for key, weight in checkpoint.weights.items()}
    model = load_model(checkpoint, small_spec())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert same_weights(checkpoint.weights, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.variant = "base"
