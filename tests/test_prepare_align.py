"""Crops: EG3D's own to the last bit, and the general ones where their definition says they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import vectors

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d.prepare import FACE, LAB, fit_pose
from convlora.integrations.eg3d.prepare.align import (
    _cut,
    align,
    cut_window,
    face_region,
    orthographic_fit,
    window,
)
from convlora.integrations.eg3d.prepare.face_model import FACE_POINTS

FRONTAL = np.array([[205.0, 102], [247, 102], [226, 126], [207, 142], [245, 142]])


def picture(width: int = 500, height: int = 640) -> np.ndarray:
    """The reference's picture."""
    x, y = np.meshgrid(np.arange(float(width)), np.arange(float(height)))
    red, green = 127.5 + 100 * np.sin(x / 23 + y / 41), 127.5 + 90 * np.cos(x / 17 - y / 29)
    return np.floor(np.stack([red, green, 127.5 + 80 * np.sin(y / 13) * np.cos(x / 57)], -1)).astype(np.uint8)


def test_the_crop_is_eg3ds_to_the_last_bit():
    _, v = vectors("12_preprocess")
    torch.testing.assert_close(torch.tensor(FACE_POINTS), v["lm3d_std"], atol=1e-7, rtol=0)
    image, landmarks = picture(), v["landmarks_image_coords"].double().numpy()
    position, scale = orthographic_fit(landmarks, 640)
    assert np.abs(position - v["pos_t"].numpy()).max() < 1e-5 and scale == pytest.approx(float(v["pos_s"]), rel=1e-6)
    hi = window(position, scale, (500, 640), 1024, 300.0)
    lo = window(position, scale, (500, 640), 224, 102.0)
    for got, want in ((hi, v["geom_hi"]), (lo, v["geom_lo"])):
        assert got[1:] == tuple(want[1:].int().tolist()) and got[0] == pytest.approx(float(want[0]), rel=1e-6)
    crop = align(image, landmarks, padding="black")
    assert np.array_equal(crop.image[::8, ::8], v["crop512_sub8"].numpy())
    assert np.array_equal(cut_window(image, lo, 224)[0][::4, ::4], v["crop224_sub4"].numpy())
    # The reference's landmarks leave out that windows begin at whole pixels and pixels have centres.
    moved = crop.landmarks * (700 / 512) + 162
    assert np.abs(moved - np.stack([v["lm_hi"][:, 0], 1024 - v["lm_hi"][:, 1]], 1)).max() < 1.5


def test_a_window_too_large_to_resize_whole_is_the_same_but_for_rounding(monkeypatch):
    import sys

    image = picture()
    cut = window(*orthographic_fit((FRONTAL - [160, 70]) * 1.4, 640), (500, 640), 1024, 300.0)
    whole, mask = cut_window(image, cut, 1024, "mirror")
    monkeypatch.setattr(sys.modules["convlora.integrations.eg3d.prepare.align"], "_WHOLE", 0)
    part, same = cut_window(image, cut, 1024, "mirror")
    assert np.array_equal(mask, same) and (mask == 0).any() and (mask == 255).any()
    difference = np.abs(whole.astype(int) - part)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("model", [FACE, LAB], ids=["face", "lab"])
def test_padding_fills_outside_and_the_mask_says_where(model):
    image = picture()[60:, 170:]
    landmarks = FRONTAL - [170, 60]
    crops = {kind: align(image, landmarks, model, 128, kind) for kind in ("mirror", "edge", "black")}
    mask = crops["black"].mask
    assert set(np.unique(mask)) == {0, 255} and 0.05 < (mask == 0).mean() < 0.6
    inside = np.zeros_like(mask, bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside[rows[0] + 4 : rows[-1] - 3, columns[0] + 4 : columns[-1] - 3] = True  # away from the filter's reach
    for crop in crops.values():
        assert np.array_equal(crop.mask, mask)
        assert np.array_equal(crop.image[inside], crops["black"].image[inside])
    first = columns[0]
    assert first > 8 and (crops["black"].image[rows[5], : first - 4] == 0).all()
    mirrored = crops["mirror"].image[rows[5]].astype(int)
    assert np.abs(mirrored[first - 6 : first - 2] - mirrored[first + 6 : first + 2 : -1][:4]).max() < 40
    flat = crops["edge"].image[rows[5], : first - 4].astype(int)
    assert np.abs(flat - flat[0]).max() <= 2


@settings(max_examples=10, deadline=None)
@given(st.floats(0.6, 2), st.floats(-100, 100), st.floats(-60, 60))
def test_a_scaled_and_moved_photo_gives_the_same_framing(factor, dx, dy):
    blank = np.zeros((600, 900, 3), np.uint8)  # every drawn face lies inside
    first = align(blank, FRONTAL, FACE, 256).landmarks
    moved = align(blank, (FRONTAL + [100, 60] + [dx, dy]) * factor * 0.8, FACE, 256).landmarks
    assert np.abs(first - moved).max() < 1.5  # EG3D's windows begin at whole pixels of 1024
    exact = [align(blank, points, LAB, 256).landmarks for points in (FRONTAL, (FRONTAL + [100 + dx, 60 + dy]) * factor)]
    assert np.abs(exact[0] - exact[1]).max() < 1e-3


def test_landmarks_move_with_the_pixels():
    image = np.zeros((400, 450, 3), np.uint8)
    for x, y in FRONTAL.astype(int):
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
    for model in (FACE, LAB):
        crop = align(image, FRONTAL, model, 512)
        for x, y in crop.landmarks:
            at = np.round([y, x]).astype(int)
            bright = crop.image[at[0] - 12 : at[0] + 13, at[1] - 12 : at[1] + 13, 0].astype(float)
            rows, columns = np.mgrid[-12:13, -12:13]
            off = [
                (bright * rows).sum() / bright.sum() + at[0] - y,
                (bright * columns).sum() / bright.sum() + at[1] - x,
            ]
            assert np.abs(off).max() < 0.6


def test_the_general_crop_has_the_models_focal_length():
    fit = fit_pose(FRONTAL, LAB)
    crop = align(picture(), FRONTAL, LAB, 200)
    again = fit_pose(crop.landmarks, LAB)
    assert again.side == pytest.approx(200, rel=1e-3) and np.abs(np.array(again.centre) - 99.5).max() < 0.05
    assert again.angles.yaw == pytest.approx(fit.angles.yaw, abs=0.05)


def test_reduction_is_antialiased():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2000, 2000, 3)).astype(np.uint8)
    small, _ = _cut(noise, np.zeros(2), np.full(2, 20.0), 100, "black", "LANCZOS")
    assert small.astype(float).std() < 12  # 74 if pixels were skipped


def test_the_face_region_reaches_from_forehead_to_chin():
    landmarks = align(picture(), FRONTAL, FACE, 512).landmarks
    disc = face_region(landmarks, 512)
    assert 0.15 < disc.mean() < 0.4
    assert all(disc[round(y), round(x)] for x, y in landmarks) and not disc[0, 0]


def test_wrong_input_is_named():
    with pytest.raises(ConvloraError, match="padding is 'wrap'; one of mirror, edge, black"):
        align(picture(), FRONTAL, padding="wrap")  # type: ignore[arg-type]
    with pytest.raises(ConvloraError, match="size is 0"):
        align(picture(), FRONTAL, size=0)
    for model in (FACE, LAB):
        with pytest.raises(AlbumError, match="lies outside the photo"):
            align(picture(100, 100), FRONTAL + 3000, model)
