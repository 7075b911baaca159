"""The hypernetwork of HyperDreamBooth - https://arxiv.org/abs/2307.06949, section 4.2: a photo becomes codes.

An encoder turns the photo into tokens once. A transformer decoder has one token for each adapted layer, made of the
codes so far, and looks at the photo's tokens; a linear head of its own for each layer gives what is added to its codes:
θ_k = θ_{k−1} + T(f, θ_{k−1}), θ_0 = 0.

What differs here: the encoder also sees the residual, photo − G(w, c), which is what an adapter has to bring (as in
HyperStyle, https://arxiv.org/abs/2111.15666); it is a small vision transformer of our own, or any other that is
given. Codes are `offset + scale · θ`. With the default, 0 and 1, both factors of a change begin near zero, where their
product has next to no gradient; `calibrate` puts the start of the adapters that teach there instead, which changes
nothing either but has a gradient. Heads begin with outputs of standard deviation 1e-3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convlora
from convlora import Adapter, files
from convlora.errors import ConvloraError, FileError
from convlora.fingerprint import fingerprint
from convlora.integrations.eg3d.hyper.codes import Codes, Layer, Layout, layout_of
from convlora.integrations.eg3d.personalize import TARGETS

#: Photos and residuals (N, 6, R, R) to tokens (N, T, D).
Encoder = Callable[[Tensor], Tensor]

FORMAT, VERSION = "convlora-hypernetwork", "1"
VIT = "vit"  # the name of our own encoder in files
_HEAD_STD = 1e-3
#: Of the LiDB adapters that codes belong to, unless a hypernetwork says otherwise.
OPTIONS: dict[str, Any] = {"a": 100, "b": 50, "seed": 0, "relative": True}


class Patches(nn.Module):
    """The first layers of our own encoder: images (N, 6, R, R) of any size are seen at `side`, in patches."""

    def __init__(self, dim: int, side: int, patch: int) -> None:
        super().__init__()
        if side % patch:
            raise ConvloraError(f"a side of {side} pixels has no whole number of patches of {patch}")
        self.side = side
        self.early = nn.Conv2d(6, dim // 2, patch // 2, patch // 2)
        self.late = nn.Conv2d(dim // 2, dim, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.late(F.gelu(self.early(images))).flatten(2).mT


class _Outside:
    """Holds an encoder that was given: its weights are not the hypernetwork's, nor are they copied with it."""

    def __init__(self, encoder: Encoder | None) -> None:
        self.encoder = encoder

    def __deepcopy__(self, _: object) -> _Outside:
        return self


class HyperNetwork(nn.Module):
    """Photos and residuals (N, 3, R, R) in [-1, 1] and [-2, 2] to `Codes` of N people.

    Args:
        layout: of the adapters, as `layout_of` gives it; `HyperNetwork.for_generator` finds it.
        dim, heads: of every transformer block.
        depth, decoder_depth: blocks of the image encoder and of the decoder. With an `encoder` of your own, `depth`
            blocks follow it.
        refinements: k, how often the decoder is applied.
        side, patch: pixels that our own encoder sees, and of its patches.
        encoder: tokens of your own instead; a function or module that gives (N, T, D) for (N, 6, R, R). It is used as
            it is: not trained, not saved and not moved. `pretrained` makes one of a published vision transformer.
        encoder_name: what files call it.
        options: of the LiDB adapters (`convlora.methods.lidb`).
        base: fingerprint of the generator, "" for any.
    """

    offset_left: Tensor
    offset_right: Tensor
    scale_left: Tensor
    scale_right: Tensor
    used_left: Tensor
    used_right: Tensor

    def __init__(
        self,
        layout: Layout,
        *,
        dim: int = 128,
        heads: int = 4,
        depth: int = 4,
        decoder_depth: int = 3,
        refinements: int = 3,
        side: int = 128,
        patch: int = 16,
        encoder: Encoder | None = None,
        encoder_name: str = "custom",
        options: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> None:
        super().__init__()
        if refinements < 1 or dim % heads:
            raise ConvloraError(
                f"refinements={refinements} must be at least 1, and dim={dim} a multiple of heads={heads}"
            )
        self.layout, self.refinements, self.base = layout, refinements, base
        self.options = {**OPTIONS, **(options or {})}
        self._outside = _Outside(encoder)
        self.patches = Patches(dim, side, patch) if encoder is None else None
        tokens, width = (side // patch) ** 2, dim
        if encoder is not None:
            with torch.no_grad():
                tried = encoder(torch.zeros(1, 6, side, side))
            if not isinstance(tried, Tensor) or tried.ndim != 3 or len(tried) != 1:
                got = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
                raise ConvloraError(f"an encoder gives tokens (N, T, D) for pictures (N, 6, R, R), not {got}")
            tokens, width = tried.shape[1:]
        self.config: dict[str, Any] = dict(
            dim=dim, heads=heads, depth=depth, decoder_depth=decoder_depth, refinements=refinements, side=side,
            patch=patch, encoder=VIT if encoder is None else encoder_name, tokens=tokens, width=width,
        )  # fmt: skip
        self.enter = nn.Linear(width, dim)
        self.place = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        block: dict[str, Any] = dict(
            d_model=dim, nhead=heads, dim_feedforward=4 * dim, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.encode = nn.ModuleList(nn.TransformerEncoderLayer(**block) for _ in range(depth))
        self.seen = nn.LayerNorm(dim)
        count, sizes = len(layout.layers), layout.rank * (layout.a + layout.b)
        self.codes = nn.Linear(sizes, dim)
        self.layer = nn.Parameter(torch.randn(1, count, dim) * 0.02)
        self.kind = nn.Embedding(len(KINDS), dim)
        self.register_buffer("kinds", torch.tensor([_kind(layer.name) for layer in layout.layers]), persistent=False)
        self.decode = nn.ModuleList(nn.TransformerDecoderLayer(**block) for _ in range(decoder_depth))
        self.told = nn.LayerNorm(dim)
        # after a norm, features have unit size: √dim of them add up
        self.heads = nn.Parameter(torch.randn(count, dim, sizes) * (_HEAD_STD / math.sqrt(dim)))
        self.bias = nn.Parameter(torch.zeros(count, sizes))
        left, right = layout.used()
        self.register_buffer("used_left", left, persistent=False)
        self.register_buffer("used_right", right, persistent=False)
        self.register_buffer("offset_left", torch.zeros(left.shape))
        self.register_buffer("offset_right", torch.zeros(right.shape))
        self.register_buffer("scale_left", torch.ones(()))
        self.register_buffer("scale_right", torch.ones(()))

    @classmethod
    def for_generator(
        cls, G: nn.Module, rank: int = 1, targets: tuple[str, ...] = TARGETS, **arguments: Any
    ) -> HyperNetwork:
        """One whose codes are those of LiDB adapters on the layers `targets` of G, which stays as it is.

        For `stylegan2.Generator`: `targets=("synthesis.*",)`.
        """
        options = {**OPTIONS, **arguments.pop("options", {})}
        adapter = convlora.inject(G, "lidb", rank, targets=list(targets), name="layout", **options)
        try:
            layout = layout_of(adapter)
        finally:
            adapter.remove()
        return cls(layout, options=options, base=fingerprint(G), **arguments)

    def inject(self, G: nn.Module, name: str = "predicted") -> Adapter:
        """Put the adapter that codes of this network belong to on G, at its start; computes factored.

        Raises:
            ConvloraError: G is another generator than the one this network was made for.
        """
        if self.base and fingerprint(G) != self.base:
            raise ConvloraError(
                "this hypernetwork was trained for another generator, and its codes mean nothing here; train one for "
                "this generator: convlora eg3d hypernetwork"
            )
        ranks = {layer.name: self.layout.rank for layer in self.layout.layers}
        adapter = convlora.inject(
            G, "lidb", self.layout.rank, targets=self.layout.names, ranks=ranks, name=name, path="low_rank",
            **self.options,
        )  # fmt: skip
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        return adapter

    @property
    def encoder(self) -> Encoder | None:
        """The encoder that was given, or None for our own."""
        return self._outside.encoder

    def calibrate(self, offset: Codes, scale: tuple[float, float]) -> None:
        """Let codes be `offset` (1, L, …) plus `scale` (of left and right) times what the decoder adds up."""
        with torch.no_grad():
            self.offset_left.copy_(offset.left[0])
            self.offset_right.copy_(offset.right[0])
            self.scale_left.fill_(scale[0])
            self.scale_right.fill_(scale[1])

    @property
    def calibrated(self) -> bool:
        """Whether codes begin somewhere else than at 0."""
        return bool(self.offset_right.any())

    def features(self, photos: Tensor, residuals: Tensor) -> Tensor:
        """Tokens (N, T, dim) of photos and residuals (N, 3, R, R).

        Raises:
            ConvloraError: other shapes.
        """
        if photos.shape != residuals.shape or photos.ndim != 4 or photos.shape[1] != 3:
            raise ConvloraError(
                f"photos and residuals are (N, 3, R, R) of one size, not {tuple(photos.shape)} and "
                f"{tuple(residuals.shape)}"
            )
        both = torch.cat([photos, residuals], 1)
        if self.encoder is None:
            assert self.patches is not None
            tokens = self.patches(both)
        else:
            with torch.no_grad():
                tokens = self.encoder(both).to(both)
        x = self.enter(tokens) + self.place
        for block in self.encode:
            x = block(x)
        return self.seen(x)

    def forward(self, photos: Tensor, residuals: Tensor, refinements: int | None = None) -> Codes:
        """Codes of N people; `refinements` None is the network's own number."""
        seen = self.features(photos, residuals)
        count, L = len(photos), len(self.layout.layers)
        theta = seen.new_zeros(count, L, self.heads.shape[-1])
        place = self.layer + self.kind(self.kinds)
        for _ in range(self.refinements if refinements is None else refinements):
            x = self.codes(theta) + place
            for block in self.decode:
                x = block(x, seen)
            theta = theta + torch.einsum("nld,lds->nls", self.told(x), self.heads) + self.bias
        rank, b, a = self.layout.rank, self.layout.b, self.layout.a
        left, right = theta.split([rank * b, rank * a], -1)
        return Codes(
            (self.offset_left + self.scale_left * left.unflatten(-1, (b, rank))) * self.used_left,
            (self.offset_right + self.scale_right * right.unflatten(-1, (rank, a))) * self.used_right,
        )

    def save(self, path: str | Path, dtype: torch.dtype | None = torch.float16, **metadata: str) -> Path:
        """One safetensors file, written atomically. An encoder that was given is not in it, only its name."""
        tensors = {name: files.cast(tensor, dtype) for name, tensor in self.state_dict().items()}
        about = {
            "format": FORMAT, "format_version": VERSION, "config": json.dumps(self.config),
            "layers": json.dumps([list(layer) for layer in self.layout.layers]), "rank": str(self.layout.rank),
            "options": json.dumps(self.options), "base_fingerprint": self.base,
        }  # fmt: skip
        if taken := sorted(set(about) & set(metadata)):
            raise FileError(f"metadata fields {taken} are written by the hypernetwork itself; choose other names")
        return files.write(Path(path), tensors, about | metadata)

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder | None = None) -> HyperNetwork:
        """Read what `save` wrote, in float32 and eval mode.

        Raises:
            FileError: no such file, no hypernetwork, a damaged one, or one of a newer version.
            ConvloraError: it was trained with an encoder that has to be given, or another one is given.
        """
        tensors, about = files.read(Path(path))
        if about.get("format") != FORMAT:
            raise FileError(f"{path} holds no hypernetwork (metadata format={about.get('format')!r})")
        if about.get("format_version") != VERSION:
            raise FileError(
                f"{path} has format version {about.get('format_version')!r}, this convlora reads {VERSION!r}: "
                "pip install --upgrade convlora"
            )
        try:
            config = dict(json.loads(about["config"]))
            layers = tuple(Layer(str(name), int(b), int(a)) for name, b, a in json.loads(about["layers"]))
            layout, options = Layout(layers, int(about["rank"])), dict(json.loads(about["options"]))
            name, tokens, width = (config.pop(key) for key in ("encoder", "tokens", "width"))
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(f"{path}: damaged metadata of a hypernetwork ({error!r})") from None
        if (name == VIT) != (encoder is None):
            need = (
                "has its own encoder: give none"
                if name == VIT
                else f"was trained with the encoder {name!r}: give encoder="
            )
            raise ConvloraError(f"the hypernetwork {path} {need}")
        net = cls(
            layout, **config, encoder=encoder, encoder_name=str(name), options=options,
            base=about.get("base_fingerprint", ""),
        )  # fmt: skip
        if (net.config["tokens"], net.config["width"]) != (tokens, width):
            raise ConvloraError(
                f"the hypernetwork {path} was trained with an encoder of {tokens} tokens of {width} numbers, and this "
                f"one gives {net.config['tokens']} of {net.config['width']}"
            )
        try:
            net.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        except RuntimeError as error:
            raise FileError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        return net.eval()


KINDS = ("convolution", "affine", "torgb")


def _kind(layer: str) -> int:
    """Which of `KINDS` a layer of StyleGAN2 is, by its name; others count as convolutions."""
    return 1 if layer.endswith("affine") else 2 if layer.endswith("torgb") else 0


def pretrained(name: str, source: str = "timm", side: int = 224, device: torch.device | str = "cpu") -> Encoder:
    """A published vision transformer as `encoder=`: tokens of the photo and of the residual, side by side.

    Args:
        name: of the model, such as "vit_base_patch16_224.augreg_in21k" for timm or
            "google/vit-base-patch16-224-in21k" for transformers. It is fetched by that library.
        source: "timm" or "transformers".
        side: pixels that it sees.

    Raises:
        ConvloraError: the library is not installed, or another source.
    """
    if source not in ("timm", "transformers"):
        raise ConvloraError(f'source is "timm" or "transformers", not {source!r}')
    try:
        if source == "timm":
            model: Any = import_module(source).create_model(name, pretrained=True, num_classes=0)
            tokens: Callable[[Tensor], Tensor] = model.forward_features
        else:
            model = import_module(source).AutoModel.from_pretrained(name)
            tokens = lambda x: model(pixel_values=x).last_hidden_state  # noqa: E731
    except ImportError:
        raise ConvloraError(f"a {source} encoder needs {source}: pip install {source}") from None
    model.to(device).eval().requires_grad_(False)

    def encode(both: Tensor) -> Tensor:
        seen = F.interpolate(both.to(device), (side, side), mode="bilinear", antialias=True)
        pictures = torch.cat([seen[:, :3], (seen[:, 3:] / 2)])  # both in [-1, 1], as these models were trained on
        return torch.cat(tokens(pictures).chunk(2), -1)

    return encode
