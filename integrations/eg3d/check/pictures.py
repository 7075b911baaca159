"""Mistakes that show only when labels and pictures are compared, by brief inversions under each hypothesis.

A hypothesis changes labels or pictures as a known mistake would have to be undone; the photos are inverted with it
and without, a few steps each, on the volume rendering alone. It is named only if it fits clearly better, and on
nearly every photo: the fit of one photo alone says little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos, resize
from convlora.integrations.eg3d.anchors import Encoder, w_statistics
from convlora.integrations.eg3d.check.finding import Finding
from convlora.integrations.eg3d.check.labels import mirrored, yaws
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, filled, photo_loss, preview

SIDE = 32  # pixels of the renderings: enough to tell poses, and networks of five stages take no less
BETTER = 0.06  # by which the median loss must fall for a hypothesis to be named
OWN = 0.03  # by which a photo's own camera must fit better than another's
NEARLY_ALL = 0.8  # of the photos must agree
TURNED = 5.0  # degrees of yaw from which a photo tells left from right


class Hypothesis(NamedTuple):
    check: str
    fine: str  # what is said where it does not fit better
    wrong: str  # what is said where it does
    remedy: str
    undo: Callable[[Photos], Photos]


def _with_labels(photos: Photos, labels: Tensor) -> Photos:
    return Photos(photos.images, labels, photos.names, photos.masks)


COLOURS = Hypothesis(
    "colours", "red and blue exchanged", "red and blue are exchanged",
    "OpenCV reads and writes BGR: cv2.cvtColor(image, cv2.COLOR_BGR2RGB) before the photos are saved",
    lambda photos: Photos(photos.images.flip(1), photos.labels, photos.names, photos.masks),
)  # fmt: skip
SIDES = Hypothesis(
    "left and right", "mirrored poses", "poses are mirrored",
    "negate x: S·P·S with S = diag(−1, 1, 1, 1) on every matrix; or the photos were mirrored without their labels",
    lambda photos: _with_labels(photos, mirrored(photos.labels)),
)  # fmt: skip
HEIGHTS = Hypothesis(
    "up and down", "poses turned upside down", "pitch has the wrong sign",
    "negate the pitch: S·P·S with S = diag(1, −1, 1, 1) on every matrix",
    lambda photos: _with_labels(photos, mirrored(photos.labels, 1)),
)  # fmt: skip


class Fitting(NamedTuple):
    """How photos are inverted here: the start, the distance, and for how long."""

    init: Encoder | None = None
    perceptual: Perceptual | None = None
    steps: int = 30
    lr: float = 0.05


def check_values(photos: Photos) -> Finding:
    """Whether the pictures use the range of brightness that pictures do: no rendering of theirs is needed."""
    grey = photos.images.mean(1)
    values = resize(grey[:, None], min(64, grey.shape[-1])).flatten()[: 1 << 24]  # the most that quantile takes
    low, high = (float(values.quantile(q)) / 2 + 0.5 for q in (0.01, 0.99))
    seen = f"brightness from {low:.2f} to {high:.2f} of the full range"
    if high < 0.1:
        return Finding("values", "error", f"{seen}: nearly black",
                       "values in [0, 1] were written as bytes: multiply by 255 first")  # fmt: skip
    clipped = float(((photos.images <= -1) | (photos.images >= 1)).float().mean())
    if low > 0.4 and high - low < 0.6:
        return Finding("values", "error", f"{seen}: washed out",
                       "normalised twice: (x + 1) / 2 was applied to values that were in [0, 1] already")  # fmt: skip
    if clipped > 0.5:
        return Finding("values", "error", f"{seen}; {clipped:.0%} of all values are 0 or 255",
                       "values in [-1, 1] were written as if they were in [0, 1]: (x + 1) · 127.5 first")  # fmt: skip
    if clipped > 0.25:
        return Finding("values", "warning", f"{seen}; {clipped:.0%} of all values are 0 or 255",
                       "look at the photos: large plain black or white areas, or clipped values")  # fmt: skip
    return Finding("values", "ok", seen)


def check_pictures(
    G: TriPlaneGenerator, photos: Photos, fitting: Fitting, count: int = 6, progress: bool = True
) -> list[Finding]:
    """Compare labels with pictures on `count` photos, those seen most from the left and from the right.

    Raises `ConvloraError` as G's rendering does.
    """
    device = next(G.parameters()).device
    chosen = _sides(photos, count)
    photos = _small(_at(photos, chosen).to(device), SIDE)
    turn = yaws(photos.labels)
    with tqdm(total=6 * fitting.steps, desc="comparing labels with pictures", disable=not progress) as bar:
        given = _fit(G, photos, fitting, bar)
        findings = []

        def compare(undone: Photos, judge: Callable[[Tensor], Finding]) -> None:
            # what was found wrong is undone for the comparisons that follow: they would suffer from it
            nonlocal photos, given
            loss = _fit(G, undone, fitting, bar)
            findings.append(judge(given - loss))
            if findings[-1].status == "error":
                photos, given = undone, loss

        compare(COLOURS.undo(photos), lambda gain: _judge(COLOURS, gain))
        framing = _framing(G, photos)
        compare(_reframed(photos, framing), lambda gain: _judge_framing(framing, gain))
        compare(SIDES.undo(photos), lambda gain: _judge(SIDES, gain[turn.abs() > TURNED]))
        compare(HEIGHTS.undo(photos), lambda gain: _judge(HEIGHTS, gain))
        exchanged = _with_labels(photos, photos.labels.flip(0))
        compare(exchanged, lambda gain: _judge_order(-gain, (turn - turn.flip(0)).abs()))
    return findings


def _judge(hypothesis: Hypothesis, gain: Tensor) -> Finding:
    if len(gain) < 2:
        return Finding(hypothesis.check, "not tested", f"no two photos are turned by more than {TURNED:.0f}°")
    better, agree = _better(gain)
    said = _said(gain)
    if better > BETTER and agree >= NEARLY_ALL:
        return Finding(hypothesis.check, "error", f"{hypothesis.wrong}: undone, they fit {said}", hypothesis.remedy)
    return Finding(hypothesis.check, "ok", f"{hypothesis.fine} fit {said}")


def _better(gain: Tensor) -> tuple[float, float]:
    """By which share the median loss is lower, and on which share of the photos it is; from gains in log loss."""
    return 1 - float((-gain.median()).exp()), float((gain > 0).float().mean())


def _said(gain: Tensor) -> str:
    """`23 % better on 6 of 6 photos`, of the direction that the median has."""
    better, _ = _better(gain)
    if better >= 0:
        return f"{better:.0%} better on {int((gain > 0).sum())} of {len(gain)} photos"
    return f"{1 - float(gain.median().exp()):.0%} worse on {int((gain < 0).sum())} of {len(gain)} photos"


def _judge_order(gain: Tensor, apart: Tensor) -> Finding:
    """`gain` is of each photo's own camera over that of a photo seen from the other side."""
    telling = apart > 2 * TURNED
    if int(telling.sum()) < 3:
        return Finding("order", "not tested", f"fewer than three photos differ by more than {2 * TURNED:.0f}° of yaw")
    gain = gain[telling]
    better, agree = _better(gain)
    said = _said(gain)
    if better < OWN or agree < 0.6:
        return Finding(
            "order", "error", f"a photo's own camera fits {said}, than another photo's",
            "dataset.json belongs to other photos, or pairs were made by position: match labels and photos by name",
        )  # fmt: skip
    return Finding("order", "ok", f"own cameras fit {said}, than other photos'")


def _judge_framing(framing: Tensor, gain: Tensor) -> Finding:
    dx, dy, scale = framing.tolist()
    better, agree = _better(gain)
    where = [f"{abs(dx):.0%} to the {'right' if dx > 0 else 'left'}"] * (abs(dx) > 0.02)
    where += [f"{abs(dy):.0%} too {'low' if dy > 0 else 'high'}"] * (abs(dy) > 0.02)
    where += [f"{scale:.2f} times as large as the cameras say"] * (abs(scale - 1) > 0.05)
    if where and better > BETTER and agree >= NEARLY_ALL:
        return Finding(
            "framing", "error", f"heads are {', '.join(where)}: so taken, photos fit {_said(gain)}",
            "align the photos as EG3D does (convlora eg3d prepare); a wrong scale may also be a wrong focal length",
        )  # fmt: skip
    return Finding("framing", "ok", f"size {scale:.2f}, off by {dx:+.0%}, {dy:+.0%} of the side")


def _sides(photos: Photos, count: int) -> list[int]:
    """Half of them seen most from one side, in order of yaw, half most from the other."""
    order = yaws(photos.labels).argsort().tolist()
    if len(order) <= count:
        return order
    return order[: count // 2] + order[len(order) - (count - count // 2) :]


def _at(photos: Photos, rows: list[int]) -> Photos:
    masks = None if photos.masks is None else photos.masks[rows]
    return Photos(photos.images[rows], photos.labels[rows], [photos.names[i] for i in rows], masks)


def _small(photos: Photos, side: int) -> Photos:
    if photos.masks is None:
        return Photos(resize(photos.images, side), photos.labels, photos.names)
    return Photos(resize(filled(photos.images, photos.masks), side), photos.labels, photos.names,
                  resize(photos.masks, side).clamp(0, 1))  # fmt: skip


def _fit(G: TriPlaneGenerator, photos: Photos, fitting: Fitting, bar: tqdm) -> Tensor:
    """(N,): the logarithm of the loss after a brief inversion, at the photos' size and without super-resolution."""
    with torch.no_grad():
        if fitting.init is None:
            w = w_statistics(G)[0].expand(len(photos), -1)
        else:
            w = fitting.init(photos.images, photos.labels)
    w = w.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=fitting.lr)
    with torch.enable_grad():
        for step in range(fitting.steps):
            optimizer.param_groups[0]["lr"] = fitting.lr * (1 - step / fitting.steps)
            out = preview(G, w, photos.labels, photos.images.shape[-1])
            loss = photo_loss(out, photos.images, fitting.perceptual, mask=photos.masks)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            bar.update()
    return loss.detach().log()


def _reframed(photos: Photos, framing: Tensor) -> Photos:
    """Labels whose intrinsics have the heads where and as large as they are in the pictures."""
    dx, dy, scale = framing
    labels = photos.labels.clone()
    labels[:, 16] *= scale
    labels[:, 20] *= scale
    labels[:, 18] += dx
    labels[:, 21] += dy
    return _with_labels(photos, labels)


def _framing(G: TriPlaneGenerator, photos: Photos, samples: int = 32) -> Tensor:
    """(3,): shift right, shift down (shares of the side) and scale that take the average head to the photos'.

    The mean photo is compared with the mean of random heads from the same cameras, seen wide; where no shift and
    scale correlates, this finds something wrong, and the inversions that follow will not confirm it.
    """
    wide, side = 2.0, photos.images.shape[-1]
    labels = photos.labels[torch.arange(samples) % len(photos)].clone()
    labels[:, [16, 20]] /= wide
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(samples, G.z_dim, generator=generator).to(labels)
    with torch.no_grad():
        w = G.mapping(z, cameras.frontal(samples, device=labels.device))[:, 0]
        heads = torch.cat([preview(G, a, b, side)["image_raw"] for a, b in zip(w.split(8), labels.split(8))])
    scales = torch.tensor([0.6, 0.67, 0.74, 0.82, 0.9, 1.0, 1.1, 1.22, 1.35, 1.5])
    shifts = torch.linspace(-0.25, 0.25, 21)
    grid = torch.cartesian_prod(shifts, shifts, scales).to(labels)
    # where a pixel of the photo lies in the wide picture, whose middle half it is without shift and scale
    at = (torch.arange(side, device=labels.device) + 0.5) / side - 0.5
    x = (at - grid[:, :1]) / grid[:, 2:] * (2 / wide)
    y = (at - grid[:, 1:2]) / grid[:, 2:] * (2 / wide)
    sampling = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    average = heads.mean(0, keepdim=True).expand(len(grid), -1, -1, -1)
    found = torch.cat([
        F.grid_sample(a, b, padding_mode="border", align_corners=False)
        for a, b in zip(average.split(256), sampling.split(256))
    ])  # fmt: skip
    target = photos.images.mean(0)
    return grid[_correlation(found, target).argmax()]


def _correlation(images: Tensor, target: Tensor) -> Tensor:
    a = images - images.mean((2, 3), keepdim=True)
    b = target - target.mean((1, 2), keepdim=True)
    return (a * b).sum((1, 2, 3)) / (a.square().sum((1, 2, 3)) * b.square().sum()).sqrt()
