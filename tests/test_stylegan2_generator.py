"""The StyleGAN2 generator: two routes to the same number, precision, gradients, files, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from convlora.errors import ConvloraError, FileError
from convlora.integrations import stylegan2
from convlora.integrations.stylegan2 import ops

SMALL = dict(z_dim=16, c_dim=0, w_dim=24, img_resolution=16, img_channels=3)
OPTIONS = dict(channel_base=256, channel_max=24)


def small(**more):
    torch.manual_seed(0)
    G = stylegan2.Generator(**SMALL, mapping_kwargs=dict(num_layers=2), synthesis_kwargs={**OPTIONS, **more})
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
    return G.eval()


@pytest.mark.parametrize("up, down, k", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (1, 1, 1), (2, 1, 1), (2, 2, 3), (4, 1, 3)])
@pytest.mark.parametrize("flip_weight", [True, False])
def test_conv_resample_equals_the_definition(up, down, k, flip_weight):
    """Zero insertion, one padding, FIR, one valid convolution, decimation, spelled out."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, k, k, dtype=torch.float64)
    f = ops.setup_filter([1, 2, 5, 3]).double()
    p = k // 2
    before = p + ((f.shape[0] + up - 1) // 2 if up > 1 else 0) + ((f.shape[0] - down + 1) // 2 if down > 1 else 0)
    after = p + ((f.shape[0] - up) // 2 if up > 1 else 0) + ((f.shape[0] - down) // 2 if down > 1 else 0)
    y = x.new_zeros(2, 3, 8 * up, 8 * up)
    y[:, :, ::up, ::up] = x
    y = F.pad(y, [before, after, before, after])
    fir = f.flip([0, 1]).expand(3, 1, 4, 4)
    if up > 1:
        y = F.conv2d(y, fir * up**2, groups=3)
    if down > 1 and up == 1:
        y = F.conv2d(y, fir, groups=3)
    y = F.conv2d(y, w if flip_weight else w.flip([2, 3]))
    if down > 1 and up > 1:
        y = F.conv2d(y, f.flip([0, 1]).expand(4, 1, 4, 4), groups=4)
    y = y[:, :, ::down, ::down]
    got = ops.conv2d_resample(x, w, f, up=up, down=down, padding=p, flip_weight=flip_weight)
    torch.testing.assert_close(got, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [True, False])
def test_fused_and_unfused_agree_with_gradients(up, demodulate):
    torch.manual_seed(0)
    f = ops.setup_filter([1, 3, 3, 1])
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 6, 6), (5, 4, 3, 3), (3, 4))]
    results = []
    for fused in (True, False):
        y = ops.modulated_conv2d(
            *inputs,
            up=up,
            padding=1,
            resample_filter=f,
            demodulate=demodulate,
            flip_weight=up == 1,
            fused_modconv=fused,
        )
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_small_kernel_without_demodulation_is_a_product(memory_format):
    """ToRGB's, with gradients of gradients, in x's memory format."""
    made = [torch.randn(s, dtype=torch.float64) for s in ((3, 4, 6, 5), (2, 4, 1, 1), (3, 4))]
    inputs = [made[0].to(memory_format=memory_format).requires_grad_(), *(t.requires_grad_() for t in made[1:])]
    x, weight, styles = inputs
    y = ops.modulated_conv2d(x, weight, styles, demodulate=False)
    expected = torch.einsum("nihw,oi,ni->nohw", x, weight[:, :, 0, 0], styles)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)
    found, wanted = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    torch.testing.assert_close(found, wanted)
    assert found[0].is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradgradcheck(
        lambda *given: ops.modulated_conv2d(*given, demodulate=False), inputs, fast_mode=True
    )


def test_gradients_are_right():
    torch.manual_seed(0)
    f = ops.setup_filter([1, 3, 3, 1])
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 3), (2, 2, 3, 3), (2, 2))]

    def up_conv(x, w, s):
        y = ops.modulated_conv2d(x, w, s, up=2, padding=1, resample_filter=f, flip_weight=False, fused_modconv=False)
        return ops.upsample2d(y, f)

    assert torch.autograd.gradcheck(up_conv, inputs, fast_mode=True)  # along random directions: seconds, not minutes


def test_channels_follow_the_rule():
    G = small()
    for r in (4, 8, 16):
        assert getattr(G.synthesis, f"b{r}").conv1.weight.shape[0] == min(256 // r, 24)
    assert G.num_ws == 2 * int(math.log2(16)) - 2


def test_nested_and_flat_options_build_the_same_network():
    nested = stylegan2.Generator(**SMALL, synthesis_kwargs=OPTIONS)
    flat = stylegan2.Generator(**SMALL, **OPTIONS)
    assert {k: v.shape for k, v in nested.state_dict().items()} == {k: v.shape for k, v in flat.state_dict().items()}
    assert nested.synthesis.b8.conv1.conv_clamp is None  # the defaults of the two official code bases
    assert flat.synthesis.b8.conv1.conv_clamp == 256


def test_each_sample_is_its_own():
    G = small()
    z = torch.randn(3, 16)
    together = G(z, noise_mode="const")
    alone = torch.cat([G(z[i : i + 1], noise_mode="const") for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)  # different kernels for one sample and for three


def test_double_model_computes_in_double():
    G = small().double()
    z = torch.randn(2, 16)
    out = G(z, noise_mode="const")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), small()(z, noise_mode="const"), rtol=0, atol=5e-5)


def test_channels_last_and_autocast():
    G = small()
    z = torch.randn(2, 16)
    want = G(z, noise_mode="const")
    last = small().to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(z, noise_mode="const"), want, rtol=0, atol=5e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = G(z, noise_mode="const")
    assert half.dtype == torch.float32  # images add up in full precision
    assert (half - want).std() < 0.03 * want.std()  # 8 bits of mantissa through five layers
    assert not torch.equal(half, want)


def test_noise_modes():
    G = small()
    z = torch.randn(1, 16)
    const, none = G(z, noise_mode="const"), G(z, noise_mode="none")
    assert torch.equal(const, G(z, noise_mode="const"))
    assert not torch.allclose(const, none)
    assert not torch.allclose(G(z), G(z))
    with pytest.raises(ConvloraError, match="noise_mode is 'constant'; one of random, const, none"):
        G(z, noise_mode="constant")


def test_truncation_and_average():
    G = small()
    z = torch.randn(64, 16)
    G.mapping(z, update_emas=True)
    w = G.mapping(z)
    torch.testing.assert_close(G.mapping.w_avg, w[:, 0].mean(0) * (1 - 0.998))
    torch.testing.assert_close(G.mapping(z, truncation_psi=0), G.mapping.w_avg.expand_as(w))
    cut = G.mapping(z, truncation_psi=0, truncation_cutoff=2)
    assert torch.equal(cut[:, 2:], w[:, 2:])


def test_compiles_without_graph_breaks():
    G = small()
    ws = G.mapping(torch.randn(2, 16)).detach()
    compiled = torch.compile(G.synthesis, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ws, noise_mode="const"), G.synthesis(ws, noise_mode="const"))


def test_functional_call_takes_plain_tensors():
    G = small()
    z = torch.randn(1, 16)
    state = {k: v.double() for k, v in G.state_dict().items()}
    out = torch.func.functional_call(G, state, (z,), dict(noise_mode="const"))
    assert out.dtype == torch.float64


def test_round_trip(tmp_path):
    G = small()
    z = torch.randn(2, 16)
    file = stylegan2.save_generator(G, tmp_path / "g.safetensors", metadata={"made_by": "a test"})
    for source in (file, tmp_path):
        H = stylegan2.load_generator(source)
        assert torch.equal(H(z, noise_mode="const"), G(z, noise_mode="const"))
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]  # no temporary file is left


def test_config_beside_the_file(tmp_path):
    G = small()
    state = {k: v for k, v in G.state_dict().items() if not k.endswith("resample_filter")}
    save_file({**state, "dataset_label_std": torch.ones(25)}, tmp_path / "g.safetensors")
    z = torch.randn(1, 16)
    H = stylegan2.load_generator(tmp_path / "g.safetensors")
    assert torch.equal(H(z, noise_mode="const"), G(z, noise_mode="const")), "inferred from the shapes"
    (tmp_path / "config.json").write_text(json.dumps({**G.config, "synthesis_kwargs": {**OPTIONS, "conv_clamp": 99}}))
    H = stylegan2.load_generator(tmp_path / "g.safetensors")
    assert H.synthesis.b4.conv1.conv_clamp == 99, "what the configuration says counts"


def test_bad_files(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        stylegan2.load_generator(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00")
    with pytest.raises(FileError, match="cannot be read as safetensors"):
        stylegan2.load_generator(broken)
    pickle = tmp_path / "g.pkl"
    pickle.write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileError, match="is a pickle"):
        stylegan2.load_generator(pickle)
    G = small()
    state = G.state_dict()
    state["synthesis.b4.const"] = torch.zeros(1, 4, 4)
    file = tmp_path / "g.safetensors"
    save_file(state, file, metadata={"config": json.dumps(G.config)})
    with pytest.raises(FileError, match=r"b4.const has shape \(1, 4, 4\), the generator needs \(24, 4, 4\)"):
        stylegan2.load_generator(file)
    state.pop("synthesis.b4.const")
    save_file(state, file, metadata={"config": json.dumps(G.config)})
    with pytest.raises(FileError, match="1 tensors missing"):
        stylegan2.load_generator(file)
    save_file(state, file, metadata={"config": json.dumps({**G.config, "colour": 1})})
    with pytest.raises(FileError, match="'colour'"):
        stylegan2.load_generator(file)


def test_unknown_and_ignored_options():
    stylegan2.Generator(**SMALL, **OPTIONS, fp16_channels_last=False)
    with pytest.raises(ConvloraError, match="no option 'chanel_base'"):
        stylegan2.Generator(**SMALL, chanel_base=256)
    with pytest.raises(ConvloraError, match="no option 'depth'"):
        stylegan2.Generator(**SMALL, mapping_kwargs=dict(depth=3))
    with pytest.raises(ConvloraError, match="power of two"):
        stylegan2.SynthesisNetwork(8, 24, 3)
    with pytest.raises(ConvloraError, match=r"z of shape \(N, 16\), got shape \(2, 8\)"):
        small()(torch.randn(2, 8))
    with pytest.raises(ConvloraError, match=r"ws must have shape \(N, 6, 24\), got \(1, 5, 24\)"):
        small().synthesis(torch.zeros(1, 5, 24))
