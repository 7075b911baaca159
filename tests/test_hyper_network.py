"""The hypernetwork: shapes, its start, gradients, files and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_generator
from torch import nn

from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations import stylegan2
from convlora.integrations.eg3d import CONFIGS, TriPlaneGenerator, lab
from convlora.integrations.eg3d.hyper.codes import Codes, Layer, Layout, squares, start
from convlora.integrations.eg3d.hyper.network import HyperNetwork, pretrained
from convlora.integrations.eg3d.hyper.opening import encoder_named, open_hypernetwork
from convlora.integrations.eg3d.lab.hyper import ENCODER, encoder, load_hypernetwork

SMALL = dict(dim=16, heads=2, depth=1, decoder_depth=1, refinements=2, side=32, patch=16)
LAYOUT = Layout((Layer("b4.conv1", 5, 7), Layer("b4.conv1.affine", 3, 9), Layer("b4.torgb", 2, 2)), 1)


def make(layout: Layout = LAYOUT, **more) -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork(layout, **{**SMALL, **more})


def pictures(count: int = 2, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, side, side) * 2 - 1, torch.rand(count, 3, side, side) - 0.5


@pytest.mark.parametrize("rank", [1, 2])
def test_every_photo_gets_codes_of_its_own_and_padding_stays_zero(rank) -> None:
    net = make(LAYOUT._replace(rank=rank)).eval()
    photos, residuals = pictures(3)
    codes = net(photos, residuals)
    assert codes.left.shape == (3, 3, 5, rank) and codes.right.shape == (3, 3, rank, 9)
    for x, used in zip(codes, net.layout.used()):
        assert bool((x[:, ~used] == 0).all()) and bool((x[:, used] != 0).all())
    alone = net(photos[1:2], residuals[1:2])
    assert all(torch.allclose(a[1:2], b, atol=1e-6) for a, b in zip(codes, alone))
    # another size of the same picture is seen at the network's own side
    larger = (nn.functional.interpolate(x, scale_factor=2.0) for x in (photos, residuals))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(net(*larger), codes))


def test_the_start_is_next_to_nothing_and_its_gradients_reach_the_encoder() -> None:
    net = make()
    photos, residuals = pictures(64)
    left, _ = net(photos, residuals, 1)
    assert 0.3e-3 < float(left.detach()[:, net.layout.used()[0]].std()) < 3e-3
    assert float(squares(net(photos, residuals).detach()).sqrt().max()) < 1e-3  # ‖left · right‖
    codes = net(photos[:2], residuals[:2])
    (codes.left.sum() + codes.right.sum()).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.ne(0).any())]
    assert without == []


def test_after_calibration_it_starts_where_the_teachers_did() -> None:
    net = make()
    begin = start(LAYOUT, 1, seed=3)
    net.calibrate(begin, (0.1, 0.05))
    photos, residuals = pictures(64)
    codes = net(photos, residuals, 1)
    drawn = codes.detach()
    assert float((drawn.right - begin.right).abs().max()) < 1e-3
    assert 0.3e-4 < float(drawn.left[:, net.layout.used()[0]].std()) < 3e-4
    # the product has a gradient for left although it is nearly zero
    (grad,) = torch.autograd.grad((codes.left @ codes.right).sum(), net.heads)
    assert float(grad.abs().max()) > 0


def test_refinements_are_added_up() -> None:
    net = make().eval()
    with torch.no_grad():
        net.heads.normal_(std=0.3)
    photos, residuals = pictures()
    once, twice = (net(photos, residuals, k) for k in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(twice, net(photos, residuals)))  # its own number is 2
    assert float((once.left - twice.left).abs().max().detach()) > 1e-2
    # θ₂ − θ₁ is the decoder's answer to θ₁;
    # what falls on padding is dropped from codes but not from θ: compare where a layer fills its frames
    unpadded = Layout((Layer("a", 5, 9), Layer("b", 5, 9)), 1)
    other = make(unpadded).eval()
    with torch.no_grad():
        other.heads.normal_(std=0.3)
    one, two = (other(photos, residuals, k) for k in (1, 2))
    seen = other.features(photos, residuals)
    x = other.codes(torch.cat([y.flatten(2) for y in one], 2)) + other.layer + other.kind(other.kinds)
    for block in other.decode:
        x = block(x, seen)
    more = torch.einsum("nld,lds->nls", other.told(x), other.heads) + other.bias
    assert torch.allclose(two.left.flatten(2) - one.left.flatten(2), more[..., :5], atol=1e-5)


def test_saved_and_loaded_it_predicts_the_same(tmp_path) -> None:
    net = make(options={"seed": 5}).eval()
    net.calibrate(start(LAYOUT, 1), (0.1, 0.2))
    with torch.no_grad():
        net.heads.normal_(std=0.1)
    photos, residuals = pictures()
    exact = HyperNetwork.load(net.save(tmp_path / "exact.safetensors", dtype=None, generator="tiny"))
    assert all(torch.equal(a, b) for a, b in zip(exact(photos, residuals), net(photos, residuals)))
    assert exact.layout == net.layout and exact.options == net.options and exact.config == net.config
    half = HyperNetwork.load(net.save(tmp_path / "half.safetensors"))
    assert all(torch.allclose(a, b, atol=5e-3) for a, b in zip(half(photos, residuals), net(photos, residuals)))
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "exact.safetensors").stat().st_size
    metadata = files.read(tmp_path / "exact.safetensors")[1]
    assert metadata["format"] == "convlora-hypernetwork" and metadata["generator"] == "tiny"
    with pytest.raises(FileError, match=r"fields \['rank'\] are written by the hypernetwork itself"):
        net.save(tmp_path / "no.safetensors", rank="3")
    assert not (tmp_path / "no.safetensors").exists()


def test_wrong_files_are_refused_by_what_is_wrong(tmp_path) -> None:
    path = make().save(tmp_path / "net.safetensors")
    tensors, metadata = files.read(path)

    def changed(tensors=tensors, **more) -> object:
        return files.write(tmp_path / "changed.safetensors", tensors, {**metadata, **more})

    with pytest.raises(FileError, match="no such file"):
        HyperNetwork.load(tmp_path / "none.safetensors")
    with pytest.raises(FileError, match=r"holds no hypernetwork \(metadata format='convlora'\)"):
        HyperNetwork.load(changed(format="convlora"))
    with pytest.raises(FileError, match="format version '9', this convlora reads '1'"):
        HyperNetwork.load(changed(format_version="9"))
    with pytest.raises(FileError, match="damaged metadata of a hypernetwork"):
        HyperNetwork.load(changed(layers="[[1]]"))
    with pytest.raises(FileError, match=r"is damaged: .*bias"):
        HyperNetwork.load(changed({k: v for k, v in tensors.items() if k != "bias"}))
    with pytest.raises(ConvloraError, match="has its own encoder: give none"):
        HyperNetwork.load(path, encoder=lambda x: x.flatten(2).mT)
    with pytest.raises(FileError, match="its config is no JSON object"):
        open_hypernetwork(changed(config="[1]"))


def test_an_encoder_of_ones_own_is_used_and_not_kept(tmp_path) -> None:
    outside = nn.Conv2d(6, 10, 8, 8)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return outside(x).flatten(2).mT

    net = make(encoder=tokens, encoder_name="mine").eval()
    assert net.config["tokens"] == 16 and net.config["width"] == 10
    photos, residuals = pictures()
    codes = net(photos, residuals)
    assert codes.left.shape == (2, 3, 5, 1)
    assert not any("patches" in name for name, _ in net.named_parameters())
    assert copy.deepcopy(net).encoder is tokens, "the moving average of a training has no second encoder"
    path = net.save(tmp_path / "net.safetensors", dtype=None)
    with pytest.raises(ConvloraError, match="was trained with the encoder 'mine': give encoder="):
        HyperNetwork.load(path)
    with pytest.raises(ConvloraError, match=r"no encoder 'mine' is known: \"vit\", \"timm:MODEL\""):
        open_hypernetwork(path)
    again = HyperNetwork.load(path, encoder=tokens)
    assert all(torch.equal(a, b) for a, b in zip(again(photos, residuals), codes))
    with pytest.raises(ConvloraError, match="an encoder of 16 tokens of 10 numbers, and this one gives 1024 of 6"):
        HyperNetwork.load(path, encoder=lambda x: x.flatten(2).mT)
    with pytest.raises(ConvloraError, match=r"gives tokens \(N, T, D\) .* not \(1, 10, 4, 4\)"):
        make(encoder=outside)


def test_published_encoders_name_the_library_that_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConvloraError, match="a timm encoder needs timm: pip install timm"):
        encoder_named("timm:vit_base_patch16_224")
    with pytest.raises(ConvloraError, match='source is "timm" or "transformers", not \'hub\''):
        pretrained("vit", "hub")
    assert encoder_named("vit") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(refinements=0), "refinements=0 must be at least 1"),
        (dict(dim=18, heads=4), "dim=18 a multiple of heads=4"),
        (dict(side=40), "a side of 40 pixels has no whole number of patches of 16"),
    ],
)
def test_impossible_sizes_are_refused(options, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        make(**options)


def test_photos_without_their_residuals_are_refused() -> None:
    with pytest.raises(ConvloraError, match=r"of one size, not \(2, 3, 32, 32\) and \(2, 3, 16, 16\)"):
        make()(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 16))


def test_it_belongs_to_its_generator_and_leaves_that_as_it_was() -> None:
    G = tiny_generator()
    keys = list(G.state_dict())
    net = HyperNetwork.for_generator(G, **SMALL)
    assert list(G.state_dict()) == keys and net.layout.names[0] == "backbone.synthesis.b4.conv1"
    adapter = net.inject(G)
    assert not any(p.requires_grad for p in G.parameters())
    assert adapter.num_parameters == net.layout.numbers
    adapter.remove()
    assert list(G.state_dict()) == keys
    with pytest.raises(ConvloraError, match="trained for another generator.*convlora eg3d hypernetwork"):
        net.inject(tiny_generator(seed=1))


def test_stylegan2s_generator_has_one_too() -> None:
    torch.manual_seed(0)
    G = stylegan2.Generator(8, 0, 8, 16, 3, synthesis_kwargs={"channel_base": 64, "channel_max": 8}).eval()
    net = HyperNetwork.for_generator(G, targets=("synthesis.*",), **SMALL)
    assert all(name.startswith("synthesis.") for name in net.layout.names)
    assert {int(kind) for kind in net.kinds} == {0, 1, 2}
    codes = net(*pictures())
    assert isinstance(codes, Codes) and codes.left.shape[1] == len(net.layout.layers)


def test_the_labs_is_below_ten_megabytes(tmp_path) -> None:
    with torch.device("cpu"):
        G = TriPlaneGenerator(**CONFIGS["lab"])
    net = HyperNetwork.for_generator(G, encoder=encoder(), encoder_name=ENCODER, depth=2)
    path = net.save(tmp_path / "hyper.safetensors")
    assert path.stat().st_size < 10 * 2**20
    identity = lab.networks.load("identity")
    assert net.config["tokens"] == 64 and net.config["width"] == 192 + 2 * identity.config["factors"] + 48
    again = load_hypernetwork(path)
    assert json.loads(files.read(path)[1]["config"])["encoder"] == ENCODER
    assert again.config == net.config and not any(p.requires_grad for p in again.parameters())
    with pytest.raises(FileError, match="no hypernetwork of the lab at .*train it with `python -m "):
        load_hypernetwork(tmp_path / "none.safetensors")


class Published(nn.Module):
    """What timm and transformers call a vision transformer, in one small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 56, 56)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).flatten(2).mT

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.forward_features(pixel_values))


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_published_encoders_see_photo_and_residual_side_by_side(monkeypatch, source) -> None:
    torch.manual_seed(0)
    model = Published()
    asked: list[tuple] = []

    def create(*name, **options) -> Published:
        asked.append((name, options))
        return model

    fake = SimpleNamespace(create_model=create, AutoModel=SimpleNamespace(from_pretrained=create))
    monkeypatch.setitem(sys.modules, source, fake)
    tokens = encoder_named(f"{source}:some/vit")
    assert asked[0][0] == ("some/vit",) and not any(p.requires_grad for p in model.parameters())
    photos, residuals = pictures(2, 64)
    found = tokens(torch.cat([photos, residuals], 1))
    assert found.shape == (2, 16, 10)
    larger = nn.functional.interpolate(photos, (224, 224), mode="bilinear", antialias=True)
    assert torch.allclose(found[..., :5], model.forward_features(larger), atol=1e-6)
    net = make(encoder=tokens, encoder_name=f"{source}:some/vit")
    assert net(photos, residuals).left.shape == (2, 3, 5, 1)
