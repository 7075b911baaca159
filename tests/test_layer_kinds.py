"""Every layer kind: identity at the start, training, merged = unmerged, exact unmerge, full restoration."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convlora


class EqualizedConv(nn.Conv2d):
    """A subclass that rescales its weight: a peer that rebuilds the layer from its attributes gets it wrong."""

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.1, self.bias, self.stride, self.padding)


class StandardizedConv(nn.Conv2d):
    """Weight standardisation inside `_conv_forward`."""

    def _conv_forward(self, x, weight, bias):
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


class RawModulated(nn.Module):
    """A raw parameter in a functional call, demodulated, as StyleGAN2 layers are."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.affine = nn.Linear(7, inputs)
        self.register_buffer("w", torch.randn(2, 7))

    def forward(self, x):
        styles = self.affine(self.w) + 1
        w = self.weight[None] * styles[:, None, :, None, None]
        w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        n, _, height, width = x.shape
        y = F.conv2d(x.reshape(1, -1, height, width), w.flatten(0, 1), padding=1, groups=n)
        return y.reshape(n, -1, height, width)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(8, 6, 3, padding=1))


IMAGE = (2, 8, 9, 9)
CASES = {
    "linear": (lambda: nn.Linear(8, 6), (2, 8)),
    "linear_tokens": (lambda: nn.Linear(8, 6, bias=False), (2, 5, 8)),
    "conv1x1": (lambda: nn.Conv2d(8, 6, 1), IMAGE),
    "conv3x3": (lambda: nn.Conv2d(8, 6, 3), IMAGE),
    "no_bias": (lambda: nn.Conv2d(8, 6, 3, bias=False), IMAGE),
    "stride2": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), IMAGE),
    "dilated": (lambda: nn.Conv2d(8, 6, 3, dilation=2, padding=2), IMAGE),
    "dilated_same": (lambda: nn.Conv2d(8, 6, 3, dilation=2, padding="same"), IMAGE),
    "valid": (lambda: nn.Conv2d(8, 6, 3, padding="valid"), IMAGE),
    "reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "circular": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "replicate": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"), IMAGE),
    "groups2": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), IMAGE),
    "groups4_dilated": (lambda: nn.Conv2d(8, 12, 3, groups=4, dilation=2, stride=2), IMAGE),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), IMAGE),
    "asymmetric": (lambda: nn.Conv2d(8, 6, (1, 5), padding=(0, 2)), IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1), IMAGE),
    "transposed_groups": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2), IMAGE),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 9)),
    "conv1d_groups": (lambda: nn.Conv1d(8, 6, 3, padding=1, groups=2), (2, 8, 9)),
    "transposed1d": (lambda: nn.ConvTranspose1d(8, 6, 4, 2, 1), (2, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 5, 5)),
    "conv3d_11k": (lambda: nn.Conv3d(4, 6, (1, 1, 3)), (1, 4, 5, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (1, 4, 3, 3, 3)),
    "equalized_subclass": (lambda: EqualizedConv(8, 6, 3, padding=1), IMAGE),
    "standardized_subclass": (lambda: StandardizedConv(8, 6, 3, padding=1), IMAGE),
    "raw_modulated": (lambda: RawModulated(8, 6), IMAGE),
    "bilinear": (lambda: nn.Bilinear(3, 3, 5), None),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1)), IMAGE),
    "weight_norm_old": (old_weight_norm, IMAGE),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 6, 3, padding=1)), IMAGE),
    "spectral_norm_old": (lambda: nn.utils.spectral_norm(nn.Conv2d(8, 6, 3, padding=1)), IMAGE),
    "channels_last": (lambda: nn.Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last), IMAGE),
}
LOW_RANK = [name for name in CASES if not any(
    word in name for word in ("subclass", "norm", "raw", "bilinear"))]  # fmt: skip


class Pair(nn.Module):
    """Calls a two-input module with one input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


def build(case):
    make, shape = CASES[case]
    layer = make()
    if shape is None:
        layer, shape = Pair(layer), (2, 3)
    net = nn.Sequential(layer).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    net(x)  # old hooks compute their weight in the first forward
    return net, x


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_adapted_merged_and_restored(case, rank, randomize):
    net, x = build(case)
    before, cls = {k: v.clone() for k, v in net.state_dict().items()}, type(net[0])
    y0 = net(x).detach()
    targets = ["0"] if case == "raw_modulated" else None
    adapter = convlora.inject_lora(net, rank=rank, targets=targets)
    assert torch.equal(net(x), y0), "identity at initialisation is bit-exact"
    assert [k for k in net.state_dict() if "convlora" not in k] == list(before), "base keys stay as they were"

    net(x).square().sum().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters()}
    assert all(g is not None for g in gradients.values())
    assert all(g.abs().max() > 0 for name, g in gradients.items() if name.endswith("/B")), (
        "B learns from the first step"
    )

    randomize(adapter)
    y1 = net(x).detach()
    assert not torch.allclose(y1, y0)
    (layer,) = adapter.layers
    assert torch.linalg.matrix_rank(adapter.delta(layer).flatten(1)) == rank
    adapter.merge()
    torch.testing.assert_close(net(x), y1, rtol=1e-9, atol=1e-9)
    assert list(net.state_dict()) == list(before), "a merged model is a plain one"
    assert type(net[0]) is cls
    adapter.unmerge()
    assert torch.equal(net(x), y1), "unmerge is bit-exact"
    adapter.remove()
    assert type(net[0]) is cls
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(x), y0)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("case", LOW_RANK)
def test_both_compute_paths_agree(case, randomize):
    """The factored forward against the full effective weight: outputs and gradients, in float64."""
    net, x = build(case)
    other = copy.deepcopy(net)
    low_rank = convlora.inject_lora(net, rank=2, path="low_rank")
    weight = convlora.inject_lora(other, rank=2, path="weight")
    randomize(low_rank)
    weight.load_state_dict(low_rank.state_dict())
    low_rank.set_strength(0.7), weight.set_strength(0.7)
    x.requires_grad_()
    results = []
    for model, adapter in ((net, low_rank), (other, weight)):
        y = model(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *adapter.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [4, 32], ids=["added at the output", "weights summed"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_low_rank_path_never_forms_a_full_weight_gradient(kind, side):
    """Backward makes nothing of the weight's size but the sum of the weights, and the forward leaves it x alone."""
    net = kind(64, 64, 3, padding=1)
    adapter = convlora.inject_lora(net, rank=1, path="low_rank")
    x = torch.randn(1, 64, side, side, requires_grad=True)
    made, kept = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            views = {
                t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)
            }
            made.extend((str(func), t.numel()) for t in leaves if t.untyped_storage().data_ptr() not in views)
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = net(x).sum()
    with Watch():
        y.backward()
    own = {p.data_ptr() for p in (x, net._parameters["weight"], *adapter.parameters())}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) < 1000
    whole = [name for name, numel in made if numel == 64 * 64 * 9]
    assert len(whole) == (side == 32) and all("addmm" in name for name in whole)
    assert made


def test_low_rank_path_on_a_layer_without_one_is_refused():
    class Positive(nn.Conv2d):  # not linear in its raw weight
        def forward(self, x):
            return F.conv2d(x, self.weight.exp())

    net = nn.Sequential(Positive(8, 6, 4))
    with pytest.raises(convlora.ConvloraError, match="layer '0': Positive has no low-rank forward"):
        convlora.inject_lora(net, path="low_rank")
    assert convlora.Adapter.names(net) == [] and type(net[0]) is Positive


def test_register_layer_teaches_a_parameter_of_another_name(randomize):
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 8, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.kernel)

    net = nn.Sequential(Kernel())
    with pytest.raises(convlora.ConvloraError, match="register_layer"):
        convlora.inject_lora(net)
    convlora.register_layer(Kernel, parameter="kernel")
    x = torch.randn(2, 8, 9, 9)
    y = net(x)
    adapter = convlora.inject_lora(net)
    assert torch.equal(net(x), y)
    randomize(adapter)
    changed = net(x)
    assert not torch.allclose(changed, y)
    adapter.merge()
    torch.testing.assert_close(net(x), changed)


def test_a_registered_low_rank_forward_is_used(randomize):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 0.5)

    def low_rank(module, weight, x):
        return F.linear(x, weight.base * 0.5) + F.linear(F.linear(x, weight.right * 0.5), weight.left)

    convlora.register_layer(Scaled, low_rank=low_rank)
    net, x = nn.Sequential(Scaled(8, 6)).double(), torch.randn(3, 8).double()
    adapter = convlora.inject_lora(net, path="low_rank")
    randomize(adapter)
    y = net(x)
    adapter.merge()
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
