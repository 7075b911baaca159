"""Sphere tracing of whole batches of rays."""

from __future__ import annotations

from math import sqrt

from ._jit import jit, jit_parallel, prange
from ._shading import backdrop, shade
from ._shapes import BODY_RADIUS, head_skin, scene

BACKDROP_RADIUS = 0.49
STEPS = 80
BLOCK = 64  # rays per parallel task: heads differ in cost from place to place


@jit
def _march(h, ox, oy, oz, dx, dy, dz):
    """Distance along a unit ray to the first solid, or -1."""
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
        t += 0.88 * d
        if t > last:
            return -1.0
    return t if d < 2.5e-3 else -1.0


@jit
def _to_backdrop(ox, oy, oz, dx, dy, dz):
    """Distance to the far side of the backdrop; rays that pass it by end at their nearest point to it."""
    along = -(ox * dx + oy * dy + oz * dz)
    square = along * along - (ox * ox + oy * oy + oz * oz) + BACKDROP_RADIUS * BACKDROP_RADIUS
    return along + sqrt(max(square, 0.0))


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
    """Fill out (N, K) with the z at which the bare head is met from the front at xy (N, K, 2)."""
    for n in range(heads.shape[0]):
        for k in range(xy.shape[1]):
            z = 0.3
            for _ in range(80):
                z -= 0.7 * head_skin(heads[n], xy[n, k, 0], xy[n, k, 1], z)
            out[n, k] = z
