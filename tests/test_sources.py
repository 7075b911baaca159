"""Generators in other people's forms: bare safetensors, torch.save, rosinality's names, the Hub."""

from __future__ import annotations

import argparse
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official_format as official
import pytest
import torch
from hostile_pickles import HOSTILE
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import save, save_file
from test_official_pickles import eg3d_images, randomized, tiny_stylegan2
from tiny import tiny_generator

from convlora.errors import ConvloraError, FileError, HubError
from convlora.integrations import eg3d, stylegan2
from convlora.integrations.stylegan2.checkpoint import read_checkpoint
from convlora.integrations.stylegan2.foreign import infer_config
from convlora.integrations.weights import digest


def image(G, seed=0, **options):
    z = torch.randn(2, G.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return G(z, torch.ones(2, G.c_dim), noise_mode="const", **options)


def bare(G, path):
    """Tensors alone, as people re-save them."""
    save_file({key: value.clone() for key, value in G.state_dict().items()}, path)
    return path


# ---- StyleGAN2 without a configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("c_dim, layers, features", [(0, 8, 24), (3, 1, 24), (5, 2, 10)])
def test_the_configuration_is_read_off_the_shapes(tmp_path, architecture, c_dim, layers, features):
    torch.manual_seed(3)
    G = stylegan2.Generator(
        16, c_dim, 24, 32, 4, mapping_kwargs=dict(num_layers=layers, layer_features=features, embed_features=7),
        synthesis_kwargs=dict(channel_base=512, channel_max=20, architecture=architecture),
    )  # fmt: skip
    G = randomized(G)
    H = stylegan2.load_generator(bare(G, tmp_path / "g.safetensors"))
    assert torch.equal(image(H), image(G))
    assert read_checkpoint(tmp_path / "g.safetensors")[0]["img_resolution"] == 32


@pytest.mark.parametrize("name", stylegan2.CONFIGS)
def test_every_official_configuration_is_inferred(name):
    with torch.device("meta"):
        G = stylegan2.Generator(**stylegan2.CONFIGS[name])
    found = infer_config(G.state_dict(), "g")
    with torch.device("meta"):
        H = stylegan2.Generator(**found)
    assert {k: v.shape for k, v in H.state_dict().items()} == {k: v.shape for k, v in G.state_dict().items()}
    for key in ("channel_base", "channel_max"):
        assert found["synthesis_kwargs"][key] == stylegan2.CONFIGS[name]["synthesis_kwargs"][key]


def test_a_preset_says_what_shapes_do_not(tmp_path, monkeypatch):
    G = tiny_stylegan2()
    monkeypatch.setitem(stylegan2.CONFIGS, "tiny", G.config)
    file = bare(G, tmp_path / "g.safetensors")
    assert stylegan2.load_generator(file).synthesis.b4.conv1.conv_clamp is None
    assert stylegan2.load_generator(file, preset="tiny").config == G.config
    with pytest.raises(ConvloraError, match="no preset 'paper128'; there are stylegan2, paper256"):
        stylegan2.load_generator(file, preset="paper128")
    with pytest.raises(FileError, match="does not fit this generator"):
        stylegan2.load_generator(file, preset="paper256")
    stylegan2.save_generator(G, file)
    with pytest.raises(FileError, match="carries its own configuration, which a preset must not replace"):
        stylegan2.load_generator(file, preset="tiny")


def test_tensors_of_something_else(tmp_path):
    file = tmp_path / "g.safetensors"
    save_file({"weight": torch.ones(2, 2)}, file)
    with pytest.raises(FileError, match=r"no config\.json beside it, and its tensors are not those of a StyleGAN2"):
        stylegan2.load_generator(file)
    save_file({"synthesis.input.freqs": torch.ones(2, 2)}, file)
    with pytest.raises(FileError, match="StyleGAN3 generator"):
        stylegan2.load_generator(file)
    state = {key: value.clone() for key, value in tiny_stylegan2().state_dict().items()}
    state["synthesis.b8.conv1.weight"] = torch.ones(3, 3, 3, 3)
    save_file(state, file)
    with pytest.raises(FileError, match="follow no channel_base"):
        stylegan2.load_generator(file)


def test_every_preset_stands_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text("utf-8")
    assert [name for name in (*eg3d.CONFIGS, *stylegan2.CONFIGS) if f"`{name}`" not in page] == []


# ---- EG3D without a configuration ----------------------------------------------------------------------------------


def meta_state(name):
    with torch.device("meta"):
        return eg3d.TriPlaneGenerator(**eg3d.CONFIGS[name]).state_dict()


def test_the_preset_is_the_one_whose_tensors_fit():
    from convlora.integrations.eg3d.checkpoint import fitting_preset

    cats = meta_state("afhqcats512-128")
    plus = {**cats, "dataset_label_std": torch.ones(25)}
    less = {key: value for key, value in cats.items() if not key.endswith("resample_filter")}
    for state in (cats, plus, less):
        assert fitting_preset(state, "cats.safetensors") is eg3d.CONFIGS["afhqcats512-128"]
    with pytest.raises(FileError, match=r"fit ffhq512-64, ffhq512-128, ffhqrebalanced512-64, .* alike.*--preset"):
        fitting_preset(meta_state("ffhq512-128"), "g.safetensors")
    with pytest.raises(FileError, match="fit shapenetcars128-64, shapenetcars128-128 alike"):
        fitting_preset(meta_state("shapenetcars128-64"), "g.safetensors")
    with pytest.raises(FileError, match="fit none of ffhq512-64"):
        fitting_preset({"x": torch.ones(1)}, "g.safetensors")


def test_bare_tensors_of_eg3d(tmp_path, monkeypatch):
    G = eg3d.load_generator("lab")
    file = bare(G, tmp_path / "lab.safetensors")
    H = eg3d.load_generator(file)
    assert H.config == G.config
    assert torch.equal(eg3d_images(H)["image"], eg3d_images(G)["image"])
    tiny = randomized(tiny_generator())
    file = bare(tiny, tmp_path / "tiny.safetensors")
    monkeypatch.setitem(eg3d.CONFIGS, "tiny-16", tiny.config)
    monkeypatch.setitem(eg3d.CONFIGS, "tiny-24", tiny.config | {"neural_rendering_resolution": 24})
    with pytest.raises(FileError, match="fit tiny-16, tiny-24 alike: say which with preset="):
        eg3d.load_generator(file)
    assert eg3d.load_generator(file, preset="tiny-24").neural_rendering_resolution == 24
    with pytest.raises(
        FileError, match=r"EG3D's tensors without a configuration: .*convlora eg3d import tiny.safetensors OUT"
    ):
        read_checkpoint(file)
    with pytest.raises(ConvloraError, match="no preset 'tiny-25'"):
        eg3d.load_generator(file, preset="tiny-25")
    with pytest.raises(FileError, match="carries its own"):
        eg3d.load_generator("lab", preset="lab")


# ---- torch.save ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("under", [None, "g_ema", "G_ema", "state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_plain_state_dicts(tmp_path, under, zipped, suffix):
    G = tiny_stylegan2(c_dim=2)
    held = G.state_dict() if under is None else {"epoch": 3, under: G.state_dict(), "optim": {"lr": 0.1}}
    torch.save(held, tmp_path / f"g{suffix}", _use_new_zipfile_serialization=zipped)
    H = stylegan2.load_generator(tmp_path / f"g{suffix}")
    assert torch.equal(image(H), image(G))
    os.remove(tmp_path / f"g{suffix}")
    assert torch.equal(image(H), image(G)), "it does not lean on the file"


def test_prefixes_of_data_parallel_are_dropped(tmp_path):
    G = tiny_stylegan2()
    torch.save({f"module.{key}": value for key, value in G.state_dict().items()}, tmp_path / "g.pt")
    assert torch.equal(image(stylegan2.load_generator(tmp_path / "g.pt")), image(G))


def test_eg3d_state_dicts(tmp_path, monkeypatch):
    G = randomized(tiny_generator())
    monkeypatch.setitem(eg3d.CONFIGS, "tiny", G.config)
    torch.save({"G_ema": G.state_dict()}, tmp_path / "g.pt")
    assert torch.equal(eg3d_images(eg3d.load_generator(tmp_path / "g.pt"))["image"], eg3d_images(G)["image"])


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_torch_files_that_are_refused(tmp_path):
    file, canary = tmp_path / "g.pt", tmp_path / "canary"
    for zipped in (True, False):
        torch.save({"g_ema": {}, "x": Trap(canary)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(FileError, match=r"more than tensors in containers \(posix\.system\) and is not opened"):
            stylegan2.load_generator(file)
        torch.save(tiny_stylegan2(), file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(FileError, match="ask for its state_dict"):
            stylegan2.load_generator(file)
    assert not canary.exists()
    for held, message in (
        ([1], "holds a list, not a dictionary"),
        ({"epoch": 1}, "holds no tensors by name, nor under g_ema, .*it has epoch"),
    ):
        torch.save(held, file)
        with pytest.raises(FileError, match=message):
            stylegan2.load_generator(file)
    whole = file.read_bytes()
    for data, message in (
        (b"", "is empty"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"\xff\xd8 a photo", "something else"),
        (whole[:100], "cannot be read as torch.save's"),
        (b"\x80\x02" + whole[:50], "cannot be read as torch.save's|more than tensors"),
    ):
        file.write_bytes(data)
        with pytest.raises(FileError, match=message):
            stylegan2.load_generator(file)
    with pytest.raises(FileError, match="no such file"):
        stylegan2.load_generator(tmp_path / "none.pt")


# ---- rosinality ----------------------------------------------------------------------------------------------------


def rosinality_state(G):
    """G in rosinality's names and shapes, written down from that code's modules, resolution by resolution."""
    own = G.state_dict()
    state = {}

    def layer(theirs, ours, rgb=False):
        state[f"{theirs}.conv.weight"] = own[f"{ours}.weight"][None]
        state[f"{theirs}.conv.modulation.weight"] = own[f"{ours}.affine.weight"]
        state[f"{theirs}.conv.modulation.bias"] = own[f"{ours}.affine.bias"]
        if rgb:
            state[f"{theirs}.bias"] = own[f"{ours}.bias"].reshape(1, -1, 1, 1)
        else:
            state[f"{theirs}.noise.weight"] = own[f"{ours}.noise_strength"].reshape(1)
            state[f"{theirs}.activate.bias"] = own[f"{ours}.bias"]

    for i in range(G.mapping.num_layers):
        for kind in ("weight", "bias"):
            state[f"style.{i + 1}.{kind}"] = own[f"mapping.fc{i}.{kind}"]
    state["input.input"] = own["synthesis.b4.const"][None]
    layer("conv1", "synthesis.b4.conv1")
    layer("to_rgb1", "synthesis.b4.torgb", rgb=True)
    noises = [own["synthesis.b4.conv1.noise_const"]]
    convs = rgbs = 0
    for resolution in G.synthesis.block_resolutions[1:]:
        for name in ("conv0", "conv1"):
            layer(f"convs.{convs}", f"synthesis.b{resolution}.{name}")
            if name == "conv0":
                state[f"convs.{convs}.conv.blur.kernel"] = torch.ones(4, 4)
            noises.append(own[f"synthesis.b{resolution}.{name}.noise_const"])
            convs += 1
        layer(f"to_rgbs.{rgbs}", f"synthesis.b{resolution}.torgb", rgb=True)
        state[f"to_rgbs.{rgbs}.upsample.kernel"] = torch.ones(4, 4)
        rgbs += 1
    state |= {f"noises.noise_{i}": value[None, None] for i, value in enumerate(noises)}
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("multiplier, resolution", [(1, 64), (2, 32), (2, 128)])
def test_rosinality_comes_out_bit_for_bit(tmp_path, multiplier, resolution):
    torch.manual_seed(1)
    G = stylegan2.Generator(
        12, 0, 12, resolution, 3, mapping_kwargs=dict(num_layers=8),
        synthesis_kwargs=dict(channel_base=64 * multiplier, channel_max=8),
    )  # fmt: skip
    G = randomized(G)
    held = {"g_ema": rosinality_state(G), "g": {}, "latent_avg": G.mapping.w_avg.clone()}
    torch.save(held, tmp_path / "g.pt")
    H = stylegan2.load_generator(tmp_path / "g.pt")
    assert torch.equal(image(H, truncation_psi=0.6), image(G, truncation_psi=0.6))
    assert H.synthesis.b4.conv1.conv_clamp is None
    assert {key: value.shape for key, value in H.state_dict().items()} == {
        key: value.shape for key, value in G.state_dict().items()
    }


def test_a_training_snapshot_of_rosinality_has_no_average_and_its_command_line(tmp_path):
    G = tiny_stylegan2()
    held = {"g_ema": rosinality_state(G), "args": argparse.Namespace(size=32, lr=0.002), "ada_aug_p": 0.1}
    torch.save(held, tmp_path / "010000.pt")
    H = stylegan2.load_generator(tmp_path / "010000.pt")
    assert torch.equal(image(H), image(G))
    with torch.no_grad():
        w = G.mapping(torch.randn(20_000, 16))[:, 0]
    error = (H.mapping.w_avg - w.mean(0)).norm() / w.std(0).norm()
    assert error < 0.05, "the mean over 4096 latents"


def test_rosinality_files_that_do_not_fit(tmp_path):
    state = rosinality_state(tiny_stylegan2())
    for key, message in (("convs.0.colour.weight", "no tensor of rosinality"), ("noises.noise_x", "noises.noise_x is")):
        torch.save({"g_ema": state | {key: torch.ones(1)}, "latent_avg": torch.ones(24)}, tmp_path / "g.pt")
        with pytest.raises(FileError, match=message):
            stylegan2.load_generator(tmp_path / "g.pt")
    less = {key: value for key, value in state.items() if key != "convs.1.activate.bias"}
    torch.save({"g_ema": less, "latent_avg": torch.ones(24)}, tmp_path / "g.pt")
    with pytest.raises(FileError, match=r"1 tensors missing \['synthesis.b8.conv1.bias'\]"):
        stylegan2.load_generator(tmp_path / "g.pt")
    less = {key: value for key, value in state.items() if key != "style.2.bias"}
    torch.save({"g_ema": less}, tmp_path / "g.pt")
    with pytest.raises(FileError, match="mapping network is incomplete"):
        stylegan2.load_generator(tmp_path / "g.pt")


# ---- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_a_generator_of_the_hub(hub, tmp_path, monkeypatch):
    G = tiny_stylegan2()
    tensors = save({key: value.clone() for key, value in G.state_dict().items()})
    config = json.dumps(G.config).encode()
    hub.make("me/gan", private=False, model__safetensors=tensors, config__json=config)
    assert stylegan2.load_generator("me/gan").config == G.config
    assert stylegan2.load_generator("hf://me/gan@main/model.safetensors").config == G.config
    H = eg3d.save_generator(tiny_generator(), tmp_path / "h.safetensors")
    hub.make("me/face", private=False, model__safetensors=H.read_bytes())
    assert torch.equal(eg3d_images(eg3d.load_generator("me/face"))["image"], eg3d_images(tiny_generator())["image"])
    with pytest.raises(HubError, match="me/empty holds no .*, no .safetensors file at all"):
        hub.make("me/empty", private=False)
        stylegan2.load_generator("me/empty")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert stylegan2.load_generator("me/gan").config == G.config
    assert len(hub.requests) == asked
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        stylegan2.load_generator("me/other")


def test_a_configuration_in_a_subfolder_of_the_hub(hub):
    G = tiny_stylegan2()
    repo = hub.make("me/gan", private=False)
    from hub_server import File

    held = {
        "a/g.safetensors": File(save({key: value.clone() for key, value in G.state_dict().items()}), False),
        "a/config.json": File(json.dumps(G.config).encode(), False),
    }
    repo.branches["main"] = repo.add(repo.branches["main"], "more", {**repo.head.files, **held}).oid
    assert stylegan2.load_generator("hf://me/gan/a/g.safetensors").config == G.config


def test_a_generator_by_http(tmp_path, monkeypatch):
    """An official pickle from an address, fetched once and read as safely as any."""
    monkeypatch.setenv("CONVLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the proxies of its first use
    (tmp_path / "served").mkdir()
    G = tiny_stylegan2()
    good = official.write(tmp_path / "served" / "good.pkl", official.snapshot(official.stylegan2_network(G)))
    evil = tmp_path / "served" / "evil.pkl"
    evil.write_bytes(HOSTILE["os.system"][0])

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        first, second = (f"{url}/{file.name}#sha256={digest(file)}" for file in (good, evil))
        assert torch.equal(image(stylegan2.load_generator(first)), image(G))
        with pytest.raises(FileError, match="names os.system"):
            stylegan2.load_generator(second)
        with pytest.raises(FileError, match="not protected"):
            stylegan2.load_generator(f"{url}/good.pkl")
        server.shutdown()
    assert torch.equal(image(stylegan2.load_generator(first)), image(G)), "from the cache"


def test_what_exists_as_a_path_is_a_path(hub, tmp_path):
    (tmp_path / "me").mkdir()
    stylegan2.save_generator(tiny_stylegan2(), tmp_path / "me" / "gan" / "g.safetensors")
    stylegan2.load_generator("me/gan")
    assert hub.requests == []
