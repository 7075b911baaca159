"""Deterministic tensor recipe used by every reference vector (numpy only, no torch RNG).

Original helper written for these vectors; it contains nothing from the reference repositories.
"""

import re
import zlib

import numpy as np


def det(name, shape, scale=1.0, shift=0.0):
    """float32 tensor that depends only on `name`, `shape`, `scale`, `shift`."""
    seed = zlib.crc32(name.encode("utf-8")) & 0x7FFFFFFF
    base = np.random.RandomState(seed).standard_normal(size=tuple(shape))
    base = np.asarray(base, dtype=np.float64).astype(np.float32)
    return np.asarray(base * np.float32(scale) + np.float32(shift), dtype=np.float32)


# (regex on the state_dict key, scale, shift); the first match wins; keys are relative to the module under test
RULES = [
    (r"(^|\.)noise_strength$", 0.1, 0.0),
    (r"(^|\.)noise_const$", 1.0, 0.0),
    (r"(^|\.)affine\.bias$", 0.1, 1.0),
    (r"(^|\.)fc\d+\.weight$", 100.0, 0.0),  # mapping layers, lr multiplier 0.01
    (r"(^|\.)fc\d+\.bias$", 10.0, 0.0),  # mapping layers, lr multiplier 0.01
    (r"(^|\.)w_avg$", 0.5, 0.0),
    (r"(^|\.)bias$", 0.1, 0.0),
    (r".*", 1.0, 0.0),
]
# tri-plane decoder output layer ('<...>net.2.weight' / '<...>net.2.bias'): output 0 is the density
DENSITY_ROW_GAIN = 24.0
DENSITY_BIAS_SHIFT = -3.0


def param(key, shape):
    """Value of the parameter/buffer `key`; returns None for FIR filters (keep the official [1,3,3,1] filter)."""
    if key.endswith("resample_filter"):
        return None
    for pattern, scale, shift in RULES:
        if re.search(pattern, key):
            out = det(key, shape, scale, shift)
            break
    if re.search(r"(^|\.)net\.2\.weight$", key):  # zero-mean, amplified density row
        row = out[0].astype(np.float64)
        out[0] = ((row - row.mean()) * DENSITY_ROW_GAIN).astype(np.float32)
    if re.search(r"(^|\.)net\.2\.bias$", key):
        out[0] = np.float32(np.float64(out[0]) + DENSITY_BIAS_SHIFT)
    return out


def state(shapes):
    """{key: shape} -> {key: float32 array} for all keys except FIR filters."""
    out = {}
    for key in sorted(shapes):
        value = param(key, shapes[key])
        if value is not None:
            out[key] = value
    return out
