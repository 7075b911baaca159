"""Colours of the lab's cats: fur patterns, eyes with slit pupils, nose and mouth, in the light of `_shading`.

Everything is computed in linear light and turned into display values at the very end, as for people.
"""

from __future__ import annotations

from math import atan2, cos, exp, sin, sqrt

from ._cat_shapes import body, collar_height, ear_frame, head, scene
from ._jit import jit
from ._names import CLOTHES, EYE, MOUTH, SKIN
from ._shading import _grain, _mix3, display
from ._shapes import eye_opening, ramp


@jit
def _stripe(h, x, y, z):
    """How dark a tabby's stripes are at a point: rays over the forehead, bars on the cheeks, bands on the body."""
    ax = abs(x)
    brow = cos(0.115 * h.stripe_k * atan2(ax, y + 0.045))
    bars = cos(h.stripe_k * (y + 0.45 * ax + 0.3 * z + 0.012))
    top = ramp(0.0, 0.045, y - 0.30 * max(ax - 0.06, 0.0))
    dx, dy = x / 0.052, (y + 0.052) / 0.062
    free = ramp(0.8, 1.3, sqrt(dx * dx + dy * dy)) if z > 0.03 else 1.0
    return h.stripes * free * ramp(-0.05, 0.55, bars + (brow - bars) * top)


@jit
def _white(h, x, y, z):
    """Coverage of white fur: muzzle and chin, a blaze between the eyes, a bib below."""
    s = 0.0
    if z > 0.0:
        if h.white > 0.0:
            rise = -0.055 + 0.085 * h.white
            half = (0.030 + 0.060 * h.white) * (1.0 - 0.75 * ramp(-0.085, rise, y))
            s = ramp(1.12, 0.88, abs(x) / half) * ramp(rise + 0.010, rise - 0.010, y) * ramp(0.0, 0.08, h.white)
        if h.blaze > 0.0:
            s = max(s, h.blaze * ramp(1.15, 0.85, abs(x) / (0.020 + 0.10 * abs(y - 0.02))) * ramp(-0.16, -0.05, -y))
    if h.bib > 0.0 and y < -0.09:
        across = ramp(1.15, 0.85, abs(x) / (0.030 + 0.085 * h.bib)) * ramp(0.0, 0.08, h.bib)
        s = max(s, across * ramp(-0.03, 0.0, z) * ramp(-0.09, -0.13, y))
    return s


@jit
def _marks(h, x, y, z, r, g, b):
    """Patch, two-coloured face, scar: what no number of the family can draw."""
    # the other colour: nearly black on light fur, ginger on dark fur
    light = ramp(0.06, 0.16, h.fur_g)
    pr, pg, pb = _mix3(0.52, 0.21, 0.05, 0.030, 0.024, 0.022, light)
    if h.mark_d > 0.0 and h.mark_r > 0.0 and z > -0.02:
        dx, dy = (x - h.mark_x) / h.mark_r, (y - h.mark_y) / h.mark_r
        ragged = 1.0 + 0.14 * sin(4.0 * dx + 2.0 * dy) + 0.10 * sin(6.0 * dy - 3.0 * dx)
        s = h.mark_d * ramp(1.08, 0.86, sqrt(dx * dx + dy * dy) * ragged)
        r, g, b = _mix3(r, g, b, pr, pg, pb, s)
    if h.mask > 0.0:
        s = h.mask * ramp(0.0, 0.010, x + 0.006 * sin(50.0 * y)) * ramp(-0.14, -0.11, y)
        r, g, b = _mix3(r, g, b, pr, pg, pb, s)
    if h.scar > 0.0 and z > 0.0:
        t = (y + 0.035) / 0.055
        dx = (x + 0.088 - 0.024 * t) / 0.0065
        r, g, b = _mix3(r, g, b, 0.42, 0.10, 0.10, 0.85 * h.scar * exp(-dx * dx) * ramp(1.15, 0.85, abs(t)))
    return r, g, b


@jit
def _paint_fur(h, x, y, z):
    mottle = 1.0 + 0.06 * _grain(x, y, z) + 0.05 * sin(230.0 * y + 90.0 * x + 3.0 * sin(60.0 * x))
    r, g, b = h.fur_r * mottle, h.fur_g * mottle, h.fur_b * mottle
    s = _stripe(h, x, y, z)
    if h.points > 0.0:
        dx, dy = x / 0.070, (y + 0.045) / 0.068
        mask = exp(-(dx * dx + dy * dy) * (dx * dx + dy * dy)) if z > 0.0 else 0.0
        s = max(s, h.points * max(mask, ramp(0.01, 0.05, y - h.ear_y)))
    r, g, b = _mix3(r, g, b, h.dark_r, h.dark_g, h.dark_b, 0.92 * s)
    s = _white(h, x, y, z)
    r, g, b = _mix3(r, g, b, h.white_r * mottle, h.white_g * mottle, h.white_b * mottle, s)
    return _marks(h, x, y, z, r, g, b)


@jit
def _paint_ear(h, x, y, z, nz, r, g, b):
    """The bare, pale inside of an ear and the tufts at its inner edge."""
    along, across, ahead, w = ear_frame(h, x, y, z)
    if along < -0.01 or w <= 0.0:
        return r, g, b
    inside = ramp(0.92, 0.74, abs(across) / w) * ramp(-0.04, 0.10, ahead / w) * ramp(0.0, 0.25, nz + 0.35)
    inside *= ramp(-0.005, 0.02, along) * (1.0 - 0.6 * h.fold)
    pink_r, pink_g, pink_b = 0.30 + 0.45 * h.fur_r, 0.15 + 0.30 * h.fur_g, 0.13 + 0.28 * h.fur_b
    r, g, b = _mix3(r, g, b, pink_r, pink_g, pink_b, 0.85 * inside)
    tuft = inside * h.tufts * ramp(0.1, -0.55, across / w) * ramp(0.85, 0.35, along / h.ear_h)
    return _mix3(r, g, b, 0.5 + 0.4 * h.fur_r, 0.5 + 0.4 * h.fur_g, 0.5 + 0.4 * h.fur_b, tuft)


@jit
def _paint_eye(h, x, y, above, below):
    side = 1.0 if x > 0 else -1.0
    dx = x - side * h.eye_x - h.gaze_x
    dy = y - h.eye_y - side * h.eye_skew - h.gaze_y - 0.0025
    reach = 1.15 * h.eye_w
    rho = sqrt(dx * dx + dy * dy) / reach
    r, g, b = h.iris_cr, h.iris_cg, h.iris_cb
    if side > 0.0:
        r, g, b = h.odd_r, h.odd_g, h.odd_b
    glow = (0.95 + 0.45 * ramp(0.4, -0.8, dy / reach)) * (1.0 - 0.55 * ramp(0.62, 0.98, rho))
    r, g, b = r * glow, g * glow, b * glow
    # two arcs that meet above and below
    tall = dy / h.pupil_h
    half = h.pupil_w * max(1.0 - tall * tall, 0.0)
    r, g, b = _mix3(r, g, b, 0.006, 0.006, 0.006, ramp(0.0012, -0.0012, abs(dx) - half))
    dim = 1.0 - 0.45 * ramp(-0.010, -0.001, above) - 0.10 * ramp(-0.005, 0.0, below)
    r, g, b = r * dim, g * dim, b * dim
    gx, gy = (dx + 0.0075) / 0.0050, (dy - 0.0085) / 0.0050
    return _mix3(r, g, b, 1.15, 1.15, 1.15, ramp(1.2, 0.6, sqrt(gx * gx + gy * gy)))


@jit
def _paint_nose(h, x, y, r, g, b):
    """Nose leather with nostrils, the line below it, the two arcs of the mouth, spots of the whiskers."""
    part = SKIN
    ax, v = abs(x), (y - h.tip_y) / h.nose_h
    wide = h.nose_w * (0.62 + 0.42 * v) if v < 0.75 else h.nose_w * 0.935
    on = ramp(0.0022, -0.0022, ax - wide) * ramp(0.95, 0.72, v) * ramp(-1.25, -0.95, v)
    if h.spot > 0.0:
        dx, dy = (x - 0.010) / 0.016, (y - h.tip_y - 0.016) / 0.014
        r, g, b = _mix3(r, g, b, 0.030, 0.024, 0.022, h.spot * ramp(1.15, 0.8, sqrt(dx * dx + dy * dy)))
    u = ax / h.mouth_w
    arc = h.mouth_y - 0.040 * u * (1.0 - u)
    if h.gap > 0.001 and u < 1.0:
        room = h.gap * (1.0 - u * u) + 0.002
        gape = ramp(0.0, 0.003, arc - y) * ramp(0.0, 0.003, y - arc + room)
        tone = h.tongue * ramp(0.30, 0.55, (arc - y) / room)
        mr, mg, mb = _mix3(0.10, 0.018, 0.018, 0.62, 0.20, 0.20, tone)
        r, g, b = _mix3(r, g, b, mr, mg, mb, gape)
        if gape > 0.5:
            part = MOUTH
    line = ramp(0.0036, 0.0012, abs(y - arc)) * ramp(1.06, 0.92, u)
    line = max(line, ramp(0.0030, 0.0010, ax) * ramp(h.mouth_y - 0.002, h.mouth_y + 0.002, y) * ramp(0.4, -0.4, v))
    r, g, b = _mix3(r, g, b, 0.25 * h.nose_r, 0.18 * h.nose_g, 0.18 * h.nose_b, 0.85 * line)
    dx, dy = (ax - h.pad_x - 0.006) / 0.020, (y - h.pad_y - 0.004) / 0.013
    spots = ramp(0.35, 0.8, sin(560.0 * ax + 1.0) * sin(620.0 * (y + 0.2 * ax)))
    dot = 0.5 * spots * exp(-dx * dx - dy * dy)
    r, g, b = r * (1.0 - dot), g * (1.0 - dot), b * (1.0 - dot)
    r, g, b = _mix3(r, g, b, h.nose_r, h.nose_g, h.nose_b, on)
    dx, dy = (ax - 0.52 * h.nose_w) / (0.24 * h.nose_w), (v + 0.05) / 0.30
    hole = 0.85 * on * exp(-dx * dx - dy * dy)
    return r * (1.0 - hole), g * (1.0 - hole), b * (1.0 - hole), part


@jit
def _paint_head(h, x, y, z, nz):
    r, g, b = _paint_fur(h, x, y, z)
    part = SKIN
    if y > h.ear_y - 0.02:
        r, g, b = _paint_ear(h, x, y, z, nz, r, g, b)
    if z < 0.03:
        return r, g, b, part
    u, v, above, below = eye_opening(h, x, y)
    if abs(u) < 1.8 and abs(v) < 0.06:
        edge = max(above, below)
        inside = ramp(0.0010, -0.0010, edge)
        pale = 0.35 * exp(-(((edge - 0.011) / 0.005) ** 2)) * ramp(1.6, 1.1, abs(u))  # a lighter ring of fur
        r, g, b = _mix3(r, g, b, 0.4 + 0.5 * r, 0.4 + 0.5 * g, 0.38 + 0.5 * b, pale)
        liner = h.rim * ramp(0.0062, 0.0030, abs(edge - 0.0010)) * ramp(1.30, 1.05, abs(u))
        if inside > 0.0:
            er, eg, eb = _paint_eye(h, x, y, above, below)
            r, g, b = _mix3(r, g, b, er, eg, eb, inside)
            if inside > 0.5:
                part = EYE
        r, g, b = _mix3(r, g, b, 0.020, 0.016, 0.015, 0.9 * liner)
    if abs(x) < 0.09 and y < h.tip_y + 0.045:
        r, g, b, code = _paint_nose(h, x, y, r, g, b)
        if code == MOUTH:
            part = MOUTH
    return r, g, b, part


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
    """Display colour and part of a surface point. Chest and collar count as clothes, outside the head's mask."""
    nx, ny, nz = normal(h, x, y, z, 0.0011)
    neck = body(h, x, y, z) if y < 0.02 else 1.0
    if neck < head(h, x, y, z):
        part = CLOTHES
        if abs(collar_height(y, z)) < 0.015:
            r, g, b = h.shirt_r, h.shirt_g, h.shirt_b
        else:
            r, g, b = _paint_fur(h, x, y, z)
    else:
        r, g, b, part = _paint_head(h, x, y, z, nz)
    # occlusion along the normal and towards the light
    open_sky, lit, reach = 1.0, 1.0, 0.012
    for _ in range(4):
        room = scene(h, x + nx * reach, y + ny * reach, z + nz * reach)
        open_sky -= (0.30 - 0.9 * reach) * max(reach - room, 0.0) / reach
        to_sun = 1.5 * reach
        px, py = x + nx * 0.006 + h.sun_x * to_sun, y + ny * 0.006 + h.sun_y * to_sun
        lit = min(lit, 0.30 + max(scene(h, px, py, z + nz * 0.006 + h.sun_z * to_sun), 0.0) / (reach * 0.62))
        reach *= 2.0
    open_sky, lit = min(max(open_sky, 0.15), 1.0), min(max(lit, 0.30), 1.0)
    # fur scatters: a soft terminator, and a bright edge where hairs are seen against the light
    soft = 0.30 if part == SKIN or part == CLOTHES else 0.10
    key = max((nx * h.sun_x + ny * h.sun_y + nz * h.sun_z + soft) / (1.0 + soft), 0.0) * lit
    dome = (0.74 + 0.26 * ny) * open_sky
    rim = 0.16 * max(-0.55 * nz + 0.35 * ny - 0.6 * nx * (1.0 if h.sun_x > 0 else -1.0), 0.0) * open_sky
    velvet = 0.05 * (1.0 - abs(nz)) * open_sky if part == SKIN else 0.0
    r = r * (key * h.sun_r + dome * h.sky_r + rim) + velvet * (0.3 + r) * h.sky_r
    g = g * (key * h.sun_g + dome * h.sky_g + rim) + velvet * (0.3 + g) * h.sky_g
    b = b * (key * h.sun_b + dome * h.sky_b + rim) + velvet * (0.3 + b) * h.sky_b
    return display(r), display(g), display(b), part
