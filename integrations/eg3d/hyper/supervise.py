"""Phase 0: the adapters that teach a hypernetwork, found the slow way for many people, a batch of them at a time.

HyperDreamBooth trains one LiDB for each of its 15,000 photos. Here every sample of a batch is another person with
numbers of its own, which the generator computes with at the price of one (see `convlora.per_sample`). All begin with
the same numbers, so that codes differ by the people they are of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convlora import Adapter
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.batches import Kept, Watch, fit_in_batches, told
from convlora.integrations.eg3d.hyper.codes import Codes, canonical, layout_of, start
from convlora.integrations.eg3d.hyper.examples import Examples, render, shown
from convlora.integrations.eg3d.losses import Perceptual, photo_loss
from convlora.integrations.eg3d.metrics import IdentityEncoder

_FORMAT = "convlora-codes"


class Supervision(NamedTuple):
    """Codes of the first M examples in canonical form, the loss before and after (M, 2), and how far each person's
    numbers moved from the common start: root mean squares of left and right (M, 2)."""

    codes: Codes
    loss: Tensor
    moved: Tensor
    seed: int = 0

    def scale(self) -> tuple[float, float]:
        """What `HyperNetwork.calibrate` takes."""
        left, right = self.moved.square().mean(0).sqrt().tolist()
        return left, right


def supervise(
    adapter: Adapter,
    examples: Examples,
    steps: int = 200,
    *,
    lr: float = 1e-2,
    batch_size: int = 8,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    identity: IdentityEncoder | None = None,
    identity_weight: float = 0.1,
    draw: Callable[..., dict[str, Tensor]] = render,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Supervision:
    """Fit codes to every example, its latent fixed; where the moment is known from another camera, to that as well.

    `adapter` is a LiDB on the generator (`HyperNetwork.inject`), whose own numbers are left alone. The loss of a step
    is `photo_loss`, on the photo and on the turned one in turn; `identity_weight` times 1 − cosine to the photo shown
    is added. Adam has a constant rate `lr` on the codes, the last fifth of the steps a falling one.

    Args:
        checkpoint: a file that keeps finished batches; a call with the same arguments goes on, and more examples may
            follow those that are there.

    Raises:
        ConvloraError: a loss that is not finite: the step and the photos are named, finished batches stay.
        FileError: the checkpoint is of other examples or arguments.
    """
    layout, G = layout_of(adapter), adapter.model
    device = next(G.parameters()).device
    kept = None
    if checkpoint is not None:
        settings = told(
            dict(
                adapter=adapter.options, layers=layout.names, base=adapter.record.base_fingerprint, steps=steps, lr=lr,
                perceptual=perceptual, perceptual_weight=perceptual_weight, identity=identity,
                identity_weight=identity_weight, draw=draw, seed=seed,
            )
        )  # fmt: skip
        kept = Kept(Path(checkpoint), _FORMAT, settings)

    def fit(_: Photos, which: slice, watch: Watch) -> dict[str, Tensor]:
        batch = examples.rows(torch.arange(len(examples))[which]).to(device)
        begin = start(layout, len(batch), seed, device)
        codes = Codes(*(nn.Parameter(x.clone()) for x in begin))
        first, last = fit_codes(batch, codes, watch)
        moved = torch.stack([(x - y).square().flatten(1).mean(1).sqrt() for x, y in zip(codes, begin)], 1)
        # of the entries that are a layer's; the padding never moves
        share = torch.tensor([used.float().mean() for used in layout.used()], device=device).sqrt()
        found = canonical(codes.detach())
        return {
            "left": found.left, "right": found.right, "loss": torch.stack([first, last], 1),
            "moved": (moved / share).detach(),
        }  # fmt: skip

    def fit_codes(batch: Examples, codes: Codes, watch: Watch) -> tuple[Tensor, Tensor]:
        optimizer = torch.optim.Adam(list(codes), lr=lr, betas=(0.9, 0.99))
        truth, masks = shown(batch.images), None if batch.masks is None else batch.masks.float() / 255
        turned = None if batch.turned is None else shown(batch.turned)
        first = last = torch.empty(0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 5 * (steps - step) / steps)
            own = turned is None or step % 2 == 0
            target, labels = (truth, batch.labels) if own or turned is None else (turned, batch.turned_labels)
            out = draw(adapter, G, batch.w, labels, Codes(*codes), layout)
            each = photo_loss(out, target, perceptual, perceptual_weight, masks if own else None)
            if identity is not None and identity_weight:
                with torch.no_grad():
                    wanted = identity(target)
                each = each + identity_weight * (1 - (identity(out["image"]) * wanted).sum(1))
            watch.see(step, each)
            optimizer.zero_grad(set_to_none=True)
            each.sum().backward()
            optimizer.step()
            if own:
                last = each.detach()
                first = last if not len(first) else first
        return first, last

    photos = Photos(examples.images, examples.labels, examples.names, examples.masks)  # for names and digests alone
    found = fit_in_batches(
        fit, photos, steps, what="adapter of", rate=f"lr={lr:g}", batch_size=batch_size, seed=seed, device=device,
        kept=kept, description="adapters that teach", progress=progress,
    )  # fmt: skip
    return Supervision(Codes(found["left"], found["right"]), found["loss"], found["moved"], seed)
