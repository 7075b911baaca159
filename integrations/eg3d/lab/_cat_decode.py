"""From a row of N(0, 1) numbers to the measures and colours of one cat, a structured row the tracer reads."""

from __future__ import annotations

import numpy as np

from ._decode import _light, _mix, _palette, _ramp, _set_colours, _wall

IDENTITY_NAMES: tuple[str, ...] = (
    "face_width", "face_height", "forehead", "cheek_height", "cheek_fullness",
    "muzzle_width", "cheek_ruff", "chin_width", "chin_length",
    "eye_size", "eye_spacing", "eye_height", "eye_tilt", "eye_roundness", "eye_rim",
    "ear_spacing", "ear_width", "ear_lean", "ear_tufts",
    "nose_height", "nose_width", "nose_bridge", "muzzle_protrusion", "nose_size",
    "mouth_width", "bib", "whisker_pads", "white_muzzle",
    "ear_size", "neck_fluff",
    "fur_darkness", "fur_warmth", "stripes", "nose_colour",
    "points", "stripe_width", "iris_lightness", "iris_hue",
)  # fmt: skip

NUISANCE_NAMES: tuple[str, ...] = (
    "squint", "mouth_open", "gaze_x", "gaze_y", "ears_back", "pupil",
    "ears_out", "fluff", "shoulder_height", "ear_turn", "tongue",
    "light_x", "light_y", "light_warmth", "ambient",
    "background_value", "background_red_green", "background_yellow_blue", "background_gradient",
    "collar_lightness", "collar_hue",
)  # fmt: skip

# Outside the family the prior is trained on. Zero means "not there" for every one of them.
TRAIT_NAMES: tuple[str, ...] = (
    "patch_x", "patch_y", "patch_size", "patch_darkness",
    "eye_asymmetry", "odd_eyes", "folded_ears", "torn_ear",
    "blaze", "half_mask", "nose_spot", "scar", "long_muzzle", "big_ears",
)  # fmt: skip

FIELDS: tuple[str, ...] = (
    # solids: centres and inverse radii of ellipsoids
    "skull_y", "skull_z", "skull_ix", "skull_iy", "skull_iz",
    "cheek_x", "cheek_y", "cheek_z", "cheek_r", "ruff_x", "ruff_y", "ruff_r",
    "muzzle_y", "muzzle_z", "muzzle_ix", "muzzle_iy", "muzzle_iz",
    "pad_x", "pad_y", "pad_z", "pad_r", "chin_y", "chin_z", "chin_r",
    "ear_x", "ear_y", "ear_z", "ear_h", "ear_w", "ear_cos", "ear_sin", "ear_back", "ear_out", "ear_turn",
    "fold", "torn", "neck_r", "chest_y", "chest_ix",
    # eye
    "eye_x", "eye_y", "eye_z", "eye_skew", "eye_w", "eye_top", "eye_bottom", "eye_cos", "eye_sin", "rim",
    "pupil_w", "pupil_h", "gaze_x", "gaze_y",
    # nose, mouth
    "bridge_y", "bridge_z", "bridge_r", "tip_y", "tip_z", "nose_w", "nose_h",
    "mouth_y", "mouth_w", "mouth_skew", "curl", "gap", "tongue",
    # fur pattern
    "stripes", "stripe_k", "points", "white", "bib", "blaze", "mask", "tufts", "fluff",
    "mark_x", "mark_y", "mark_r", "mark_d", "spot", "scar",
    # colours, linear light
    "fur_r", "fur_g", "fur_b", "dark_r", "dark_g", "dark_b", "white_r", "white_g", "white_b",
    "nose_r", "nose_g", "nose_b", "iris_cr", "iris_cg", "iris_cb", "odd_r", "odd_g", "odd_b",
    "shirt_r", "shirt_g", "shirt_b", "back_r", "back_g", "back_b", "back_slope",
    # light
    "sun_x", "sun_y", "sun_z", "sun_r", "sun_g", "sun_b", "sky_r", "sky_g", "sky_b",
)  # fmt: skip
CAT = np.dtype([(name, np.float64) for name in FIELDS])

# Palettes in display values, from light to dark: grey furs, warm furs, irises from blue over green to copper.
# fmt: off
GREY = np.array([(.95, .94, .92), (.77, .76, .75), (.54, .55, .58), (.31, .31, .33), (.13, .125, .13)])
WARM = np.array([(.97, .91, .81), (.91, .74, .51), (.81, .52, .27), (.52, .34, .21), (.23, .16, .12)])
IRIS = np.array([(.45, .68, .88), (.50, .76, .62), (.62, .74, .34), (.88, .74, .24), (.82, .50, .18)])
# fmt: on


def decode(params: np.ndarray, traits: np.ndarray) -> np.ndarray:
    """params (N, PARAM_DIM), traits (N, TRAIT_DIM) -> (N,) rows of CAT."""
    names = IDENTITY_NAMES + NUISANCE_NAMES
    p = {name: np.tanh(column / 2) for name, column in zip(names, params.T.astype(np.float64))}
    q = dict(zip(TRAIT_NAMES, traits.T.astype(np.float64)))
    cat = np.zeros(len(params), CAT)
    _bones(cat, p, q)
    _ears(cat, p, q)
    _eyes(cat, p, q)
    _nose_and_mouth(cat, p, q)
    _pattern(cat, p, q)
    _colours(cat, p, q)
    _light(cat, p)
    return cat


def _bones(h: np.ndarray, p: dict, q: dict) -> None:
    width, height = 1 + 0.16 * p["face_width"], 1 + 0.10 * p["face_height"]
    puffed = 1 + 0.10 * p["fluff"]
    h["skull_y"], h["skull_z"] = 0.014 + 0.014 * p["forehead"], -0.022
    h["skull_ix"], h["skull_iz"] = 1 / (0.146 * width), 1 / 0.158
    h["skull_iy"] = 1 / (0.136 * height * (1 + 0.10 * p["forehead"]))
    h["cheek_x"], h["cheek_y"] = 0.078 * width, -0.050 * height + 0.018 * p["cheek_height"]
    h["cheek_z"], h["cheek_r"] = 0.042, 0.070 * (1 + 0.20 * p["cheek_fullness"])
    ruff = np.maximum(0.4 + 0.9 * p["cheek_ruff"], 0.0)
    h["ruff_x"], h["ruff_y"] = (0.084 + 0.034 * ruff) * width, -0.074 * height + 0.012 * p["cheek_height"]
    h["ruff_r"] = (0.040 + 0.022 * ruff) * puffed
    long = 0.030 * q["long_muzzle"]
    h["muzzle_y"], h["muzzle_z"] = -0.060 * height, 0.106 + 0.6 * long
    h["muzzle_ix"] = 1 / (0.062 * (1 + 0.30 * p["muzzle_width"]))
    h["muzzle_iy"], h["muzzle_iz"] = 1 / (0.052 * height), 1 / (0.066 + 0.018 * p["muzzle_protrusion"] + 0.5 * long)
    front = h["muzzle_z"] + 1 / h["muzzle_iz"]
    pads = 1 + 0.30 * p["whisker_pads"]
    h["pad_x"], h["pad_y"] = 0.030 * (1 + 0.25 * p["muzzle_width"]), -0.082 * height
    h["pad_r"] = 0.033 * pads
    h["pad_z"] = front - 0.026
    gap = np.maximum(p["mouth_open"] - 0.2, 0)
    h["chin_y"] = h["pad_y"] - 0.028 - 0.012 * p["chin_length"] - 0.022 * gap
    h["chin_z"], h["chin_r"] = front - 0.042, 0.032 * (1 + 0.25 * p["chin_width"])
    h["neck_r"] = (0.100 + 0.034 * p["neck_fluff"]) * puffed
    h["chest_y"], h["chest_ix"] = -0.372 + 0.030 * p["shoulder_height"], 1 / (0.24 * (0.6 + 0.4 * width))


def _ears(h: np.ndarray, p: dict, q: dict) -> None:
    size = (1 + 0.38 * p["ear_size"]) * (1 + 0.45 * q["big_ears"])
    fold = np.clip(q["folded_ears"], 0, 1)
    width = 1 / h["skull_ix"]
    h["ear_x"] = width * (0.57 + 0.14 * p["ear_spacing"])
    h["ear_y"], h["ear_z"] = h["skull_y"] + 0.66 / h["skull_iy"], -0.012 - 0.020 * p["ears_back"]
    h["ear_h"] = 0.126 * size * (1 - 0.42 * fold)
    h["ear_w"] = 0.060 * (0.5 + 0.5 * size) * (1 + 0.26 * p["ear_width"])
    lean = 0.26 + 0.24 * p["ear_lean"] + 0.30 * p["ears_out"] + 0.35 * fold
    h["ear_cos"], h["ear_sin"] = np.cos(lean), np.sin(lean)
    h["ear_back"] = 0.10 + 0.30 * p["ears_back"]
    h["ear_out"], h["ear_turn"] = 0.30 + 0.50 * p["ears_out"], 0.55 * p["ear_turn"]
    h["fold"], h["torn"] = fold, np.clip(q["torn_ear"], 0, 1)


def _eyes(h: np.ndarray, p: dict, q: dict) -> None:
    size = 1 + 0.22 * p["eye_size"]
    h["eye_x"] = 0.065 * (1 + 0.15 * p["eye_spacing"] + 0.08 * p["face_width"])
    h["eye_y"], h["eye_z"] = 0.004 + 0.014 * p["eye_height"], 0.076
    h["eye_skew"] = 0.013 * q["eye_asymmetry"]
    h["eye_w"] = 0.0400 * size
    wide = 1 - 0.42 * np.maximum(p["squint"], -0.15)
    roundness = 1 + 0.28 * p["eye_roundness"]
    h["eye_top"] = 0.0300 * size * roundness * wide
    h["eye_bottom"] = 0.0215 * size * roundness * (0.4 + 0.6 * wide)
    tilt = 0.20 + 0.26 * p["eye_tilt"]
    h["eye_cos"], h["eye_sin"] = np.cos(tilt), np.sin(tilt)
    h["rim"] = 0.55 + 0.45 * p["eye_rim"]
    h["pupil_w"] = 0.0095 + 0.0070 * p["pupil"]
    h["pupil_h"] = 0.0235 * (0.6 + 0.4 * size)
    h["gaze_x"], h["gaze_y"] = 0.012 * p["gaze_x"], 0.006 * p["gaze_y"]


def _nose_and_mouth(h: np.ndarray, p: dict, q: dict) -> None:
    front = h["muzzle_z"] + 1 / h["muzzle_iz"]
    h["bridge_y"], h["bridge_z"] = 0.030, 0.100 + 0.014 * p["nose_bridge"]
    h["bridge_r"] = 0.024 * (1 + 0.30 * p["nose_width"])
    h["tip_y"], h["tip_z"] = h["muzzle_y"] + 0.014 + 0.010 * p["nose_height"], front - 0.012
    nose = 1 + 0.35 * p["nose_size"]
    h["nose_w"], h["nose_h"] = 0.0215 * nose * (1 + 0.15 * p["nose_width"]), 0.0180 * nose
    h["mouth_y"] = h["tip_y"] - 0.7 * h["nose_h"] - 0.016
    h["mouth_w"] = 0.043 * (1 + 0.26 * p["mouth_width"]) * (1 + 0.12 * p["muzzle_width"])
    h["mouth_skew"], h["curl"] = 0.0, 0.006
    h["gap"] = 0.038 * np.maximum(p["mouth_open"] - 0.2, 0)
    h["tongue"] = _ramp(0.0, 0.5, p["tongue"])


def _pattern(h: np.ndarray, p: dict, q: dict) -> None:
    h["stripes"] = _ramp(-0.25, 0.50, p["stripes"])
    h["stripe_k"] = 2 * np.pi / (0.042 * (1 + 0.40 * p["stripe_width"]))
    h["points"] = _ramp(0.05, 0.65, p["points"])
    h["white"], h["bib"] = _ramp(-0.25, 0.70, p["white_muzzle"]), _ramp(-0.30, 0.60, p["bib"])
    h["tufts"], h["fluff"] = 0.5 + 0.5 * p["ear_tufts"], 0.5 + 0.5 * p["fluff"]
    h["blaze"], h["mask"] = np.clip(q["blaze"], 0, 1), np.clip(q["half_mask"], 0, 1)
    h["mark_x"], h["mark_y"] = 0.10 * q["patch_x"], -0.01 + 0.08 * q["patch_y"]
    h["mark_r"], h["mark_d"] = 0.062 * np.clip(q["patch_size"], 0, 2), np.clip(q["patch_darkness"], 0, 1)
    h["spot"], h["scar"] = np.clip(q["nose_spot"], 0, 1), np.clip(q["scar"], 0, 1)


def _colours(h: np.ndarray, p: dict, q: dict) -> None:
    darkness, warmth = 0.44 + 0.62 * p["fur_darkness"], _ramp(-0.45, 0.45, p["fur_warmth"])
    fur = _mix(_palette(GREY, darkness), _palette(WARM, darkness), warmth)
    # stripes and points are the same kind of fur, two or three shades darker
    dark = _mix(_palette(GREY, darkness + 0.42), _palette(WARM, darkness + 0.42), warmth)
    white = _mix(fur, np.array([[0.95, 0.93, 0.90]]), np.full(len(h), 0.93))
    pale, black = np.array([[0.88, 0.58, 0.56]]), np.array([[0.17, 0.13, 0.13]])
    nose = _mix(np.repeat(pale, len(h), 0), black, _ramp(-0.35, 0.55, p["nose_colour"] + 0.45 * (darkness - 0.4)))
    iris = _palette(IRIS, 0.52 + 0.75 * p["iris_hue"]) * (1 + 0.22 * p["iris_lightness"][:, None])
    odd = _mix(iris, np.array([[0.40, 0.64, 0.92]]), np.clip(1.2 * q["odd_eyes"], 0, 1))
    hue = np.pi * p["collar_hue"][:, None] + np.array([0.6, 2.7, 4.8])
    collar = (0.44 + 0.34 * p["collar_lightness"][:, None]) * (1 + 0.55 * np.cos(hue))
    _set_colours(
        h,
        ("fur_r fur_g fur_b", fur), ("dark_r dark_g dark_b", dark), ("white_r white_g white_b", white),
        ("nose_r nose_g nose_b", nose), ("iris_cr iris_cg iris_cb", iris), ("odd_r odd_g odd_b", odd),
        ("shirt_r shirt_g shirt_b", collar), ("back_r back_g back_b", _wall(p)),
    )  # fmt: skip
    h["back_slope"] = 0.30 * p["background_gradient"]
