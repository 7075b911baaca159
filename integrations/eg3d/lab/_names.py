"""The names and order of the numbers that describe one photo of the lab world."""

from __future__ import annotations

IDENTITY_NAMES: tuple[str, ...] = (
    "face_width", "face_height", "forehead", "cheekbones", "cheek_fullness",
    "jaw_width", "jaw_angle", "chin_width", "chin_length",
    "eye_size", "eye_spacing", "eye_height", "eye_tilt", "eye_openness", "lid_crease",
    "brow_height", "brow_thickness", "brow_arch", "brow_tilt",
    "nose_length", "nose_width", "nose_bridge", "nose_protrusion", "nose_tip",
    "mouth_width", "mouth_height", "upper_lip", "lower_lip",
    "ear_size", "neck_width",
    "skin_melanin", "skin_undertone", "freckles", "lip_colour",
    "hair_lightness", "hair_redness", "iris_lightness", "iris_hue",
)  # fmt: skip

NUISANCE_NAMES: tuple[str, ...] = (
    "smile", "mouth_open", "gaze_x", "gaze_y", "brow_raise", "age",
    "hair_length", "hair_volume", "hair_fringe", "hair_parting", "hair_bun",
    "light_x", "light_y", "light_warmth", "ambient",
    "background_value", "background_red_green", "background_yellow_blue", "background_gradient",
    "shirt_lightness", "shirt_hue",
)  # fmt: skip

# Outside the family the prior is trained on. Zero means "not there" for every one of them.
TRAIT_NAMES: tuple[str, ...] = (
    "birthmark_x", "birthmark_y", "birthmark_size", "birthmark_darkness",
    "eye_asymmetry", "mouth_asymmetry", "long_nose", "long_chin",
    "unibrow", "heavy_brow", "scar", "streak",
    "glasses", "eye_patch",
)  # fmt: skip
OCCLUDER_TRAITS: tuple[str, ...] = ("glasses", "eye_patch")
IDENTITY_TRAITS: tuple[str, ...] = tuple(name for name in TRAIT_NAMES if name not in OCCLUDER_TRAITS)

IDENTITY_DIM = len(IDENTITY_NAMES)
NUISANCE_DIM = len(NUISANCE_NAMES)
PARAM_NAMES = IDENTITY_NAMES + NUISANCE_NAMES
PARAM_DIM = len(PARAM_NAMES)
TRAIT_DIM = len(TRAIT_NAMES)

# Part codes of a traced ray.
BACKGROUND, SKIN, EYE, HAIR, MOUTH, CLOTHES, OCCLUDER = range(7)
