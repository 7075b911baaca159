"""Novel views of latents: the tri-planes are computed once per latent, whatever the number of cameras."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.generator import TriPlaneGenerator


class Views(NamedTuple):
    """images (N, V, 3, R, R) in [-1, 1] and depths (N, V, 1, r, r) along the rays, at the renderer's resolution."""

    images: Tensor
    depths: Tensor


def novel_views(G: TriPlaneGenerator, w: Tensor, labels: Tensor, *, batch_size: int | None = None) -> Tensor:
    """The images (N, V, 3, R, R) of `render_views`."""
    return render_views(G, w, labels, batch_size=batch_size).images


@torch.no_grad()
def render_views(G: TriPlaneGenerator, w: Tensor, labels: Tensor, *, batch_size: int | None = None) -> Views:
    """Render latents w (N, w_dim), or ws (N, num_ws, w_dim), from cameras labels (V, 25), or (N, V, 25) of their own.

    `batch_size` None is 8, or 4 on a CPU, whose cache holds no more. The results are on the CPU, rendered
    deterministically.
    """
    if labels.ndim == 2:
        labels = labels.expand(len(w), -1, -1)
    if w.shape[1:] not in ((G.w_dim,), (G.num_ws, G.w_dim)) or labels.shape[0] != len(w) or labels.shape[-1] != 25:
        raise ConvloraError(
            f"views need w (N, {G.w_dim}) or (N, {G.num_ws}, {G.w_dim}) and labels (V, 25) or (N, V, 25), "
            f"not {tuple(w.shape)} and {tuple(labels.shape)}"
        )
    device = next(G.parameters()).device
    batch_size = batch_size or (4 if device.type == "cpu" else 8)
    ws = w.to(device)
    ws = ws[:, None].expand(-1, G.num_ws, -1) if ws.ndim == 2 else ws
    labels = labels.to(device)
    views = labels.shape[1]
    planes = torch.cat([G.planes(ws[i : i + batch_size], noise_mode="const") for i in range(0, len(ws), batch_size)])
    owner = torch.arange(len(ws), device=device).repeat_interleave(views)
    images, depths = [], []
    for i in range(0, len(owner), batch_size):
        rows = owner[i : i + batch_size]
        cameras = labels.flatten(0, 1)[i : i + batch_size]
        out = G.synthesis(ws[rows], cameras, planes=planes[rows], deterministic=True)
        images.append(out["image"].cpu())
        depths.append(out["image_depth"].cpu())
    return Views(*(torch.cat(parts).unflatten(0, (len(ws), views)) for parts in (images, depths)))
