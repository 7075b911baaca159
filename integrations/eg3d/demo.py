"""The demo: a procedural person's album becomes a personal 3D generator in minutes, without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import load_album
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.pipeline import Settings, check_settings, personalize_album
from convlora.integrations.eg3d.report import Plan, Report, best_spanned
from convlora.integrations.eg3d.run_folder import RunFolder
from convlora.integrations.eg3d.tasks import Hull
from convlora.integrations.eg3d.tasks.directions import Direction, find_direction

#: What suits the lab's small prior: its encoder starts inversion close, so few steps are enough.
LAB_SETTINGS = Settings(
    anchor_steps=25, anchor_lr=0.05, steps=120, batch_size=4, lr=0.004, lr_full=0.0015, views=8, compare_full=True
)

#: Attributes of the lab's heads that an album shows, or may show, in more than one state, and their names on the page.
EDITABLE = {
    "smile": "smile", "age": "age", "mouth_open": "open mouth", "brow_raise": "raised brows",
    "hair_length": "hair length", "hair_volume": "hair volume", "hair_fringe": "fringe", "hair_parting": "parting",
    "hair_bun": "bun", "light_x": "light from the side",
}  # fmt: skip


def run_demo(
    out: str | Path, *, train: int = 16, test: int = 8, settings: Settings = LAB_SETTINGS, device: str = "cpu",
    command: str = "", progress: bool = True,
) -> Report:  # fmt: skip
    """Draw person A's album into `out/album`, personalise the lab generator with it, compare, and return the report.

    `train` of at most 50 photos teach, `test` of at most 12 are held out. Interrupted, it resumes.
    """
    from convlora.integrations.eg3d import lab

    for name, count, most in (("train", train, 50), ("test", test, 12)):
        if not 1 <= count <= most:
            raise ConvloraError(f"{name}={count}: person A's album has 1 to {most} such photos")
    G = load_generator("lab", device)
    check_settings(G, settings)
    with RunFolder(out, {"album": "person A", "train": train, "test": test, **vars(settings)}) as folder:
        album_folder = folder / "album"
        if not (album_folder / "manifest.json").is_file():  # written last: without it the album is half done
            with tqdm(total=1, desc="drawing person A's album", disable=not progress) as bar, folder.timed("album"):
                for half_done in album_folder.glob("*"):
                    half_done.unlink()
                lab.write_album(lab.PERSON_A, album_folder, train=train, test=test, resolution=G.img_resolution)
                bar.update()
        album = load_album(album_folder, G.img_resolution)
        return personalize_album(
            G, album, folder, settings, lab_networks(device), directions=lambda hull: lab_directions(G, hull),
            plan=Plan(yaw=settings.yaw), command=command, progress=progress,
        )  # fmt: skip


def lab_directions(G: TriPlaneGenerator, hull: Hull, count: int = 2, samples: int = 2000) -> list[Direction]:
    """The `count` of `EDITABLE` in which this person's photos vary most, as directions in the lab generator's W.

    The first numbers of the lab's z are what is drawn, so a latent's attribute is known without a picture or a
    predictor: `samples` of them are mapped and parted as InterFaceGAN parts scored pictures.
    """
    from convlora.integrations.eg3d.lab import world

    device = next(G.parameters()).device
    z = torch.randn(samples, G.z_dim, generator=torch.Generator().manual_seed(0))
    z = z / z.square().mean(1, keepdim=True).sqrt()
    front = cameras.frontal(samples, **cameras.orbit_of(G.rendering_kwargs), device=device)
    with torch.no_grad():
        w = G.mapping(z.to(device), front)[:, 0].cpu()
    found = [find_direction(w, z[:, world.PARAM_NAMES.index(name)], told, share=0.1) for name, told in EDITABLE.items()]
    return best_spanned(hull, found, count)
