import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import mne
import numpy as np
import pytest
from eeg_files import mne_template
from hypothesis import given
from hypothesis import strategies as st

from sjepa_deploy.eeg.montage import Montage, read_montage, scalp_map
from sjepa_deploy.errors import MissingDependencyError, MontageError


def assert_equals_mne(montage: Montage, oracle: mne.channels.DigMontage) -> None:
    ch_pos = oracle.get_positions()["ch_pos"]
    assert list(montage.ch_names) == oracle.ch_names
    np.testing.assert_array_equal(montage.positions, [ch_pos[name] for name in oracle.ch_names])


def test_shipped_hydrocel_is_mnes_to_the_last_bit():
    assert_equals_mne(read_montage("gsn-hydrocel-129"), mne.channels.make_standard_montage("GSN-HydroCel-129"))


def test_shipped_pretraining_montage_is_the_10_05_system_in_the_checkpoints_order():
    montage = read_montage("sjepa-62")
    assert len(montage.ch_names) == 62
    assert montage.ch_names[:3] == ("Fp1", "Fp2", "F7")
    assert montage.ch_names[-1] == "PO4"
    ch_pos = mne_template("colin27_1005").get_positions()["ch_pos"]
    np.testing.assert_allclose(montage.positions, [ch_pos[name] for name in montage.ch_names], rtol=0, atol=1e-9)


def test_shipped_pretraining_montage_is_braindecodes():
    # Read, not imported: braindecode imports torchaudio, which does not load everywhere.
    source = Path(importlib.util.find_spec("braindecode").origin).parent / "models" / "signal_jepa.py"
    assigned = {
        node.target.id: node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign)
    }
    channels = ast.literal_eval(assigned["_PRETRAIN_CHS_INFO"])
    montage = read_montage("sjepa-62")
    assert list(montage.ch_names) == [channel["ch_name"] for channel in channels]
    assert list(map(list, montage.positions)) == [channel["loc"] for channel in channels]


def test_shipped_montages_need_no_mne():
    code = (
        "import sys; sys.modules.update(mne=None, torch=None, scipy=None)\n"
        "from sjepa_deploy.eeg.montage import read_montage\n"
        "assert len(read_montage('GSN-HydroCel-129').ch_names) == 129 and len(read_montage('sjepa-62').positions) == 62"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_montages_say_that_they_need_mne(monkeypatch):
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(MissingDependencyError, match=r"MNE.*pip install .*mne>=.*\[eeg\]"):
        read_montage("biosemi64")


@pytest.mark.parametrize(
    ("name", "mnes"),
    [("BioSemi64", "biosemi64"), ("standard_1005", "colin27_1005"), ("colin27_1020", "colin27_1020")],
)
def test_standard_montages_are_mnes(name, mnes):
    assert_equals_mne(read_montage(name), mne_template(mnes))


@pytest.mark.parametrize(
    ("name", "message"),
    [("biosemi46", "Did you mean .*biosemi64"), ("no such thing", "There are GSN-HydroCel-129, sjepa-62")],
)
def test_unknown_names_suggest_known_ones(name, message):
    with pytest.raises(MontageError, match=f"{name!r} is neither a montage nor a file.*{message}"):
        read_montage(name)


def test_tab_separated_files_round_trip(tmp_path):
    montage = read_montage("sjepa-62").pick(["Oz", "Cz"])
    lines = ["\t".join([name, *map(repr, xyz)]) for name, xyz in zip(montage.ch_names, montage.positions, strict=True)]
    path = tmp_path / "mine.tsv"
    path.write_text("\n".join(["name\tx\ty\tz", *lines, ""]))
    assert read_montage(str(path)) == montage


def test_other_files_are_read_by_mne(tmp_path):
    path = tmp_path / "mine.sfp"
    path.write_text("A1 0.0 0.09 0.0\nA2 0.09 0.0 0.0\nA3 0.0 0.0 0.09\nA4 -0.09 0.0 0.0\n")
    assert_equals_mne(read_montage(str(path)), mne.channels.read_custom_montage(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("short.tsv", "name\tx\ty\tz\nCz\t0\t0\n", "short.tsv is not a table"),
        ("words.tsv", "name\tx\ty\tz\nCz\t0\t0\tup\n", "words.tsv is not a table.*up"),
        ("twice.tsv", "name\tx\ty\tz\nCz\t0\t0\t0.1\ncz\t0\t0\t0.1\n", "one of them twice"),
        ("empty.tsv", "name\tx\ty\tz\n", "no channels"),
        ("nan.tsv", "name\tx\ty\tz\nCz\t0\t0\tnan\n", "finite x, y, z"),
        ("notes.md", "nothing of the kind", "notes.md cannot be read as a montage"),
        ("broken.sfp", "A1 1 2\nA2\n", "broken.sfp cannot be read as a montage"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MontageError, match=message):
        read_montage(str(path))


def test_pick_keeps_the_order_asked_for_and_the_montages_spelling():
    montage = read_montage("sjepa-62")
    picked = montage.pick(["oz", "FP1"])
    assert picked.ch_names == ("Oz", "Fp1")
    assert picked.positions == (montage.positions[montage.ch_names.index("Oz")], montage.positions[0])


def test_pick_lists_all_missing_channels():
    with pytest.raises(MontageError, match=re.escape("no channels E1, X9.")):
        read_montage("sjepa-62").pick(["Cz", "E1", "X9"])


def test_pick_refuses_a_channel_twice():
    with pytest.raises(MontageError, match="twice"):
        read_montage("sjepa-62").pick(["Cz", "cz"])


def test_as_many_positions_as_names():
    with pytest.raises(MontageError, match="as many"):
        Montage(ch_names=("Cz", "Oz"), positions=((0.0, 0.0, 0.1),))


@given(st.integers(0, 2**32 - 1), st.integers(10, 129), st.floats(0.05, 0.15))
def test_scalp_map_keeps_angles_and_distances_from_the_vertex(seed, n_chans, radius):
    rng = np.random.default_rng(seed)
    azimuth, inclination = rng.uniform(-np.pi, np.pi, n_chans), np.arccos(rng.uniform(-0.5, 1, n_chans))
    across = np.sin(inclination)
    head = np.column_stack([across * np.cos(azimuth), across * np.sin(azimuth), np.cos(inclination)])
    places = scalp_map(radius * head + rng.uniform(-0.05, 0.05, 3))  # the origin may lie anywhere in the head
    expected = np.column_stack([np.cos(azimuth), np.sin(azimuth)]) * (inclination / (np.pi / 2))[:, None]
    np.testing.assert_allclose(places, expected, atol=1e-6)


@pytest.mark.parametrize("n_chans", [1, 2, 3])
def test_scalp_map_of_a_few_electrodes_is_seen_from_the_origin(n_chans):
    places = scalp_map(np.eye(3)[:n_chans] * 0.09)
    np.testing.assert_allclose(places, [[1, 0], [0, 1], [0, 0]][:n_chans], atol=1e-12)


def test_scalp_map_shows_the_head_from_above_nose_up():
    montage = read_montage("sjepa-62")
    place = dict(zip(montage.ch_names, scalp_map(montage.positions), strict=True))
    assert place["Fz"][1] > place["Cz"][1] > place["Pz"][1] > place["Oz"][1]
    assert place["C3"][0] < place["Cz"][0] < place["C4"][0]
    assert abs(place["Cz"]).max() < 0.2
    assert 0.7 < np.hypot(*place["Oz"]) < 1.2
