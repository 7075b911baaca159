"""Colours of the lab world: painted features and a light that does not depend on the camera.

Everything is computed in linear light and turned into display values at the very end. Gloss is baked with a
fixed viewer straight ahead of the face, so that one surface point has one colour from every camera.
"""

from __future__ import annotations

from math import exp, sin, sqrt

from ._jit import jit
from ._names import BACKGROUND, CLOTHES, EYE, HAIR, MOUTH, OCCLUDER, SKIN
from ._shapes import eye_opening, is_shirt, lip_edges, mouth_frame, ramp, scene, solids, strand_angle


@jit
def _mix3(r, g, b, r2, g2, b2, share):
    return r + (r2 - r) * share, g + (g2 - g) * share, b + (b2 - b) * share


@jit
def _grain(x, y, z):
    """Smooth pseudo-random mottling in [-1, 1]."""
    coarse = sin(91.0 * x + 2.0 * sin(63.0 * y)) * sin(83.0 * y + 1.7 * sin(71.0 * x))
    return 0.5 * coarse + 0.5 * sin(160.0 * x + 140.0 * z + 1.3 * sin(150.0 * y))


@jit
def _paint_eye(h, x, y, u, v, above, below):
    side = 1.0 if x > 0 else -1.0
    dx = x - side * h.eye_x - h.gaze_x
    dy = y - h.eye_y - side * h.eye_skew - h.gaze_y - 0.0022
    rho = sqrt(dx * dx + dy * dy) / h.iris_r
    r, g, b = 0.80, 0.77, 0.74
    r, g, b = _mix3(r, g, b, 0.62, 0.40, 0.36, 0.55 * ramp(0.72, 1.05, abs(u)))
    iris = 1.0 - ramp(0.92, 1.06, rho)
    if iris > 0:
        flecks = 0.85 + 0.30 * sin(9.0 * (dx * 300.0) / (abs(dx * 300.0) + abs(dy * 300.0) + 0.2)) * ramp(0.3, 0.8, rho)
        glow = (0.85 + 0.75 * ramp(0.5, -0.9, dy / h.iris_r)) * flecks * (1.0 - 0.72 * ramp(0.72, 1.0, rho))
        r, g, b = _mix3(r, g, b, h.iris_cr * glow, h.iris_cg * glow, h.iris_cb * glow, iris)
        r, g, b = _mix3(r, g, b, 0.006, 0.005, 0.005, 1.0 - ramp(0.36, 0.48, rho))
    shade = 1.0 - 0.55 * ramp(-0.011, -0.001, above) - 0.15 * ramp(-0.005, 0.0, below)
    r, g, b = r * shade, g * shade, b * shade
    gx, gy = (dx + 0.34 * h.iris_r) / (0.27 * h.iris_r), (dy - 0.34 * h.iris_r) / (0.27 * h.iris_r)
    return _mix3(r, g, b, 1.15, 1.15, 1.15, 1.0 - ramp(0.7, 1.15, sqrt(gx * gx + gy * gy)))


@jit
def _brow(h, x, y):
    """Coverage of the eyebrows at (x, y)."""
    side = 1.0 if x > 0 else -1.0
    t = (side * x - h.eye_x - 0.003) / (1.16 * h.eye_w)
    base = h.brow_y + side * 0.8 * h.eye_skew
    bend = (t - 0.3) / (1.3 if t < 0.3 else 0.75)
    fall = bend * bend * (0.75 if t < 0.3 else 0.95)
    middle = base + h.brow_arch * (0.45 - fall) + h.brow_tilt * t
    half = h.brow_thick * (1.0 - 0.62 * ramp(0.0, 1.1, t)) * (1.0 - 0.25 * ramp(-0.4, -1.1, t))
    inner = ramp(-1.16, -0.86, t) if h.unibrow <= 0 else max(ramp(-1.16, -0.86, t), h.unibrow)
    cover = inner * (1.0 - ramp(1.0, 1.14, t)) * (1.0 - ramp(0.55, 1.15, abs(y - middle) / half))
    hairs = 0.93 + 0.07 * sin(620.0 * (side * x) - 300.0 * (y - middle))
    return cover * hairs


@jit
def _paint_skin(h, x, y, z, ny):
    """Albedo and part of a point on head or neck."""
    r, g, b = h.skin_r, h.skin_g, h.skin_b
    part = SKIN
    mottle = 1.0 + 0.035 * _grain(x, y, z)
    r, g, b = r * mottle, g * mottle, b * mottle
    if z < 0.02:
        return r, g, b, part
    ax = abs(x)
    dx, dy = (ax - 0.078) / 0.042, (y + 0.042) / 0.036
    flush = 0.55 * exp(-dx * dx - dy * dy)
    dx, dy = x / 0.022, (y - h.tip_y) / 0.020
    flush += 0.42 * exp(-dx * dx - dy * dy)
    flush *= 0.8 + 0.3 * h.smile
    r, g, b = r * (1.0 + 0.06 * flush), g * (1.0 - 0.24 * flush), b * (1.0 - 0.24 * flush)
    if h.freckles > 0 and y < 0.02:
        dy = (y + 0.030) / 0.034
        spots = ramp(0.42, 0.75, sin(610 * x + 3 * sin(240 * y)) * sin(570 * y + 3 * sin(310 * x)))
        s = 0.55 * h.freckles * spots * exp(-dy * dy - (x / 0.09) * (x / 0.09))
        r, g, b = r * (1 - 0.35 * s), g * (1 - 0.55 * s), b * (1 - 0.65 * s)
    # eyes
    u, v, above, below = eye_opening(h, x, y)
    if abs(u) < 1.7 and abs(v) < 0.05:
        edge = max(above, below)
        inside = 1.0 - ramp(-0.0009, 0.0009, edge)
        around = exp(-(u * u + v * v / 0.0006) * 1.1)  # thinner, darker skin around the eye
        s = 0.20 * around + 0.14 * h.age * exp(-(((v + 0.024) / 0.007) ** 2)) * ramp(1.1, 0.4, abs(u))
        r, g, b = r * (1 - 0.7 * s), g * (1 - s), b * (1 - 0.9 * s)
        fold = (above - 0.0125) / 0.0022
        s = 0.40 * h.crease * exp(-fold * fold) * ramp(1.05, 0.6, abs(u)) * ramp(-0.004, 0.004, v)
        r, g, b = r * (1 - s), g * (1 - 1.15 * s), b * (1 - 1.15 * s)
        lash = 0.0034 + 0.0016 * ramp(-0.5, 1.0, u)
        upper = 1.0 - ramp(0.35 * lash, lash, abs(above - 0.3 * lash))
        upper *= ramp(1.22, 0.95, abs(u + 0.04)) * ramp(-0.006, 0.0, v + 0.008 * abs(u))
        lower = 0.40 * (1.0 - ramp(0.0002, 0.0020, abs(below))) * ramp(1.02, 0.75, abs(u))
        if inside > 0:
            er, eg, eb = _paint_eye(h, x, y, u, v, above, below)
            r, g, b = _mix3(r, g, b, er, eg, eb, inside)
            if inside > 0.5:
                part = EYE
        r, g, b = _mix3(r, g, b, 0.16 * h.skin_r, 0.11 * h.skin_g, 0.10 * h.skin_b, lower)
        r, g, b = _mix3(r, g, b, 0.018, 0.013, 0.012, upper)
    cover = _brow(h, x, y)
    if cover > 0:
        br, bg, bb = 0.55 * h.hair_r + 0.008, 0.55 * h.hair_g + 0.006, 0.55 * h.hair_b + 0.005
        r, g, b = _mix3(r, g, b, br, bg, bb, 0.92 * cover)
    # nostrils
    dx, dy = (ax - 0.62 * h.wing_x) / 0.0075, (y - h.tip_y + 0.66 * h.tip_r) / 0.0046
    s = 0.80 * exp(-dx * dx - dy * dy) * ramp(0.35, -0.25, ny)
    r, g, b = r * (1 - 0.92 * s), g * (1 - s), b * (1 - s)
    # lines of age: from the nostrils to the mouth corners, on the forehead, beside the eyes
    lines = 0.10 * max(h.smile, 0.0) + 0.55 * h.age
    if lines > 0.01:
        t = (h.tip_y - 0.002 - y) / (h.tip_y - h.mouth_y + 0.004)
        dx = (ax - (h.wing_x + 0.012 + 0.026 * t)) / 0.0048
        s = lines * exp(-dx * dx) * ramp(-0.1, 0.3, t) * ramp(1.35, 0.8, t)
        wave = sin((y + 0.12 * x * x) * 390.0)
        s += 0.35 * h.age * ramp(0.7, 1.0, wave) * ramp(0.062, 0.082, y) * ramp(0.13, 0.11, y) * ramp(0.075, 0.05, ax)
        fan = sin(950.0 * (v + 0.12 * (u - 1.0) * v * 30.0))
        s += 0.40 * h.age * ramp(0.3, 1.0, fan) * ramp(1.12, 1.3, u) * ramp(1.75, 1.4, u) * ramp(0.022, 0.010, abs(v))
        r, g, b = r * (1 - 0.34 * s), g * (1 - 0.44 * s), b * (1 - 0.46 * s)
    # mouth
    u, v = mouth_frame(h, x, y)
    if abs(u) < 1.12 and abs(v) < 0.06:
        top, upper, lower, bottom = lip_edges(h, min(max(u, -1.0), 1.0))
        on = ramp(0.0012, -0.0012, v - top) * ramp(0.0012, -0.0012, bottom - v) * ramp(1.02, 0.93, abs(u))
        tone = 0.86 if v > 0.5 * (upper + lower) else 1.06 + 0.10 * ramp(lower, bottom, v)
        r, g, b = _mix3(r, g, b, tone * h.lip_r, tone * h.lip_g, tone * h.lip_b, 0.92 * on)
        seam = ramp(0.0024, 0.0004, max(v - upper, lower - v)) * ramp(1.08, 0.90, abs(u))
        r, g, b = _mix3(r, g, b, 0.30 * h.lip_r, 0.16 * h.lip_g, 0.16 * h.lip_b, 0.9 * seam)
        if upper - lower > 0.004:
            gap = ramp(0.0004, 0.0022, upper - v) * ramp(0.0004, 0.0022, v - lower)
            if gap > 0:
                teeth = ramp(upper - 0.0125, upper - 0.0095, v) * ramp(0.80, 0.62, abs(u))
                teeth *= 0.85 - 0.25 * ramp(upper - 0.004, upper, v)
                ir, ig, ib = _mix3(0.075, 0.016, 0.016, 0.84, 0.79, 0.71, teeth)
                r, g, b = _mix3(r, g, b, ir, ig, ib, gap)
                if gap > 0.5:
                    part = MOUTH
    if part == SKIN:
        r, g, b = _paint_marks(h, x, y, r, g, b)
    return r, g, b, part


@jit
def _paint_marks(h, x, y, r, g, b):
    """Birthmark and scar: marks that no parameter of the family can draw."""
    if h.mark_d > 0 and h.mark_r > 0:
        dx, dy = (x - h.mark_x) / h.mark_r, (y - h.mark_y) / h.mark_r
        ragged = 1.0 + 0.16 * sin(5.0 * dx + 2.0 * dy) + 0.12 * sin(7.0 * dy - 3.0 * dx)
        s = h.mark_d * ramp(1.05, 0.75, sqrt(dx * dx + dy * dy * 1.3) * ragged)
        r, g, b = r * (1 - 0.66 * s), g * (1 - 0.86 * s), b * (1 - 0.80 * s)
    if h.scar > 0:
        t = (y + 0.030) / 0.085
        dx = (x - 0.092 + 0.028 * t + 0.004 * sin(60.0 * y)) / 0.0042
        s = h.scar * exp(-dx * dx) * ramp(1.15, 0.85, abs(t))
        r, g, b = _mix3(r, g, b, 0.56, 0.22, 0.20, 0.85 * s)
    return r, g, b


@jit
def _paint_hair(h, x, y, z):
    a = strand_angle(h, x, y, z)
    fine = 0.5 * sin(61.0 * a + 2.0 * sin(14.0 * y)) + 0.35 * sin(127.0 * a + 3.0 * sin(11.0 * y))
    fine += 0.35 * sin(23.0 * a)
    tone = 1.0 + 0.24 * fine + 0.22 * ramp(0.05, -0.25, y)
    r, g, b = h.hair_r, h.hair_g, h.hair_b
    if h.streak > 0:
        s = ramp(0.26, 0.17, abs(a - 0.55))
        r, g, b = _mix3(r, g, b, h.streak_r, h.streak_g, h.streak_b, s)
    return tone * r, tone * g, tone * b


@jit
def display(value):
    """Linear light to display value with a soft shoulder below white."""
    value = max(value, 0.0)
    if value > 0.6:
        value = 0.6 + 0.4 * (1.0 - exp(-(value - 0.6) / 0.4))
    return min(value, 1.0) ** 0.4545


@jit
def backdrop(h, x, y, z):
    """Studio wall on the inside of the world's sphere: a soft vertical gradient and a faint pool of light."""
    glow = 1.0 + h.back_slope * y / 0.35 + 0.22 * exp(-(x * x + (y - 0.02) * (y - 0.02)) / 0.06) - 0.08
    return display(h.back_r * glow), display(h.back_g * glow), display(h.back_b * glow), BACKGROUND


@jit
def normal(h, x, y, z, step):
    """Unit gradient of the scene by four samples on a tetrahedron."""
    a = scene(h, x + step, y - step, z - step)
    b = scene(h, x - step, y - step, z + step)
    c = scene(h, x - step, y + step, z - step)
    d = scene(h, x + step, y + step, z + step)
    nx, ny, nz = a - b - c + d, -a - b + c + d, -a + b - c + d
    size = 1.0 / (sqrt(nx * nx + ny * ny + nz * nz) + 1e-12)
    return nx * size, ny * size, nz * size


@jit
def shade(h, x, y, z):
    """Display colour and part of a surface point."""
    nx, ny, nz = normal(h, x, y, z, 0.0011)
    skin, body, locks, glass = solids(h, x, y, z)
    gloss, soft = 0.0, 0.0
    if glass <= min(min(skin, body), locks):
        r, g, b, part, gloss = 0.020, 0.018, 0.018, OCCLUDER, 0.25
    elif locks <= min(skin, body):
        r, g, b = _paint_hair(h, x, y, z)
        part, gloss = HAIR, 0.0
    elif body < skin and is_shirt(y, z):
        r, g, b, part = h.shirt_r, h.shirt_g, h.shirt_b, CLOTHES
        rib = 1.0 - 0.30 * ramp(-0.300, -0.262, y + 0.52 * (z + 0.06)) * ramp(-0.262, -0.268, y + 0.52 * (z + 0.06))
        r, g, b = r * rib, g * rib, b * rib
    else:
        r, g, b, part = _paint_skin(h, x, y, z, ny)
        gloss, soft = (0.05 if part == SKIN else 0.0), 1.0
    # occlusion along the normal and towards the light
    open_sky, lit, reach = 1.0, 1.0, 0.012
    for _ in range(4):
        room = scene(h, x + nx * reach, y + ny * reach, z + nz * reach)
        open_sky -= (0.30 - 0.9 * reach) * max(reach - room, 0.0) / reach
        away, to_sun = 0.006, 1.5 * reach
        px, py = x + nx * away + h.sun_x * to_sun, y + ny * away + h.sun_y * to_sun
        pz = z + nz * away + h.sun_z * to_sun
        lit = min(lit, 0.30 + max(scene(h, px, py, pz), 0.0) / (reach * 0.62))
        reach *= 2.0
    open_sky = min(max(open_sky, 0.12), 1.0)
    lit = min(max(lit, 0.25), 1.0)
    facing = nx * h.sun_x + ny * h.sun_y + nz * h.sun_z
    # light bleeds through skin: the terminator is wider and warmer in red
    key_r = max((facing + 0.34 * soft) / (1.0 + 0.34 * soft), 0.0) * lit
    key_g = max((facing + 0.18 * soft) / (1.0 + 0.18 * soft), 0.0) * lit
    key_b = max((facing + 0.14 * soft) / (1.0 + 0.14 * soft), 0.0) * lit
    dome = (0.72 + 0.28 * ny) * open_sky
    rim = 0.20 * max(-0.55 * nz + 0.35 * ny - 0.6 * nx * (1.0 if h.sun_x > 0 else -1.0), 0.0) * open_sky
    hx, hy, hz = h.sun_x, h.sun_y, h.sun_z + 1.0
    half = max(nx * hx + ny * hy + nz * hz, 0.0) / sqrt(hx * hx + hy * hy + hz * hz)
    shine = gloss * half**22 * lit
    if part == HAIR:  # a soft band of light across the crown
        band = ny - 0.55
        shine = (0.030 + 0.35 * r) * exp(-band * band * 16.0) * max(nz + 0.35, 0.0) * lit * 0.55
    r = r * (key_r * h.sun_r + dome * h.sky_r + rim) + shine * (0.6 + 0.4 * r)
    g = g * (key_g * h.sun_g + dome * h.sky_g + rim) + shine * (0.6 + 0.4 * g)
    b = b * (key_b * h.sun_b + dome * h.sky_b + rim) + shine * (0.6 + 0.4 * b)
    return display(r), display(g), display(b), part
