"""From an album of photos to a personal 3D generator: what `convlora eg3d demo` runs, step by step.

python examples/eg3d_personalize.py OUT [--quick]

The person is procedural (a head drawn by a program), so everything here may be published. With an EG3D of
your own and real photos, change the two lines marked (*).
"""

import sys
from pathlib import Path

import torch

import convlora
from convlora.integrations import eg3d
from convlora.integrations.eg3d import images, lab

out = Path(sys.argv[1])
quick = "--quick" in sys.argv  # a few steps only, to try the script
out.mkdir(parents=True)
convlora.prepare_cpu()  # on a CPU: freed memory is kept, with which a step at 512² is up to 1.8 times as fast

# 1. A frozen, pretrained EG3D.
G = eg3d.load_generator("lab").requires_grad_(False)  # (*)

# 2. An album: photos, their cameras in EG3D's dataset.json, and which of them are held out.
lab.write_album(lab.PERSON_A, out / "album", train=4 if quick else 16, test=2 if quick else 8)  # (*)
album = eg3d.load_album(out / "album", G.img_resolution)

# 3. Anchors: every photo inverted into W. The lab's encoder gives a start close to the end.
perceptual = lab.networks.perceptual_distance
anchors = eg3d.find_anchors(
    G, album.train, steps=2 if quick else 25, init=lab.w_encoder(G), perceptual=perceptual, lr=0.05
)
anchors.save(out / "anchors.safetensors")

# 4. Personalise: a rank-1 adapter on every layer of the backbone and the super-resolution, the decoder in full.
adapter = eg3d.personalize(
    G, album.train, anchors, rank=1, steps=4 if quick else 110, lr=0.008, lr_full=0.003, perceptual=perceptual
)
print(adapter)
path = adapter.save(out / "adapter.safetensors", person=album.person, consent="procedural, none needed")
print(f"{path}: {path.stat().st_size:,} bytes")

# 5. Anyone with the same base and the file has the same generator.
fresh = eg3d.load_generator("lab")
convlora.load_adapter(fresh, path)

# 6. What it knows: the person from cameras no photo was taken from, beside the pretrained generator.
orbit = eg3d.cameras.random_views(3 if quick else 16, mode="orbit")
personal = eg3d.tasks.novel_views(fresh, anchors.w[:1], orbit)[0]
with adapter.disabled():
    pretrained = eg3d.tasks.novel_views(G, anchors.w[:1], orbit)[0]
images.save_animation(out / "orbit.webp", torch.cat([pretrained, personal], dim=3))

# 7. Between two photos of the person, every latent should still be the person.
frontal = eg3d.cameras.frontal(1)
between = eg3d.tasks.interpolate(fresh, anchors.w[0], anchors.w[1], frontal, weights=3 if quick else 7)[:, 0]
images.save_sheet(
    out / "sheet.png",
    [
        ("photos", album.train.images[:7]),
        ("pretrained", pretrained[:7]),
        ("personal", personal[:7]),
        ("between", between),
    ],
)
print(f"look at {out / 'sheet.png'} and {out / 'orbit.webp'}")
