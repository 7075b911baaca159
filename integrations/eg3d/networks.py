"""Which networks a run compares with: the lab's for its drawn heads, LPIPS and ArcFace for photographs."""

from __future__ import annotations

import torch

from convlora.errors import HubError
from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator
from convlora.integrations.eg3d.losses import Perceptual
from convlora.integrations.eg3d.metrics import IdentityEncoder, load_identity, load_perceptual
from convlora.integrations.eg3d.metrics.loading import brought
from convlora.integrations.eg3d.pipeline import Networks


def lab_networks(device: torch.device | str = "cpu", generator: str = "lab") -> Networks:
    """The perceptual distance, identity encoder and w encoder of the lab's "lab" or "lab-cats".

    They know procedural heads of their own species only.
    """
    return choose_networks(generator, device=device)[0]


def choose_networks(
    generator: str, perceptual: str | None = None, identity: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Networks, list[str]]:
    """The networks for pictures of a generator, and what the user should know of them.

    Args:
        generator: as `load_generator` takes it; "lab" and "lab-cats" draw procedural heads, all others are for
            photographs.
        perceptual: "NAME", "NAME:PATH" or "none". Where it is None the lab has its own, and photographs get LPIPS
            (alex), fetched if it is not here, or, where that fails, the lab's as a stand-in.
        identity: the same. Where it is None the lab has its own, and photographs get an ArcFace if its file is in
            the folder that CONVLORA_WEIGHTS names, else none.

    Raises: as `load_perceptual` and `load_identity`, for what was asked for by name.
    """
    told: list[str] = []
    procedural = generator in SHIPPED
    loss: Perceptual | None = None
    encoder: IdentityEncoder | None = None
    if perceptual is None:
        loss = load_perceptual(generator, device=device) if procedural else _lpips_or_lab(device, told)
    elif perceptual != "none":
        loss = load_perceptual(perceptual, device=device)
    if identity is None:
        encoder = load_identity(generator, device=device) if procedural else _brought_arcface(device, told)
    elif identity != "none":
        encoder = load_identity(identity, device=device)
    if not procedural:
        return Networks(loss, encoder), told
    from convlora.integrations.eg3d import lab

    kind = next(kind for kind in lab.SPECIES.values() if kind.generator == generator)
    return Networks(loss, encoder, lab.w_encoder(load_generator(generator, device), kind)), told


def _lpips_or_lab(device: torch.device | str, told: list[str]) -> Perceptual:
    try:
        return load_perceptual("lpips_alex", device=device)
    except HubError as error:
        told.append(
            "the perceptual loss is the lab's stand-in, trained on procedural heads, because LPIPS is not to be had: "
            f"{error}. --perceptual lpips_alex:FOLDER reads its two files from a folder"
        )
    return load_perceptual("lab", device=device)


def _brought_arcface(device: torch.device | str, told: list[str]) -> IdentityEncoder | None:
    for name in ("arcface_ir101", "arcface_ir_se50"):
        if brought(name):
            return load_identity(name, device=device)
    told.append(
        "identity is not measured: --identity arcface_ir101 fetches an encoder for photographs, and --identity "
        "NAME:PATH reads one from a file"
    )
    return None
