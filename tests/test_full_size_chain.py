"""At full size: an official checkpoint and a photo become a personal generator's picture, within 8 GiB, on a CPU."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import official_format
import pytest
import torch
from PIL import Image

from convlora.integrations import eg3d

# of scikit-image's portrait: image-left eye, image-right eye, nose, corners of the mouth
LANDMARKS = np.array([[205.01, 101.73], [246.76, 103.71], [224.67, 128.96], [201.72, 139.25], [245.27, 141.86]])

CHAIN = """
import sys
from convlora.cli import main
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.images import save_png
from convlora.integrations.eg3d.tasks import novel_views

checkpoint, photos, landmarks, out = sys.argv[1:]
assert main(["eg3d", "import", checkpoint, f"{out}/generator"]) == 0
assert main(["eg3d", "prepare", photos, f"{out}/album", "--landmarks", landmarks, "--keep-all", "--quiet"]) == 0
G = eg3d.load_generator(f"{out}/generator").requires_grad_(False)
album = eg3d.load_album(f"{out}/album", G.img_resolution)
anchors = eg3d.find_anchors(G, album.train, 2, batch_size=1, w_samples=8, progress=False)
adapter = eg3d.personalize(G, album.train, anchors, steps=2, batch_size=1, progress=False)
adapter.save(f"{out}/me.safetensors", person=album.person, consent=album.consent)
image = novel_views(G, anchors.w[:1], cameras.frontal(1, **cameras.orbit_of(G.rendering_kwargs)))[0, 0]
save_png(f"{out}/me.png", image)
print("loss", anchors.loss.tolist(), "trainables", adapter.num_trainable)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_a_checkpoint_and_photos_to_a_picture(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhqrebalanced512-128"])
    checkpoint = official_format.write(
        tmp_path / "ffhqrebalanced512-128.pkl", official_format.snapshot(official_format.eg3d_network(G))
    )
    photos = tmp_path / "photos"
    photos.mkdir()
    portrait = Image.fromarray(data.astronaut())
    portrait.save(photos / "one.png")
    portrait.crop((30, 0, 512, 482)).save(photos / "two.jpg", quality=95)
    landmarks = {"one.png": LANDMARKS.tolist(), "two.jpg": (LANDMARKS - [30, 0]).tolist()}
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    del G
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, str(checkpoint), str(photos), str(tmp_path / "landmarks.json"), str(tmp_path)],
        capture_output=True, text=True, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024**2  # KiB on Linux
    print(f"peak {peak:.2f} GiB")
    assert peak < 8
    with Image.open(tmp_path / "me.png") as image:
        assert image.size == (512, 512)
    assert (tmp_path / "me.safetensors").stat().st_size < 500_000
    assert "trainables 95367" in done.stdout
