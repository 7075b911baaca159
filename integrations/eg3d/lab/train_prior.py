"""Trains the lab's small EG3D prior on procedural heads whose every pixel and depth is known.

    python -m convlora.integrations.eg3d.lab.train_prior --minutes 90 --out .lab/prior
    python -m convlora.integrations.eg3d.lab.train_prior --minutes 120 --out .lab/prior --resume
    python -m convlora.integrations.eg3d.lab.train_prior --species cats --start lab --minutes 50 --out .lab/cats

No adversary is needed to start with: the head that belongs to a latent z is z itself (see `lab.z_from_params`),
so the generator is fitted to the truth by regression. The first part of the time goes to single rays, half
of them aimed at eyes, brows, nose and mouth, with samples around the known surface; a loss on where the ray stops
makes clean surfaces early. The second part adds patches through the generator's own sampling path and its
super-resolution, against supersampled drawings, with the lab's perceptual distance.
The backbone computes in bfloat16 while it trains; rays, decoder and weights stay in float32.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import cameras, checkpoint, renderer
from ..configs import CONFIGS
from ..generator import TriPlaneGenerator
from . import networks, world
from ._species import SPECIES
from ._species import species as species_of
from ._training import angles, curve, orbit, write_checkpoint, write_provenance, write_sheet
from .networks import PerceptualNet

UNSEEN_SEED = 800_500
PATCH = 32
WEIGHTS = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Plan:
    """How long, how much, how fast. `rays_share` is the share of the time given to single rays alone."""

    minutes: float
    rays_share: float = 0.6
    heads: int = 6
    rays: int = 320
    patch_heads: int = 4
    patch_rays: int = 160
    rate: float = 1.5e-2
    mapping_rate: float = 20.0
    affine_rate: float = 3.0
    density_rate: float = 3.0
    seed: int = 0
    species: str = "people"


@dataclass
class Heads:
    """A batch of random heads of one species: latents, parameters, cameras and their labels."""

    z: Tensor
    params: Tensor
    cameras: Tensor
    labels: Tensor
    species: str

    @property
    def origins(self) -> Tensor:
        return self.cameras[:, :3, 3].contiguous()

    def first(self, count: int) -> Heads:
        return Heads(self.z[:count], self.params[:count], self.cameras[:count], self.labels[:count], self.species)


def random_heads(count: int, z_dim: int, generator: torch.Generator, species: str = "people") -> Heads:
    """Latents and the heads they stand for: params are the first entries of z scaled to unit mean square."""
    z = torch.randn(count, z_dim, generator=generator)
    cam2world = orbit(*angles(count, generator))
    params = (z * z.square().mean(1, keepdim=True).rsqrt())[:, : world.PARAM_DIM]
    return Heads(z, params.contiguous(), cam2world, cameras.label(cam2world), species)


def aimed_rays(heads: Heads, count: int, generator: torch.Generator) -> Tensor:
    """Unit directions (N, count, 3): half spread over the picture, half through the features of the face."""
    spread = count // 2
    uv = torch.rand(len(heads.z), spread, 2, generator=generator)
    _, even = world.rays_through(heads.cameras, None, uv)
    points = world.anchors3d(heads.params, None, heads.species)
    eyes, outwards = points[:, :2], torch.tensor([[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    near = [eyes + outwards * torch.tensor(aim) for aim in species_of(heads.species).aims]
    spots = torch.cat([points, points[:, 3:].mean(1, keepdim=True), eyes, *near], 1)
    pick = torch.randint(spots.shape[1], (len(spots), count - spread, 1), generator=generator)
    jitter = torch.randn(len(spots), count - spread, 3, generator=generator) * torch.tensor([0.028, 0.02, 0.01])
    aim = spots.gather(1, pick.expand(-1, -1, 3)) + jitter
    return torch.cat([even, F.normalize(aim - heads.origins[:, None], dim=-1)], 1)


def known_depths(depth: Tensor, near: float, far: float, count: int = 12) -> Tensor:
    """Sorted sample depths (N, M, 2 count): `count` stratified over the ray, as many around the true surface."""
    step = (far - near) / count
    even = near + step * (torch.arange(count, device=depth.device) + torch.rand(*depth.shape, count))
    width = torch.tensor([0.012, 0.045]).repeat(count // 2)
    close = depth[..., None] + torch.randn(*depth.shape, count) * width
    return torch.cat([even, close], -1).sort(-1).values


class Trainer:
    """The generator, its running average and one step of each kind of training."""

    def __init__(self, plan: Plan, device: str = "cpu"):
        self.plan, self.device = plan, device
        torch.manual_seed(plan.seed)
        self.rng = torch.Generator().manual_seed(plan.seed)
        self.model = TriPlaneGenerator(**CONFIGS["lab"]).to(device).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.options: dict[str, Any] = self.model.rendering_kwargs
        prepare(self.model)
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = make_optimiser(self.model, plan)
        self.step, self.spent = 0, 0.0
        self.perceptual: PerceptualNet | None = None

    # -- parts ------------------------------------------------------------------------------------------------

    def planes(self, heads: Heads) -> tuple[Tensor, Tensor]:
        ws = self.model.mapping(heads.z.to(self.device), heads.labels.to(self.device))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            return ws, self.model.planes(ws, noise_mode="none").float()

    def field(self, planes: Tensor, origins: Tensor, directions: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, M, S, 3) and raw densities (N, M, S) at samples of rays; depths (N, M, S)."""
        count, rays, samples = depths.shape
        points = origins[:, None, None] + directions[:, :, None] * depths[..., None]
        colours, sigma = renderer.query(
            renderer.fold_planes(planes), self.model.decoder, points.flatten(1, 2), None, self.options
        )
        return colours[..., :3].view(count, rays, samples, 3), sigma.view(count, rays, samples)

    def ray_loss(self, heads: Heads, planes: Tensor, count: int, geometry: float) -> dict[str, Tensor]:
        directions = aimed_rays(heads, count, self.rng)
        truth = world.trace(heads.params, None, heads.origins, directions, heads.species)
        near, far = self.options["ray_start"], self.options["ray_end"]
        depths = known_depths(truth.depth, near, far)
        colours, sigma = self.field(planes, heads.origins, directions, depths)
        colour, _, weights = renderer.march_rays(colours, sigma, depths)
        middle = 0.5 * (depths[..., 1:] + depths[..., :-1])
        stray = (weights * (middle - truth.depth[..., None]).abs()).sum(-1).mean()
        leak = (1 - weights.sum(-1)).mean()
        error = colour - (truth.rgb * 2 - 1)
        return {
            "mse": error.square().mean(),
            "l1": error.abs().mean(),
            "stray": stray,
            "leak": leak,
            "total": error.square().mean() + 0.25 * error.abs().mean() + geometry * (stray + 0.25 * leak),
        }

    def patch_loss(self, heads: Heads, planes: Tensor, ws: Tensor) -> dict[str, Tensor]:
        """Patches of the raw and the final image through the official sampling path, against supersampled truth."""
        size = self.model.neural_rendering_resolution
        corner = patch_corners(heads, size, self.rng)
        fine = truth_patches(heads, corner, size)
        coarse = F.avg_pool2d(fine, 2)
        _, directions = world.rays_through(heads.cameras, None, grid(corner, PATCH, size))
        origins = heads.origins[:, None].expand_as(directions)
        drawn = self.model.renderer(planes, self.model.decoder, origins, directions, self.options)
        features = drawn.features.transpose(1, 2).unflatten(2, (PATCH, PATCH))
        raw = features[:, :3]
        image = superresolve(self.model, features, ws)
        keep = slice(8, -8)  # what the patch's cut edges reach is left out
        sharp, wanted = image[..., keep, keep], fine[..., keep, keep]
        error, low = sharp - wanted, raw - coarse
        loss = error.square().mean() + 0.3 * error.abs().mean() + 0.5 * low.square().mean() + 0.15 * low.abs().mean()
        out = {"mse": error.square().mean(), "raw_mse": low.square().mean(), "leak": (1 - drawn.weight_sum).mean()}
        if self.perceptual is not None:
            out["perceptual"] = self.perceptual.distance(sharp, wanted).mean()
            loss = loss + 0.3 * out["perceptual"]
        return {"total": loss + 0.02 * out["leak"], **out}

    # -- one step -----------------------------------------------------------------------------------------------

    def train_step(self, fraction: float) -> dict[str, Tensor]:
        plan = self.plan
        alone = fraction < plan.rays_share
        heads = random_heads(plan.heads, self.model.z_dim, self.rng, plan.species)
        ws, planes = self.planes(heads)
        geometry = 2.0 * max(0.1, 1 - fraction / max(plan.rays_share, 1e-6))
        out = self.ray_loss(heads, planes, plan.rays if alone else plan.patch_rays, geometry)
        loss = out["total"]
        if not alone:
            few = plan.patch_heads
            patch = self.patch_loss(heads.first(few), planes[:few], ws[:few])
            loss = 0.5 * loss + patch.pop("total")
            out.update({f"patch_{name}": value for name, value in patch.items()})
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        freeze_unused(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = plan.rate * group["scale"] * curve(fraction)
        before = density_row(self.model).detach().clone()
        self.optimiser.step()
        with torch.no_grad():  # densities span a hundredfold of what colours do: their row moves faster
            row = density_row(self.model)
            row.add_(row - before, alpha=plan.density_rate - 1)
        self.step += 1
        follow(self.average, self.model, min(0.999, (1 + self.step) / (10 + self.step)))
        return out

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        write_checkpoint(
            path,
            {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "rng": self.rng.get_state(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "spent": self.spent,
            },
        )

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["average"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.rng.set_state(content["rng"])
        self.step, self.spent = content["step"], content["spent"]

    def begin_with(self, path: Path) -> None:
        """Take the weights of a generator file for the model and its average; the optimiser starts afresh."""
        state = checkpoint.load_generator(path, self.device).state_dict()
        self.model.load_state_dict(state)
        self.average.load_state_dict(state)

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the average, as float16 for any species but people, and how it was made beside it."""
        centre(self.average)
        name = networks.file_name("prior", self.plan.species)
        dtype = None if self.plan.species == "people" else torch.float16
        checkpoint.save_generator(self.average, folder / f"{name}.safetensors", dtype=dtype)
        write_provenance(folder / f"{name}.json", steps=self.step, hours=round(self.spent / 3600, 3), **facts)


def density_row(model: TriPlaneGenerator) -> Tensor:
    """The decoder's weights (hidden,) that make the density."""
    last: Any = model.decoder.net[2]
    return last.weight[0]


def prepare(model: TriPlaneGenerator) -> None:
    """What differs from a usual random start.

    No noise, a mapping that is blind to the unused latents and hands the parameters on, a steeper density, and a
    super-resolution that begins as plain up-sampling of the rendered image.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("noise_strength"):
            parameter.requires_grad_(False)
    with torch.no_grad():
        first: Any = model.backbone.mapping.fc0
        first.weight[:, world.PARAM_DIM : model.z_dim] = 0
        hand_on(model)
        density_row(model).mul_(4)
        for block in (model.superresolution.block0, model.superresolution.block1):
            block.torgb.weight.zero_()


def hand_on(model: TriPlaneGenerator) -> None:
    """Let the last 2 · PARAM_DIM numbers of w be lrelu(p) and lrelu(-p) of each world parameter p.

    A random mapping mixes all parameters in every number of w; those with a small part in the picture (the hue of
    the shirt, freckles) are then noise to be damped, and were, for good.
    """
    count = world.PARAM_DIM
    first: Any = model.backbone.mapping.fc0
    last: Any = model.backbone.mapping.fc1
    shift = 4.0  # keeps the hidden numbers on the straight side of their lrelu, whose gain is √2
    eye = torch.eye(count)
    hidden, plus, minus = slice(-count, None), slice(-2 * count, -count), slice(-count, None)
    first.weight[hidden] = 0
    first.weight[hidden, :count] = eye / first.weight_gain
    first.bias[hidden] = shift / first.bias_gain
    last.weight[-2 * count :] = 0
    last.weight[plus, hidden] = eye / (math.sqrt(2) * last.weight_gain)
    last.weight[minus, hidden] = -eye / (math.sqrt(2) * last.weight_gain)
    last.bias[plus] = -shift / last.bias_gain
    last.bias[minus] = shift / last.bias_gain


def freeze_unused(model: TriPlaneGenerator) -> None:
    grad = model.backbone.mapping.fc0.weight.grad
    if grad is not None:
        grad[:, world.PARAM_DIM : model.z_dim] = 0


def make_optimiser(model: TriPlaneGenerator, plan: Plan) -> torch.optim.Optimizer:
    mapping = [p for n, p in model.named_parameters() if ".mapping." in n and p.requires_grad]
    affine = [p for n, p in model.named_parameters() if ".affine." in n and p.requires_grad]
    known = {id(p) for p in mapping + affine}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": mapping, "scale": plan.mapping_rate},
        {"params": affine, "scale": plan.affine_rate},
        {"params": rest, "scale": 1.0},
    ]
    return torch.optim.Adam(groups, lr=plan.rate, betas=(0.9, 0.99), eps=1e-8)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the running average towards the model."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


@torch.no_grad()
def centre(model: TriPlaneGenerator, count: int = 10_000) -> None:
    """Set w_avg to the mean of w over random latents."""
    z = torch.randn(count, model.z_dim, generator=torch.Generator().manual_seed(0))
    device = model.backbone.mapping.w_avg.device
    w = model.mapping(z.to(device), torch.zeros(count, 25, device=device))[:, 0]
    model.backbone.mapping.w_avg.copy_(w.mean(0))


def grid(corner: Tensor, size: int, full: int) -> Tensor:
    """Image points (N, size², 2) in [0, 1]: pixel centres of patches at `corner` (N, 2: x, y) of a full² image."""
    line = torch.arange(size) + 0.5
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    offset = torch.stack([columns, rows], -1).view(1, -1, 2)
    return (corner[:, None].float() + offset) / full


def patch_corners(heads: Heads, size: int, generator: torch.Generator) -> Tensor:
    """Where patches start (N, 2): on or beside a feature of the face mostly, anywhere otherwise."""
    count = len(heads.z)
    marks = world.landmarks(heads.params, None, heads.cameras, None, heads.species)
    pick = torch.randint(marks.shape[1], (count, 1, 1), generator=generator).expand(-1, -1, 2)
    near = marks.gather(1, pick)[:, 0] * size - PATCH / 2
    near = near + torch.randn(count, 2, generator=generator) * 5
    anywhere = torch.rand(count, 2, generator=generator) * (size - PATCH)
    face = torch.rand(count, 1, generator=generator) < 0.6
    return torch.where(face, near, anywhere).round().clamp(0, size - PATCH).long()


def truth_patches(heads: Heads, corner: Tensor, size: int) -> Tensor:
    """Drawn patches (N, 3, 2 PATCH, 2 PATCH) in [-1, 1] of the final image, 2 × 2 rays to a pixel."""
    side = PATCH * 4
    _, directions = world.rays_through(heads.cameras, None, grid(corner * 4, side, size * 4))
    colour = world.trace(heads.params, None, heads.origins, directions, heads.species).rgb
    return F.avg_pool2d(colour.transpose(1, 2).reshape(len(corner), 3, side, side), 2) * 2 - 1


def superresolve(model: TriPlaneGenerator, features: Tensor, ws: Tensor) -> Tensor:
    """The super-resolution's two blocks on a patch, without its resizing to the full input size."""
    last = ws[:, -1:].expand(-1, 3, -1)
    x, image = model.superresolution.block0(features, features[:, :3].clone(), last, noise_mode="none")
    return model.superresolution.block1(x, image, last, noise_mode="none")[1]


@torch.no_grad()
def judge(model: TriPlaneGenerator, path: Path | None, count: int = 8, species: str = "people") -> dict[str, float]:
    """Unseen heads over yaw -0.35 … 0.35 through the whole generator: PSNR against the truth, and a contact sheet."""
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    z = torch.randn(count, model.z_dim, generator=generator)
    params = (z * z.square().mean(1, keepdim=True).rsqrt())[:, : world.PARAM_DIM].contiguous()
    cam2world = orbit(torch.linspace(-0.35, 0.35, count), torch.linspace(0.15, -0.15, count))
    label = cameras.label(cam2world)
    truth = world.render(params, None, cam2world, None, model.img_resolution, 2, species)
    out = model.synthesis(model.mapping(z, label), label, noise_mode="const", deterministic=True)
    if path is not None:
        write_sheet(path, [truth.image, out["image"], out["image_raw"]], 2)
    error = (out["image"].clamp(-1, 1) - truth.image).square().mean(1, keepdim=True) / 4
    low = (out["image_raw"].clamp(-1, 1) - F.avg_pool2d(truth.image, 2)).square().mean() / 4
    head = (error * truth.mask).sum((1, 2, 3)) / truth.mask.sum((1, 2, 3))
    return {"psnr_image": decibel(error.mean((1, 2, 3))), "psnr_head": decibel(head), "psnr_raw": decibel(low[None])}


def decibel(mse: Tensor) -> float:
    return round((-10 * mse.log10()).mean().item(), 2)


def load_perceptual() -> PerceptualNet | None:
    """The lab's perceptual net if it has been trained already."""
    if not (WEIGHTS / "perceptual.safetensors").exists():
        return None
    net = networks.load("perceptual")
    assert isinstance(net, PerceptualNet)
    return net


def fit(trainer: Trainer, out: Path, command: str, export: Path) -> None:
    """Train until the plan's minutes are spent; a checkpoint, a sheet and an export every ten minutes.

    Ctrl-C or a plain kill saves a checkpoint first, for --resume.
    """
    out.mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, _frame: stopped.append(number))
    budget = trainer.plan.minutes * 60
    saved = began = time.monotonic() - trainer.spent
    saved += trainer.spent
    shown: dict[str, float] = {}
    with tqdm(total=round(budget), initial=round(trainer.spent), unit="s", mininterval=30) as bar:
        while trainer.spent < budget and not stopped:
            fraction = trainer.spent / budget
            if fraction >= trainer.plan.rays_share and trainer.perceptual is None:
                trainer.perceptual = load_perceptual()
            losses = trainer.train_step(fraction)
            trainer.spent = time.monotonic() - began
            bar.update(round(trainer.spent) - bar.n)
            if trainer.step % 100 == 0:
                shown = {name: value.item() for name, value in losses.items()}
                log(out / "log.csv", trainer, shown)
                bar.set_postfix(
                    step=trainer.step, psnr=f"{-10 * math.log10(shown['mse'] / 4):.1f}", stray=f"{shown['stray']:.3f}"
                )
            if time.monotonic() - saved > 600 or trainer.spent >= budget:
                trainer.save(out / "last.pt")
                facts = judge(trainer.average, out / f"sheet_{trainer.step:06d}.png", species=trainer.plan.species)
                log(out / "judged.csv", trainer, facts)
                trainer.export(export, {"command": command, "seed": trainer.plan.seed, **facts})
                saved = time.monotonic()
    if stopped:
        trainer.save(out / "last.pt")


def log(path: Path, trainer: Trainer, values: dict[str, float]) -> None:
    with path.open("a") as file:
        shown = " ".join(f"{name}={value:.5f}" for name, value in values.items())
        file.write(f"{trainer.step} {trainer.spent:.0f}s {shown}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, default=Path(".lab/prior"))
    parser.add_argument("--export", type=Path, default=WEIGHTS, help="folder of prior.safetensors and prior.json")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    parser.add_argument("--start", type=Path, help="begin with a generator's weights, such as the shipped prior's")
    parser.add_argument("--species", choices=list(SPECIES), default="people")
    parser.add_argument("--rays-share", type=float, default=Plan.rays_share)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = Plan(
        options.minutes,
        rays_share=options.rays_share,
        rate=options.rate,
        seed=options.seed,
        species=options.species,
    )
    trainer = Trainer(plan, options.device)
    if options.start is not None:
        trainer.begin_with(options.start)
    if options.resume and (options.out / "last.pt").exists():
        trainer.load(options.out / "last.pt")
    command = (
        f"python -m convlora.integrations.eg3d.lab.train_prior --minutes {options.minutes:g} "
        f"--rays-share {options.rays_share:g} --rate {options.rate:g} --seed {options.seed}"
        + (f" --species {options.species}" if options.species != "people" else "")
        + (f" --start {options.start}" if options.start is not None else "")
    )
    fit(trainer, options.out, command, options.export)


if __name__ == "__main__":
    main()
