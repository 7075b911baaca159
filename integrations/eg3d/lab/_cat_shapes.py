"""Signed distances of a cat's solids, in world units (negative inside); see `_shapes`, whose parts it is built from.

`h` is one row of `_cat_decode.CAT` everywhere.
"""

from __future__ import annotations

from math import cos, sin, sqrt

from ._jit import jit
from ._shapes import BODY_RADIUS, carve, ellipsoid, eye_opening, ramp, union

FAR = 0.085  # beyond this distance from the coarse head the details are not evaluated


@jit
def ear_frame(h, x, y, z):
    """Coordinates of the nearer ear: along its axis, across, forwards, and half its width there."""
    side = 1.0 if x > 0 else -1.0
    sx, sy = side * x - h.ear_x, y - h.ear_y
    sz = z - h.ear_z + h.ear_back * sy
    along, lean = sx * h.ear_sin + sy * h.ear_cos, sx * h.ear_cos - sy * h.ear_sin
    turn = h.ear_out + side * h.ear_turn
    c, s = cos(turn), sin(turn)
    across, ahead = lean * c - sz * s, sz * c + lean * s
    ahead -= 1.1 * h.fold * max(along - 0.35 * h.ear_h, 0.0)
    t = along / h.ear_h
    narrow = (1.0 - t) * (1.0 + 0.55 * t) if t > 0.0 else 1.0 + 1.3 * t  # below its base it hides in the head
    return along, across, ahead, h.ear_w * narrow


@jit
def _ear(h, x, y, z):
    side = 1.0 if x > 0 else -1.0
    mx = side * x - h.ear_x - 0.4 * h.ear_h * h.ear_sin
    my, mz = y - h.ear_y - 0.4 * h.ear_h * h.ear_cos, z - h.ear_z
    bound = sqrt(mx * mx + my * my + mz * mz) - 0.75 * h.ear_h - 0.045
    if bound > 0.03:
        return bound
    along, across, ahead, w = ear_frame(h, x, y, z)
    flat = 1.8 * ahead
    d = sqrt(across * across + flat * flat) - w
    hollow = 1.5 * (ahead - 0.52 * w)
    d = carve(0.62 * d, 0.62 * (sqrt(across * across + hollow * hollow) - 0.80 * w), 0.010) - 0.005
    if h.torn > 0.0 and side < 0.0:
        du, dv = along - 0.62 * h.ear_h, across - 0.42 * h.ear_w
        d = carve(d, sqrt(du * du + dv * dv) - 0.026 * h.torn, 0.004)
    return max(d, -(along + 0.05))


@jit
def head(h, x, y, z):
    """Head without neck: skull, cheeks, ears, muzzle, lids and eyeballs."""
    ax = abs(x)
    d = ellipsoid(x, y - h.skull_y, z - h.skull_z, h.skull_ix, h.skull_iy, h.skull_iz)
    dx, dy, dz = ax - h.cheek_x, y - h.cheek_y, z - h.cheek_z
    d = union(d, sqrt(dx * dx + dy * dy + dz * dz) - h.cheek_r, 0.06)
    dx, dy, dz = ax - h.ruff_x, (y - h.ruff_y) * 1.15, z - 0.005
    d = union(d, sqrt(dx * dx + dy * dy + dz * dz) * 0.9 - 0.9 * h.ruff_r, 0.05)
    d = union(d, ellipsoid(x, y - h.muzzle_y, z - h.muzzle_z, h.muzzle_ix, h.muzzle_iy, h.muzzle_iz), 0.045)
    if d < FAR and z > 0.0:
        dx, dy, dz = ax - h.pad_x, (y - h.pad_y) * 1.1, z - h.pad_z
        d = union(d, sqrt(dx * dx + dy * dy + dz * dz) - h.pad_r, 0.020)
        dy, dz = y - h.chin_y, z - h.chin_z
        d = union(d, sqrt(x * x + dy * dy + dz * dz) - h.chin_r, 0.022)
        d = union(d, _bridge(h, x, y, z), 0.030)
        if z > 0.05:
            d = _eye(h, x, y, z, d)
            u, v = x / h.nose_w, (y - h.tip_y) / h.nose_h
            leather = max(1.0 - u * u - v * v, 0.0)
            d -= 0.004 * leather
            seam = x * 190.0
            if y < h.tip_y - 0.5 * h.nose_h and y > h.mouth_y - 0.012:
                d += 0.0030 * max(1.0 - seam * seam, 0.0)
    elif d >= FAR:
        d -= 0.04
    if y > h.ear_y - 0.09:
        d = union(d, _ear(h, x, y, z), 0.016)
    return d


@jit
def _bridge(h, x, y, z):
    """From between the eyes to the nose."""
    by, bz = h.tip_y - h.bridge_y, h.tip_z - 0.010 - h.bridge_z
    dy, dz = y - h.bridge_y, z - h.bridge_z
    t = min(max((dy * by + dz * bz) / (by * by + bz * bz), 0.0), 1.0)
    dy, dz = dy - t * by, dz - t * bz
    return sqrt(x * x + dy * dy + dz * dz) - h.bridge_r * (1.0 - 0.28 * t)


@jit
def _eye(h, x, y, z, d):
    side = 1.0 if x > 0 else -1.0
    dx, dy, dz = abs(x) - h.eye_x, y - h.eye_y - side * h.eye_skew, z - h.eye_z
    if dx * dx + dy * dy > 0.0050:
        return d
    d = carve(d, ellipsoid(dx, dy, dz - 0.076, 22.0, 27.0, 26.0), 0.028)
    _, _, above, below = eye_opening(h, x, y)
    lid = 0.0046 * ramp(-0.0008, 0.0035, max(above, 0.9 * below))
    return union(d, sqrt(dx * dx + dy * dy + dz * dz) - 0.050 - lid, 0.012)


@jit
def collar_height(y, z):
    """Height above the middle of the collar, which hangs a little lower in front."""
    return y + 0.30 * z + 0.203


@jit
def body(h, x, y, z):
    """Neck and chest, cut off by the sphere that bounds the world; the collar lies on the neck."""
    dz = z + 0.035
    neck = sqrt(x * x + dz * dz) - h.neck_r - 0.20 * max(-0.15 - y, 0.0)
    neck = max(0.93 * neck, y + 0.05)
    d = union(neck, ellipsoid(x, y - h.chest_y, z + 0.055, h.chest_ix, 1 / 0.165, 1 / 0.150), 0.09)
    band = collar_height(y, z) / 0.015
    d -= 0.006 * max(1.0 - band * band * band * band, 0.0)
    return max(d, sqrt(x * x + y * y + z * z) - BODY_RADIUS)


@jit
def scene(h, x, y, z):
    """Distance to the cat; chin and throat flow into each other."""
    d = head(h, x, y, z)
    if y < 0.02:
        d = union(d, body(h, x, y, z), 0.035)
    return d
