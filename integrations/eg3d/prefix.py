"""What stays the same while weights are tuned at fixed latents: the backbone's blocks in front of the first tuned one.

A block-wise adapter of the fine blocks, or a tuned super-resolution, leaves them as they are. They are run once per
photo, and their result is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from convlora.integrations.eg3d.batches import free_memory
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.stylegan2.generator import Begun

_SHARE = 0.25  # of the free memory, for what is kept


def constant_blocks(G: TriPlaneGenerator, tuned: Iterable[Tensor]) -> int:
    """How many of the backbone's first blocks hold none of the tensors `tuned`."""
    synthesis = G.backbone.synthesis
    changing = {id(tensor) for tensor in tuned}
    for index, resolution in enumerate(synthesis.block_resolutions):
        block = getattr(synthesis, f"b{resolution}")
        if any(id(tensor) in changing for tensor in (*block.parameters(), *block.buffers())):
            return index
    return len(synthesis.block_resolutions)


@torch.no_grad()
def constant_prefix(G: TriPlaneGenerator, w: Tensor, tuned: Iterable[Tensor], batch_size: int) -> Begun | None:
    """The constant blocks' result for w (N, w_dim), with constant noise; None without any.

    It takes at most a quarter of the device's free memory: later blocks, whose results are larger, are left out.
    """
    synthesis = G.backbone.synthesis
    blocks = constant_blocks(G, tuned)
    free = free_memory(w.device)
    while blocks and free is not None and len(w) * _bytes_after(G, blocks) > _SHARE * free:
        blocks -= 1
    if not blocks:
        return None
    ws = w[:, None].expand(-1, G.num_ws, -1)
    parts = [synthesis.advance(part, blocks, noise_mode="const") for part in ws.split(batch_size)]
    return Begun(blocks, _joined([part.x for part in parts]), _joined([part.img for part in parts]))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _bytes_after(G: TriPlaneGenerator, blocks: int) -> int:
    """What one photo's state takes after so many blocks."""
    synthesis = G.backbone.synthesis
    side = synthesis.block_resolutions[blocks - 1]
    channels = getattr(synthesis, f"b{side}").conv1.out_channels + synthesis.img_channels
    return channels * side * side * synthesis.b4.const.element_size()
