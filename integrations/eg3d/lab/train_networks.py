"""Trains the lab's perceptual net and identity encoder on drawings of procedural people, or of cats.

    python -m convlora.integrations.eg3d.lab.train_networks photos --people 7000 --each 3
    python -m convlora.integrations.eg3d.lab.train_networks perceptual --minutes 12
    python -m convlora.integrations.eg3d.lab.train_networks identity --minutes 12
    python -m convlora.integrations.eg3d.lab.train_networks identity --species cats --folder .lab/cats --resume

`photos` draws the people once into a memory-mapped folder; drawing can still be going on while the others train.
Seeds of training people lie below 100_000 and those of the validation people start at 800_000, so neither
meets the people that the project's results are measured on (from 900_000).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import cameras
from . import networks, world
from ._species import PEOPLE, SPECIES, Species
from ._species import species as species_of
from ._training import angles, curve, orbit, write_provenance
from .networks import IdentityEncoder, PerceptualNet, file_name, save

VALIDATION_SEED = 800_000
SIZE = 128
WEIGHTS = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Photos:
    """A folder of drawings: pictures (n, 128, 128, 3) uint8 and what they show, person by person."""

    pictures: np.ndarray
    params: Tensor
    traits: Tensor
    labels: Tensor
    angles: Tensor
    person: Tensor
    folder: Path
    kind: Species

    def ready(self) -> int:
        """How many pictures from the start have been drawn so far."""
        return int((self.folder / "drawn").read_text())

    def batch(self, index: Tensor) -> Tensor:
        """Images (n, 3, 128, 128) in [-1, 1]."""
        pictures = torch.from_numpy(self.pictures[index.numpy()])
        return pictures.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)

    def mirrored(self) -> Photos:
        """What the same pictures show after a swap of left and right; `batch` still gives them unswapped."""
        sign = torch.tensor([-1.0 if name in self.kind.sided else 1.0 for name in self.kind.param_names])
        turned = self.angles * torch.tensor([-1.0, 1.0])
        return replace(self, params=self.params * sign, angles=turned, labels=cameras.label(orbit(*turned.unbind(1))))


def plan(
    first_seed: int, people: int, each: int, kind: Species, plain: float = 0.4, alike: bool = False
) -> dict[str, Tensor]:
    """Who is drawn how: `each` photos of every person, in an order where people mix; a share has no rare traits.

    `alike`: people 2k and 2k + 1 have the same identity parameters, and the second has a rare trait of its own.
    """
    seeds = list(range(first_seed, first_seed + people))
    generator = torch.Generator().manual_seed(first_seed + 1)
    total = people * each
    faces = [seed - (seed - first_seed) % 2 for seed in seeds] if alike else seeds
    identity = world.sample_identity(faces).repeat(each, 1)
    nuisance = world.sample_nuisance(list(range(first_seed + people, first_seed + people + total)))
    lasting = torch.tensor([name in kind.lasting_traits for name in kind.trait_names])
    marked = (torch.rand(people, 1, generator=generator) >= plain).float()
    own = world.sample_traits(seeds, kind) * marked
    if alike:
        marks = world.sample_traits(list(range(first_seed, first_seed + 12 * people)), kind) * lasting
        own[1::2] = marks[marks.ne(0).any(1)][: len(own[1::2])]
    traits = own.repeat(each, 1)
    passing = world.sample_traits(list(range(first_seed + people, first_seed + people + total)), kind)
    traits = torch.where(lasting, traits, passing)
    yaw, pitch = angles(total, generator)
    return {
        "params": torch.cat([identity, nuisance], 1),
        "traits": traits,
        "angles": torch.stack([yaw, pitch], 1),
        "person": torch.arange(people).repeat(each),
    }


def draw(
    folder: Path, first_seed: int, people: int, each: int, supersample: int, kind: Species, alike: bool = False
) -> None:
    """Draw a plan into `folder`, from where it was left; progress is in the file `drawn`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = plan(first_seed, people, each, kind, alike=alike)
    total = len(facts["person"])
    arrays: dict[str, Any] = {name: value.numpy() for name, value in facts.items()}
    np.savez(folder / "facts.npz", **arrays)
    file, count = folder / "pictures.npy", folder / "drawn"
    fresh = not file.exists() or not count.exists()
    pictures = np.lib.format.open_memmap(file, "w+" if fresh else "r+", np.uint8, (total, SIZE, SIZE, 3))
    done = 0 if fresh else int(count.read_text())
    count.write_text(str(done))
    cam2world = orbit(*facts["angles"].unbind(1))
    for start in tqdm(range(done, total, 16), desc=f"drawing {folder.name}", mininterval=20):
        part = slice(start, min(start + 16, total))
        rows = facts["params"][part], facts["traits"][part]
        photo = world.render(*rows, cam2world[part], None, SIZE, supersample, kind)
        pictures[part] = ((photo.image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        temporary = count.with_suffix(".tmp")
        temporary.write_text(str(part.stop))
        temporary.replace(count)


def open_photos(folder: Path, kind: Species) -> Photos:
    facts = {name: torch.from_numpy(value) for name, value in np.load(folder / "facts.npz").items()}
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    return Photos(
        pictures,
        facts["params"],
        facts["traits"],
        cameras.label(orbit(*facts["angles"].unbind(1))),
        facts["angles"],
        facts["person"],
        folder,
        kind,
    )


def vary(images: Tensor, colour: float = 1.0) -> Tensor:
    """What happens to photos: colour gain and offset (scaled by `colour`), softness, grain; (N, 3, R, R) in [-1, 1]."""
    count = len(images)
    gain = 1 + colour * (0.12 * torch.randn(count, 1, 1, 1) + 0.05 * torch.randn(count, 3, 1, 1))
    offset = colour * (0.06 * torch.randn(count, 1, 1, 1) + 0.03 * torch.randn(count, 3, 1, 1))
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    softness = (torch.rand(count, 1, 1, 1) * 1.4 - 0.4).clamp_(0, 1)
    images = torch.lerp(images, small, softness)
    grain = torch.randn_like(images) * (0.06 * torch.rand(count, 1, 1, 1))
    return (images * gain + offset + grain).clamp_(-1, 1)


def steps_of(photos: Photos, batch: int, minutes: float, name: str, rng: torch.Generator) -> Any:
    """Batches of indices until the time is spent, with the share of the time that has passed."""
    began = time.monotonic()
    with tqdm(total=round(minutes * 60), unit="s", desc=name, mininterval=20) as bar:
        while (spent := time.monotonic() - began) < minutes * 60:
            bar.update(int(spent) - bar.n)
            yield spent / (minutes * 60), torch.randint(photos.ready(), (batch,), generator=rng).sort().values, bar


def train_perceptual(
    photos: Photos, held: Photos, minutes: float, seed: int, out: Path, start: PerceptualNet | None = None
) -> dict[str, Any]:
    """Regression of parameters and camera angles from 64² and 128² photos."""
    net = PerceptualNet(photos.params.shape[1]) if start is None else start.requires_grad_(True).train()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), 1.5e-3, weight_decay=1e-3)
    rng, step, sides = torch.Generator().manual_seed(seed), 0, (photos, photos.mirrored())
    for fraction, index, bar in steps_of(photos, 64, minutes, "perceptual", rng):
        shown = sides[step % 2]
        large = step % 8 < 2
        index = index[::2] if large else index
        images = photos.batch(index)
        images = images.flip(3) if shown is not photos else images
        images = vary(images if large else F.avg_pool2d(images, 2))
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * curve(fraction)
        with torch.autocast("cpu", torch.bfloat16):
            params, pose = net(images.contiguous(memory_format=torch.channels_last), shown.labels[index])
        loss = F.mse_loss(params.float(), shown.params[index])
        loss = loss + 4 * F.mse_loss(pose.float(), shown.angles[index])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
    save(net.eval(), out / f"{file_name('perceptual', photos.kind)}.safetensors")
    return {"steps": step, **measure_perceptual(net, held)}


@torch.no_grad()
def measure_perceptual(net: PerceptualNet, held: Photos) -> dict[str, Any]:
    """Explained variance of the parameters on unseen people, and the mean camera error."""
    net.eval()
    count = min(held.ready(), 1000)
    found = [net(F.avg_pool2d(held.batch(i), 2), held.labels[i]) for i in torch.arange(count).split(100)]
    params, pose = (torch.cat(column) for column in zip(*found, strict=True))
    truth = held.params[:count]
    explained = 1 - (params - truth).square().mean(0) / truth.var(0)
    names = held.kind.param_names
    return {
        "held_out_photos": count,
        "explained_variance": round(explained.mean().item(), 4),
        "explained_by_name": {n: round(v, 3) for n, v in zip(names, explained.tolist(), strict=True)},
        "camera_error_degrees": round((pose - held.angles[:count]).abs().mean().rad2deg().item(), 3),
    }


def pairs(photos: Photos, count: int, rng: torch.Generator) -> Tensor:
    """Indices (2 count,) of two different photos of each of `count` people: all first ones, then all second ones.

    Neighbours 2k and 2k + 1 come together, so that people who are alike (see `plan`) have to be told apart.
    """
    people = int(photos.person.max()) + 1
    each = photos.ready() // people
    couple = 2 * torch.randperm(people // 2, generator=rng)[: count // 2]
    person = torch.cat([couple, couple + 1])
    first = torch.randint(each, (len(person),), generator=rng)
    second = (first + 1 + torch.randint(each - 1, (len(person),), generator=rng)) % each
    return torch.cat([person + people * first, person + people * second])


def contrast(units: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of finding a photo's partner among all others in the batch, and how often it is found."""
    count = len(units) // 2
    logits = (units @ units.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count).roll(count)
    return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).float().mean()


def train_identity(
    photos: Photos, held: Photos, alike: Photos, minutes: float, seed: int, out: Path, start: IdentityEncoder | None
) -> dict[str, Any]:
    """Contrast between people, plus regression of what makes a person: identity parameters and lasting traits."""
    lasting = torch.tensor([name in photos.kind.lasting_traits for name in photos.kind.trait_names])
    facts = torch.cat([photos.params[:, : world.IDENTITY_DIM], photos.traits[:, lasting]], 1)
    net = IdentityEncoder(facts.shape[1]) if start is None else start.requires_grad_(True).train()
    if net.factors.out_features != facts.shape[1]:  # begun with another species, whose factors mean something else
        net.factors = nn.Linear(net.factors.in_features, facts.shape[1])
        net.config["factors"] = facts.shape[1]
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate = 2e-3 if start is None else 1e-3
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=2e-3)
    rng, step = torch.Generator().manual_seed(seed), 0
    for fraction, _, bar in steps_of(photos, 1, minutes, "identity", rng):
        index = pairs(photos, 64, rng)
        images = vary(F.avg_pool2d(photos.batch(index), 2), 0.5)
        for group in optimiser.param_groups:
            group["lr"] = rate * curve(fraction)
        with torch.autocast("cpu", torch.bfloat16):
            units, factors = net.describe(images.contiguous(memory_format=torch.channels_last))
        regression = F.mse_loss(factors.float(), facts[index])
        contrasted, hits = contrast(units.float(), 0.1)
        loss = contrasted + 3 * regression
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            bar.set_postfix(
                step=step, loss=f"{loss.item():.2f}", hits=f"{hits.item():.2f}", mse=f"{regression.item():.3f}"
            )
        if step % 500 == 0:
            tqdm.write(json.dumps({"step": step, **measure_identity(net, held, alike)}))
            net.train()
    save(net.eval(), out / f"{file_name('identity', photos.kind)}.safetensors")
    return {"steps": step, "people": int(photos.person.max()) + 1, **measure_identity(net, held, alike)}


@torch.no_grad()
def measure_identity(net: IdentityEncoder, held: Photos, alike: Photos) -> dict[str, Any]:
    """Verification on unseen people: area under the ROC curve over all pairs, and cosines of both kinds.

    `alike_auc`: the same where every other pair is of two people whose rare traits alone differ.
    """
    net.eval()
    cosines, person, upper = compare(net, held)
    same = (person[:, None] == person) & upper
    equal, other = cosines[same], cosines[upper & ~same]
    close, who, above = compare(net, alike)
    own = (who[:, None] == who) & above
    couple = (who[:, None] // 2 == who // 2) & above & ~own
    return {
        "held_out_people": int(person.max()) + 1,
        "held_out_photos": len(person),
        "pairs_same": len(equal),
        "pairs_different": len(other),
        "verification_auc": round(roc_area(equal, other), 5),
        "cosine_same_mean": round(equal.mean().item(), 4),
        "cosine_same_p05": round(equal.quantile(0.05).item(), 4),
        "cosine_different_mean": round(other.mean().item(), 4),
        "cosine_different_p95": round(other.quantile(0.95).item() if len(other) < 10**7 else float("nan"), 4),
        "alike_people": int(who.max()) + 1,
        "alike_auc": round(roc_area(close[own], close[couple]), 5),
        "cosine_alike_mean": round(close[couple].mean().item(), 4),
    }


def compare(net: IdentityEncoder, photos: Photos) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (n, n) of all photos, whom each shows (n,), and which entries count every pair once (n, n)."""
    count = photos.ready()
    units = torch.cat([net(photos.batch(i)) for i in torch.arange(count).split(100)])
    cosines = units @ units.T
    return cosines, photos.person[:count], torch.ones_like(cosines, dtype=torch.bool).triu(1)


def roc_area(equal: Tensor, other: Tensor) -> float:
    """How often a cosine of one person is above one of two people."""
    order = torch.cat([equal, other]).argsort().argsort().double()
    ranks = order[: len(equal)].sum() - len(equal) * (len(equal) - 1) / 2
    return (ranks / (len(equal) * len(other))).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["photos", "perceptual", "identity"])
    parser.add_argument("--folder", type=Path, default=Path(".lab/photos"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--people", type=int, default=7000)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--held-people", type=int, default=200, help="photos: unseen ones to measure on, of each kind")
    parser.add_argument("--held-each", type=int, default=8)
    parser.add_argument("--supersample", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="begin with the shipped weights of people")
    parser.add_argument("--species", choices=list(SPECIES), default="people")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    kind = species_of(options.species)
    if options.what == "photos":
        unseen = options.held_people, options.held_each, options.supersample, kind
        draw(options.folder / "held", VALIDATION_SEED, *unseen)
        draw(options.folder / "alike", VALIDATION_SEED + 20_000, *unseen, alike=True)
        draw(options.folder / "train", 0, options.people, options.each, options.supersample, kind, alike=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    photos, held = (open_photos(options.folder / part, kind) for part in ("train", "held"))
    begin: Any = networks.load(options.what) if options.resume else None
    if options.what == "identity":
        alike = open_photos(options.folder / "alike", kind)
        facts = train_identity(photos, held, alike, options.minutes, options.seed, options.out, begin)
    else:
        facts = train_perceptual(photos, held, options.minutes, options.seed, options.out, begin)
    command = (
        f"python -m convlora.integrations.eg3d.lab.train_networks {options.what} "
        f"--minutes {options.minutes:g} --seed {options.seed} --threads {options.threads}"
        + " --resume" * options.resume
        + (f" --species {kind.name} --folder FOLDER" if kind is not PEOPLE else "")
    )
    write_provenance(
        options.out / f"{file_name(options.what, kind)}.json",
        command=command,
        seed=options.seed,
        hours=round(options.minutes / 60, 3),
        photos=photos.ready(),
        **facts,
    )
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
