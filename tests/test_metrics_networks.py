"""Networks of losses and metrics: the reference packages' numbers, their files, and what goes wrong with files."""

from __future__ import annotations

import json
import math
import pickle
import struct
import time

import numpy as np
import published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vectors import DATA

from convlora import cli
from convlora.errors import AlbumError, ConvloraError, FileError, HubError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import metrics, segment
from convlora.integrations.eg3d.metrics import arcface, load_identity, load_perceptual, ssim
from convlora.integrations.eg3d.metrics.arcface import ArcFace
from convlora.integrations.eg3d.metrics.lpips import LPIPS
from convlora.integrations.eg3d.metrics.state import fill, named, read_state
from convlora.integrations.eg3d.networks import choose_networks
from convlora.integrations.weights import digest

REFERENCE = json.loads((DATA / "perceptual.json").read_text())
TRUNKS = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of files named as the published ones; their tensors are the recipe's, not the real ones."""
    path = tmp_path_factory.mktemp("published")
    for net, name in TRUNKS.items():
        # torchvision's files hold the classifier too
        published.save(path / name, {**published.trunk(net), "classifier.1.weight": torch.ones(2, 2)})
        published.save(path / f"{net}.pth", published.heads(net))
    published.save(path / "weights.pt", published.dists_heads())
    return path


# ---- perceptual distances


@pytest.mark.parametrize("name", ["lpips_alex", "lpips_vgg", "lpips_squeeze", "dists"])
def test_distances_and_gradients_are_those_of_the_reference_packages(name, folder):
    a, b = published.images()
    net = load_perceptual(name, folder)
    wanted = REFERENCE[name]
    a.requires_grad_()
    found = net(a, b)
    assert found.detach().tolist() == pytest.approx(wanted["distance"], rel=2e-5, abs=1e-6)
    found.sum().backward()
    assert [a.grad.norm().item(), a.grad[0, 0, 5, 5].item()] == pytest.approx(wanted["gradient"], rel=1e-3, abs=1e-8)


def test_a_loaded_distance_is_frozen_named_and_split(folder):
    a, b = published.images(40)
    for name in ("lpips_alex", f"lpips_squeeze:{folder}"):
        net = load_perceptual(name, folder if ":" not in name else None)
        assert torch.equal(net(a, b), net.distance(net.features(a), net.features(b))), "features can be kept"
        assert torch.allclose(net(a, b)[1:], net(a[1:], b[1:]), rtol=1e-4), "photos do not see each other"
        assert torch.allclose(net(a, b), net(b, a), rtol=1e-5)
        assert net(a, a).abs().max() < 1e-6
        assert net.name in metrics.described(net) and all(digits in metrics.described(net) for digits in net.sha256)
        assert [digest(file) for file in net.source] == list(net.sha256)
    with pytest.raises(ConvloraError, match="not 'resnet'"):
        LPIPS("resnet")
    net = LPIPS("alex")
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_gradients_stay_finite_where_features_vanish(folder):
    flat = torch.zeros(1, 3, 40, 40, requires_grad=True)
    net = LPIPS("alex")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-50.0)  # ReLUs put out 0 everywhere
    net.distance(net.features(flat), net.features(torch.ones(1, 3, 40, 40))).sum().backward()
    assert flat.grad.isfinite().all()


def test_whole_state_dicts_of_the_packages_load_too(folder, tmp_path):
    from safetensors.torch import save_file

    a, b = published.images(40)
    parts = published.trunk("squeeze")
    whole = {
        f"net.slice{1 + int(key.split('.')[1]) // 3}.{key.removeprefix('features.')}": t for key, t in parts.items()
    }
    whole |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for key, tensor in published.heads("squeeze").items():
        whole |= {key: tensor, key.replace("lin", "lins.", 1): tensor}
    wanted = load_perceptual("lpips_squeeze", folder)(a, b)
    assert torch.equal(load_perceptual("lpips_squeeze", published.save(tmp_path / "whole.pth", whole))(a, b), wanted)
    save_file({key: t.clone() for key, t in whole.items()}, tmp_path / "whole.safetensors")
    assert torch.equal(load_perceptual("lpips_squeeze", tmp_path / "whole.safetensors")(a, b), wanted)
    dists = {f"stage1.{key.removeprefix('features.')}": t for key, t in published.trunk("vgg").items()}
    dists |= {**published.dists_heads(), "stage2.4.filter": torch.ones(64, 1, 3, 3), "mean": torch.zeros(1, 3, 1, 1)}
    assert torch.equal(
        load_perceptual("dists", published.save(tmp_path / "dists.pth", dists))(a, b),
        load_perceptual("dists", [folder / TRUNKS["vgg"], folder / "weights.pt"])(a, b),
    )


def test_the_labs_distance_is_what_it_was_and_its_files_are_named():
    from convlora.integrations.eg3d.lab import networks as lab

    a, b = published.images()
    loss, identity = load_perceptual("lab"), load_identity("lab")
    assert torch.equal(loss(a, b), lab.perceptual_distance(a, b))
    assert torch.equal(identity(a), lab.load("identity")(a))
    assert loss.source[0].endswith("perceptual.safetensors") and len(loss.sha256[0]) == 64
    with pytest.raises(ConvloraError, match="align must be \"pool\", not '5pt'"):
        load_identity("lab", align="5pt")
    with pytest.raises(ConvloraError, match="landmarks are used with"):
        identity(a, torch.zeros(2, 5, 2))


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_files_that_do_not_fit_are_named_with_what_is_wrong(folder, tmp_path, capsys):
    def wrong(match, name, path, error=FileError):
        with pytest.raises(error, match=match):
            load_perceptual(name, path)

    wrong("no network called 'lpips'; there are lpips_alex", "lpips", None, ConvloraError)
    wrong("names no path", "lpips_alex:", None, ConvloraError)
    wrong("got two paths", "lpips_alex:here", folder, ConvloraError)
    wrong("no such file", "lpips_alex", tmp_path / "none.pth")
    wrong("holds none of alexnet-owt-7be5be79.pth, alex.pth", "lpips_alex", tmp_path)
    wrong("lacks features.2.weight, .* and 19 more", "lpips_vgg", [folder / TRUNKS["alex"], folder / "vgg.pth"])
    wide = {**published.heads("alex"), "lin3.model.1.weight": torch.ones(1, 384, 1, 1)}
    wrong(r"lin3.model.1.weight \(1, 384, 1, 1\) instead of \(1, 256, 1, 1\)", "lpips_alex", [
        folder / TRUNKS["alex"], published.save(tmp_path / "wide.pth", wide),
    ])  # fmt: skip
    wrong("lacks features.28.weight", "lpips_vgg", [
        published.save(tmp_path / "cut.pth", {k: t for k, t in published.trunk("vgg").items() if ".28." not in k}),
        folder / "vgg.pth",
    ])  # fmt: skip
    wrong("holds none of the tensors", "lpips_alex", folder / "weights.pt")
    broken = {**published.heads("alex"), "lin2.model.1.weight": torch.full((1, 384, 1, 1), math.nan)}
    wrong("not finite in lin2", "lpips_alex", [folder / TRUNKS["alex"], published.save(tmp_path / "nan.pth", broken)])
    cut = (folder / TRUNKS["squeeze"]).read_bytes()
    (tmp_path / "short.pth").write_bytes(cut[: len(cut) // 2])
    wrong("short.pth is no file of tensors alone", "lpips_squeeze", tmp_path / "short.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Code()}))
    wrong("evil.pth is no file of tensors alone", "lpips_alex", tmp_path / "evil.pth")
    wrong("holds a list", "lpips_alex", _saved(tmp_path / "list.pth", [1]))
    assert "never be printed" not in capsys.readouterr().out


def _saved(path, value):
    torch.save(value, path)
    return path


def test_images_that_do_not_fit_are_refused(folder):
    net = load_perceptual("lpips_alex", folder)
    with pytest.raises(ConvloraError, match=r"R of 31 or more, got \(1, 3, 30, 30\)"):
        net(torch.zeros(1, 3, 30, 30), torch.zeros(1, 3, 30, 30))
    assert net(torch.zeros(1, 3, 31, 31), torch.zeros(1, 3, 31, 31)).shape == (1,)
    with pytest.raises(ConvloraError, match="of one shape"):
        net(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    for name, side in (("lpips_squeeze", 17), ("dists", 16)):
        net = load_perceptual(name, folder)
        assert net(torch.zeros(2, 3, side, side), torch.ones(2, 3, side, side)).isfinite().all(), name
        with pytest.raises(ConvloraError, match=f"R of {side} or more"):
            net.features(torch.zeros(1, 3, side - 1, side - 1))


def test_a_network_is_filled_wholly_or_not_at_all():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    for damage in ({"1.bias": torch.zeros(3)}, {"1.bias": torch.full((2,), math.inf)}):
        with pytest.raises(FileError, match=r"1\.bias"):
            fill(net, state | damage, "a file")
        assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    fill(net, {key: tensor.half() for key, tensor in state.items()}, "a file")
    assert all(not tensor.any() and tensor.dtype == torch.float32 for tensor in net.state_dict().values())


def test_without_a_network_the_error_comes_at_once_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the Hub's own client tries six times in 23 s
    start = time.monotonic()
    for load, name, words in (
        (load_perceptual, "lpips_alex", ["BSD-3-Clause", "CONVLORA_WEIGHTS", "alexnet-owt-7be5be79.pth"]),
        (load_identity, "arcface_ir_se50", ["no lasting address", "model_ir_se50.pth"]),
        (load_identity, "arcface_ir101", ["WebFace4M", "Give its path"]),
    ):
        with pytest.raises(HubError) as error:
            load(name)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert time.monotonic() - start < 20


def test_files_brought_along_are_used_without_a_network(folder, monkeypatch, tmp_path):
    for file in ("alex.pth", TRUNKS["alex"]):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    a, b = published.images(40)
    wanted = load_perceptual("lpips_alex", folder)(a, b)
    assert torch.equal(load_perceptual("lpips_alex", str(tmp_path))(a, b), wanted)
    monkeypatch.setenv("CONVLORA_WEIGHTS", str(tmp_path))
    with pytest.raises(FileError, match="has SHA-256"):
        load_perceptual("lpips_alex")  # what has the published name but other contents is not taken for it


# ---- SSIM


def test_ssim_is_that_of_scikit_image():
    from skimage.metrics import structural_similarity

    a, b = published.images(48)
    for first, second, found in zip(a, b, ssim(a, b).tolist()):
        wanted = structural_similarity(
            *((image.double().numpy() + 1) / 2 for image in (first, second)), channel_axis=0, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert found == pytest.approx(wanted, abs=2e-6)


def test_ssim_with_padding_is_a_plain_blur():
    a, b = published.images(24)
    at = torch.arange(-5.0, 6.0).double()
    window = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / 4.5)
    kernel = (window / window.sum()).expand(3, 1, 11, 11)

    def blur(x):
        return F.conv2d(x, kernel, padding=5, groups=3)

    x, y = (a.double() + 1) / 2, (b.double() + 1) / 2
    mx, my = blur(x), blur(y)
    over = (2 * mx * my + 1e-4) * (2 * (blur(x * y) - mx * my) + 9e-4)
    under = (mx**2 + my**2 + 1e-4) * (blur(x * x) - mx**2 + blur(y * y) - my**2 + 9e-4)
    assert torch.allclose(ssim(a, b, "same").double(), (over / under).mean((1, 2, 3)), atol=1e-5)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_ssim_is_one_for_equal_images_alone_and_symmetric(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, 3, 16, 20, generator=generator) * 2 - 1
    b = (a + noise * torch.randn(a.shape, generator=generator)).clamp(-1, 1)
    found = ssim(a, b)
    assert torch.allclose(found, ssim(b, a), atol=1e-6) and found.max() <= 1 + 1e-6
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-6)
    if noise > 0.1:
        assert found.max() < 0.9999


def test_ssim_refuses_what_it_cannot_compare():
    image = torch.zeros(1, 3, 16, 16)
    for a, b, padding, match in (
        (image, image[..., :12], "valid", "of one shape"),
        (image[..., :8, :8], image[..., :8, :8], "valid", "window is 11×11, the images are 8×8"),
        (image, image, "reflect", "padding must be"),
    ):
        with pytest.raises(ConvloraError, match=match):
            ssim(a, b, padding)


# ---- ArcFace


def arcface_shapes(name):
    """Key and shape of every tensor of the published file, written from its list of keys."""
    se = name == "arcface_ir_se50"

    def norm(key, width, affine=True):
        own = {f"{key}.{part}": (width,) for part in ("weight", "bias")} if affine else {}
        return own | {f"{key}.{part}": (width,) for part in ("running_mean", "running_var")}

    found = {"input_layer.0.weight": (64, 3, 3, 3), **norm("input_layer.1", 64), "input_layer.2.weight": (64,)}
    inputs, n = 64, 0
    for width, count in zip((64, 128, 256, 512), (3, 4, 14, 3) if se else (3, 13, 30, 3)):
        for _ in range(count):
            at = f"body.{n}"
            if inputs != width:
                found |= {
                    f"{at}.shortcut_layer.0.weight": (width, inputs, 1, 1),
                    **norm(f"{at}.shortcut_layer.1", width),
                }
            found |= norm(f"{at}.res_layer.0", inputs) | {f"{at}.res_layer.1.weight": (width, inputs, 3, 3)}
            if se:
                found |= {f"{at}.res_layer.2.weight": (width,), f"{at}.res_layer.3.weight": (width, width, 3, 3)}
                found |= norm(f"{at}.res_layer.4", width)
                found |= {
                    f"{at}.res_layer.5.fc1.weight": (width // 16, width, 1, 1),
                    f"{at}.res_layer.5.fc2.weight": (width, width // 16, 1, 1),
                }
            else:
                found |= norm(f"{at}.res_layer.2", width)
                found |= {f"{at}.res_layer.3.weight": (width,), f"{at}.res_layer.4.weight": (width, width, 3, 3)}
                found |= norm(f"{at}.res_layer.5", width)
            inputs, n = width, n + 1
    found |= norm("output_layer.0", 512) | {"output_layer.3.weight": (512, 25088), "output_layer.3.bias": (512,)}
    return found | norm("output_layer.4", 512, affine=se)


def arcface_state(name):
    """Numbers of about the real ones' size: positive variances, slopes of 0.25."""
    generator = torch.Generator().manual_seed(5)
    state, shapes = {}, arcface_shapes(name)
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[key] = noise * math.prod(shape[1:]) ** -0.5
        elif key.endswith("running_var"):
            state[key] = 1 + 0.2 * noise.tanh()
        elif key.endswith("weight"):
            slope = f"{key.removesuffix('weight')}bias" not in shapes
            state[key] = (0.25 if slope else 1.0) + 0.05 * noise
        else:
            state[key] = 0.1 * noise
    return state


def arcface_by_keys(name, s, x):
    """The same network as plain function calls that read its tensors by key."""
    se = name == "arcface_ir_se50"

    def norm(x, key):
        mean, var = s[f"{key}.running_mean"], s[f"{key}.running_var"]
        return F.batch_norm(x, mean, var, s.get(f"{key}.weight"), s.get(f"{key}.bias"))

    x = F.prelu(norm(F.conv2d(x, s["input_layer.0.weight"], padding=1), "input_layer.1"), s["input_layer.2.weight"])
    starts = {0, 3, 7, 21} if se else {0, 3, 16, 46}
    for n in range(24 if se else 49):
        r, stride = f"body.{n}.res_layer", 2 if n in starts else 1
        short = x[..., ::stride, ::stride]
        if f"body.{n}.shortcut_layer.0.weight" in s:
            short = norm(F.conv2d(short, s[f"body.{n}.shortcut_layer.0.weight"]), f"body.{n}.shortcut_layer.1")
        y = F.conv2d(norm(x, f"{r}.0"), s[f"{r}.1.weight"], padding=1)
        if se:
            y = F.conv2d(F.prelu(y, s[f"{r}.2.weight"]), s[f"{r}.3.weight"], stride=stride, padding=1)
            y = norm(y, f"{r}.4")
            gate = F.conv2d(F.adaptive_avg_pool2d(y, 1), s[f"{r}.5.fc1.weight"]).clamp(min=0)
            y = y * F.conv2d(gate, s[f"{r}.5.fc2.weight"]).sigmoid()
        else:
            y = F.prelu(norm(y, f"{r}.2"), s[f"{r}.3.weight"])
            y = norm(F.conv2d(y, s[f"{r}.4.weight"], stride=stride, padding=1), f"{r}.5")
        x = y + short
    x = F.linear(norm(x, "output_layer.0").flatten(1), s["output_layer.3.weight"], s["output_layer.3.bias"])
    x = norm(x, "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("name", "millions"), [("arcface_ir_se50", 43.8), ("arcface_ir101", 65.2)])
def test_arcface_has_the_published_keys_and_size(name, millions):
    with torch.device("meta"):
        net = ArcFace(name)
    own = {key: tuple(t.shape) for key, t in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert own == arcface_shapes(name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["arcface_ir_se50", "arcface_ir101"])
def test_arcface_is_the_network_its_keys_describe(name, tmp_path):
    state = arcface_state(name)
    prefix = "model.net." if name == "arcface_ir101" else ""
    kept = {prefix + key: tensor for key, tensor in state.items()}
    kept |= {prefix + "input_layer.1.num_batches_tracked": torch.tensor(7)}
    file = published.save(tmp_path / "model_ir_se50.pth", kept)
    net = load_identity(name, file)
    images = published.images(128)[0]
    with torch.no_grad():
        found = net(images)
        wanted = arcface_by_keys(name, state, F.adaptive_avg_pool2d(images, 112))
    assert found.shape == (2, 512) and torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert (found[0] @ found[1]).abs() < 0.999, "different pictures have different directions"
    assert metrics.described(net) == f"{name}, align pool (model_ir_se50.pth SHA-256 {digest(file)})"


def test_a_file_of_the_other_arcface_is_refused(tmp_path):
    small = {key: torch.zeros(1) for key in ("input_layer.0.weight", "body.0.res_layer.1.weight")}
    with pytest.raises(FileError, match="lacks input_layer.1.weight"):
        load_identity("arcface_ir_se50", published.save(tmp_path / "x.pth", small))
    with pytest.raises(FileError, match="holds none of the tensors of arcface_ir101"):
        load_identity("arcface_ir101", published.save(tmp_path / "y.pth", {"conv1.weight": torch.zeros(1)}))
    with pytest.raises(ConvloraError, match="align must be"):
        load_identity("arcface_ir101", align="face")
    assert named({"a.b.w": torch.ones(1), "a.b.v": torch.ones(1), "c": torch.ones(1)}, ["v", "w"]).keys() == {"v", "w"}


@given(st.floats(-60, 60), st.floats(0.8, 2.2), st.floats(-20, 20), st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_five_points_bring_a_face_onto_the_template(degrees, scale, dx, dy):
    # A smooth picture f is drawn where a similarity moves the template; aligning must give f back in its own place.
    def picture(x, y):
        return torch.stack([(x / 30).sin(), (y / 25).cos(), ((x + y) / 40).sin()])

    turn = complex(scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees)))
    middle = complex(56, 56)
    there = complex(127.5 + dx, 127.5 + dy)
    points = [(complex(*p) - middle) * turn + there for p in arcface.TEMPLATE]
    landmarks = torch.tensor([[[p.real, p.imag] for p in points]])
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    back = (torch.complex(x, y) - there) / turn + middle
    face = arcface.aligned(picture(back.real, back.imag)[None], "5pt", landmarks)
    v, u = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    inside = slice(30, 82)  # what lies in the picture at any of these turns
    assert torch.allclose(face[0, :, inside, inside], picture(u, v)[:, inside, inside], atol=0.02)


def test_pool_and_crop_take_the_parts_they_say():
    images = published.images(512)[0]
    assert torch.equal(arcface.aligned(images, "pool"), F.adaptive_avg_pool2d(images, 112))
    window = F.avg_pool2d(images, 2)[:, :, 35:223, 32:220]
    assert torch.allclose(arcface.aligned(images, "center_crop"), F.adaptive_avg_pool2d(window, 112), atol=1e-6)
    for align, landmarks, match in (
        ("5pt", None, "needs landmarks"),
        ("5pt", torch.zeros(2, 4, 2), r"got \(2, 4, 2\)"),
    ):
        with pytest.raises(ConvloraError, match=match):
            arcface.aligned(images, align, landmarks)
    with pytest.raises(ConvloraError, match="R of 112 or more"):
        arcface.aligned(torch.zeros(1, 3, 64, 64), "pool")


# ---- masks


def test_masks_come_from_files(tmp_path):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.png")
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    Image.fromarray(half).save(tmp_path / "b.png")
    masks = segment.masks_from_files(tmp_path, ["a.jpg", "b.png"])(torch.zeros(2, 3, 16, 16))
    assert masks.shape == (2, 1, 16, 16) and masks[0].min() == 1
    assert torch.equal(masks[1, 0, 0], torch.tensor([1.0] * 8 + [0.0] * 8))
    with pytest.raises(AlbumError, match=r"no mask for c\.png"):
        segment.masks_from_files(tmp_path, ["c.png"])
    with pytest.raises(ConvloraError, match="2 photos, and 1 images"):
        segment.masks_from_files(tmp_path, ["a", "b"])(torch.zeros(1, 3, 16, 16))
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "d.png")
    with pytest.raises(AlbumError, match="9×8: masks must be square"):
        segment.masks_from_files(tmp_path, ["d.png"])


def onnx_of_a_1x1_convolution(weights, side):
    """The bytes of an ONNX model: a 1×1 convolution of an RGB picture, its weights one row per output channel."""

    def number(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def part(tag, body):
        if isinstance(body, int):
            return number(tag << 3) + number(body)
        body = body.encode() if isinstance(body, str) else body
        return number(tag << 3 | 2) + number(len(body)) + body

    def value(name, channels):
        dims = b"".join(part(1, part(1, n)) for n in (1, channels, side, side))
        return part(1, name) + part(2, part(1, part(1, 1) + part(2, dims)))

    rows = len(weights)
    raw = struct.pack(f"<{3 * rows}f", *(w for row in weights for w in row))
    tensor = b"".join(part(1, n) for n in (rows, 3, 1, 1)) + part(2, 1) + part(8, "w") + part(9, raw)
    node = part(1, "x") + part(1, "w") + part(2, "y") + part(4, "Conv")
    graph = part(1, node) + part(2, "g") + part(5, tensor) + part(11, value("x", 3)) + part(12, value("y", rows))
    return part(1, 7) + part(7, graph) + part(8, part(1, "") + part(2, 11))


def test_an_onnx_network_segments(tmp_path):
    pytest.importorskip("cv2")
    images = torch.full((2, 3, 32, 32), -1.0)
    images[:, 0, :, :16] = 1.0  # red on the left
    images[1] = images[1].flip(-1)
    (tmp_path / "red.onnx").write_bytes(onnx_of_a_1x1_convolution([[1.0, 0, 0]], 16))
    masks = segment.onnx_segmenter(tmp_path / "red.onnx", 16, mean=(0, 0, 0), std=(1, 1, 1))(images)
    assert masks.shape == (2, 1, 32, 32) and masks.min() >= 0 and masks.max() <= 1
    assert masks[0, 0, :, :14].min() > 0.95 and masks[0, 0, :, 18:].max() < 0.05
    assert torch.allclose(masks[1], masks[0].flip(-1), atol=1e-6)
    (tmp_path / "two.onnx").write_bytes(onnx_of_a_1x1_convolution([[-9.0, 0, 0], [9.0, 0, 0]], 16))
    two = segment.onnx_segmenter(tmp_path / "two.onnx", 16, channel=1)(images)
    assert two[0, 0, :, :14].min() > 0.95 and two[0, 0, :, 18:].max() < 0.05
    with pytest.raises(ConvloraError, match="with a channel 2"):
        segment.onnx_segmenter(tmp_path / "two.onnx", 16, channel=2)(images)
    with pytest.raises(FileError, match="no such file"):
        segment.onnx_segmenter(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(FileError, match="is no ONNX network"):
        segment.onnx_segmenter(tmp_path / "bad.onnx")


# ---- in a run


def test_a_run_names_its_networks_and_says_what_is_missing(folder, capsys, tmp_path):
    networks, told = choose_networks("photos.safetensors")
    assert networks.perceptual.name == "lab" and networks.identity is None and networks.encoder is None
    assert "stand-in" in told[0] and "identity is not measured" in told[1]
    networks, told = choose_networks("photos.safetensors", f"lpips_alex:{folder}", "lab")
    assert networks.perceptual.name == "lpips_alex" and networks.identity.name == "lab" and not told
    networks, told = choose_networks("photos.safetensors", "none", "none")
    assert networks.perceptual is None and networks.identity is None and not told
    networks, told = choose_networks("lab")
    assert networks.perceptual.name == networks.identity.name == "lab" and networks.encoder is not None and not told


def test_an_encoder_brought_along_measures_identity(monkeypatch, tmp_path):
    published.save(tmp_path / "model_ir_se50.pth", {"input_layer.0.weight": torch.zeros(1)})
    monkeypatch.setenv("CONVLORA_WEIGHTS", str(tmp_path))
    for load in (lambda: choose_networks("photos.safetensors", "none"), lambda: load_identity("arcface_ir_se50")):
        with pytest.raises(FileError, match=r"model_ir_se50\.pth lacks"):  # it was found, and is only half of it
            load()


def test_personalize_takes_networks_by_name(folder, tmp_path, capsys):
    from tiny import TINY, write_tiny_album

    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**{**TINY, "neural_rendering_resolution": 32}).eval().requires_grad_(False)
    generator = eg3d.save_generator(G, tmp_path / "G.safetensors")
    album, out = write_tiny_album(tmp_path / "album", 4), tmp_path / "out"
    command = ["eg3d", "personalize", str(album), "--generator", str(generator), "--out", str(out), "--held-out", "1"]
    command += ["--anchor-steps", "1", "--steps", "2", "--batch-size", "1", "--quiet", "--identity", "lab"]
    assert cli.main([*command, "--perceptual", f"lpips_alex:{folder}"]) == 0
    printed = capsys.readouterr()
    assert "stand-in" not in printed.err
    notes = json.loads((out / "report.json").read_text())["metric_notes"]
    assert f"alex.pth SHA-256 {digest(folder / 'alex.pth')}" in notes["perceptual"] and "lpips_alex" in printed.out
    assert "lab (identity.safetensors SHA-256" in notes["ID_sim"]
    assert cli.main([*command, "--perceptual", "none"]) == 2
    assert "other settings (perceptual: 'lpips_alex" in capsys.readouterr().err
    assert cli.main([*command, "--perceptual", "vgg"]) == 2
    assert "no network called 'vgg'" in capsys.readouterr().err


def test_tensors_are_read_from_nested_state_dicts(tmp_path):
    path = _saved(tmp_path / "nested.ckpt", {"state_dict": {"a": torch.ones(2)}, "epoch": 3})
    assert read_state(path).keys() == {"a"}
