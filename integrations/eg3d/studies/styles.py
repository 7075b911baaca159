"""The styles of a cohort: adapters that all its people share, and which blocks a style needs."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import convlora
from convlora.integrations.eg3d.blocks import FULL_MASK, GROUPS, Mask, mask_name, masked_ranks, masked_weights, masks
from convlora.integrations.eg3d.lab.style_adapter import Heads, ordinary_heads, style_adapter
from convlora.integrations.eg3d.lab.styles import style_named
from convlora.integrations.eg3d.run_folder import write_text
from convlora.integrations.eg3d.studies.cohort import Cohort
from convlora.integrations.eg3d.tasks import novel_views

CALIBRATION_SEEDS = 600_000  # heads that blocks are chosen with: no style is learnt from them, nobody is measured
CHOSEN = 3  # masks that are also trained
_MOST_HEADS = 128
#: A style's learning rate as a multiple of the settings', which is that of a person's LoRA of rank 1.
RATE = 2.0


@dataclass(frozen=True)
class Styles:
    """Adapters of one style in `cohort.out/styles`, a file for each mask they were trained with."""

    cohort: Cohort
    style: str

    @property
    def folder(self) -> Path:
        return self.cohort.out / "styles"

    @torch.no_grad()
    def draw(self, images: Tensor) -> Tensor:
        """Images (…, 3, R, R) in the style."""
        flat = images.reshape(-1, *images.shape[-3:])
        return torch.cat([style_named(self.style)(part) for part in flat.split(32)]).view_as(images)

    def adapter(self, mask: Mask = FULL_MASK) -> Path:
        """The file of the adapter trained in the groups of a mask alone; trained now if it is not there."""
        path = self.folder / f"{self.style}_{mask_name(mask).replace('+', '_')}.safetensors"
        if not path.is_file():
            with _alone(self.folder):
                if not path.is_file():
                    self._train(mask, path)
        return path

    def chosen(self, heads: int) -> list[Mask]:
        """The masks, best first, that keep most of identity and style when the full adapter is masked.

        Measured on the base alone, with `heads` heads that nobody is learnt from or measured with: the harmonic mean of
        style score and cosine of identities with the same head drawn over. So the choice fits no person by chance.
        """
        path = self.folder / f"{self.style}_chosen_{heads}.json"
        if not path.is_file():
            full = self.adapter()
            with _alone(self.folder):
                if not path.is_file():
                    write_text(path, json.dumps(self._ranked(full, heads), indent=1))
        best = json.loads(path.read_text(encoding="utf-8"))[:CHOSEN]
        names = {mask_name(mask): mask for mask in masks()}
        return [names[row["mask"]] for row in best]

    @cached_property
    def _heads(self) -> Heads:
        settings = self.cohort.settings
        count = min(_MOST_HEADS, settings.steps * settings.batch_size)
        return ordinary_heads(self.cohort.base, count, self.cohort.species)

    def _train(self, mask: Mask, path: Path) -> None:
        cohort, settings = self.cohort, self.cohort.settings
        model = copy.deepcopy(cohort.base)
        torch.manual_seed(0)
        adapter = style_adapter(
            model, self.style, ranks=masked_ranks(model, mask), heads=self._heads, steps=settings.steps,
            batch_size=min(settings.batch_size, len(self._heads.photos)), lr=settings.lr * RATE,
            perceptual=cohort.networks.perceptual, perceptual_weight=settings.perceptual_weight,
            checkpoint=path.with_suffix(".ckpt"), progress=cohort.progress, species=cohort.species,
        )  # fmt: skip
        adapter.save(path, style=self.style, blocks=mask_name(mask))
        path.with_suffix(".ckpt").unlink(missing_ok=True)

    def _ranked(self, full: Path, count: int) -> list[dict[str, str | float]]:
        """Every mask but none and all, with its scores, best first."""
        cohort, model = self.cohort, copy.deepcopy(self.cohort.base)
        heads = ordinary_heads(model, count, cohort.species, CALIBRATION_SEEDS)
        labels = heads.photos.labels[:, None]
        plain = novel_views(model, heads.w, labels)[:, 0]
        target = self.draw(plain)
        known, away = cohort.embed(target), cohort.perceptual(plain, target).sum()
        adapter = convlora.load_adapter(model, full, "style")
        scores: dict[Mask, tuple[float, float]] = {}
        for mask in masks():
            if 0 < len(mask) < len(GROUPS):
                adapter.set_strength(masked_weights(model, mask))
                images = novel_views(model, heads.w, labels)[:, 0]
                style = 1 - cohort.perceptual(images, target).sum() / away
                scores[mask] = float((cohort.embed(images) * known).sum(1).mean()), float(style)
        best = sorted(scores, key=lambda mask: both(*scores[mask]), reverse=True)
        return [
            {"mask": mask_name(m), "identity": scores[m][0], "style": scores[m][1], "both": both(*scores[m])}
            for m in best
        ]


def both(identity: float, style: float) -> float:
    """The harmonic mean of two scores, which neither makes up for the other's lack in; 0 where one is not above 0."""
    return 2 * identity * style / (identity + style) if min(identity, style) > 0 else 0.0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of the cohort trains here."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as handle:
        try:
            import fcntl
        except ImportError:  # Windows: two processes would both train, and the later file stays
            pass
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
