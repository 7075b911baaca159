"""NVIDIA's checkpoints: what is in them comes out bit for bit, and nothing in them is ever executed."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import official_format as official
import pytest
import torch
from hostile_pickles import CANARY, HOSTILE, IN_A_TENSOR, network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_generator
from vectors import DATA

from convlora.errors import FileError
from convlora.integrations import eg3d, stylegan2
from convlora.integrations.eg3d import cameras
from convlora.integrations.stylegan2.official_pickle import Network, read_pickle

ROOT = Path(__file__).parents[1]
FIXED = dict(noise_mode="const", deterministic=True)


def tiny_stylegan2(**more):
    torch.manual_seed(1)
    options = dict(channel_base=256, channel_max=24, num_fp16_res=4, conv_clamp=256)
    G = stylegan2.Generator(
        **{**dict(z_dim=16, c_dim=0, w_dim=24, img_resolution=32, img_channels=3), **more},
        mapping_kwargs=dict(num_layers=3), synthesis_kwargs=options,
    )  # fmt: skip
    return randomized(G)


def randomized(G):
    """Also those tensors that are zero or one in a new network."""
    with torch.no_grad():
        for value in G.state_dict().values():
            if value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.2)
    return G.eval()


def same_bits(got, want):
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype and got[key].shape == value.shape, key
        assert torch.equal(got[key], value), key
        assert got[key].is_contiguous() and not got[key].requires_grad and type(got[key]) is torch.Tensor, key


def eg3d_images(G, seed=0):
    z = torch.randn(2, G.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return G(z, cameras.random_views(2, seed=seed), **FIXED)


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_eg3d_snapshot_comes_out_bit_for_bit(tmp_path, protocol, numpy_1):
    G = randomized(tiny_generator())
    saved = official.eg3d_network(G, cached_planes=protocol == 4, neural_rendering_resolution=13)
    whole = official.snapshot(saved, augment_pipe=official.augment_pipe())
    file = official.write(tmp_path / "network-snapshot-000200.pkl", whole, protocol, numpy_1)
    data = file.read_bytes()
    for name in ("torch_utils.persistence", "dnnlib.util", "_load_from_bytes", "OSGDecoder", "AugmentPipe"):
        assert name.encode() in data, "the file is like NVIDIA's"
    assert (b"numpy.core.multiarray" in data, b"numpy._core.multiarray" in data) == (numpy_1, not numpy_1)
    assert "training.triplane" not in sys.modules and "torch_utils" not in sys.modules

    found = read_pickle(file)
    assert found.class_name == "TriPlaneGenerator" and found.description.startswith("TriPlaneGenerator (G_ema), ")
    label_std = found.tensors.pop("dataset_label_std")
    assert label_std.shape == (25,)
    same_bits(found.tensors, G.state_dict())
    assert found.classes["superresolution"] == "SuperresolutionHybrid2X"
    assert found.attributes["neural_rendering_resolution"] == 13 and "_last_planes" not in found.attributes
    assert type(found.arguments["rendering_kwargs"]["ray_start"]) is float, "numpy's numbers became Python's"
    assert found.arguments["rendering_kwargs"]["depth_resolution"] == 7, "the constructor's copy"
    json.dumps([found.arguments, found.attributes], allow_nan=False)

    H = eg3d.load_generator(file)
    assert H.neural_rendering_resolution == 13
    assert H.rendering_kwargs["depth_resolution"] == TINY["rendering_kwargs"]["depth_resolution"], "attributes win"
    G.neural_rendering_resolution = 13
    for key, image in eg3d_images(G).items():
        assert torch.equal(eg3d_images(H)[key], image), key


@pytest.mark.parametrize("key", ["G_ema", "G", None])
@pytest.mark.parametrize("c_dim", [0, 3])
def test_a_stylegan2_snapshot_comes_out_bit_for_bit(tmp_path, c_dim, key):
    G = tiny_stylegan2(c_dim=c_dim)
    saved = official.stylegan2_network(G)
    whole = official.snapshot(tiny_network() if key == "G_ema" else saved) | {"G_ema": saved}
    if key == "G":
        del whole["G_ema"]
        whole |= {"G": saved}
    file = official.write(tmp_path / "ffhq.pkl", saved if key is None else whole, 3)
    found = read_pickle(file)
    same_bits(found.tensors, G.state_dict())
    H = stylegan2.load_generator(file)
    z, c = torch.randn(2, 16), torch.randn(2, c_dim)
    assert H.config == G.config
    assert torch.equal(H(z, c, noise_mode="const"), G(z, c, noise_mode="const"))


def tiny_network():
    return official.stylegan2_network(tiny_stylegan2(w_dim=8))


def test_flat_arguments_and_positional_ones_are_understood(tmp_path):
    """StyleGAN3's code base, from which EG3D came, has StyleGAN2's options flat."""
    torch.manual_seed(0)
    first = dict(z_dim=16, c_dim=0, w_dim=24, img_resolution=16, img_channels=3)
    flat = dict(channel_base=256, channel_max=24, fp16_channels_last=False, magnitude_ema_beta=0.999)
    G = stylegan2.Generator(**first, mapping_kwargs=dict(num_layers=2), **flat).eval()
    saved = official.official(G, official.easy(dict(mapping_kwargs=dict(num_layers=2), **flat)))
    saved.meta["state"]["_init_args"] = tuple(first.values())
    H = stylegan2.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))
    assert H.synthesis.b4.conv1.conv_clamp == 256
    z = torch.randn(1, 16)
    assert torch.equal(H(z, noise_mode="const"), G(z, noise_mode="const"))


def test_results_own_their_memory_whatever_the_view(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {
        "whole": base, "column": base[:, 2], "transposed": base.t(), "window": base[1:3, 1:5:2], "scalar": base[2, 3],
        "expanded": base[0, :1].expand(3), "empty": base[:0], "channels_last": torch.randn(2, 3, 4, 4).to(
            memory_format=torch.channels_last),
    }  # fmt: skip
    views |= {str(kind): torch.tensor([1, 0, 1]).to(kind) for kind in (
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool)}  # fmt: skip
    file = tmp_path / "g.pkl"
    file.write_bytes(network({"_parameters": {}, "_buffers": views, "_non_persistent_buffers_set": set()}))
    found = read_pickle(file).tensors
    same_bits(found, views)
    found["whole"].zero_()
    assert found["column"][1] == 8 and found["transposed"][1, 1] == 7, "no two share memory"
    file.unlink()
    assert found["window"].tolist() == [[7, 9], [13, 15]]


def test_buffers_that_are_not_saved_are_left_out(tmp_path):
    state = {"_buffers": {"kept": torch.ones(1), "not": torch.ones(1)}, "_non_persistent_buffers_set": {"not"}}
    for protocol in (3, 4):
        whole = {"G_ema": official.Persistent("Generator", {"_parameters": {}, "_modules": {}} | state)}
        assert list(read_pickle(official.write(tmp_path / "g.pkl", whole, protocol)).tensors) == ["kept"]


def full_generator(name):
    """An official configuration at its full size; cheap to draw, every value different from its initial one."""
    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[name])
    with torch.no_grad():
        for value in G.state_dict().values():
            value += 0.01
    return G.eval()


@pytest.fixture(scope="module")
def full_file(tmp_path_factory):
    G = full_generator("ffhq512-128")
    file = tmp_path_factory.mktemp("full") / "ffhq512-128.pkl"
    yield G, official.write(file, official.snapshot(official.eg3d_network(G)))
    file.unlink()


def test_a_full_ffhq512_128_file(full_file):
    G, file = full_file
    assert file.stat().st_size > 120e6
    found = read_pickle(file)
    keys = json.loads((DATA / "eg3d_ffhq512_keys.json").read_text())
    found.tensors.pop("dataset_label_std")
    shapes = {key: (list(value.shape), str(value.dtype)) for key, value in found.tensors.items()}
    assert shapes == {key: (shape, f"torch.{dtype}") for key, (shape, dtype, _) in keys.items()}
    same_bits(found.tensors, G.state_dict())
    H = eg3d.load_generator(file)
    assert H.config["rendering_kwargs"] == G.rendering_kwargs and H.neural_rendering_resolution == 128
    same_bits({key: value.detach() for key, value in H.state_dict().items()}, G.state_dict())


@pytest.mark.slow  # two pictures of 512² on one thread
def test_images_of_a_full_ffhq512_128_file(full_file):
    G, file = full_file
    H = eg3d.load_generator(file)
    few = dict(depth_resolution=4, depth_resolution_importance=2)
    z, c = torch.randn(1, 512), cameras.frontal()
    images = []
    for model in (copy.deepcopy(G), H):
        model.rendering_kwargs |= few
        with torch.no_grad():
            images.append(model(z, c, neural_rendering_resolution=16, **FIXED))
    assert images[0]["image"].shape == (1, 3, 512, 512)
    assert all(torch.equal(images[0][key], images[1][key]) for key in images[0])


@pytest.mark.parametrize("name", [name for name in eg3d.CONFIGS if name != "lab"])
def test_every_official_configuration_has_the_official_tensors(name):
    stem = {"f": "ffhq512", "a": "afhqcats512", "s": "shapenetcars128"}[name[0]]
    want = json.loads((DATA / f"eg3d_{stem}_keys.json").read_text())
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[name])
    parameters = dict(G.named_parameters())
    state = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch."), "param" if key in parameters else "buffer"]
        for key, value in G.state_dict().items()
    }
    assert state == want
    assert list(state) == list(want)


@pytest.mark.parametrize("name, num_ws, widest, last", [
    ("paper256", 14, 512, 64), ("paper512", 16, 512, 64), ("paper1024", 18, 512, 32), ("stylegan2", 18, 512, 32),
    ("auto256", 14, 512, 64), ("auto512", 16, 512, 64), ("auto1024", 18, 512, 32)])  # fmt: skip
def test_stylegan2_configurations(name, num_ws, widest, last):
    with torch.device("meta"):
        G = stylegan2.Generator(**stylegan2.CONFIGS[name])
    assert G.num_ws == num_ws and G.mapping.num_layers == (2 if name.startswith("auto") else 8)
    assert G.synthesis.b4.const.shape[0] == widest
    block = getattr(G.synthesis, f"b{G.img_resolution}")
    assert block.conv1.out_channels == last and block.conv1.conv_clamp == 256 and block.use_fp16
    halves = [r for r in G.synthesis.block_resolutions if getattr(G.synthesis, f"b{r}").use_fp16]
    assert halves == [G.img_resolution >> i for i in (3, 2, 1, 0)]


def test_automatic_ray_limits_and_a_white_background(tmp_path):
    """Both limits 'auto', as a checkpoint may have them: rays are cut to the cube, those that miss it are white."""
    G = tiny_generator()
    saved = official.eg3d_network(G)
    saved.meta["state"]["rendering_kwargs"] |= dict(ray_start="auto", ray_end="auto", white_back=True, box_warp=0.5)
    saved.meta["state"]["rendering_kwargs"] |= dict(depth_resolution=48, clean_image_raw=True)
    H = eg3d.load_generator(official.write(tmp_path / "cars.pkl", official.snapshot(saved)))
    assert H.rendering_kwargs["ray_start"] == H.rendering_kwargs["ray_end"] == "auto"
    with torch.no_grad():
        for p in H.decoder.net[2].parameters():
            p[0] = -60.0 * (p.ndim == 1)  # density: nothing anywhere
        empty = H(torch.zeros(1, 8), cameras.frontal(), neural_rendering_resolution=24, **FIXED)
        H.decoder.net[2].bias[0] = 80  # solid
        solid = H(torch.zeros(1, 8), cameras.frontal(), neural_rendering_resolution=24, **FIXED)
    torch.testing.assert_close(empty["image_raw"], torch.ones(1, 3, 24, 24))
    assert empty["image"].isfinite().all()
    depth = solid["image_depth"][0, 0]
    # the near face of the cube of side 0.5, seen from a distance of 2.7
    assert abs(depth[12, 12] - 2.45) < 0.02 and depth.isfinite().all()
    numbers = eg3d.load_generator(tmp_path / "cars.pkl")
    numbers.rendering_kwargs |= dict(ray_start=2.25, ray_end=3.3)
    assert not torch.equal(eg3d_images(H)["image_raw"], eg3d_images(numbers)["image_raw"])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, monkeypatch, name):
    data, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(data)
    with pytest.raises(FileError, match=message) as refusal:
        read_pickle(tmp_path / "evil.pkl")
    assert str(refusal.value).startswith(f"{tmp_path / 'evil.pkl'} is a pickle that ")
    assert len(str(refusal.value)) < 1000
    assert os.listdir(tmp_path) == ["evil.pkl"]


def test_the_hostile_files_are_what_they_say(tmp_path, monkeypatch):
    """Python's own unpickler does what these files want: the refusals above are no accident of broken files."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "posix.system", "eval", "Popen", "open"):
        done = pickle.loads(HOSTILE[name][0])["training_set_kwargs"]
        if hasattr(done, "wait"):
            done.wait()
        if hasattr(done, "close"):
            done.close()
        (tmp_path / CANARY).unlink()  # it is there
    with pytest.raises(ValueError):
        torch.load(io.BytesIO(IN_A_TENSOR), weights_only=False)
    (tmp_path / CANARY).unlink()  # torch's unrestricted loader, which official code calls, ran the command


AUDIT = """
import json, os, resource, sys
from pathlib import Path
from convlora.errors import FileError
from convlora.integrations.stylegan2.official_pickle import read_pickle

folder = Path(sys.argv[1])
files = sorted(folder.glob("*.pkl"))
read_pickle(folder / "valid.pkl")  # what is imported late is imported now
seen = []
watched = ("os.", "subprocess.", "exec", "compile", "import", "pickle.", "socket.", "ctypes.", "shutil.", "tempfile.",
           "marshal.", "code.", "builtins.", "webbrowser.", "urllib.")

def hook(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event.startswith(watched) or writes:
        seen.append([event, repr(arguments)[:200]])

sys.addaudithook(hook)
open(folder / "probe", "w").close()
exec("pass")
assert {"open", "exec"} <= {event for event, _ in seen}, "the hook sees"
limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
seen.clear()
said = {}
for file in files:
    try:
        said[file.name] = read_pickle(file).class_name
    except FileError as error:
        said[file.name] = "refused: " + str(error)
    except BaseException as error:
        said[file.name] = "WRONG: " + repr(error)
print(json.dumps([said, seen]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory by /proc")
def test_reading_touches_nothing_and_stays_small(tmp_path):
    """In a process of its own with an audit hook, and a limit on memory: no import, no exec, no process, no write."""
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number:03d}.pkl").write_bytes(data)
    G = tiny_generator()
    official.write(tmp_path / "valid.pkl", official.snapshot(official.eg3d_network(G)))
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, events = json.loads(done.stdout)
    assert said.pop("valid.pkl") == "TriPlaneGenerator"
    assert len(said) == len(HOSTILE) and all(word.startswith("refused: ") for word in said.values()), said
    assert events == []
    assert not (tmp_path / CANARY).exists()


def test_other_things_under_the_name_of_a_pickle(tmp_path):
    file = tmp_path / "network.pkl"
    with pytest.raises(FileError, match="no such file"):
        read_pickle(file)
    torch.save({"g_ema": {}}, file)
    with pytest.raises(FileError, match=r"zip archive, as torch\.save writes it.*rename it to \.pt"):
        read_pickle(file)
    torch.save({"g_ema": {}}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(FileError, match=r"file of torch\.save.*rename it to \.pt"):
        read_pickle(file)
    stylegan2.save_generator(tiny_stylegan2(), tmp_path / "g.safetensors")
    for data, message in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "web page"),
        ((tmp_path / "g.safetensors").read_bytes(), r"rename it to \.safetensors"),
        (b"\xff\xd8\xff\xe0 a photo", "0xff at byte 0 is no instruction"),
        (official.dumps({"D": official.discriminator()}), "a discriminator and no generator.*it has D"),
        (official.dumps(official.discriminator()), "a DualDiscriminator and no generator"),
        (official.dumps({"epoch": 3}), "no generator: 'G_ema' or 'G' is needed, it has epoch"),
        (official.dumps([1]), "holds a list, not a dictionary"),
    ):
        file.write_bytes(data)
        with pytest.raises(FileError, match=message):
            read_pickle(file)


def test_stylegan3_and_tensorflow_are_named_with_what_to_do(tmp_path):
    file = tmp_path / "network.pkl"
    layer = official.Persistent("SynthesisInput", {"_buffers": {"freqs": torch.ones(4, 2)}})
    synthesis = official.Persistent("SynthesisNetwork", {"_modules": {"input": layer}})
    G = official.Persistent("Generator", {"_modules": {"synthesis": synthesis}, "_init_kwargs": {"z_dim": 512}})
    official.write(file, {"G": G, "D": official.discriminator(), "G_ema": G})
    with pytest.raises(FileError, match="StyleGAN3 generator, whose layers are other ones"):
        stylegan2.load_generator(file)
    file.write_bytes(b"\x80\x04cdnnlib.tflib.network\nNetwork\n)\x81}b.")
    with pytest.raises(FileError, match=r"TensorFlow networks.*legacy\.py of NVIDIA's\s+stylegan2-ada-pytorch"):
        stylegan2.load_generator(file)


def test_the_wrong_family_is_named(tmp_path):
    a = official.write(tmp_path / "a.pkl", official.snapshot(official.eg3d_network(tiny_generator())))
    b = official.write(tmp_path / "b.pkl", official.snapshot(official.stylegan2_network(tiny_stylegan2())))
    with pytest.raises(FileError, match=r"EG3D generator: load it with eg3d\.load_generator"):
        stylegan2.load_generator(a)
    with pytest.raises(FileError, match=r"holds a Generator without rendering_kwargs.*stylegan2\.load_generator"):
        eg3d.load_generator(b)


def test_a_network_that_does_not_fit_its_own_arguments(tmp_path):
    saved = official.stylegan2_network(tiny_stylegan2())
    saved.meta["state"]["_init_kwargs"]["w_dim"] = 25
    with pytest.raises(FileError, match=r"\w+ has shape \(.*24.*\), the generator needs \(.*25.*\)"):
        stylegan2.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))
    saved.meta["state"]["_init_kwargs"]["colour"] = 1
    with pytest.raises(FileError, match="no option 'colour'"):
        stylegan2.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))
    saved = official.eg3d_network(tiny_generator())
    saved.meta["state"]["_modules"]["superresolution"].meta["class_name"] = "SuperresolutionHybrid9X"
    with pytest.raises(FileError, match="unknown super-resolution module 'SuperresolutionHybrid9X'"):
        eg3d.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    G = stylegan2.Generator(4, 0, 4, 4, 3, mapping_kwargs=dict(num_layers=1), synthesis_kwargs=dict(channel_max=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "SOURCE", "")  # a byte changed in there changes nothing
        whole = official.snapshot(official.stylegan2_network(G), augment_pipe=official.augment_pipe())
    file = tmp_path_factory.mktemp("fuzz") / "g.pkl"
    official.write(file, whole)
    assert read_pickle(file).class_name == "Generator"
    return file, file.read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_an_error_or_a_network(valid, data):
    """Any bytes changed, cut out or repeated: one kind of error, or tensors."""
    file, good = valid
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed) - 1)) :]
    elif data.draw(st.booleans()):
        at, more = data.draw(st.integers(0, len(changed))), data.draw(st.integers(1, 64))
        changed[at:at] = changed[at : at + more]
    file.write_bytes(changed)
    try:
        found = read_pickle(file)
    except FileError as error:
        assert str(file) in str(error)
    else:
        assert isinstance(found, Network) and found.tensors
        assert all(isinstance(value, torch.Tensor) for value in found.tensors.values())


@settings(max_examples=200, deadline=None)
@given(body=st.lists(st.sampled_from([
    b"N", b"]", b"}", b")", b"(", b"t", b"a", b"e", b"s", b"u", b"b", b"R", b"0", b"1", b"\x81", b"\x85", b"\x86",
    b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"h\x00", b"h\x01", b"q\x00", b"K\x01", b"\x8c\x01a", b"X\x01\0\0\0b",
    b"C\x02xy", b"\x8a\x01\x05", b"G\0\0\0\0\0\0\0\0", b"ccollections\nOrderedDict\n", b"cdnnlib.util\nEasyDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.storage\n_load_from_bytes\n", b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cbuiltins\nset\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ctraining.x\nY\n", b"\x8c\x02f4", b"\x8c\x01<",
]), max_size=40))  # fmt: skip
def test_any_program_of_allowed_instructions_ends_in_an_error_or_a_network(tmp_path_factory, body):
    file = tmp_path_factory.getbasetemp() / "program.pkl"
    file.write_bytes(b"\x80\x04" + b"".join(body) + b".")
    try:
        read_pickle(file)
    except FileError:
        pass


def test_a_count_of_instructions_far_from_what_real_files_need(tmp_path, monkeypatch):
    """A snapshot with three full-size networks takes a small part of what is allowed."""
    from convlora.integrations.stylegan2 import official_pickle

    G = tiny_generator()
    data = official.dumps({key: official.eg3d_network(G) for key in ("G", "D", "G_ema")})
    file = tmp_path / "g.pkl"
    file.write_bytes(data)
    used = []

    class Counting(official_pickle.Budget):
        def __del__(self):
            used.append(official_pickle.INSTRUCTIONS - self.left)

    monkeypatch.setattr(official_pickle, "Budget", Counting)
    read_pickle(file)
    gc.collect()
    # a full-size generator has the modules of this one and one more resolution in the backbone
    assert len(used) == 1 and 1000 < used[0] < official_pickle.INSTRUCTIONS / 10


@pytest.mark.parametrize("change, message", [
    ({"w_dim": 1 << 20, "z_dim": 1 << 20}, "does not fit this generator"),  # a mapping network of terabytes
    ({"w_dim": 1 << 40}, "asks for 1,099,511,627,776 of something"),
    ({"mapping_kwargs": {"num_layers": 100_000}}, "asks for 100,000 layers; the file has fewer tensors"),
    ({"img_resolution": 1 << 19}, "does not describe a Generator|does not fit"),
    ({"img_resolution": "large"}, "does not describe a Generator"),
    ({"img_resolution": -8}, "a power of two from 4 up"),
    ({"synthesis_kwargs": 5}, "does not describe a Generator"),
    ({"synthesis_kwargs": {"kernel_size": 1 << 20}}, "does not describe a Generator|does not fit"),
    ({"synthesis_kwargs": {"channel_base": 0}}, "does not describe a Generator|does not fit"),
    ({"mapping_kwargs": {"activation": [1]}}, "does not describe a Generator"),
])  # fmt: skip
def test_arguments_that_ask_for_more_than_the_file_holds(tmp_path, change, message):
    saved = official.stylegan2_network(tiny_stylegan2())
    saved.meta["state"]["_init_kwargs"] |= change
    with pytest.raises(FileError, match=message):
        stylegan2.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))


@pytest.mark.parametrize("change, message", [
    ({"neural_rendering_resolution": 1e9}, "neural_rendering_resolution 1000000000.0"),
    ({"neural_rendering_resolution": 1 << 19}, "neural_rendering_resolution 524288"),
    ({"rendering_kwargs": [1]}, "rendering_kwargs is a list"),
    ({"rendering_kwargs": {"ray_start": 1}}, "rendering_kwargs lacks ray_end, box_warp, depth_resolution"),
])  # fmt: skip
def test_attributes_of_another_kind(tmp_path, change, message):
    saved = official.eg3d_network(tiny_generator())
    saved.meta["state"] |= change
    file = official.write(tmp_path / "g.pkl", {"G_ema": saved})
    with pytest.raises(FileError, match=message):
        eg3d.load_generator(file)


def test_the_class_of_the_super_resolution_counts_not_what_the_arguments_say(tmp_path):
    """As in the released cats, by report: 8X in the file where the training program would choose 8XDC."""
    G = tiny_generator()
    saved = official.eg3d_network(G)
    saved.meta["state"]["rendering_kwargs"]["superresolution_module"] = "training.superresolution.Other"
    H = eg3d.load_generator(official.write(tmp_path / "g.pkl", {"G_ema": saved}))
    assert H.superresolution.name == "SuperresolutionHybrid2X"
    assert torch.equal(eg3d_images(H)["image"], eg3d_images(G)["image"])
