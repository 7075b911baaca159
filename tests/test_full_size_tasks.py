"""Every task on the full-size 512² generator with random weights, two steps each: shapes, finite, seconds, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# In a process of its own, so that the peak of its memory is that of the tasks.
TASKS = """
import json, resource, sys, time
from functools import partial
import torch
from convlora.cpu import prepare_cpu
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.lab.networks import perceptual_distance
from convlora.integrations.eg3d.personalize import inject_personal
from convlora.integrations.eg3d.tasks import (
    edit, inpaint, interpolate, invert, make_hull, mesh, novel_views, personal_direction, project, replace_background,
    synthesize, upscale,
)
from convlora.integrations.eg3d.tasks.background import opacity
from convlora.integrations.eg3d.tasks.degrade import center_hole, downsample
from convlora.integrations.eg3d.tasks.depth import normals
from convlora.integrations.eg3d.tasks.directions import find_direction
from convlora.integrations.eg3d.tasks.views import render_views

device, out = sys.argv[1:]
torch.manual_seed(0)
prepare_cpu()  # as the program does
G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhqrebalanced512-128"]).eval().requires_grad_(False).to(device)
for p in inject_personal(G).parameters():
    p.requires_grad_(False)
orbit = cameras.orbit_of(G.rendering_kwargs)
labels = cameras.random_views(1, seed=0, **orbit)
with torch.no_grad():
    samples = G.mapping(torch.randn(40, 512, device=device), cameras.frontal(40, **orbit, device=device))[:, 0]
hull = make_hull(samples[:6])
photos = Photos(torch.linspace(-1, 1, 512).expand(1, 3, 512, 512).contiguous(), labels, ["photo.png"])
options = dict(batch_size=1, perceptual=perceptual_distance, progress=False)
image = (1, 3, 512, 512)


def timed(name, images, run):
    start, spent = time.perf_counter(), time.process_time()
    found = run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, spent = (time.perf_counter() - start) / images, (time.process_time() - spent) / images
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1024**3
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # KiB on Linux
    row = {"task": name, "seconds": round(seconds, 2), "processor_seconds": round(spent, 2), "peak_gib": round(peak, 2)}
    print(json.dumps(row), flush=True)
    return found


def check(tensor, shape):
    assert tensor.shape == shape, (tensor.shape, shape)
    assert bool(tensor.isfinite().all())


G.planes(samples[:1, None].expand(-1, 14, -1), noise_mode="const")  # whatever the first call of all costs
check(timed("one view", 1, lambda: novel_views(G, samples[:1], labels)), (1, *image))
check(timed("interpolate", 2, lambda: interpolate(G, samples[0], samples[1], labels, weights=2)), (2, *image))
check(timed("synthesize", 2, lambda: synthesize(G, hull, 2, batch_size=1)).images, (2, 3, 512, 512))

normal = find_direction(samples, samples[:, 0], "first", share=0.2).normal
direction = personal_direction(hull, normal)
alpha = hull.coefficients(hull.start((1,)))
move = partial(edit, G, hull, alpha, direction, torch.tensor([-1.0, 1.0]), labels, batch_size=1)
check(timed("edit", 2, move).images, (2, *image))
seen = timed("depth and normals", 1, lambda: render_views(G, samples[:1], labels))
check(normals(seen.depths[0], labels), (1, 3, 128, 128))
ws = samples[:1, None].expand(-1, 14, -1)
person = timed("opacity", 1, lambda: opacity(G, ws, labels.to(device), 512)).cpu()
check(replace_background(photos.images, -photos.images, person), image)
points = torch.rand(1, 4096, 3, device=device) - 0.5
level = float(G.sample_mixed(points, None, ws, noise_mode="const")["sigma"].median())
found = timed("mesh, 64 points a side", 1, lambda: mesh(G, samples[0], resolution=64, level=level))
assert len(found.faces) > 100

for per_layer in (False, True):
    name = "project, per layer" if per_layer else "project"
    found = timed(name, 1, lambda: project(G, photos, hull, 2, per_layer=per_layer, **options))
    check(found.images, image)
    assert bool(hull._replace(anchors=hull.anchors.cpu()).contains(found.alpha).all())
fill = partial(inpaint, G, photos, hull, center_hole(512), 2, out=f"{out}/filled", **options)
check(timed("inpaint", 1, fill).images, image)
check(timed("inpaint, blended again", 1, lambda: fill(how="laplacian")).images, image)
small = Photos(downsample(photos.images, 16), labels, photos.names)
check(timed("upscale, 32 to 512", 1, lambda: upscale(G, small, hull, 2, **options)).images, image)

into_folder = partial(invert, G, photos, 2, out=f"{out}/inverted", stop_below=None, **options)
latent = timed("invert, latent alone", 1, lambda: into_folder(0, target="none"))
check(latent.images, image)
for target in ("all", "adapter"):  # the latents are there already
    found = timed(f"invert, tuning {target}", 1, lambda: into_folder(2, target=target, views=labels))
    check(found.images, image)
    check(found.views, (1, *image))
    assert torch.equal(found.w, latent.w) and bool(found.loss.isfinite().all())
assert found.adapters[0].stat().st_size < 1_000_000
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_every_task_at_full_size(device: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TASKS, device, str(tmp_path)], capture_output=True, text=True, timeout=3500
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 15
    assert max(row["peak_gib"] for row in rows) < 8
    blended = {row["task"]: row["seconds"] for row in rows}
    assert blended["inpaint, blended again"] < blended["inpaint"]  # its coefficients were kept
