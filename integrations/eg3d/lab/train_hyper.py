"""Trains the lab's hypernetwork, on drawings of procedural people with rare traits.

    python -m convlora.integrations.eg3d.lab.train_hyper --folder .lab/hyper --people 2048 --steps 4000

Everything goes into the folder and a call with the same options goes on where the last one stopped. First people are
drawn, sixteen to a file: a photo of each, and the same moment from another camera. The latent of a photo is known where
the head is of the prior's own family, but a user's comes from inversion and has taken up some of what the prior cannot
draw; so a share of the people get inverted latents. Then codes are fitted to some of them (phase 0), the network is
trained (phase 1), and judged on people that no training met. It is written into the package if its predictions alone
raise ID_sim over the pretrained generator's: if the whole interval of the mean gain over people lies above 0.

Seeds: training people from 300_000, validation people from 810_000; results are measured on people from 900_000.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convlora import files
from convlora.cpu import prepare_cpu
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.hyper.examples import Examples, make_examples, render, shown
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.hyper.supervise import supervise
from convlora.integrations.eg3d.hyper.train import Plan, train
from convlora.integrations.eg3d.images import save_sheet
from convlora.integrations.eg3d.lab import people, world
from convlora.integrations.eg3d.lab._species import PEOPLE
from convlora.integrations.eg3d.lab._training import write_provenance
from convlora.integrations.eg3d.lab.encoder import w_encoder
from convlora.integrations.eg3d.lab.hyper import ENCODER, encoder, load_hypernetwork, shipped
from convlora.integrations.eg3d.metrics.bootstrap import paired_difference
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.pipeline import Networks
from convlora.integrations.eg3d.run_folder import RunFolder

TRAINING_SEED, VALIDATION_SEED = 300_000, 810_000
CHUNK = 16
PLAIN = 0.15  # of the people have no rare traits
_MOST = 0.95  # of a latent's sum of squares may be parameters; see world.z_from_params


class Moments(NamedTuple):
    """What is drawn of N people, one moment each: params and traits, the photo's camera and another one."""

    params: Tensor
    traits: Tensor
    labels: Tensor
    turned_labels: Tensor


def moments(seeds: list[int]) -> Moments:
    """Each person's by the seed alone; cameras as those of `people.photos` and of the metrics' novel views."""
    lasting = torch.tensor([float(name in PEOPLE.lasting_traits) for name in PEOPLE.trait_names])
    labels, turned, marked = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        yaw, pitch = torch.randn(2, generator=generator) * torch.tensor([people.YAW, people.PITCH])
        yaw, pitch = (
            yaw.clamp(-people.YAW_LIMIT, people.YAW_LIMIT),
            pitch.clamp(-people.PITCH_LIMIT, people.PITCH_LIMIT),
        )
        labels.append(cameras.label(cameras.look_at(math.pi / 2 + yaw[None], cameras.vertical_angle(pitch[None]))))
        turned.append(cameras.random_views(1, seed=seed))
        marked.append(float(torch.rand((), generator=generator) >= PLAIN))
    params = torch.cat([world.sample_identity(seeds), world.sample_nuisance(seeds)], 1)
    traits = world.sample_traits(seeds) * lasting * torch.tensor(marked)[:, None]
    return Moments(params, traits, torch.cat(labels), torch.cat(turned))


def drawn(at: Moments, labels: Tensor, side: int) -> Tensor:
    """Pictures (N, 3, side, side) of the moments from cameras labels (N, 25)."""
    return world.render(at.params, at.traits, cameras.split_label(labels)[0], None, side).image


def known_latents(G: TriPlaneGenerator, at: Moments) -> Tensor:
    """w (N, w_dim) of heads of the prior's family, without their traits."""
    size = at.params.square().sum(1, keepdim=True)
    params = at.params * (_MOST * G.z_dim / size).clamp(max=1).sqrt()
    with torch.no_grad():
        return G.mapping(world.z_from_params(params, z_dim=G.z_dim), at.labels)[:, 0]


def make_chunk(G: TriPlaneGenerator, seeds: list[int], inverted: int, steps: int, networks: Networks) -> Examples:
    """Examples of these people; the first `inverted` of them with latents from inversion, on renderings of half the
    side: that is half the time, and near enough."""
    at = moments(seeds)
    images, turned = drawn(at, at.labels, G.img_resolution), drawn(at, at.turned_labels, G.img_resolution)
    photos = Photos(images, at.labels, [str(seed) for seed in seeds])
    w = known_latents(G, at)
    if inverted:
        side = G.neural_rendering_resolution
        G.neural_rendering_resolution = side // 2
        try:
            found = find_anchors(
                G, photos.first(inverted), steps, init=w_encoder(G), perceptual=networks.perceptual, lr=0.07,
                batch_size=4, progress=False,
            )  # fmt: skip
        finally:
            G.neural_rendering_resolution = side
        w[:inverted] = found.w
    return make_examples(G, photos, w, turned=turned, turned_labels=at.turned_labels)


_TENSORS = ("images", "labels", "w", "drawn", "turned", "turned_labels")


def write_chunk(path: Path, chunk: Examples) -> None:
    files.write(path, {name: getattr(chunk, name) for name in _TENSORS}, {"names": json.dumps(chunk.names)})


def read_chunk(path: Path) -> Examples:
    tensors, metadata = files.read(path)
    names = json.loads(metadata["names"])
    return Examples(person=torch.arange(len(names)), names=names, **tensors)


def draw_people(
    G: TriPlaneGenerator, folder: RunFolder, count: int, share: float, steps: int, networks: Networks
) -> Examples:
    """All training people, from the files that are there and new ones."""
    found: Examples | None = None
    for first in tqdm(range(0, count, CHUNK), desc="drawing and inverting people", mininterval=20):
        path = folder / f"people_{first:05d}.safetensors"
        if not path.is_file():
            seeds = list(range(TRAINING_SEED + first, TRAINING_SEED + first + CHUNK))
            with folder.timed("people"):
                write_chunk(path, make_chunk(G, seeds, round(share * CHUNK), steps, networks))
        chunk = read_chunk(path)
        found = chunk if found is None else found.joined(chunk)
    assert found is not None
    return found


def taught_first(examples: Examples, count: int) -> Examples:
    """The same examples, those that get adapters first: as many of every chunk, so that both kinds of latents are
    among them."""
    place = torch.arange(len(examples)) % CHUNK
    order = torch.argsort(place, stable=True)
    return examples.rows(torch.cat([order[:count].sort().values, order[count:].sort().values]))


class Judge:
    """People that no training met, inverted as a user's photo would be, and the truth from other cameras."""

    def __init__(self, G: TriPlaneGenerator, path: Path, networks: Networks, count: int = 8, views: int = 4) -> None:
        self.G, self.networks, self.views = G, networks, views
        seeds = list(range(VALIDATION_SEED, VALIDATION_SEED + count))
        self.at = moments(seeds)
        self.labels = cameras.random_views(views, seed=VALIDATION_SEED)
        if not path.is_file():
            photos = Photos(drawn(self.at, self.at.labels, G.img_resolution), self.at.labels, [str(s) for s in seeds])
            w = find_anchors(
                G, photos, 25, init=w_encoder(G), perceptual=networks.perceptual, lr=0.05, batch_size=4, progress=False
            ).w
            turned = drawn(self.at, self.at.turned_labels, G.img_resolution)
            write_chunk(path, make_examples(G, photos, w, turned=turned, turned_labels=self.at.turned_labels))
        self.examples = read_chunk(path)
        poses = cameras.split_label(self.labels)[0].repeat(count, 1, 1)
        rows = (self.at.params.repeat_interleave(views, 0), self.at.traits.repeat_interleave(views, 0))
        self.truth = world.render(*rows, poses, None, G.img_resolution).image

    @torch.no_grad()
    def measure(self, hyper: HyperNetwork | None, refinements: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Per person: "ID_sim" (mean cosine of novel views with the photo), "identity" (the same with the truth from
        there), "perceptual" (distance to that truth), "own" (of the photo); and the views (N · V, 3, R, R)."""
        assert self.networks.identity is not None and self.networks.perceptual is not None
        photo, w, count = shown(self.examples.images), self.examples.w, len(self.examples)
        adapter, codes = None, None
        if hyper is not None:
            adapter = hyper.inject(self.G, "judged")
            codes = hyper(*self.examples.inputs(), refinements)
        try:
            rows = torch.arange(count).repeat_interleave(self.views)
            labels = self.labels.repeat(count, 1)
            seen: list[Tensor] = []
            own: list[Tensor] = []
            for part in rows.split(4):
                at = slice(len(seen) * 4, len(seen) * 4 + len(part))
                some = None if codes is None else codes.rows(part)
                seen.append(render(adapter, self.G, w[part], labels[at], some, deterministic=True)["image"])
            for part in torch.arange(count).split(4):
                some = None if codes is None else codes.rows(part)
                own.append(
                    render(adapter, self.G, w[part], self.examples.labels[part], some, deterministic=True)["image"]
                )
        finally:
            if adapter is not None:
                adapter.remove()
        views = torch.cat(seen)
        who, them = self.networks.identity(views), self.networks.identity(photo)[rows]
        per = lambda x: x.view(count, -1).mean(1)  # noqa: E731
        found = {
            "ID_sim": per((who * them).sum(1)),
            "identity": per((who * self.networks.identity(self.truth)).sum(1)),
            "perceptual": per(self.networks.perceptual(views, self.truth).flatten()),
            "own": self.networks.perceptual(torch.cat(own), photo).flatten(),
        }
        return found, views


def told(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(value.mean()), 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".lab/hyper"))
    parser.add_argument("--people", type=int, default=2048, help=f"training people, a multiple of {CHUNK}")
    parser.add_argument("--inverted", type=float, default=0.375, help="share of them whose latents are inverted")
    parser.add_argument("--inversion-steps", type=int, default=12)
    parser.add_argument("--taught", type=int, default=128, help="people with adapters that teach; 0: none")
    parser.add_argument("--taught-steps", type=int, default=30)
    parser.add_argument("--taught-lr", type=float, default=2e-2)
    parser.add_argument("--distilled", type=int, default=0, help="steps that learn from those adapters alone")
    parser.add_argument("--distilled-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=4000, help="steps that learn from pictures")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--identity-weight", type=float, default=0.3)
    parser.add_argument("--code-weight", type=float, default=0.1)
    parser.add_argument("--start", type=Path, help="begin with the weights of a file, such as the shipped one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, default=shipped(), help="where the weights go if they help")
    options = parser.parse_args()
    prepare_cpu()
    G = load_generator("lab").requires_grad_(False)
    networks = lab_networks()
    settings = {name: getattr(options, name) for name in ("inverted", "inversion_steps")}
    with RunFolder(options.folder, settings) as folder:
        facts = fit(G, networks, folder, options)
    print(json.dumps(facts, indent=1))


def fit(G: TriPlaneGenerator, networks: Networks, folder: RunFolder, options: argparse.Namespace) -> dict[str, Any]:
    """All stages; what was found is returned and, with the weights, written if they help."""
    examples = draw_people(G, folder, options.people, options.inverted, options.inversion_steps, networks)
    judge = Judge(G, folder / "judge.safetensors", networks)
    torch.manual_seed(options.seed)
    hyper = HyperNetwork.for_generator(G, encoder=encoder(), encoder_name=ENCODER, depth=2)
    if options.start is not None:
        hyper.load_state_dict(load_hypernetwork(options.start).state_dict())
    adapter = hyper.inject(G)
    supervision = None
    if options.taught:
        examples = taught_first(examples, options.taught)
        with folder.timed("phase 0"):
            supervision = supervise(
                adapter, examples.rows(torch.arange(options.taught)), options.taught_steps, lr=options.taught_lr,
                batch_size=4, perceptual=networks.perceptual, identity=networks.identity,
                identity_weight=options.identity_weight, seed=options.seed, checkpoint=folder / "codes.safetensors",
            )  # fmt: skip
    before, base_views = judge.measure(None)
    print("pretrained", told(before), flush=True)
    log = folder / "judged.jsonl"

    def look(net: HyperNetwork, step: int) -> None:
        adapter.disable()
        found, _ = judge.measure(net)
        adapter.enable()
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "cpu_seconds": round(time.process_time()), **told(found)}) + "\n")

    plan = Plan(
        options.steps, options.batch_size, options.lr, distilled=options.distilled, distilled_lr=options.distilled_lr,
        identity_weight=options.identity_weight, code_weight=options.code_weight, average=0.99, seed=options.seed,
    )  # fmt: skip
    with folder.timed("phase 1"):
        train(
            hyper, adapter, examples, supervision, plan=plan, perceptual=networks.perceptual,
            identity=networks.identity, checkpoint=folder / "train.ckpt", look=look, look_every=150,
        )  # fmt: skip
    adapter.remove()
    after, views = judge.measure(hyper)
    once, _ = judge.measure(hyper, 1)
    hyper.save(folder / "hyper.safetensors", generator="lab", procedural="true")
    V = judge.views
    rows = [("truth", judge.truth[::V]), ("pretrained", base_views[::V]), ("hypernetwork", views[::V])]
    save_sheet(folder / "sheet.png", [("photo", shown(judge.examples.images)), *rows])
    one, other = ([[float(x)] for x in found["ID_sim"]] for found in (after, before))
    gain = paired_difference(one, other)  # over people
    facts: dict[str, Any] = {
        "judged_on": f"{len(judge.examples)} unseen people, {V} novel views each, latents from 25 steps of inversion",
        "pretrained": told(before), "hypernetwork_only": told(after), "one_refinement": told(once),
        "ID_sim_gain": {"mean": round(gain.mean, 4), "low": round(gain.low, 4), "high": round(gain.high, 4)},
        "ID_sim_gain_by_person": [round(float(x), 4) for x in after["ID_sim"] - before["ID_sim"]],
        "phase_0_loss_before_and_after": supervision and [round(x, 4) for x in supervision.loss.mean(0).tolist()],
        "wall_seconds": {name: round(x) for name, x in folder.seconds().items()},
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if gain.low > 0:
        hyper.save(options.export, generator="lab", procedural="true")
        command = shlex.join(["python", "-m", f"{__package__}.train_hyper", *sys.argv[1:]])
        write_provenance(
            options.export.with_suffix(".json"), command=command, seed=options.seed, steps=options.steps, **facts
        )
    return facts


if __name__ == "__main__":
    main()
