"""Personalisation whose loss or weights stop being numbers: it stops, says where, and keeps the last good state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_generator, tiny_photos

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.personalize import inject_personal, parameter_groups, tune, unfreeze

PHOTOS = tiny_photos(4)
ANCHORS = Anchors(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), PHOTOS.names, torch.zeros(4))


class Distance:
    """A perceptual distance that is NaN for the photo in row 1 of the batch of one step."""

    def __init__(self, wrong_at: int) -> None:
        self.calls, self.wrong_at = 0, wrong_at

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # twice a step: for image_raw and image
        found = (a - b).abs().mean((1, 2, 3))
        return found * torch.tensor([1, float("nan")]) if self.calls == 2 * self.wrong_at else found


def personal(whole: bool = False) -> tuple:
    G = tiny_generator()
    torch.manual_seed(0)
    if whole:
        return G, [{"params": unfreeze(G), "lr": 1e-3}]
    return G, parameter_groups(inject_personal(G), 0.01, 0.001)


def run(G, groups, **options):
    return tune(G, options.pop("photos", PHOTOS), ANCHORS, groups, batch_size=2, progress=False, **options)


def values(groups) -> list[torch.Tensor]:
    return [p.detach().clone() for group in groups for p in group["params"]]


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "full"])
def test_the_model_and_the_file_keep_the_last_good_weights(tmp_path, whole) -> None:
    G, groups = personal(whole)
    order = torch.cat([torch.randperm(4, generator=(g := torch.Generator().manual_seed(0)))] +
                      [torch.randperm(4, generator=g) for _ in range(20)])  # fmt: skip
    name = PHOTOS.names[int(order[13 * 2 + 1])]  # of step 14
    file = tmp_path / "run.ckpt"
    with pytest.raises(
        ConvloraError, match=rf"tuning to {name} diverged at step 14 of 20 \(lr=.*of step 10 back.*run.ckpt"
    ):
        run(G, groups, steps=20, perceptual=Distance(14), checkpoint=file, checkpoint_seconds=0)
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 10
    assert all(torch.equal(a, b) for a, b in zip(values(groups), kept["tuned"], strict=True))
    assert not torch.equal(values(groups)[0], values(personal(whole)[1])[0]), "the ten good steps are not lost"
    sound, good = personal(whole)
    run(sound, good, steps=20, perceptual=Distance(-1))
    again, groups = personal(whole)
    run(again, groups, steps=20, perceptual=Distance(-1), checkpoint=file)
    assert all(torch.equal(a, b) for a, b in zip(values(groups), values(good), strict=True)), "it goes on from there"


def test_a_learning_rate_that_is_far_too_large_leaves_the_start(tmp_path) -> None:
    G, groups = personal()
    start = values(groups)
    for group in groups:
        group["lr"] = 1e30
    with pytest.raises(
        ConvloraError, match=r"diverged at step [23] of 20 \(lr=1e\+30, 1e\+30\).*lower lr.*of step 0 back"
    ):
        run(G, groups, steps=20, checkpoint=tmp_path / "run.ckpt", checkpoint_seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(values(groups), start, strict=True))
    assert not (tmp_path / "run.ckpt").exists()


def test_weights_that_overflow_in_the_last_step_are_seen() -> None:
    G, groups = personal()
    start = values(groups)
    huge = torch.finfo(torch.float32).max
    for group in groups:
        group["lr"] = huge
    with pytest.raises(ConvloraError, match="diverged at step [12] of [12]"):
        run(G, groups, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(values(groups), start, strict=True))


def test_a_photo_of_nan_is_named() -> None:
    images = PHOTOS.images.clone()
    images[2] = float("nan")
    G, groups = personal()
    with pytest.raises(ConvloraError, match=r"tuning to photo_02.png diverged at step [12] of 10"):
        run(G, groups, photos=replace(PHOTOS, images=images), steps=10)


def test_a_checkpoint_of_another_learning_rate_is_refused(tmp_path) -> None:
    G, groups = personal()
    run(G, groups, steps=3, checkpoint=tmp_path / "run.ckpt")
    G, groups = personal()
    groups[0]["lr"] = 0.5
    before = values(groups)
    with pytest.raises(FileError, match="other settings"):
        run(G, groups, steps=3, checkpoint=tmp_path / "run.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))
