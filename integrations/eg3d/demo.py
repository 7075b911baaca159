"""The demo: a procedural person's album becomes a personal 3D generator in minutes, without a GPU."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import load_album
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.pipeline import Settings, check_settings, personalize_album
from convlora.integrations.eg3d.report import Report
from convlora.integrations.eg3d.run_folder import RunFolder

#: What suits the lab's small prior: its encoder starts inversion close, so few steps are enough.
LAB_SETTINGS = Settings(
    anchor_steps=25, anchor_lr=0.05, steps=120, batch_size=4, lr=0.004, lr_full=0.0015, views=8, compare_full=True
)


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
        return personalize_album(G, album, folder, settings, lab_networks(device), command=command, progress=progress)
