import numpy as np
import pytest
import torch

from sjepa_deploy.eeg.montage import fit_sphere, read_montage
from sjepa_deploy.errors import SpecError
from sjepa_deploy.learning.masking import Masking, MaskSampler, within_radius

POSITIONS = {name: read_montage(name).positions for name in ("sjepa-62", "GSN-HydroCel-129")}


@pytest.mark.parametrize(("montage", "hidden"), [("sjepa-62", (3.8, 7.1, 12.2)), ("GSN-HydroCel-129", (6.3, 14.1, 23.4))])
def test_the_blocks_hide_as_many_channels_as_those_of_the_paper(montage, hidden):
    for radius, expected in zip((0.4, 0.6, 0.8), hidden, strict=True):
        sampler = MaskSampler(Masking(radius=radius), POSITIONS[montage])
        masks = sampler(20_000, torch.Generator().manual_seed(0))
        drawn = (~masks.hidden_padding).sum(dim=-1).float().mean().item()
        exact = within_radius(POSITIONS[montage], radius).sum(dim=1).double().mean().item()
        assert drawn == pytest.approx(exact, rel=0.01)
        assert exact == pytest.approx(expected, rel=0.05)


def test_the_sphere_is_the_one_that_points_were_put_on():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 3))
    points = 0.09 * points / np.linalg.norm(points, axis=1, keepdims=True) + [0.01, -0.02, 0.03]
    centre, radius = fit_sphere(points)
    np.testing.assert_allclose(centre, [0.01, -0.02, 0.03], atol=1e-12)
    assert radius == pytest.approx(0.09)


@pytest.mark.parametrize("radius", [0.4, 0.8])
def test_a_block_mask_is_every_channel_within_the_radius_and_nothing_else(radius):
    positions = np.array(POSITIONS["sjepa-62"])
    masks = MaskSampler(Masking(radius=radius, n_contexts=2), POSITIONS["sjepa-62"])(50)
    _, head = fit_sphere(positions)
    blocks = {
        frozenset(j for j in range(62) if np.sqrt(((positions[i] - positions[j]) ** 2).sum()) <= radius * head) for i in range(62)
    }
    for row in range(100):
        hidden = set(masks.hidden[row, 0][~masks.hidden_padding[row, 0]].tolist())
        visible = set(masks.visible[row][~masks.visible_padding[row]].tolist())
        assert frozenset(hidden) in blocks
        assert visible == set(range(62)) - hidden


def test_fixed_masks_have_the_sizes_of_the_author_and_never_show_what_they_hide():
    masking = Masking(mode="fixed", radius=0.8)
    masks = MaskSampler(masking, POSITIONS["sjepa-62"])(50)
    near = within_radius(POSITIONS["sjepa-62"], 0.8)
    assert masks.visible.shape == (50 * 8, 8)
    assert masks.hidden.shape == (50 * 8, 2, 8)
    for visible, targets in zip(masks.visible.tolist(), masks.hidden.tolist(), strict=True):
        assert len(set(visible)) == 8
        assert all(len(set(target)) == 8 for target in targets)
        assert not set(visible) & {channel for target in targets for channel in target}
    compact = [any(near[i][target].sum() >= min(8, near[i].sum()) for i in range(62)) for target in masks.hidden[:, 0]]
    assert all(compact)  # each target fills a block before it takes a channel outside of it


def test_masks_follow_from_the_generator_and_differ_between_examples():
    sampler = MaskSampler(Masking(), POSITIONS["sjepa-62"])
    first, again = (sampler(64, torch.Generator().manual_seed(3)).hidden for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(row.flatten().tolist()) for row in first}) > 20


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (Masking(radius=3.0), "hides all 62 channels"),
        (Masking(mode="fixed", n_visible=40, n_hidden=20), "are more than the montage's 62"),
    ],
)
def test_masks_that_leave_nothing_are_refused(masking, message):
    with pytest.raises(SpecError, match=message):
        MaskSampler(masking, POSITIONS["sjepa-62"])


@pytest.mark.parametrize("changes", [{"radius": 0.0}, {"n_contexts": 0}, {"n_targets": 2}])
def test_masks_that_are_none_are_refused(changes):
    with pytest.raises(SpecError):
        Masking(**changes)
