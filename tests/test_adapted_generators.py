"""Whole generators with an adapter on: what GAN trainers do with them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny import tiny_generator

import convlora
from convlora.integrations import stylegan2
from convlora.integrations.eg3d import cameras


def generator() -> stylegan2.Generator:
    torch.manual_seed(0)
    return stylegan2.Generator(8, 0, 8, 16, 3, mapping_kwargs={"num_layers": 2}, channel_base=128, channel_max=8).eval()


Z = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def draw(G, z=Z):
    return G(z, None, noise_mode="const")


@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_copy_save_compile_and_average_an_adapted_stylegan2(path, randomize):
    G = generator()
    keys, y0 = list(G.state_dict()), draw(G)
    layers = [row.name for row in convlora.adaptable(G) if row.low_rank_path or path == "weight"]
    adapter = convlora.inject_lora(G, rank=1, targets=layers, path=path)
    assert torch.equal(draw(G), y0)
    assert [key for key in G.state_dict() if "convlora" not in key] == keys
    randomize(adapter)
    y = draw(G)
    assert not torch.allclose(y, y0)
    file = io.BytesIO()
    torch.save(G, file)
    file.seek(0)
    for twin in (copy.deepcopy(G), torch.load(file, weights_only=False)):
        assert torch.equal(draw(twin), y)
    torch._dynamo.reset()
    compiled = torch.compile(G.synthesis, fullgraph=True, backend="aot_eager")
    ws = G.mapping(Z, None).detach()
    torch.testing.assert_close(compiled(ws, noise_mode="const"), y, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(G)
    with torch.no_grad():  # the way StyleGAN2 averages: parameter by parameter
        for mine, theirs in zip(twin.parameters(), G.parameters()):
            mine.copy_(torch.zeros_like(mine).lerp(theirs, 1.0))
    assert torch.equal(draw(twin), y)
    adapter.merge()
    torch.testing.assert_close(draw(G), y, rtol=1e-4, atol=1e-4)
    plain = generator()
    plain.load_state_dict(G.state_dict())
    assert torch.equal(draw(plain), draw(G))
    adapter.remove()
    assert torch.equal(draw(G), y0) and list(G.state_dict()) == keys


@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_path_length_gradients_reach_the_adapter(path):
    """‖∂(image·noise)/∂w‖ differentiated again: the path length regulariser of StyleGAN2."""
    G = generator().double()
    layers = [row.name for row in convlora.adaptable(G, "synthesis.*") if row.low_rank_path]
    adapter = convlora.inject_lora(G, rank=1, targets=layers, path=path)
    ws = G.mapping(Z.double(), None).detach().requires_grad_()
    image = G.synthesis(ws, noise_mode="const")
    (gradient,) = torch.autograd.grad((image * torch.randn_like(image)).sum(), ws, create_graph=True)
    gradient.square().sum(2).mean(1).sqrt().sum().backward()
    grads = {name: p.grad for name, p in adapter.named_parameters() if name.endswith("/B")}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert sum(g.abs().max() > 0 for g in grads.values()) >= len(grads) - 1


def test_an_adapted_eg3d_moves_between_precisions_and_formats(randomize):
    G = tiny_generator()
    adapter = convlora.inject_lora(G, rank=1, targets=["backbone.synthesis.*", "superresolution.*"], train=["decoder"])
    randomize(adapter, 0.05)
    c, ws = cameras.frontal(1), torch.randn(1, G.num_ws, G.w_dim)
    y = G.synthesis(ws, c, noise_mode="const", deterministic=True)["image"]
    last = G.to(memory_format=torch.channels_last).synthesis(ws, c, noise_mode="const", deterministic=True)["image"]
    torch.testing.assert_close(last, y, rtol=1e-3, atol=1e-3)
    double = G.double().synthesis(ws.double(), c.double(), noise_mode="const", deterministic=True)["image"]
    torch.testing.assert_close(double.float(), y, rtol=1e-3, atol=1e-3)
