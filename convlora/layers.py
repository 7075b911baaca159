"""Layer kinds: where a module keeps its raw weight, how that weight is a matrix, and its low-rank forward.

This is the only place that knows layer kinds. Other packages add theirs with `register_layer`; the matrix
view is the same for all: `weight.flatten(1)`, which is im2col `out × in/groups·kh·kw` for convolutions and
`in × out/groups·kh·kw` for transposed ones, as torch stores them. A raw modulated weight `(1, out, in, kh, kw)`,
which carries its batch dimension with it, is seen as `(out, in, kh, kw)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora import factored
from convlora.errors import ConvloraError
from convlora.factored import LowRankWeight


class Slot(NamedTuple):
    """The raw tensor behind a layer's weight: `owner._parameters[parameter]`."""

    owner: nn.Module
    parameter: str

    @property
    def tensor(self) -> Tensor:
        tensor = self.owner._parameters[self.parameter]
        assert tensor is not None  # find_slot only returns slots that hold a tensor
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's `(out, in, *kernel)`; a batch dimension in front does not count."""
        tensor = self.tensor
        return tuple(tensor.shape[1:] if _has_batch_dimension(tensor, self.owner) else tensor.shape)


#: A kind's forward with a weight that stays factored: `(module, weight, *forward's arguments) -> output`.
LowRankForward = Callable[..., Any]


class LayerKind(NamedTuple):
    matches: Callable[[nn.Module], bool]
    parameter: str
    low_rank: LowRankForward | None


_REGISTERED: list[LayerKind] = []

# Modules whose `weight` has two or more dimensions without being a linear map of features.
_NOT_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def register_layer(
    layer: type[nn.Module] | Callable[[nn.Module], bool],
    *,
    parameter: str = "weight",
    low_rank: LowRankForward | None = None,
) -> None:
    """Teach convlora a layer kind: `layer` is a class (subclasses included) or a predicate on modules.

    `parameter` names the raw tensor (2 or more dimensions) that the module reads as `self.<parameter>` in its
    forward. `low_rank(module, weight, *args, **kwargs)` computes the forward with a `LowRankWeight`; without
    it, the layer computes with the full effective weight. The last registration that matches wins.
    """
    if isinstance(layer, type):
        if not issubclass(layer, nn.Module):
            raise ConvloraError(f"register_layer needs an nn.Module class or a predicate, not {layer!r}")
        cls = layer
        matches: Callable[[nn.Module], bool] = lambda module: isinstance(module, cls)  # noqa: E731
    elif callable(layer):
        matches = layer
    else:
        raise ConvloraError(f"register_layer needs an nn.Module class or a predicate, not {layer!r}")
    _REGISTERED.insert(0, LayerKind(matches, parameter, low_rank))


def as_matrix(weight: Tensor, owner: nn.Module | None = None) -> Tensor:
    """The matrix view `(out, cols)` of a weight in any memory format; vectors and scalars become one row.

    `owner` is the module that holds the weight: it tells `(1, out, in, k, k)` from a 3-D convolution's weight.
    """
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    return weight.flatten(0, 1).flatten(1) if _has_batch_dimension(weight, owner) else weight.flatten(1)


def kernel_side(shape: tuple[int, ...]) -> int:
    """The kernel side k of a convolution weight `(out, in, *kernel)`; 1 for a linear layer."""
    return max(shape[2:], default=1)


def _has_batch_dimension(weight: Tensor, owner: nn.Module | None) -> bool:
    # Some ports of StyleGAN2 store (1, out, in, k, k), to be multiplied by styles (batch, 1, in, 1, 1). Flattened
    # from dimension 1, that is a single row, on which "rank 1" is any ΔW at all. A 3-D convolution to one channel,
    # (1, in, k, k, k), looks much the same: torch's own say so by their class, raw ones by their cubic kernel.
    if weight.ndim != 5 or weight.shape[0] != 1 or owner is None:
        return False
    known = isinstance(owner, (nn.Conv3d, nn.ConvTranspose3d, parametrize.ParametrizationList))
    return not known and weight.shape[2] != weight.shape[3]


def find_slot(module: nn.Module) -> Slot | None:
    """Where the raw weight of a layer lives, or None if the module is no layer that can be adapted.

    Under `weight_norm` and `spectral_norm` (old hooks, new parametrizations, any parametrization that keeps
    the shape) this is the raw tensor *below* the normalisation, so that a merge adds to that tensor.
    """
    kind = _registered_kind(module)
    if kind is not None:
        return _slot(module, kind.parameter)
    if isinstance(module, (*_NOT_LAYERS, torch.jit.ScriptModule)):
        return None
    if parametrize.is_parametrized(module, "weight"):
        return _slot_below(module)
    for parameter in (
        "weight",
        "weight_v",
        "weight_orig",
    ):  # the last two: old weight_norm, old spectral_norm
        slot = _slot(module, parameter)
        if slot is not None:
            return slot
    return None


def low_rank_forward(module: nn.Module) -> LowRankForward | None:
    """The low-rank forward for this module, or None where only the full effective weight is right."""
    kind = _registered_kind(module)
    if kind is not None:
        return kind.low_rank
    if "weight" not in module._parameters:
        return None  # a normalised weight: the map from raw tensor to weight is not linear
    cls: Any = own_class(module)
    # A subclass that overrides how the weight is used (to rescale it, say) is not the plain map any more.
    if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return _linear
    plain: Any
    for plain in _CONVS:
        if isinstance(module, plain):
            untouched = cls.forward is plain.forward and cls._conv_forward is plain._conv_forward
            return _conv if untouched else None
    if any(isinstance(module, plain) and cls.forward is plain.forward for plain in _TRANSPOSED):
        return _conv_transpose
    return None


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the subclass that `convlora.attach` generated for it."""
    return type(module).__dict__.get("_convlora_base", type(module))


def _registered_kind(module: nn.Module) -> LayerKind | None:
    return next((kind for kind in _REGISTERED if kind.matches(module)), None)


def _slot(owner: nn.Module, parameter: str) -> Slot | None:
    tensor = owner._parameters.get(parameter)
    if tensor is None or isinstance(tensor, nn.UninitializedParameter):
        return None
    return Slot(owner, parameter) if tensor.ndim >= 2 and tensor.is_floating_point() else None


def _slot_below(module: nn.Module) -> Slot | None:
    originals: nn.Module = module.parametrizations["weight"]  # type: ignore[index, assignment]
    training = [(part, part.training) for part in originals.modules()]
    originals.eval()  # in training, looking at a spectral_norm's weight advances its power iteration
    try:
        with torch.no_grad():
            shape = cast(Tensor, module.weight).shape
    finally:
        for part, was in training:
            part.training = was
    # weight_norm keeps (g, v) as original0, original1; the direction v is the one of the weight's own shape.
    names = [name for name, tensor in originals._parameters.items() if tensor is not None and tensor.shape == shape]
    return _slot(originals, names[-1]) if names else None


def _linear(module: nn.Linear, weight: LowRankWeight, x: Tensor) -> Tensor:
    return factored.linear(x, weight, module.bias)


def _conv(module: Any, weight: LowRankWeight, x: Tensor) -> Tensor:
    """Of torch's Conv1d to Conv3d, with any padding."""
    ends = module._reversed_padding_repeated_twice  # (last dimension's before, after, the one's before it, ...)
    if module.padding_mode != "zeros" or ends[::2] != ends[1::2]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, ends = F.pad(x, ends, mode=mode), [0] * len(ends)
    return _convolved(module, weight, x, tuple(ends[::-2]), (0,) * (len(ends) // 2))


def _conv_transpose(module: Any, weight: LowRankWeight, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """Of torch's ConvTranspose1d to ConvTranspose3d."""
    dimensions = weight.base.ndim - 2
    more = module._output_padding(
        x, output_size, module.stride, module.padding, module.kernel_size, dimensions, module.dilation
    )
    return _convolved(module, weight, x, module.padding, tuple(more))


def _convolved(
    module: Any, weight: LowRankWeight, x: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...]
) -> Tensor:
    geometry = factored.Geometry(
        module.stride, padding, module.dilation, module.transposed, output_padding, module.groups
    )
    if x.ndim == weight.base.ndim:
        return factored.convolve(x, weight, module.bias, geometry)
    return factored.convolve(x[None], weight, module.bias, geometry)[0]
