"""`convlora eg3d check`: the mistakes people make with EG3D's cameras and albums, named with evidence and remedy."""

from __future__ import annotations

from pathlib import Path

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos, load_album
from convlora.integrations.eg3d.check.finding import Finding, table
from convlora.integrations.eg3d.check.labels import check_labels
from convlora.integrations.eg3d.check.latents import check_latents, latent_files
from convlora.integrations.eg3d.check.pictures import Fitting, check_pictures, check_values
from convlora.integrations.eg3d.generator import TriPlaneGenerator

__all__ = ["Finding", "Fitting", "check_album", "check_photos", "table"]

FITTING = Fitting()


def check_album(
    G: TriPlaneGenerator, folder: str | Path, *, fast: bool = False, fitting: Fitting = FITTING, photos: int = 6,
    progress: bool = True,
) -> list[Finding]:  # fmt: skip
    """All checks of an album for G: of the labels, of latents that lie in the folder, of the pictures.

    fast: without the inversions. photos: how many are inverted, under six hypotheses each.

    Raises `AlbumError` where `load_album` does: what cannot be read cannot be checked.
    """
    whole = load_album(folder, G.img_resolution).photos
    latents = check_latents(G, latent_files(Path(folder)), whole.names)
    return [*check_photos(G, whole, fast=fast, fitting=fitting, count=photos, progress=progress), *latents]


def check_photos(
    G: TriPlaneGenerator, photos: Photos, *, fast: bool = False, fitting: Fitting = FITTING, count: int = 6,
    progress: bool = True,
) -> list[Finding]:  # fmt: skip
    """The checks of labels and pictures, of photos already read."""
    radius = float(G.rendering_kwargs.get("avg_camera_radius", cameras.RADIUS))
    box = float(G.rendering_kwargs.get("box_warp", 1))
    findings, repaired = check_labels(photos.labels, photos.names, radius, box)
    values = check_values(photos)
    findings.append(values)
    hopeless = [f.check for f in findings if f.status == "error" and f.check in ("matrices", "values")]
    if fast or hopeless:
        why = "--fast" if fast else f"the {hopeless[0]} have to be right first"
        pictures = ("left and right", "up and down", "colours", "order", "framing")
        return [*findings, *(Finding(name, "not tested", why) for name in pictures)]
    usable = Photos(photos.images, repaired, photos.names, photos.masks)
    return [*findings, *check_pictures(G, usable, fitting, count, progress)]
