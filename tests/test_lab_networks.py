"""The lab's perceptual net and identity encoder: their contracts, their files, and what they learnt."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.cameras import label
from convlora.integrations.eg3d.lab import networks, world
from convlora.integrations.eg3d.lab._training import curve, orbit

DATA = Path(str(files("convlora.integrations.eg3d.lab") / "data"))


@pytest.fixture(scope="module")
def people() -> dict[str, torch.Tensor]:
    """Twelve unseen people, four photos each: other expression, light and pose every time."""
    torch.set_num_threads(2)
    count, each = 12, 4
    identity = world.sample_identity(list(range(810_000, 810_000 + count))).repeat(each, 1)
    nuisance = world.sample_nuisance(list(range(820_000, 820_000 + count * each)))
    generator = torch.Generator().manual_seed(3)
    yaw = (torch.rand(count * each, generator=generator) - 0.5) * 0.7
    pitch = (torch.rand(count * each, generator=generator) - 0.5) * 0.3
    cameras = orbit(yaw, pitch)
    params = torch.cat([identity, nuisance], 1)
    images = world.render(params, None, cameras, None, 64, 2).image
    return {"images": images, "params": params, "labels": label(cameras), "person": torch.arange(count).repeat(each)}


def test_identity_separates_unseen_people(people: dict[str, torch.Tensor]) -> None:
    net = networks.load("identity")
    with torch.no_grad():
        units = net(people["images"])
    assert units.shape == (48, 128)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(48), atol=1e-5, rtol=0)
    cosines, person = units @ units.T, people["person"]
    upper = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same = cosines[(person[:, None] == person) & upper]
    other = cosines[(person[:, None] != person) & upper]
    auc = (same[:, None] > other).float().mean()
    assert auc > 0.95  # 0.98 and more over 1600 photos (data/identity.json); 48 photos leave some spread


def test_identity_takes_other_sizes(people: dict[str, torch.Tensor]) -> None:
    net = networks.load("identity")
    images = people["images"][:2]
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(doubled), net(images), atol=1e-5, rtol=0)


def test_distance_is_zero_for_equal_images_and_grows_with_blur(people: dict[str, torch.Tensor]) -> None:
    images = people["images"][:6]
    soft = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    softer = torch.nn.functional.avg_pool2d(soft, 5, 1, 2)
    assert torch.equal(networks.perceptual_distance(images, images), torch.zeros(6))
    near, far = networks.perceptual_distance(images, soft), networks.perceptual_distance(images, softer)
    assert near.shape == (6,)
    assert (far > near).all() and (near > 0).all()
    with pytest.raises(ConvloraError, match="one shape"):
        networks.perceptual_distance(images, images[:, :, :32])


def test_distance_has_gradients(people: dict[str, torch.Tensor]) -> None:
    start = people["images"][:1].clone().requires_grad_()
    networks.perceptual_distance(start, people["images"][1:2]).sum().backward()
    assert start.grad is not None and start.grad.abs().sum() > 0
    assert all(p.grad is None for p in networks.load("perceptual").parameters())


def test_encode_finds_parameters_of_unseen_people(people: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        found = networks.encode(people["images"], people["labels"])
    assert found.shape == people["params"].shape
    explained = 1 - (found - people["params"]).square().mean() / people["params"].var()
    assert explained > 0.2  # several parameters cannot be seen from every side


@pytest.mark.parametrize("part, limit", [("perceptual", 1_500_000), ("identity", 4_000_000)])
def test_files_are_small_and_say_how_they_were_made(part: str, limit: int) -> None:
    assert (DATA / f"{part}.safetensors").stat().st_size <= limit
    facts = json.loads((DATA / f"{part}.json").read_text())
    assert facts["procedural"] is True
    assert {"command", "seed", "date", "machine", "hours", "steps"} <= facts.keys()


@pytest.mark.parametrize("part", networks.PARTS)
def test_saved_networks_come_back(part: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = networks.PerceptualNet(7) if part == "perceptual" else networks.IdentityEncoder(5)
    path = tmp_path / "net.safetensors"
    networks.save(net, path)
    again = networks.read(part, path)
    for (name, kept), (_, value) in zip(again.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(kept, value.half().float() if value.is_floating_point() else value), name


def test_wrong_files_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvloraError, match="perceptual, identity"):
        networks.load("lpips")
    with pytest.raises(FileError, match="no identity net at .*train_networks identity"):
        networks.load("identity", path=tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00")
    with pytest.raises(FileError, match="cannot be read"):
        networks.load("identity", path=broken)


def test_rate_warms_up_and_falls() -> None:
    assert curve(0.0) < curve(0.005) < curve(0.01)
    assert curve(0.01) == pytest.approx(1.0)
    assert curve(1.0) == pytest.approx(0.02)
    assert all(curve(a / 100) >= curve((a + 1) / 100) for a in range(1, 100))
