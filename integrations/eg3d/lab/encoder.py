"""A quick start for inversion in the lab: photo → world parameters → z → w."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.integrations.eg3d.anchors import Encoder
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.lab import networks, world
from convlora.integrations.eg3d.lab._species import Species

_MOST = 0.95  # of a latent's sum of squares may be parameters; see world.z_from_params


def w_encoder(G: TriPlaneGenerator, species: str | Species = "people") -> Encoder:
    """`init=` of `find_anchors` for the lab generator of a species: (images, labels) -> w (N, w_dim)."""

    def encode(images: Tensor, labels: Tensor) -> Tensor:
        params = networks.encode(images, labels, species=species)
        size = params.square().sum(1, keepdim=True)
        params = params * (_MOST * G.z_dim / size).clamp(max=1).sqrt()
        z = world.z_from_params(params.cpu(), z_dim=G.z_dim).to(images.device)
        with torch.no_grad():
            return G.mapping(z, labels)[:, 0]

    return encode
