import dataclasses
import json

import pytest
import torch
from small import CH_NAMES, ENCODER, make_spec

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.errors import CheckpointError
from sjepa_deploy.models.checkpoint import read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.models.transfer import base_encoder, transfer

HEAD = ("spatial_conv", "final_layer")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = build_model(make_spec(), seed=1)
    with torch.no_grad():  # as if it had learned: also the embeddings differ from their initialisation
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    write_checkpoint(model, folder)
    return read_checkpoint(folder)


def check_report(report, model, base):
    """Every weight of both sides is in exactly one place."""
    skipped = [s.name for s in report.skipped if s.name not in report.taken]
    assert sorted(report.taken + report.new) == sorted(model.state_dict())
    assert sorted({*report.taken, *report.left, *skipped}) == sorted(base.weights)
    assert not set(report.taken) & set(report.new)


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
@pytest.mark.parametrize("to_prelocal", [False, True])
def test_every_weight_is_what_the_table_says(variant, to_prelocal, base):
    spec = make_spec(variant)
    model, report = transfer(base, spec, seed=7, encoder_to_prelocal=to_prelocal)
    fresh = build_model(spec, seed=7).state_dict()
    for name, weight in model.state_dict().items():
        part = name.split(".")[0]
        pretrained = {
            "prelocal": to_prelocal and part == "feature_encoder",
            "postlocal": part == "feature_encoder",
            "contextual": part in ("feature_encoder", "pos_encoder", "transformer"),
        }[variant]
        assert torch.equal(weight, base.weights[name] if pretrained else fresh[name]), name
        assert (name in report.taken) == pretrained
    check_report(report, model, base)
    assert all(name.startswith(HEAD) for name in report.new) or variant == "prelocal"
    if variant == "prelocal":
        assert bool(report.skipped) != to_prelocal
        assert all(s.name.startswith("feature_encoder") and "unless" in s.reason for s in report.skipped)


def test_position_embeddings_move_by_name_and_the_rest_comes_from_the_coordinates(base):
    names = read_montage("sjepa-62").ch_names
    other = tuple(name.upper() if i % 2 else name for i, name in enumerate(reversed(names[:20])))
    spec = make_spec("contextual", ch_names=names[:20]).replace(
        ch_names=other, positions=tuple(reversed(read_montage("sjepa-62").positions[:20]))
    )
    model, report = transfer(base, spec)
    fresh = build_model(spec, seed=0).state_dict()
    key = "pos_encoder.pos_encoder_spat.weight"
    for row, name in enumerate(other):
        mine = [i for i, n in enumerate(CH_NAMES) if n.casefold() == name.casefold()]
        expected = base.weights[key][mine[0]] if mine else fresh[key][row]
        assert torch.equal(model.state_dict()[key][row], expected)
        assert (name in report.channels_taken) == bool(mine)
    assert len(report.channels_taken) == 5
    assert set(report.channels_taken) | set(report.channels_new) == set(other)
    assert [s.name for s in report.skipped] == [key]


def test_hydrocel_shares_only_cz_with_the_62_channels(tmp_path):
    montage = read_montage("sjepa-62")
    spec = make_spec(ch_names=montage.ch_names)
    write_checkpoint(build_model(spec, seed=0), tmp_path)
    net = read_montage("GSN-HydroCel-129")
    target = make_spec("contextual").replace(ch_names=net.ch_names, positions=net.positions, n_chans=129)
    _, report = transfer(read_checkpoint(tmp_path), target)
    assert report.channels_taken == ("Cz",)
    assert len(report.channels_new) == 128


def test_another_length_is_noted_and_another_rate_refused_unless_accepted(base):
    _, report = transfer(base, make_spec("contextual", n_times=408))
    assert "pretrained on windows of 152 samples, fine-tuned on 408" in report.notes
    faster = make_spec("contextual", sfreq=128.0)
    with pytest.raises(CheckpointError, match=r"pretrained at 100 Hz, the data are at 128 Hz.*--sfreq 100"):
        transfer(base, faster)
    _, report = transfer(base, faster, accept_sfreq=True)
    assert "filters learned at 100 Hz are used at 128 Hz" in report.notes
    with pytest.raises(CheckpointError, match="pretrained on uV, the data are in V"):
        transfer(base, make_spec("contextual", unit="V"))


def test_a_shape_that_does_not_fit_is_an_error_that_names_both(base):
    wider = dataclasses.replace(ENCODER, conv_layers=((12, 32, 8), *ENCODER.conv_layers[1:]))
    with pytest.raises(CheckpointError, match=r"feature_encoder.1.0.weight .*\(8, 1, 32\).*\(12, 1, 32\)"):
        transfer(base, make_spec("postlocal", encoder=wider))
    deeper = dataclasses.replace(base_encoder(base)[0], n_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks transformer.encoder.layers.2"):
        transfer(base, make_spec("contextual", encoder=deeper))


def test_only_a_base_model_is_transferred(tmp_path):
    spec = make_spec("postlocal")
    write_checkpoint(build_model(spec, seed=0), tmp_path)
    with pytest.raises(CheckpointError, match="holds a postlocal model, not a base model"):
        transfer(read_checkpoint(tmp_path), spec)


def test_the_report_can_be_stored_in_the_checkpoint(base, tmp_path):
    model, report = transfer(base, make_spec("contextual"))
    write_checkpoint(model, tmp_path, training={"transfer": report})
    stored = json.loads((tmp_path / "config.json").read_text())[TRAINING_KEY]["transfer"]
    assert tuple(stored["taken"]) == report.taken
    assert read_checkpoint(tmp_path).variant == "contextual"


def test_a_folder_in_braindecodes_form_is_taken_too(tmp_path):
    from oracle import braindecode_model

    spec = make_spec(encoder=dataclasses.replace(ENCODER, n_layers=1))
    theirs = braindecode_model(spec)
    theirs.save_pretrained(tmp_path)
    model, report = transfer(read_checkpoint(tmp_path), spec.replace(variant="contextual"))
    for name, weight in theirs.state_dict().items():
        if name in model.state_dict():
            assert torch.equal(model.state_dict()[name], weight), name
    assert not report.left
