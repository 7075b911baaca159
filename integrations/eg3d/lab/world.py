"""A procedural world of heads with known parameters, depth, parts and landmarks, for training without photos.

One photo is a row of PARAM_DIM numbers, each N(0, 1) a priori: who it is (the first IDENTITY_DIM) and how the
photo was taken (the rest). A row of traits adds what no such photo shows: marks, asymmetry, unusual
proportions, occluders. Heads sit at the origin, y up, faces towards +z; see `cameras` for the camera convention.

The names and what they draw are those of a species, people unless `species` says otherwise; all have equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convlora.errors import ConvloraError

from .. import cameras
from ..configs import CONFIGS
from ._names import (
    IDENTITY_DIM,
    IDENTITY_NAMES,
    IDENTITY_TRAITS,
    NUISANCE_DIM,
    NUISANCE_NAMES,
    OCCLUDER_TRAITS,
    PARAM_DIM,
    PARAM_NAMES,
    TRAIT_DIM,
    TRAIT_NAMES,
)
from ._species import Species
from ._species import species as species_of

__all__ = [
    "IDENTITY_DIM", "IDENTITY_NAMES", "IDENTITY_TRAITS", "NUISANCE_DIM", "NUISANCE_NAMES", "OCCLUDER_TRAITS",
    "PARAM_DIM", "PARAM_NAMES", "TRAIT_DIM", "TRAIT_NAMES", "Photo", "Trace",
    "anchors3d", "attributes", "landmarks", "pixel_rays", "rays_through", "render", "sample_identity",
    "sample_nuisance", "sample_traits", "sdf", "trace", "z_from_params",
]  # fmt: skip

_IDENTITY, _NUISANCE, _TRAITS, _PADDING = range(4)  # random streams of one seed
TRAIT_SHARE, OCCLUDER_SHARE = 0.3, 0.12  # how often `sample_traits` draws each group


class Trace(NamedTuple):
    """rgb (N, M, 3) in [0, 1]; depth (N, M) along the unit ray; part (N, M) uint8."""

    rgb: Tensor
    depth: Tensor
    part: Tensor


class Photo(NamedTuple):
    """image (N, 3, R, R) in [-1, 1]; depth (N, 1, R, R) along the ray; mask (N, 1, R, R), the head's coverage."""

    image: Tensor
    depth: Tensor
    mask: Tensor


def _generators(seed: int | Sequence[int], stream: int) -> list[np.random.Generator]:
    seeds = [seed] if isinstance(seed, int) else [int(s) for s in seed]
    return [np.random.default_rng(np.random.SeedSequence([s, stream])) for s in seeds]


def _normals(seed: int | Sequence[int], stream: int, count: int) -> Tensor:
    rows = [rng.standard_normal(count, dtype=np.float32) for rng in _generators(seed, stream)]
    return torch.from_numpy(np.stack(rows))


def sample_identity(seed: int | Sequence[int]) -> Tensor:
    """One row of N(0, 1) identity numbers per seed: (N, IDENTITY_DIM)."""
    return _normals(seed, _IDENTITY, IDENTITY_DIM)


def sample_nuisance(seed: int | Sequence[int]) -> Tensor:
    """One row of N(0, 1) photo numbers per seed: (N, NUISANCE_DIM), independent of `sample_identity`."""
    return _normals(seed, _NUISANCE, NUISANCE_DIM)


def sample_traits(seed: int | Sequence[int], species: str | Species = "people") -> Tensor:
    """One row of traits per seed: (N, TRAIT_DIM); most are 0, each appears with a fixed small probability."""
    kind = species_of(species)
    group = kind.trait_names[0].partition("_")[0]  # place, size and darkness of one mark come together
    rows = np.zeros((1 if isinstance(seed, int) else len(seed), TRAIT_DIM), np.float32)
    for row, rng in zip(rows, _generators(seed, _TRAITS)):
        # Every number is drawn whether used or not, so that one trait never shifts another's stream.
        present, amount = rng.random(TRAIT_DIM), rng.uniform(0.5, 1.0, TRAIT_DIM)
        sign = np.where(rng.random(TRAIT_DIM) < 0.5, -1.0, 1.0)
        for at, name in enumerate(kind.trait_names):
            if name.startswith(group):
                if present[0] < TRAIT_SHARE:
                    row[at] = amount[at] * (sign[at] if name[-1] in "xy" else 1)
            elif present[at] < (OCCLUDER_SHARE if name in kind.occluder_traits else TRAIT_SHARE):
                row[at] = amount[at] * (sign[at] if name.endswith("asymmetry") else 1)
    return torch.from_numpy(rows)


def _rows(values: Tensor | np.ndarray, width: int, what: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2 or array.shape[1] != width:
        raise ConvloraError(f"{what} must be (N, {width}), got {tuple(array.shape)}: one row per photo")
    if not np.isfinite(array).all():
        raise ConvloraError(f"{what} must be finite numbers: a NaN or infinite head cannot be drawn")
    return array


def _heads(params: Tensor | np.ndarray, traits: Tensor | np.ndarray | None, kind: Species) -> np.ndarray:
    rows = _rows(params, PARAM_DIM, "params")
    marks = np.zeros((len(rows), TRAIT_DIM)) if traits is None else _rows(traits, TRAIT_DIM, "traits")
    if len(marks) != len(rows):
        raise ConvloraError(f"params has {len(rows)} rows and traits {len(marks)}: give one trait row per photo")
    return kind.decode(rows, marks)


def _floats(values: Tensor | np.ndarray, shape: tuple[int | None, ...], what: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        wanted = ", ".join("*" if side is None else str(side) for side in shape)
        raise ConvloraError(f"{what} must be ({wanted}), got {tuple(array.shape)}")
    return np.ascontiguousarray(array, np.float32)


def trace(
    params: Tensor | np.ndarray,
    traits: Tensor | np.ndarray | None,
    origins: Tensor | np.ndarray,
    directions: Tensor | np.ndarray,
    species: str | Species = "people",
) -> Trace:
    """Colours, depths and parts along rays.

    params (N, PARAM_DIM), traits (N, TRAIT_DIM) or None, origins (N, 3), directions (N, M, 3) of unit length.
    Parts: 0 background, 1 skin, 2 eye, 3 hair, 4 mouth interior, 5 clothes, 6 occluder; a cat's fur is skin on its head
    and clothes below. A ray that meets no solid
    ends on the far side of the backdrop sphere, so depth is always finite. Float32 on the CPU.
    """
    from . import _jit

    kind = species_of(species)
    heads = _heads(params, traits, kind)
    start = _floats(origins, (len(heads), 3), "origins")
    rays = _floats(directions, (len(heads), None, 3), "directions")
    shape = rays.shape[:2]
    rgb, depth = np.empty((*shape, 3), np.float32), np.empty(shape, np.float32)
    part = np.empty(shape, np.uint8)
    _jit.use_threads(torch.get_num_threads())
    kind.tracer().trace_rays(heads, start, rays, rgb, depth, part)
    return Trace(torch.from_numpy(rgb), torch.from_numpy(depth), torch.from_numpy(part))


def _camera(cam2world: Tensor | np.ndarray, intrinsics: Tensor | np.ndarray | None) -> tuple[Tensor, Tensor]:
    poses = torch.from_numpy(_floats(cam2world, (None, 4, 4), "cam2world"))
    if intrinsics is None:
        return poses, cameras.ffhq_intrinsics()
    return poses, torch.from_numpy(_floats(intrinsics, (3, 3), "intrinsics"))


def rays_through(
    cam2world: Tensor | np.ndarray, intrinsics: Tensor | np.ndarray | None, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Origins (N, 3) and unit directions (N, M, 3) through image points, OpenCV camera axes.

    `points` is (M, 2) for all cameras or (N, M, 2): x, then y, as shares of the image from its upper left corner.
    """
    poses, k = _camera(cam2world, intrinsics)
    u, v = points.expand(len(poses), -1, -1).unbind(-1)
    y = (v - k[1, 2]) / k[1, 1]
    x = (u - k[0, 2] - k[0, 1] * y) / k[0, 0]
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    rays = rays / rays.norm(dim=-1, keepdim=True)
    # Not a matrix product: its rounding depends on how many cameras there are, and a photo must not.
    right, down, ahead = poses[:, None, :3, :3].unbind(-1)
    directions = rays[..., :1] * right + rays[..., 1:2] * down + rays[..., 2:] * ahead
    return poses[:, :3, 3].contiguous(), directions.contiguous()


def pixel_rays(
    cam2world: Tensor | np.ndarray, intrinsics: Tensor | np.ndarray | None, resolution: int
) -> tuple[Tensor, Tensor]:
    """Origins (N, 3) and unit directions (N, R*R, 3) through pixel centres, rows first."""
    at = (torch.arange(resolution) + 0.5) / resolution
    v, u = torch.meshgrid(at, at, indexing="ij")
    return rays_through(cam2world, intrinsics, torch.stack([u, v], -1).reshape(-1, 2))


def render(
    params: Tensor | np.ndarray,
    traits: Tensor | np.ndarray | None,
    cam2world: Tensor | np.ndarray,
    intrinsics: Tensor | np.ndarray | None,
    resolution: int,
    supersample: int = 2,
    species: str | Species = "people",
) -> Photo:
    """Photos of heads, each pixel the mean of supersample² rays.

    params (N, PARAM_DIM), cam2world (N, 4, 4), intrinsics (3, 3) normalised by the image size or None for EG3D's
    FFHQ camera. The mask counts skin, eyes, hair, mouth and occluders, not clothes.
    """
    if resolution < 1 or supersample < 1:
        raise ConvloraError(f"resolution and supersample must be at least 1, got {resolution} and {supersample}")
    side = resolution * supersample
    rgb, depth, part = trace(params, traits, *pixel_rays(cam2world, intrinsics, side), species)
    image = rgb.reshape(-1, side, side, 3).permute(0, 3, 1, 2)
    head = ((part > 0) & (part != 5)).float().reshape(-1, 1, side, side)
    pool = torch.nn.functional.avg_pool2d
    image, depth, mask = (pool(plane, supersample) for plane in (image, depth.reshape(-1, 1, side, side), head))
    return Photo((image * 2 - 1).contiguous(), depth, mask)


def sdf(
    params: Tensor | np.ndarray,
    traits: Tensor | np.ndarray | None,
    points: Tensor | np.ndarray,
    species: str | Species = "people",
) -> Tensor:
    """Signed distance (N, M) of the union of all solids at points (N, M, 3): right in sign, approximate in size."""
    from . import _jit

    kind = species_of(species)
    heads = _heads(params, traits, kind)
    where = _floats(points, (len(heads), None, 3), "points")
    out = np.empty(where.shape[:2], np.float32)
    _jit.use_threads(torch.get_num_threads())
    kind.tracer().distances(heads, where, out)
    return torch.from_numpy(out)


def anchors3d(
    params: Tensor | np.ndarray, traits: Tensor | np.ndarray | None, species: str | Species = "people"
) -> Tensor:
    """World points (N, 5, 3) on the skin: left eye, right eye, nose tip, left and right mouth corner.

    Left is left in a frontal photo, that is negative x.
    """
    kind = species_of(species)
    h = _heads(params, traits, kind)
    lift = 0.5 * (h["eye_top"] - h["eye_bottom"])  # the middle of the opening lies above the line of its corners
    zero = np.zeros(len(h))
    corner = h["curl"] * 0.65
    xy = np.stack(
        [
            np.stack([-h["eye_x"], h["eye_y"] - h["eye_skew"] + lift], -1),
            np.stack([h["eye_x"], h["eye_y"] + h["eye_skew"] + lift], -1),
            np.stack([zero, h["tip_y"]], -1),
            np.stack([-h["mouth_w"], h["mouth_y"] - h["mouth_skew"] * h["mouth_w"] + corner], -1),
            np.stack([h["mouth_w"], h["mouth_y"] + h["mouth_skew"] * h["mouth_w"] + corner], -1),
        ],
        1,
    )
    z = np.empty(xy.shape[:2])
    kind.tracer().skin_in_front(h, xy, z)
    return torch.from_numpy(np.concatenate([xy, z[..., None]], -1).astype(np.float32))


def landmarks(
    params: Tensor | np.ndarray,
    traits: Tensor | np.ndarray | None,
    cam2world: Tensor | np.ndarray,
    intrinsics: Tensor | np.ndarray | None,
    species: str | Species = "people",
) -> Tensor:
    """`anchors3d` in the photo: (N, 5, 2), x then y, as shares of the image from its upper left corner."""
    poses, k = _camera(cam2world, intrinsics)
    points = anchors3d(params, traits, species)
    local = torch.einsum("nji,nkj->nki", poses[:, :3, :3], points - poses[:, None, :3, 3])
    pixels = local @ k.T
    return pixels[..., :2] / pixels[..., 2:]


def attributes(
    params: Tensor | np.ndarray, traits: Tensor | np.ndarray | None, species: str | Species = "people"
) -> dict[str, Tensor]:
    """True labels by name, each (N,): parameters squashed to [-1, 1] as the drawing uses them, traits as given."""
    rows = torch.from_numpy(_rows(params, PARAM_DIM, "params").astype(np.float32))
    marks = np.zeros((len(rows), TRAIT_DIM)) if traits is None else _rows(traits, TRAIT_DIM, "traits")
    squashed = torch.tanh(rows / 2)
    kind = species_of(species)
    labels = {name: squashed[:, at] for at, name in enumerate(kind.param_names)}
    labels.update({name: torch.from_numpy(marks[:, at].astype(np.float32)) for at, name in enumerate(kind.trait_names)})
    return labels


def z_from_params(params: Tensor | np.ndarray, seed: int = 0, z_dim: int | None = None) -> Tensor:
    """A latent (N, z_dim) whose root mean square is 1 and whose first PARAM_DIM numbers are `params`.

    The mapping network divides z by its root mean square, so only such a z keeps its first numbers. The remaining
    z_dim - PARAM_DIM numbers are drawn from `seed` and scaled to carry what is missing from the sum of squares.
    z_dim None is that of the lab generator.
    """
    if z_dim is None:
        z_dim = int(CONFIGS["lab"]["z_dim"])
    rows = torch.from_numpy(_rows(params, PARAM_DIM, "params").astype(np.float32))
    if z_dim <= PARAM_DIM:
        raise ConvloraError(f"z_dim must exceed {PARAM_DIM}, the number of world parameters, got {z_dim}")
    missing = z_dim - rows.square().sum(1)
    if bool((missing <= 0).any()):
        raise ConvloraError(
            f"params have a sum of squares of {float(z_dim - missing.min()):.1f}, at least z_dim={z_dim}: "
            "no latent of unit root mean square starts with them; shrink the row or use a larger z_dim"
        )
    rng = np.random.default_rng(np.random.SeedSequence([seed, _PADDING]))
    padding = torch.from_numpy(rng.standard_normal((len(rows), z_dim - PARAM_DIM), dtype=np.float32))
    padding = padding * (missing.sqrt() / padding.norm(dim=1))[:, None]
    return torch.cat([rows, padding], 1)
