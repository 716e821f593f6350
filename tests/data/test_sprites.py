"""Sprites: every combination of factors once, as an image of its own that shows them."""

from __future__ import annotations

import pytest
import torch

import pyro_vae as pv


def test_every_combination_is_drawn_once_and_looks_like_no_other() -> None:
    drawn = pv.data.sprites()
    assert drawn.images.shape == (4608, 1, 32, 32)
    assert set(drawn.images.unique().tolist()) == {0.0, 1.0}
    assert len(drawn.factors.unique(dim=0)) == 4608
    assert len(drawn.images.flatten(1).unique(dim=0)) == 4608
    assert drawn.factors.amax(0).tolist() == [n - 1 for n in drawn.sizes]
    # No sprite touches the border, where a part of it would be lost.
    border = drawn.images.clone()
    border[..., 1:-1, 1:-1] = 0
    assert border.sum() == 0


def test_the_factors_are_those_of_the_images() -> None:
    images, factors, names, _ = pv.data.sprites()
    pixels = (torch.arange(32) + 0.5) / 16 - 1
    mass = images.sum((1, 2, 3))
    centre = [(images.sum((1, dim)) @ pixels) / mass for dim in (2, 3)]
    for axis, name in enumerate(("x", "y")):
        # A heart's centre of mass lies off its origin, by less than a third of the largest half-width.
        expected = -0.42 + 0.12 * factors[:, names.index(name)]
        assert (centre[axis] - expected).abs().max() < 0.13
    # Areas in pixels: half-widths squared, times the shape's own area; a pixel's rounding along the outline.
    width = (0.22 + 0.055 * factors[:, 1]) * 16
    for shape, area in ((0, 1.8**2), (1, torch.pi * 0.55)):
        which = factors[:, 0] == shape
        assert (mass[which] - area * width[which] ** 2).abs().max() <= 8 * width.max() / 2


def test_a_seed_chooses_the_combinations() -> None:
    first, again, other = (pv.data.sprites(50, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.factors, other.factors)
    assert len(first.factors.unique(dim=0)) == 50


def test_they_load_as_a_data_set() -> None:
    data = pv.data.load("sprites")
    assert (data.x_shape, len(data.train), len(data.test), data.levels) == ((1, 32, 32), 3686, 922, 2)
    assert data.train_labels is not None
    assert set(data.train_labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("size", [0, -1, 4609])
def test_sizes_beyond_the_combinations_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"not between 1 and the number of combinations, 4608"):
        pv.data.sprites(size)
