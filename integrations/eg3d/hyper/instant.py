"""Phase 2: a person from one photo, predicted and then tuned for a few steps at a higher rank.

HyperDreamBooth's rank-relaxed fast finetuning: the predicted change is merged into the weights, exactly, and a fresh
LoRA of higher rank, which begins at zero, is tuned to the photo. Both together are one adapter, exact at the sum of
the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.inject import check_name
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.hyper.codes import Codes, put
from convlora.integrations.eg3d.hyper.examples import make_examples
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.losses import Perceptual
from convlora.integrations.eg3d.personalize import TARGETS, narrow, tune

PREDICTED, TUNED = "predicted", "tuned"


class Instant(NamedTuple):
    """The adapter on G, the photo's anchor, seconds by stage ("inversion", "prediction", "tuning"), and codes
    (1, L, …), None without a hypernetwork."""

    adapter: Adapter
    anchors: Anchors
    seconds: dict[str, float]
    codes: Codes | None

    def save(self, path: str | Path, dtype: torch.dtype | None = None, **metadata: str) -> Path:
        """The adapter's file; `person` and `consent` are fields of it."""
        return self.adapter.save(path, dtype, **metadata)


def instant(
    G: TriPlaneGenerator,
    photo: Photos,
    hyper: HyperNetwork | None,
    *,
    anchors: Anchors | None = None,
    steps: int = 40,
    rank: int = 4,
    lr: float = 0.004,
    refinements: int | None = None,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    name: str = "default",
    seed: int = 0,
    progress: bool = True,
    look: Callable[[int], None] | None = None,
    look_every: int = 100,
    **inversion: Any,
) -> Instant:
    """Personalise G in place from one photo; the result is one low-rank adapter `name`.

    Args:
        hyper: None leaves the prediction away: a LoRA of `rank` tuned for `steps`.
        anchors: the photo's, if it was inverted before.
        steps: 0 leaves the tuning away.
        refinements: how often the decoder is applied; None is the network's own number.
        look: called every `look_every` steps of the tuning with their number, to measure G as it is then.
        inversion: options of `find_anchors`, such as `steps=25` as `anchor_steps`, `init` or `refine_camera`.

    Raises:
        ConvloraError: not one photo, neither a hypernetwork nor steps, another generator than the hypernetwork's.
    """
    if len(photo) != 1:
        raise ConvloraError(f"instant personalisation is from one photo, not {len(photo)}: photos.part([0])")
    check_name(G, name)
    if hyper is None and steps < 1:
        raise ConvloraError("without a hypernetwork and without steps nothing would change: give one of them")
    seconds: dict[str, float] = {}
    device = next(G.parameters()).device
    began = time.monotonic()
    if anchors is None:
        anchors = find_anchors(
            G, photo, inversion.pop("anchor_steps", 500), perceptual=perceptual, perceptual_weight=perceptual_weight,
            seed=seed, progress=progress, **inversion,
        )  # fmt: skip
    elif inversion:
        raise ConvloraError(f"{', '.join(inversion)}: options of an inversion, and anchors are given")
    if anchors.names != photo.names:
        raise ConvloraError(f"the anchor is of {', '.join(anchors.names)} and the photo is {photo.names[0]}")
    began = _lap(seconds, "inversion", began, device)
    codes = None
    parts: dict[str, float] = {}
    try:
        if hyper is not None:
            codes = predict(G, photo, anchors, hyper, refinements)
            predicted = hyper.inject(G, PREDICTED)
            parts[PREDICTED] = 1.0
            put(predicted, codes)
            began = _lap(seconds, "prediction", began, device)
        if steps:
            if hyper is not None:
                predicted.merge()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                tuned = convlora.inject_lora(G, rank, targets=list(TARGETS), ranks=narrow(G, rank), name=TUNED)
            parts[TUNED] = 1.0
            tune(
                G, photo, anchors, [{"params": list(tuned.parameters()), "lr": lr}], steps=steps, batch_size=1,
                perceptual=perceptual, perceptual_weight=perceptual_weight, seed=seed, progress=progress,
                description="tuning to the photo", look=look, look_every=look_every,
            )  # fmt: skip
            if hyper is not None:
                predicted.unmerge()
        adapter = convlora.compose(G, parts, how="concat", name=name)
    finally:
        for part in reversed(list(parts)):
            Adapter.of(G, part).remove()
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    _lap(seconds, "tuning", began, device)
    return Instant(adapter, anchors, seconds, codes)


@torch.no_grad()
def predict(
    G: TriPlaneGenerator, photos: Photos, anchors: Anchors, hyper: HyperNetwork, refinements: int | None = None
) -> Codes:
    """Codes of N photos, of whom G has no adapter on; padded pixels are the rendering's own."""
    labels = photos.labels if anchors.labels is None else anchors.labels
    device = next(G.parameters()).device
    examples = make_examples(G, Photos(photos.images, labels, photos.names, photos.masks), anchors.w)
    found: Codes = hyper.to(device)(*examples.to(device).inputs(), refinements)
    return found


def _lap(seconds: dict[str, float], stage: str, began: float, device: torch.device) -> float:
    """Note the time since `began`, after the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.monotonic()
    seconds[stage] = now - began
    return now
