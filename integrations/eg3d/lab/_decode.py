"""From a row of N(0, 1) numbers to the measures and colours of one head, a structured row the tracer reads."""

from __future__ import annotations

import numpy as np

from ._names import PARAM_NAMES, TRAIT_NAMES

FIELDS: tuple[str, ...] = (
    # solids: centres and inverse radii of ellipsoids
    "cran_y", "cran_z", "cran_ix", "cran_iy", "cran_iz",
    "face_y", "face_z", "face_ix", "face_iy", "face_iz",
    "jaw_y", "jaw_z", "jaw_ix", "jaw_iy", "jaw_iz",
    "chin_y", "chin_z", "chin_ix", "chin_iy", "chin_iz",
    "cheek_x", "cheek_y", "cheek_z", "cheek_ir",
    "ridge_x", "ridge_y", "ridge_z",
    "ear_x", "ear_y", "ear_z", "ear_ix", "ear_iy", "ear_iz",
    "neck_r",
    # eye, brow
    "eye_x", "eye_y", "eye_z", "eye_skew", "eye_w", "eye_top", "eye_bottom", "eye_cos", "eye_sin", "crease",
    "iris_r", "gaze_x", "gaze_y",
    "brow_y", "brow_thick", "brow_arch", "brow_tilt", "unibrow",
    # nose, mouth
    "bridge_y", "bridge_z", "bridge_r", "tip_y", "tip_z", "tip_r", "wing_x", "nose_ix",
    "mouth_y", "mouth_w", "mouth_skew", "curl", "gap", "lip_up", "lip_low",
    # hair
    "cap_y", "cap_ix", "cap_iy", "cap_iz", "cut_y", "drape_y", "drape_z", "drape_ix", "drape_iy", "drape_iz",
    "cut_slope", "open_y", "open_ix", "open_iy", "part_x", "sweep", "fringe", "bun_r", "wave", "strand",
    # occluders
    "glasses", "eye_patch",
    # painted marks
    "smile", "age", "freckles", "mark_x", "mark_y", "mark_r", "mark_d", "scar", "streak",
    # colours, linear light
    "skin_r", "skin_g", "skin_b", "lip_r", "lip_g", "lip_b", "hair_r", "hair_g", "hair_b",
    "iris_cr", "iris_cg", "iris_cb", "shirt_r", "shirt_g", "shirt_b", "streak_r", "streak_g", "streak_b",
    "back_r", "back_g", "back_b", "back_slope",
    # light
    "sun_x", "sun_y", "sun_z", "sun_r", "sun_g", "sun_b", "sky_r", "sky_g", "sky_b",
)  # fmt: skip
HEAD = np.dtype([(name, np.float64) for name in FIELDS])

# Palettes in display values, from light to dark: human skin, natural hair and irises.
# fmt: off
SKIN = np.array([(.97, .83, .75), (.93, .75, .64), (.87, .68, .55), (.76, .56, .43), (.59, .41, .30), (.41, .27, .19)])
HAIR = np.array(
    [(.88, .76, .55), (.76, .58, .34), (.53, .36, .20), (.33, .21, .13), (.19, .12, .085), (.09, .07, .065)]
)
IRIS = np.array([(.46, .62, .74), (.42, .56, .48), (.52, .46, .26), (.42, .27, .13), (.24, .14, .08)])
# fmt: on


def _palette(colours: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Colour at `position` in [0, 1] along a palette, (N, 3)."""
    at = np.clip(position, 0, 1) * (len(colours) - 1)
    low = np.minimum(at.astype(int), len(colours) - 2)
    share = (at - low)[:, None]
    return colours[low] * (1 - share) + colours[low + 1] * share


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + (b - a) * share[:, None]


def _ramp(low: float, high: float, x: np.ndarray) -> np.ndarray:
    s = np.clip((x - low) / (high - low), 0, 1)
    return s * s * (3 - 2 * s)


def decode(params: np.ndarray, traits: np.ndarray) -> np.ndarray:
    """params (N, PARAM_DIM), traits (N, TRAIT_DIM) -> (N,) rows of HEAD."""
    p = {name: np.tanh(column / 2) for name, column in zip(PARAM_NAMES, params.T.astype(np.float64))}
    q = dict(zip(TRAIT_NAMES, traits.T.astype(np.float64)))
    head = np.zeros(len(params), HEAD)
    _bones(head, p, q)
    _eyes(head, p, q)
    _nose_and_mouth(head, p, q)
    _hair(head, p)
    _colours(head, p, q)
    _light(head, p)
    return head


def _bones(h: np.ndarray, p: dict, q: dict) -> None:
    width, height = 1 + 0.13 * p["face_width"], 1 + 0.08 * p["face_height"]
    gap = np.maximum(p["mouth_open"] - 0.15, 0)  # the jaw drops as the mouth opens
    h["cran_y"], h["cran_z"] = 0.050 + 0.014 * p["forehead"], -0.022
    h["cran_ix"], h["cran_iz"] = 1 / (0.146 * (0.45 + 0.55 * width)), 1 / 0.172
    h["cran_iy"] = 1 / (0.156 * (1 + 0.05 * p["forehead"]))
    h["face_y"], h["face_z"] = -0.042 * height, 0.030
    h["face_ix"], h["face_iy"], h["face_iz"] = 1 / (0.124 * width), 1 / (0.150 * height), 1 / 0.130
    h["jaw_y"], h["jaw_z"] = -0.112 * height - 0.010 * gap - 0.012 * p["jaw_angle"], 0.022
    h["jaw_ix"] = 1 / (0.093 * width * (1 + 0.24 * p["jaw_width"]))
    h["jaw_iy"], h["jaw_iz"] = 1 / (0.066 + 0.012 * p["jaw_angle"]), 1 / 0.110
    drop = 0.018 * p["chin_length"] + 0.030 * q["long_chin"]
    h["chin_y"], h["chin_z"] = -0.158 * height - drop - 0.018 * gap, 0.098 + 0.010 * q["long_chin"]
    h["chin_ix"] = 1 / (0.040 * (1 + 0.38 * p["chin_width"] + 0.15 * q["long_chin"]))
    h["chin_iy"], h["chin_iz"] = 1 / (0.034 + 0.3 * np.maximum(drop, 0)), 1 / 0.036
    fullness = 0.042 * (1 + 0.16 * p["cheek_fullness"] + 0.08 * np.maximum(p["smile"], 0))
    h["cheek_x"] = 0.074 * width * (1 + 0.06 * p["cheekbones"])
    h["cheek_y"] = -0.036 + 0.018 * p["cheekbones"] - 0.016 * p["cheek_fullness"] + 0.006 * p["smile"]
    h["cheek_z"], h["cheek_ir"] = 0.092 + 0.007 * p["cheekbones"] + 0.003 * p["smile"], 1 / fullness
    h["ridge_x"], h["ridge_y"], h["ridge_z"] = 0.052 * width, 0.050 + 0.005 * p["forehead"], 0.108
    ear = 1 + 0.28 * p["ear_size"]
    h["ear_x"], h["ear_y"], h["ear_z"] = 0.152 * (0.45 + 0.55 * width), 0.000, -0.018
    h["ear_ix"], h["ear_iy"], h["ear_iz"] = 1 / (0.017 * ear), 1 / (0.043 * ear), 1 / (0.027 * ear)
    h["neck_r"] = 0.064 * (1 + 0.14 * p["neck_width"]) * (0.6 + 0.4 * width)


def _eyes(h: np.ndarray, p: dict, q: dict) -> None:
    size = 1 + 0.17 * p["eye_size"]
    h["eye_x"] = 0.062 * (1 + 0.12 * p["eye_spacing"] + 0.05 * p["face_width"])
    h["eye_y"], h["eye_z"] = 0.008 + 0.013 * p["eye_height"], 0.0925
    h["eye_skew"] = 0.013 * q["eye_asymmetry"]
    h["eye_w"] = 0.0375 * size
    raised = 1 + 0.12 * p["brow_raise"]
    h["eye_top"] = 0.0208 * size * (1 + 0.26 * p["eye_openness"]) * raised
    h["eye_bottom"] = 0.0136 * size * (1 + 0.12 * p["eye_openness"]) * (1 - 0.32 * np.maximum(p["smile"], 0))
    tilt = 0.05 + 0.22 * p["eye_tilt"]
    h["eye_cos"], h["eye_sin"] = np.cos(tilt), np.sin(tilt)
    h["crease"] = 0.55 + 0.45 * p["lid_crease"]
    h["iris_r"] = 0.0172 * (0.5 + 0.5 * size)
    h["gaze_x"], h["gaze_y"] = 0.014 * p["gaze_x"], 0.006 * p["gaze_y"]
    heavy = np.clip(q["heavy_brow"], 0, 2)
    h["brow_y"] = h["eye_y"] + 0.041 + 0.010 * p["brow_height"] + 0.011 * p["brow_raise"] + 0.003 * heavy
    h["brow_thick"] = 0.0084 * (1 + 0.50 * p["brow_thickness"]) * (1 + 0.75 * heavy)
    h["brow_arch"] = 0.012 * (1 + 0.9 * p["brow_arch"]) + 0.012 * heavy
    h["brow_tilt"], h["unibrow"] = 0.006 * p["brow_tilt"] - 0.001, np.clip(q["unibrow"], 0, 1)


def _nose_and_mouth(h: np.ndarray, p: dict, q: dict) -> None:
    long = q["long_nose"]
    h["bridge_y"], h["bridge_z"] = 0.030, 0.126 + 0.007 * p["nose_bridge"]
    h["bridge_r"] = 0.0125 * (1 + 0.35 * p["nose_width"])
    h["tip_y"] = -0.048 - 0.019 * p["nose_length"] - 0.017 * long
    h["tip_z"] = 0.168 + 0.014 * p["nose_protrusion"] + 0.026 * long
    h["tip_r"] = 0.0175 * (1 + 0.25 * p["nose_tip"])
    h["wing_x"], h["nose_ix"] = 0.0190 * (1 + 0.40 * p["nose_width"]), 1 / (1 + 0.22 * p["nose_width"])
    height = 1 + 0.08 * p["face_height"]
    opening = np.maximum(p["mouth_open"] - 0.15, 0)
    h["mouth_y"] = -0.104 * height - 0.010 * p["mouth_height"] - 0.010 * long - 0.008 * q["long_chin"]
    h["mouth_y"] = np.minimum(h["mouth_y"], h["tip_y"] - 0.046)  # a long nose pushes the mouth down, never onto it
    h["mouth_w"] = 0.046 * (1 + 0.20 * p["mouth_width"]) * (1 + 0.16 * p["smile"])
    h["mouth_skew"] = 0.16 * q["mouth_asymmetry"]
    h["smile"], h["curl"] = p["smile"], 0.012 * p["smile"] + 0.0015
    h["gap"] = 0.030 * opening + 0.005 * np.maximum(p["smile"] - 0.35, 0)
    h["lip_up"] = 0.0110 * (1 + 0.50 * p["upper_lip"])
    h["lip_low"] = 0.0145 * (1 + 0.48 * p["lower_lip"])


def _hair(h: np.ndarray, p: dict) -> None:
    long = _ramp(-0.75, 0.85, p["hair_length"])  # 0 cropped, 0.5 a bob, 1 below the shoulders
    volume = 0.5 + 0.5 * p["hair_volume"]
    thick = 0.010 + 0.026 * volume + 0.008 * long
    h["cap_y"] = h["cran_y"] + 0.006 + 0.35 * thick
    h["cap_ix"] = 1 / (1 / h["cran_ix"] + 0.35 * thick + 0.024 * _ramp(0.3, 0.6, long) + 0.002)
    h["cap_iy"], h["cap_iz"] = 1 / (1 / h["cran_iy"] + 0.75 * thick), 1 / (1 / h["cran_iz"] + 0.55 * thick)
    h["cut_y"], h["cut_slope"] = 0.028 - 0.40 * long, 0.55 - 0.45 * long
    bottom = 0.02 - 0.38 * _ramp(0.12, 1.0, long)
    top = 0.13
    bottom = bottom - 0.16 * _ramp(0.1, 0.6, long)  # the cut below takes the round end away
    h["drape_y"], h["drape_z"] = (top + bottom) / 2, -0.058
    h["drape_iy"] = 1 / ((top - bottom) / 2 + 0.04)
    h["drape_ix"] = 1 / (1 / h["cran_ix"] - 0.020 + (0.034 + 0.040 * volume) * _ramp(0.1, 0.6, long))
    h["drape_iz"] = 1 / (0.085 + 0.035 * _ramp(0.1, 0.6, long))
    h["open_y"] = 0.045
    h["open_ix"] = h["face_ix"] / (1.10 - 0.06 * long)
    h["open_iy"] = 1 / (0.128 + 0.016 * p["forehead"])
    h["part_x"] = 0.075 * p["hair_parting"]
    h["sweep"] = 0.010 + 0.020 * volume
    h["fringe"] = 0.064 * _ramp(-0.1, 0.85, p["hair_fringe"]) - 0.006
    h["bun_r"] = 0.056 * _ramp(0.25, 0.65, p["hair_bun"])
    h["ear_x"] -= 0.016 * _ramp(0.3, 0.6, long)  # long hair lies over the ears
    h["wave"], h["strand"] = 0.004 * volume * long, 0.0016 + 0.0016 * volume


def _colours(h: np.ndarray, p: dict, q: dict) -> None:
    melanin = 0.47 + 0.55 * p["skin_melanin"]
    skin = _palette(SKIN, melanin)
    tone = p["skin_undertone"][:, None]
    skin = skin * (1 + tone * np.array([0.01, 0.028, -0.055])) - 0.01 * np.maximum(tone, 0)
    age = _ramp(-0.2, 0.95, p["age"])
    # Light hair and light irises are rare on dark skin: the two palettes follow the melanin softly.
    dark = np.clip(melanin, 0, 1)
    hair_at = 0.52 - 0.95 * p["hair_lightness"] * (1 - 0.72 * dark) + 0.42 * (dark - 0.35)
    hair = _palette(HAIR, hair_at)
    red = np.maximum(p["hair_redness"], 0) * (1 - 0.6 * dark)
    hair = _mix(hair, hair * np.array([1.25, 0.78, 0.55]) + np.array([0.08, 0.0, 0.0]), red)
    hair = _mix(hair, np.array([[0.68, 0.67, 0.66]]), 0.85 * _ramp(0.45, 1.0, p["age"]))
    iris = _palette(IRIS, 0.50 - 0.65 * p["iris_lightness"] * (1 - 0.5 * dark) + 0.42 * (dark - 0.35))
    iris = iris * (1 + p["iris_hue"][:, None] * np.array([0.12, 0.06, -0.16]))
    lip = _mix(skin * np.array([0.92, 0.60, 0.62]), np.array([[0.74, 0.27, 0.33]]), 0.26 + 0.24 * p["lip_colour"])
    hue = np.pi * p["shirt_hue"][:, None] + np.array([0.6, 2.7, 4.8])
    shirt = (0.42 + 0.34 * p["shirt_lightness"][:, None]) * (1 + 0.26 * np.cos(hue))
    streak = _mix(hair, np.array([[0.93, 0.90, 0.86]]), np.clip(q["streak"], 0, 1))
    _set_colours(
        h,
        ("skin_r skin_g skin_b", skin), ("lip_r lip_g lip_b", lip), ("hair_r hair_g hair_b", hair),
        ("iris_cr iris_cg iris_cb", iris), ("shirt_r shirt_g shirt_b", shirt), ("back_r back_g back_b", _wall(p)),
        ("streak_r streak_g streak_b", streak),
    )  # fmt: skip
    h["back_slope"] = 0.30 * p["background_gradient"]
    h["age"], h["freckles"] = age, _ramp(0.25, 0.9, p["freckles"]) * (1 - 0.7 * dark)
    h["mark_x"], h["mark_y"] = 0.095 * q["birthmark_x"], -0.045 + 0.09 * q["birthmark_y"]
    h["mark_r"], h["mark_d"] = 0.030 * np.clip(q["birthmark_size"], 0, 2), np.clip(q["birthmark_darkness"], 0, 1)
    h["scar"], h["streak"] = np.clip(q["scar"], 0, 1), np.clip(q["streak"], 0, 1)
    h["glasses"], h["eye_patch"] = np.clip(q["glasses"], 0, 1), np.clip(q["eye_patch"], 0, 1)


def _wall(p: dict) -> np.ndarray:
    """Display colour of the backdrop, (N, 3)."""
    value = 0.56 + 0.27 * p["background_value"][:, None]
    red_green, yellow_blue = p["background_red_green"][:, None], p["background_yellow_blue"][:, None]
    return value * (1 + 0.11 * red_green * np.array([1, -0.6, 0]) + 0.14 * yellow_blue * np.array([0.5, 0.3, -1]))


def _set_colours(h: np.ndarray, *colours: tuple[str, np.ndarray]) -> None:
    """Write display colours (N, 3) into the three fields each is named for, in linear light."""
    for names, colour in colours:
        for channel, name in enumerate(names.split()):
            h[name] = np.clip(colour[:, channel], 0.02, 0.98) ** 2.2


def _light(h: np.ndarray, p: dict) -> None:
    x, y = 0.95 * p["light_x"], 0.42 + 0.40 * p["light_y"]
    norm = np.sqrt(x * x + y * y + 0.81)
    h["sun_x"], h["sun_y"], h["sun_z"] = x / norm, y / norm, 0.9 / norm
    warm, ambient = p["light_warmth"], p["ambient"]
    sun, sky = 0.93 - 0.18 * ambient, 0.33 + 0.14 * ambient
    h["sun_r"], h["sun_g"], h["sun_b"] = sun * (1 + 0.10 * warm), sun, sun * (1 - 0.16 * warm)
    h["sky_r"], h["sky_g"], h["sky_b"] = sky * (1 - 0.05 * warm), sky, sky * (1.04 + 0.08 * warm)
