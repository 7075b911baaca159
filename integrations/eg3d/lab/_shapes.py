"""Signed distances of the head's solids, in world units (negative inside).

Distances are of the usual ray-marching kind: smooth unions of ellipsoids, exact in sign, a little off in
length; the tracer therefore takes slightly shortened steps. `h` is one row of `_decode.HEAD` everywhere.
"""

from __future__ import annotations

from math import atan2, sin, sqrt

from ._jit import jit

BODY_RADIUS = 0.465  # everything solid stays inside this sphere
FAR = 0.075  # beyond this distance from the coarse head the details are not evaluated


@jit
def ellipsoid(x, y, z, ix, iy, iz):
    """Approximate distance to an ellipsoid at the origin, given inverse radii."""
    x, y, z = x * ix, y * iy, z * iz
    k0 = sqrt(x * x + y * y + z * z)
    x, y, z = x * ix, y * iy, z * iz
    return k0 * (k0 - 1.0) / (sqrt(x * x + y * y + z * z) + 1e-9)


@jit
def union(a, b, k):
    """Smooth minimum; k is the width of the blend."""
    s = max(k - abs(a - b), 0.0)
    return min(a, b) - s * s / (4.0 * k)


@jit
def carve(a, b, k):
    """`a` without `b`, with a soft edge."""
    s = max(k - abs(a + b), 0.0)
    return max(a, -b) + s * s / (4.0 * k)


@jit
def ramp(low, high, x):
    s = min(max((x - low) / (high - low), 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


@jit
def eye_opening(h, x, y):
    """Lid coordinates of (x, y): outward u and upward v, each over the eye, and height above upper/lower lid.

    Returns (u in eye widths, v, above_upper, below_lower); inside the opening both heights are negative.
    """
    side = 1.0 if x > 0 else -1.0
    dx, dy = side * x - h.eye_x, y - h.eye_y - side * h.eye_skew
    u = (dx * h.eye_cos + dy * h.eye_sin) / h.eye_w
    v = dy * h.eye_cos - dx * h.eye_sin
    square = u * u
    lean = (u + 0.14) * (u + 0.14)  # the upper lid peaks a little towards the nose
    upper = h.eye_top * (1.0 - 0.80 * lean - 0.22 * square * square) * (1.0 if square < 1.3 else 0.6)
    lower = -h.eye_bottom * (1.0 - square)
    return u, v, v - upper, lower - v


@jit
def mouth_frame(h, x, y):
    """Mouth coordinates: u across in mouth widths, v upwards from the (curled, skewed) line between the lips."""
    u = x / h.mouth_w
    rest = h.mouth_y + h.mouth_skew * x
    return u, y - rest - h.curl * (min(u * u, 2.0) - 0.35)


@jit
def lip_edges(h, u):
    """Heights of the upper lip's rim, its lower rim, the lower lip's upper rim, its lower rim, at u."""
    across = max(1.0 - u * u, 0.0)
    root = sqrt(across)
    bow = 1.0 - 0.30 * max(1.0 - (u / 0.22) * (u / 0.22), 0.0)
    gap = h.gap * across
    seam = 0.0014 * (1.0 - 6.0 * u * u) * across
    upper = 0.25 * gap + seam
    lower = -0.75 * gap + seam
    top = upper + h.lip_up * (0.35 * root + 0.65 * across) * bow
    return top, upper, lower, lower - h.lip_low * (0.6 * root + 0.4 * across)


@jit
def _lips(h, x, y):
    """How far the lips stand out of the face at (x, y)."""
    u, v = mouth_frame(h, x, y)
    if abs(u) > 1.25 or abs(v) > 0.06:
        return 0.0
    top, upper, lower, bottom = lip_edges(h, min(max(u, -1.0), 1.0))
    fade = max(1.0 - u * u, 0.0)
    a = (v - 0.5 * (top + upper)) / (0.55 * (top - upper) + 0.003)
    b = (v - 0.5 * (lower + bottom)) / (0.55 * (lower - bottom) + 0.003)
    a, b = max(1.0 - a * a, 0.0), max(1.0 - b * b, 0.0)
    out = fade * (0.0055 * a + 0.0065 * b)
    if lower < v < upper:
        out -= 0.016 * min(fade * 2.0, 1.0) * min((upper - v) * 180.0, min((v - lower) * 180.0, 1.0))
    corner = (abs(u) - 1.04) * 6.0
    rise = v * 110.0
    return out - 0.0012 * max(1.0 - corner * corner - rise * rise, 0.0)


@jit
def _nose(h, x, y, z):
    sx = x * h.nose_ix
    by, bz = h.tip_y - h.bridge_y, h.tip_z - h.bridge_z
    dy, dz = y - h.bridge_y, z - h.bridge_z
    t = min(max((dy * by + dz * bz) / (by * by + bz * bz), 0.0), 1.0)
    dy, dz = dy - t * by, dz - t * bz
    bridge = sqrt(sx * sx + dy * dy + dz * dz) - (h.bridge_r + (0.8 * h.tip_r - h.bridge_r) * t)
    dy, dz = y - h.tip_y, z - h.tip_z + 0.004
    tip = sqrt(x * x + dy * dy * 1.15 + dz * dz) - h.tip_r
    wx = abs(x) - h.wing_x
    dy, dz = (y - h.tip_y + 0.004) * 1.1, (z - h.tip_z + 0.020) * 0.8
    wing = sqrt(wx * wx + dy * dy + dz * dz) - 0.68 * h.tip_r
    return union(union(bridge, tip, 0.016), wing, 0.012)


@jit
def head_skin(h, x, y, z):
    """Head without neck: skull, face, nose, lids and eyeballs, lips, ears."""
    d = union(
        ellipsoid(x, y - h.cran_y, z - h.cran_z, h.cran_ix, h.cran_iy, h.cran_iz),
        ellipsoid(x, y - h.face_y, z - h.face_z, h.face_ix, h.face_iy, h.face_iz),
        0.08,
    )
    if d > FAR:
        return d - 0.045
    ax = abs(x)
    if y < 0.0:
        d = union(d, ellipsoid(x, y - h.jaw_y, z - h.jaw_z, h.jaw_ix, h.jaw_iy, h.jaw_iz), 0.05)
    if z > 0.02:
        d = union(d, ellipsoid(x, y - h.chin_y, z - h.chin_z, h.chin_ix, h.chin_iy, h.chin_iz), 0.055)
        dx, dy, dz = ax - h.cheek_x, (y - h.cheek_y) * 1.05, z - h.cheek_z
        d = union(d, sqrt(dx * dx + dy * dy + dz * dz) - 1.0 / h.cheek_ir, 0.05)
        dx, dy, dz = (ax - h.ridge_x) * 0.55, y - h.ridge_y, z - h.ridge_z
        d = union(d, sqrt(dx * dx + dy * dy + dz * dz) - 0.026, 0.035)
        if z > 0.07 and -0.1 < y < 0.08:
            side = 1.0 if x > 0 else -1.0
            dx, dy, dz = ax - h.eye_x, y - h.eye_y - side * h.eye_skew, z - h.eye_z
            d = carve(d, ellipsoid(dx + 0.004, dy, dz - 0.080, 20.0, 30.0, 26.0), 0.034)
            if dx * dx + dy * dy < 0.0042:
                ball = sqrt(dx * dx + dy * dy + dz * dz) - 0.05
                u, v, above, below = eye_opening(h, x, y)
                lid = 0.0042 * ramp(-0.0008, 0.0035, max(above, 0.8 * below))
                fold = (above - 0.0125) * 300.0
                d = union(d, ball - lid, 0.012)
                if abs(u) < 1:
                    d += 0.0016 * h.crease * max(1.0 - fold * fold, 0.0)
        if z > 0.08:
            if y > -0.13:
                d = union(d, _nose(h, x, y, z), 0.018)
            if y < -0.04:
                d -= _lips(h, x, y)
                if abs(x) < 0.02:  # the groove between nose and mouth
                    groove = x * 130.0
                    rise = (y - 0.5 * (h.mouth_y + 0.012 + h.tip_y - 0.012)) * 60.0
                    d += 0.0022 * max(1.0 - groove * groove, 0.0) * max(1.0 - rise * rise, 0.0)
    if ax > 0.10 and z < 0.05:
        ex, ey, ez = ax - h.ear_x, y - h.ear_y, z - h.ear_z
        ex, ez = ex + 0.30 * ez, ez + 0.18 * ey
        ear = ellipsoid(ex, ey, ez, h.ear_ix, h.ear_iy, h.ear_iz)
        ear = carve(ear, ellipsoid(ex - 0.014, ey - 0.004, ez - 0.012, 75.0, 0.042 * h.ear_iy * 36.0, 60.0), 0.010)
        d = union(d, ear, 0.012)
    return d


@jit
def torso(h, x, y, z):
    """Neck and shoulders, cut off by the sphere that bounds the world."""
    t = min(max((-0.10 - y) / 0.24, 0.0), 1.0)
    dx, dz = x, z + 0.022 + 0.045 * t
    neck = sqrt(dx * dx + dz * dz) - h.neck_r * (1.0 + 0.10 * t * t)
    neck = max(neck, y + 0.06)
    d = union(neck, ellipsoid(x, y + 0.400, z + 0.075, 1 / 0.36, 1 / 0.145, 1 / 0.155), 0.11)
    return max(d, sqrt(x * x + y * y + z * z) - BODY_RADIUS)


@jit
def is_shirt(y, z):
    """Below the collar, a plane that tips down towards the chest."""
    return y + 0.52 * (z + 0.06) < -0.262


@jit
def strand_angle(h, x, y, z):
    """Angle around the crown: hairs run along lines of constant angle."""
    return atan2(x - 0.6 * h.part_x * ramp(-0.1, 0.15, y), z + 0.075 + 0.25 * (max(y, 0.0) - 0.2))


@jit
def keep_above(d, below):
    """Keep what lies above the cut, rounded."""
    s = max(0.03 - abs(d - below), 0.0)
    return max(d, below) + s * s / 0.12


@jit
def hair(h, x, y, z):
    d = ellipsoid(x, y - h.cap_y, z + 0.024, h.cap_ix, h.cap_iy, h.cap_iz)
    drape = ellipsoid(x, y - h.drape_y, z - h.drape_z, h.drape_ix, h.drape_iy, h.drape_iz)
    d = union(d, drape, 0.04)
    if h.bun_r > 0.002:
        dy, dz = y - h.cran_y - 0.178, z + 0.070
        d = union(d, sqrt(x * x + dy * dy + dz * dz) - h.bun_r, 0.012)
    if d > 0.05:
        return d - 0.01
    d = keep_above(d, h.cut_y + h.cut_slope * z - y)
    off = (x - h.part_x) / 0.11
    warped = y + h.fringe + h.sweep * min(off * off, 1.6) - h.open_y
    warped = warped * (h.open_iy if warped > 0 else 0.05 * h.open_iy)
    sx, sz = x * h.open_ix, (z - 0.20) / 0.172
    k0 = sqrt(sx * sx + warped * warped + sz * sz)
    opening = (k0 - 1.0) * 0.115
    d = carve(d, opening, 0.016)
    if d < 0.02:
        a = strand_angle(h, x, y, z)
        d += h.strand * ramp(-0.30, 0.0, y) * sin(34.0 * a + 3.0 * sin(9.0 * a)) + h.wave * sin(55.0 * y + 5.0 * a)
    return d


@jit
def occluder(h, x, y, z):
    """Glasses and an eye patch; far away when the head wears neither."""
    d = 1.0
    if h.glasses > 0.0:
        rim_z = h.eye_z + 0.071
        ax, dy = abs(x), y - h.eye_y + 0.004
        dx = ax - h.eye_x - 0.002
        q = (dx * dx * dx * dx / 3.6e-6 + dy * dy * dy * dy / 1.55e-6) ** 0.25  # a rounded square, 1 on the rim
        flat, dz = (q - 1.0) * 0.036, z - rim_z + 0.5 * max(dx, 0.0)
        thick = 0.0028 + 0.0022 * h.glasses
        d = sqrt(flat * flat + dz * dz) - thick
        bx, by = max(ax - (h.eye_x - 0.040), 0.0), dy - 0.012
        d = min(d, sqrt(bx * bx + by * by + (z - rim_z) * (z - rim_z)) - 0.8 * thick)
        if ax > h.eye_x + 0.03:
            tz = max(z - rim_z + 0.022, max(-0.02 - z, 0.0))
            tx = ax - (h.eye_x + 0.0445 + 0.26 * max(rim_z - 0.022 - z, 0.0))
            d = min(d, sqrt(tx * tx + (dy - 0.012) * (dy - 0.012) + tz * tz) - 0.8 * thick)
    if h.eye_patch > 0.0:
        dx, dy, dz = x - h.eye_x, y - h.eye_y - h.eye_skew, z - h.eye_z - 0.036
        size = 1.0 / (0.030 + 0.018 * h.eye_patch)
        d = min(d, ellipsoid(dx, dy, dz, size, 1.2 * size, 40.0))
    return 0.8 * d


@jit
def solids(h, x, y, z):
    """Distances to (head skin, torso, hair, occluder)."""
    skin = head_skin(h, x, y, z)
    body = torso(h, x, y, z) if y < -0.02 else 1.0
    glass = occluder(h, x, y, z) if h.glasses + h.eye_patch > 0.0 else 1.0
    return skin, body, hair(h, x, y, z), glass


@jit
def scene(h, x, y, z):
    """Distance to the nearest solid; chin and neck flow into each other."""
    skin, body, locks, glass = solids(h, x, y, z)
    return min(union(skin, body, 0.028), min(locks, glass))
