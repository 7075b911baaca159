"""What the lab's two training scripts share: cameras to train on, a learning-rate curve, safe files."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.files import replacing
from convlora.integrations.eg3d import cameras


def orbit(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Cameras (N, 4, 4) that look at the origin; angles (N,) in radians, yaw to the right."""
    return cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch))


def angles(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Yaw and pitch (count,) in radians: half of them near the front as photos are, half spread evenly."""
    wide = torch.rand(count, 2, generator=generator) * 2 - 1
    near = torch.randn(count, 2, generator=generator)
    pick = (torch.rand(count, 1, generator=generator) < 0.5).float()
    both = pick * near * torch.tensor([0.22, 0.1]) + (1 - pick) * wide * torch.tensor([0.55, 0.3])
    return both[:, 0].clamp(-0.6, 0.6), both[:, 1].clamp(-0.35, 0.35)


def curve(fraction: float, warmup: float = 0.01, floor: float = 0.02) -> float:
    """Learning-rate factor after this fraction of the training: linear warm-up, then half a cosine down to `floor`."""
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    done = min((fraction - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """torch.save to a file that appears whole or not at all."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def write_provenance(path: Path, **facts: Any) -> None:
    """The JSON beside a weights file: how it was made. Times are UTC."""
    facts = {
        "procedural": True,
        "trained_on": "drawings of the lab's procedural heads; no photographs",
        "license": "Apache-2.0",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **facts,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def write_sheet(path: Path, rows: list[Tensor], scale: int = 1) -> None:
    """A PNG with one row of pictures per entry; each row is (N, 3, R, R) in [-1, 1]."""
    from PIL import Image

    strips = []
    for row in rows:
        row = F.interpolate(row.float(), size=rows[0].shape[-1]) if row.shape[-1] != rows[0].shape[-1] else row
        strips.append(row.float().clamp(-1, 1).permute(2, 0, 3, 1).reshape(row.shape[-2], -1, 3))
    picture = ((torch.cat(strips) + 1) * 127.5).round().to(torch.uint8).numpy()
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
