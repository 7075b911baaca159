"""The lab's hypernetwork: photos of procedural people to codes of adapters on the lab's generator.

Its eyes are the lab's identity encoder, which was trained to see what makes a person: features of the photo and of what
the generator makes of it, side by side, and patches of the difference.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import FileError
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.lab import networks
from convlora.integrations.eg3d.lab.networks import IdentityEncoder

ENCODER = "lab-identity"  # what files call it
NAME = "hyper.safetensors"
_SIDE, _CELL = 8, 4  # tokens and cells of a token's patch of the residual, to a side
_UP_TO = 5  # blocks of the identity encoder: 96 channels, 8×8 of 64×64


def encoder(device: torch.device | str = "cpu", identity: IdentityEncoder | None = None) -> LabEncoder:
    """Tokens of photos and residuals, for `HyperNetwork(encoder=…)`."""
    net = identity or networks.load("identity", device)
    assert isinstance(net, IdentityEncoder)
    return LabEncoder(net)


class LabEncoder:
    """(N, 6, R, R) to (N, 64, 192 + 2·factors + 48): each token is an eighth of the picture to a side."""

    def __init__(self, identity: IdentityEncoder) -> None:
        self.identity = identity

    def __call__(self, both: Tensor) -> Tensor:
        both = both.to(self.identity.embed.weight)
        photo, residual = both[:, :3], both[:, 3:]
        pair = torch.cat([photo, photo - residual])
        net, small = self.identity, F.adaptive_avg_pool2d(pair, self.identity.size)
        x = net.blocks[:_UP_TO](F.relu(net.norm(net.stem(small))))
        local = torch.cat(x.flatten(2).mT.chunk(2), -1)
        _, factors = net.describe(small)
        overall = torch.cat(factors.chunk(2), -1)[:, None].expand(-1, local.shape[1], -1)
        cells = F.adaptive_avg_pool2d(residual, _SIDE * _CELL)
        patches = F.unfold(cells, _CELL, stride=_CELL).mT
        return torch.cat([local, overall, 2 * patches], -1)


def shipped() -> Path:
    return Path(str(files(__package__) / "data" / NAME))


def load_hypernetwork(path: str | Path | None = None, device: torch.device | str = "cpu") -> HyperNetwork:
    """The lab's hypernetwork, frozen, from `path` or from the package.

    Raises:
        FileError: there is none.
    """
    path = shipped() if path is None else Path(path)
    if not path.is_file():
        raise FileError(
            f"no hypernetwork of the lab at {path}; train it with `python -m {__package__}.train_hyper`, which writes "
            "it there if it proves better than none"
        )
    return HyperNetwork.load(path, encoder(device)).to(device).requires_grad_(False)
