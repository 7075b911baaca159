"""Volume rendering of tri-planes: rays, plane sampling, stratified and importance depths, ray marching.

Source: Chan et al., https://arxiv.org/abs/2112.07945 (section 4), after NeRF, https://arxiv.org/abs/2003.08934, with
the conventions of the released EG3D weights, slips included where the weights depend on them (each is marked).
Shapes: N images, M rays, S samples per ray, P points, C channels. Depth is the distance along the unit ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.integrations.stylegan2.ops import full_precision

Decoder = Callable[..., dict[str, Tensor]]
Limit = float | Tensor

CACHED = 1 << 14  # points whose features and activations a CPU's cache holds
HELD = 1 << 22  # points whose features and activations other devices hold at once, some 3 GB at full size


class Rendering(NamedTuple):
    """Per ray: features (N, M, C) in about [-1, 1], depth and weight_sum (N, M, 1); below, what led to them."""

    features: Tensor
    depth: Tensor
    weight_sum: Tensor
    depths: Tensor  # (N, M, S) ascending, of the last pass
    weights: Tensor  # (N, M, S - 1), one per interval
    coarse_depths: Tensor
    coarse_sigma: Tensor
    coarse_weights: Tensor


# ---- rays ----------------------------------------------------------------------------------------------------------


def sample_rays(cam2world: Tensor, intrinsics: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions (N, R*R, 3), row by row through the pixel centres.

    cam2world (N, 4, 4), intrinsics (N, 3, 3) normalised by the image size.
    """
    fx, fy = intrinsics[:, 0, 0, None], intrinsics[:, 1, 1, None]
    cx, cy = intrinsics[:, 0, 2, None], intrinsics[:, 1, 2, None]
    skew = intrinsics[:, 0, 1, None]
    pixel = (torch.arange(resolution, device=cam2world.device, dtype=cam2world.dtype) + 0.5) / resolution
    u = pixel.repeat(resolution)
    v = pixel.repeat_interleave(resolution)
    x = (u - cx + cy * skew / fy - skew * v / fy) / fx
    y = (v - cy) / fy
    # a sum of columns and not a matrix product: autocast would round a product to 8 bits
    right, down, forward, origin = cam2world[:, None, :3, :].unbind(-1)
    directions = F.normalize(right * x[..., None] + down * y[..., None] + forward, dim=-1)
    return origin.expand_as(directions), directions


def box_limits(origins: Tensor, directions: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """Entry and exit depth (N, M, 1) of the axis-aligned cube of `side` around the origin; (-1, -2) for a miss."""
    a = (-side / 2 - origins) / directions
    b = (side / 2 - origins) / directions
    near = torch.minimum(a, b).amax(-1, keepdim=True)
    far = torch.maximum(a, b).amin(-1, keepdim=True)
    hit = near <= far
    return torch.where(hit, near, -1.0), torch.where(hit, far, -2.0)


def auto_limits(origins: Tensor, directions: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """box_limits, with the misses filled in: near from the nearest entry, far from the *farthest entry*.

    The second should have been the farthest exit; the released code says entry, so this does. If every ray misses
    the marks of box_limits stay.
    """
    near, far = box_limits(origins, directions, side)
    hit = far > near
    nearest = torch.where(hit, near, torch.inf).amin()
    farthest = torch.where(hit, near, -torch.inf).amax()
    fill = ~hit & hit.any()
    return torch.where(fill, nearest, near), torch.where(fill, farthest, far)


# ---- depths --------------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """All that is random about rays: jitter (N, M, S) of the first pass, quantiles u (N, M, U) of the second."""

    jitter: Tensor
    u: Tensor

    def part(self, which: slice) -> Samples:
        """Of some of the N images."""
        return Samples(self.jitter[which], self.u[which])


def draw_samples(
    origins: Tensor,
    options: Mapping[str, Any],
    deterministic: bool = False,
    generator: torch.Generator | None = None,
) -> Samples:
    """For rays of origins (N, M, 3); see render_rays for the options."""
    fine = options.get("depth_resolution_importance", 0)
    return Samples(
        draw_jitter(origins, options["depth_resolution"], deterministic, generator),
        quantiles(origins, fine, deterministic, generator),
    )


def draw_jitter(
    origins: Tensor, count: int, deterministic: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform in [0, 1), (N, M, count) for rays of origins (N, M, 3), or all 0.5."""
    shape = (*origins.shape[:-1], count)
    if deterministic:
        return origins.new_tensor(0.5).expand(shape)
    return torch.rand(shape, generator=generator, device=origins.device, dtype=origins.dtype)


def stratified_depths(
    origins: Tensor,
    near: Limit,
    far: Limit,
    count: int,
    disparity: bool = False,
    deterministic: bool = False,
    jitter: Tensor | None = None,
) -> Tensor:
    """(N, M, count) ascending depths: one jittered sample per interval; numbers or (N, M, 1) tensors as limits.

    deterministic=True puts every sample half an interval on; jitter (N, M, count) puts each on by a share of its own.
    The last sample may pass `far`, by up to one interval.
    """
    if count < 2:
        raise ConvloraError(f"depth_resolution is {count}; a ray needs at least 2 samples")
    step = torch.arange(count, device=origins.device, dtype=origins.dtype)
    if jitter is None:
        jitter = draw_jitter(origins, count, deterministic)
    t = (step + jitter) / (count - 1)
    if disparity:
        return 1 / ((1 - t) / near + t / far)
    return near + (far - near) * t


def quantiles(
    like: Tensor, count: int, deterministic: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Where importance_depths draws, (N, M, count) for a tensor (N, M, …): uniform, or linspace(0, 1, count)."""
    shape = (*like.shape[:-1], count)
    if deterministic:
        return torch.linspace(0, 1, count, device=like.device, dtype=like.dtype).expand(shape)
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)


@torch.no_grad()
def importance_depths(
    depths: Tensor, weights: Tensor, count: int, deterministic: bool = False, u: Tensor | None = None
) -> Tensor:
    """(N, M, count) depths drawn where the first pass found weight. depths (N, M, S), weights (N, M, S - 1).

    u (N, M, count) are `quantiles` drawn before, in place of new ones. As in the released code the smoothed weights
    are shifted by one against their bins, and the last bin is never drawn.
    """
    u = (quantiles(depths, count, deterministic) if u is None else u).contiguous()
    padded = F.pad(weights, (1, 1), value=-torch.inf)
    smooth = torch.maximum(padded[..., :-1], padded[..., 1:])
    smooth = (smooth[..., :-1] + smooth[..., 1:]) / 2 + 0.01
    edges = (depths[..., :-1] + depths[..., 1:]) / 2
    pdf = smooth[..., 1:-1] + 1e-5
    pdf = pdf / pdf.sum(-1, keepdim=True)
    cdf = F.pad(pdf.cumsum(-1), (1, 0))
    above = torch.searchsorted(cdf, u, right=True)
    low, high = (above - 1).clamp(min=0), above.clamp(max=cdf.shape[-1] - 1)
    cdf_low, cdf_high = cdf.gather(-1, low), cdf.gather(-1, high)
    edge_low, edge_high = edges.gather(-1, low), edges.gather(-1, high)
    width = cdf_high - cdf_low
    width = torch.where(width < 1e-5, 1.0, width)
    return edge_low + (u - cdf_low) / width * (edge_high - edge_low)


# ---- tri-planes ----------------------------------------------------------------------------------------------------


def project(points: Tensor) -> Tensor:
    """Plane coordinates (N, 3, P, 2) of points (N, P, 3): (x, y), (x, z), (z, x).

    The third was meant to be (z, y); the released weights were trained with (z, x), so it stays.
    """
    x, y, z = points.unbind(-1)
    return torch.stack([torch.stack(pair, dim=-1) for pair in ((x, y), (x, z), (z, x))], dim=1)


def _bilinear(planes: Tensor, grid: Tensor) -> Tensor:
    """planes (N, C, H, W) at grid (N, P, 2) -> (N, C, P); zero outside."""
    planes, grid = planes.to(grid.dtype), grid.unsqueeze(1)
    out = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.squeeze(2)


def sample_planes(planes: Tensor, points: Tensor, box_warp: float) -> Tensor:
    """Features (N, 3, P, C) of each plane; planes (N, 3, C, H, W), points (N, P, 3) in a box of side box_warp."""
    grid = project(points * (2 / box_warp))
    sampled = _bilinear(planes.flatten(0, 1), grid.flatten(0, 1))
    return sampled.unflatten(0, planes.shape[:2]).transpose(2, 3)


def fold_planes(planes: Tensor) -> Tensor:
    """(N, 3, C, H, W) to (N, 2, C, H, W) whose *summed* samples are the mean over the three planes.

    The second and third plane see the same two coordinates in swapped order, so their transposes add up before
    sampling: exact for bilinear sampling, and a third less work per point. Stored with the channels of a texel side by
    side, so that a corner is one stretch of memory.
    """
    x, y, z = planes.movedim(2, -1).unbind(1)
    return torch.stack([x, y + z.transpose(1, 2)], dim=1).div(3).movedim(-1, 2)


def sample_folded(folded: Tensor, points: Tensor, box_warp: float) -> Tensor:
    """Mean plane features (N, P, C) at points (N, P, 3), from fold_planes."""
    points = points * (2 / box_warp)
    if points.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _gather_texels(folded, points)
    first = _bilinear(folded[:, 0], points[..., :2])
    # one at a time: the sum of both in one tensor would make backward copy its gradient for each
    return (first + _bilinear(folded[:, 1], points[..., ::2])).transpose(1, 2)


def _gather_texels(folded: Tensor, points: Tensor) -> Tensor:
    """sample_folded as one weighted sum of the eight texels around a point, which a CPU does several times faster.

    Forwards, that is: the gradient of embedding_bag runs on one thread, on two cores that of grid_sample is ahead.

    folded (N, 2, C, R, R), points (N, P, 3) in [-1, 1].
    """
    n, _, c, side, _ = folded.shape
    pixel = torch.movedim(points, -1, 0) * (side / 2) + (side - 1) / 2  # (3, N, P)
    low = pixel.detach().floor()
    corner = torch.stack([low, low + 1], dim=1)  # (3, 2, N, P)
    weight = torch.stack([low + 1 - pixel, pixel - low], dim=1)
    weight = weight * ((corner >= 0) & (corner < side))  # zero outside
    x, *others = corner.clamp_(0, side - 1).nan_to_num_(0).to(torch.int32)  # a point of NaN keeps its weight of NaN
    image = torch.arange(n, dtype=torch.int32).view(n, 1) * (2 * side * side)
    rows = torch.stack([other * side + (image + i * side * side) for i, other in enumerate(others)])  # (2, 2, N, P)
    index = (rows.unsqueeze(2) + x).reshape(8, -1).t().contiguous()
    weight = (weight[1:].unsqueeze(2) * weight[0]).reshape(8, -1).t()
    texels = folded.movedim(2, -1).reshape(-1, c).to(points.dtype)
    return F.embedding_bag(index, texels, mode="sum", per_sample_weights=weight.contiguous()).unflatten(0, (n, -1))


def query(
    folded: Tensor, decoder: Decoder, points: Tensor, directions: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Decoded features (N, P, C) and raw density (N, P) at points (N, P, 3)."""
    with full_precision(points.device):
        features = sample_folded(folded, points, options["box_warp"])
    rgb, sigma = _decode(decoder, features, directions)
    sigma = sigma.squeeze(-1)
    noise = options.get("density_noise", 0)
    if noise > 0:
        sigma = sigma + torch.randn_like(sigma) * noise
    return rgb, sigma


def _decode(decoder: Decoder, features: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    """rgb (N, P, C) and sigma (N, P, 1); on a CPU in pieces whose activations stay in its cache."""
    count = max(1, CACHED // len(features))
    if features.device.type != "cpu" or features.shape[1] <= count or torch.compiler.is_compiling():
        out = decoder(features, directions)
        return out["rgb"], out["sigma"]
    pieces = [decoder(piece, directions) for piece in features.split(count, dim=1)]
    return torch.cat([out["rgb"] for out in pieces], 1), torch.cat([out["sigma"] for out in pieces], 1)


# ---- ray marching --------------------------------------------------------------------------------------------------


def march_weights(sigma: Tensor, depths: Tensor) -> Tensor:
    """Weight (N, M, S - 1) of every interval, from raw densities and ascending depths (N, M, S).

    The transmittance is a running sum of optical depths, not a running product: no zeros to treat in backward.
    """
    density = F.softplus((sigma[..., :-1] + sigma[..., 1:]) / 2 - 1)
    optical = density * depths.diff(dim=-1)
    before = F.pad(optical[..., :-1].cumsum(-1), (1, 0))
    return -torch.expm1(-optical) * torch.exp(-before)


def node_weights(weights: Tensor) -> Tensor:
    """Interval weights (N, M, S - 1) to sample weights (N, M, S): an interval's colour is the mean of its ends."""
    return (F.pad(weights, (0, 1)) + F.pad(weights, (1, 0))) / 2


def mean_depth(weights: Tensor, depths: Tensor) -> Tensor:
    """Expected depth (N, M, 1); rays without weight get the largest depth of the whole call."""
    total = weights.sum(-1, keepdim=True)
    middle = (depths[..., :-1] + depths[..., 1:]) / 2
    empty = total == 0
    depth = (weights * middle).sum(-1, keepdim=True) / torch.where(empty, 1.0, total)
    depth = torch.where(empty | depth.isnan(), torch.inf, depth)
    return torch.clamp(depth, depths.amin(), depths.amax())


def march_rays(
    colors: Tensor, sigma: Tensor, depths: Tensor, white_back: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """features (N, M, C), depth (N, M, 1), weights (N, M, S - 1) of one pass.

    From colors (N, M, S, C), raw densities sigma (N, M, S) and ascending depths (N, M, S).
    """
    weights = march_weights(sigma, depths)
    return composite([(colors, node_weights(weights))], weights, white_back), mean_depth(weights, depths), weights


def composite(parts: list[tuple[Tensor, Tensor]], weights: Tensor, white_back: bool = False) -> Tensor:
    """Sum of colors (N, M, S, C) times sample weights (N, M, S) over all parts, in the range of images.

    Working on parts keeps coarse and fine colours where they are: only their weights take part in the sort.
    """
    sums = [torch.matmul(w.unsqueeze(-2), colors.to(w.dtype)).squeeze(-2) for colors, w in parts]
    total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    if white_back:
        total = total + 1 - weights.sum(-1, keepdim=True)
    return total * 2 - 1


def limits(origins: Tensor, directions: Tensor, options: Mapping[str, Any]) -> tuple[Limit, Limit]:
    """Near and far of every ray: the numbers of the options, or the cube of side box_warp if both are 'auto'."""
    near, far = options["ray_start"], options["ray_end"]
    if near == "auto" and far == "auto":
        return auto_limits(origins, directions, options["box_warp"])
    if isinstance(near, str) or isinstance(far, str):
        raise ConvloraError(f"ray_start and ray_end are two numbers or both 'auto', got {near!r} and {far!r}")
    return near, far


class _Passes(NamedTuple):
    """Both passes along some of the rays, as Rendering has them."""

    features: Tensor
    weight_sum: Tensor
    depths: Tensor
    weights: Tensor
    coarse_sigma: Tensor
    coarse_weights: Tensor


def render_rays(
    planes: Tensor,
    decoder: Decoder,
    origins: Tensor,
    directions: Tensor,
    options: Mapping[str, Any],
    deterministic: bool = False,
    points: int | None = None,
    samples: Samples | None = None,
) -> Rendering:
    """Two-pass volume rendering of planes (N, 3, C, H, W) along rays (N, M, 3).

    options: box_warp, ray_start, ray_end, depth_resolution, depth_resolution_importance (0 = one pass),
    disparity_space_sampling, white_back, density_noise. deterministic=True removes all randomness; samples are
    random numbers drawn before, in place of new ones.
    Without gradients, rays are taken so many at a time that one pass has about `points` samples (None: what the
    device's memory suits), and colours are kept of those alone; random numbers do not depend on it.
    """
    if options.get("clamp_mode", "softplus") != "softplus":
        raise ConvloraError(f"clamp_mode is {options['clamp_mode']!r}; only 'softplus' exists")
    folded = fold_planes(planes)
    near, far = limits(origins, directions, options)
    disparity = bool(options.get("disparity_space_sampling", False))
    jitter, u = draw_samples(origins, options, deterministic) if samples is None else samples
    coarse = stratified_depths(origins, near, far, options["depth_resolution"], disparity, jitter=jitter)

    rays = _rays_at_once(coarse, points, options)
    parts = zip(*(tensor.split(rays, dim=1) for tensor in (origins, directions, coarse, u)))
    passes = [_march(folded, decoder, o, d, depths, quantile, options) for o, d, depths, quantile in parts]
    found = passes[0] if len(passes) == 1 else _Passes(*(torch.cat(tensors, dim=1) for tensors in zip(*passes)))
    with full_precision(origins.device):
        depth = mean_depth(found.weights, found.depths)
    return Rendering(depth=depth, coarse_depths=coarse, **found._asdict())


def _rays_at_once(coarse: Tensor, points: int | None, options: Mapping[str, Any]) -> int:
    """How many of the rays of coarse (N, M, S) are taken at a time."""
    n, m, s = coarse.shape
    # backward would add up a gradient of the planes for each part, and noise is drawn sample by sample
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or options.get("density_noise", 0) > 0:
        return max(1, m)
    if points is None:
        points = CACHED if coarse.device.type == "cpu" else HELD
    return max(1, points // (n * s))


def _march(
    folded: Tensor, decoder: Decoder, origins: Tensor, directions: Tensor, coarse: Tensor, u: Tensor,
    options: Mapping[str, Any],
) -> _Passes:  # fmt: skip
    """Both passes along rays (N, M, 3): the first at coarse (N, M, S), the second at its quantiles u (N, M, U)."""

    def field(depths: Tensor) -> tuple[Tensor, Tensor]:
        n, m, s = depths.shape
        points = (origins.unsqueeze(2) + depths.unsqueeze(-1) * directions.unsqueeze(2)).reshape(n, m * s, 3)
        colors, sigma = query(folded, decoder, points, None, options)  # the decoder ignores directions
        return colors.unflatten(1, (m, s)), sigma.reshape(n, m, s).to(depths.dtype)

    colors, sigma = field(coarse)
    with full_precision(origins.device):
        coarse_weights = march_weights(sigma, coarse)
    if u.shape[-1] == 0:
        depths, weights = coarse, coarse_weights
        parts = [(colors, node_weights(weights))]
    else:
        fine = importance_depths(coarse, coarse_weights, u.shape[-1], u=u)
        fine_colors, fine_sigma = field(fine)
        with full_precision(origins.device):
            depths, order = torch.cat([coarse, fine], dim=-1).sort(dim=-1)
            weights = march_weights(torch.cat([sigma, fine_sigma], dim=-1).gather(-1, order), depths)
            nodes = node_weights(weights)
            nodes = torch.zeros_like(nodes).scatter(-1, order, nodes)
        own = nodes.split([coarse.shape[-1], u.shape[-1]], dim=-1)
        parts = list(zip((colors, fine_colors), own, strict=True))
    with full_precision(origins.device):
        features = composite(parts, weights, bool(options.get("white_back", False)))
        return _Passes(features, weights.sum(-1, keepdim=True), depths, weights, sigma, coarse_weights)


class RaySampler(nn.Module):
    """sample_rays as a module without parameters, where the official tree has one."""

    def forward(self, cam2world: Tensor, intrinsics: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
        return sample_rays(cam2world, intrinsics, resolution)


class ImportanceRenderer(nn.Module):
    """render_rays as a module without parameters, where the official tree has one."""

    def forward(
        self,
        planes: Tensor,
        decoder: Decoder,
        origins: Tensor,
        directions: Tensor,
        options: Mapping[str, Any],
        deterministic: bool = False,
        samples: Samples | None = None,
    ) -> Rendering:
        return render_rays(planes, decoder, origins, directions, options, deterministic, samples=samples)

    def run_model(
        self, planes: Tensor, decoder: Decoder, points: Tensor, directions: Tensor | None, options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Raw density (N, P, 1) and features (N, P, C) at points (N, P, 3)."""
        rgb, sigma = query(fold_planes(planes), decoder, points, directions, options)
        return {"rgb": rgb, "sigma": sigma.unsqueeze(-1)}
