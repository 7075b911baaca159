"""Sphere tracing of cats: `_tracer`'s kernels over another scene.

A compiled kernel is bound to the functions it calls, and its cache to the file it stands in; so the loops stand here
once more, over `_cat_shapes` and `_cat_shading`.
"""

from __future__ import annotations

from math import sqrt

from ._cat_shading import shade
from ._cat_shapes import head, scene
from ._jit import jit, jit_parallel, prange
from ._shading import backdrop
from ._shapes import BODY_RADIUS
from ._tracer import BLOCK, STEPS, _to_backdrop


@jit
def _march(h, ox, oy, oz, dx, dy, dz):
    """Distance along a unit ray to the cat, or -1."""
    along = -(ox * dx + oy * dy + oz * dz)
    square = along * along - (ox * ox + oy * oy + oz * oz) + BODY_RADIUS * BODY_RADIUS
    if square <= 0.0:
        return -1.0
    root = sqrt(square)
    t, last = max(along - root, 0.0), along + root
    d = 1.0
    for _ in range(STEPS):
        d = scene(h, ox + t * dx, oy + t * dy, oz + t * dz)
        if d < 3e-4:
            return t
        t += 0.85 * d
        if t > last:
            return -1.0
    return t if d < 2.5e-3 else -1.0


@jit_parallel
def trace_rays(heads, origins, directions, rgb, depth, part):
    """Fill rgb (N, M, 3), depth (N, M), part (N, M) for origins (N, 3) and directions (N, M, 3)."""
    rays = directions.shape[1]
    blocks = (rays + BLOCK - 1) // BLOCK
    for task in prange(heads.shape[0] * blocks):
        n = task // blocks
        first = (task % blocks) * BLOCK
        h = heads[n]
        ox, oy, oz = float(origins[n, 0]), float(origins[n, 1]), float(origins[n, 2])
        for m in range(first, min(first + BLOCK, rays)):
            dx, dy, dz = float(directions[n, m, 0]), float(directions[n, m, 1]), float(directions[n, m, 2])
            t = _march(h, ox, oy, oz, dx, dy, dz)
            if t >= 0.0:
                r, g, b, code = shade(h, ox + t * dx, oy + t * dy, oz + t * dz)
            else:
                t = _to_backdrop(ox, oy, oz, dx, dy, dz)
                r, g, b, code = backdrop(h, ox + t * dx, oy + t * dy, oz + t * dz)
            rgb[n, m, 0], rgb[n, m, 1], rgb[n, m, 2] = r, g, b
            depth[n, m], part[n, m] = t, code


@jit_parallel
def distances(heads, points, out):
    """Fill out (N, M) with the scene's distance at points (N, M, 3)."""
    for n in prange(heads.shape[0]):
        for m in range(points.shape[1]):
            out[n, m] = scene(heads[n], float(points[n, m, 0]), float(points[n, m, 1]), float(points[n, m, 2]))


@jit
def skin_in_front(heads, xy, out):
    """Fill out (N, K) with the z at which the head is met from the front at xy (N, K, 2)."""
    for n in range(heads.shape[0]):
        for k in range(xy.shape[1]):
            z = 0.3
            for _ in range(80):
                z -= 0.7 * head(heads[n], xy[n, k, 0], xy[n, k, 1], z)
            out[n, k] = z
