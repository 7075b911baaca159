"""ArcFace identity encoders: residual networks from a face to 512 numbers whose direction is the person's.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019 (the embedding
network, "IR" with the output "BN-Dropout-FC-BN") and Hu et al., "Squeeze-and-Excitation Networks", 2018, for the "SE"
variant. Two published files fit:

- IR-SE50 as TreB1eN's InsightFace_Pytorch names it (`model_ir_se50.pth`): My3DGen's, MyStyle's and pSp's encoder;
- IR-101 as CVLface names it (`model.safetensors`, with or without its `model.net.` before every key).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError

Align = Literal["pool", "center_crop", "5pt"]
SIDE = 112

#: Where ArcFace's training has eyes (left in the picture first), tip of the nose and corners of the mouth, in pixels.
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

#: Blocks of each stage; a stage halves the side and ends in 64, 128, 256 or 512 channels.
_BLOCKS = {"arcface_ir_se50": (3, 4, 14, 3), "arcface_ir101": (3, 13, 30, 3)}


class _Excite(nn.Module):
    """Squeeze-and-excitation: scale channels by what their averages say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(width // 16, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class _Block(nn.Module):
    """A residual block; IR-SE50 excites at the end, IR-101 normalises between its first convolution and the PReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, excite: bool) -> None:
        super().__init__()
        between = [] if excite else [nn.BatchNorm2d(outputs)]
        after = [_Excite(outputs)] if excite else []
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            *between,
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            *after,
        )
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)  # every second position
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class ArcFace(nn.Module):
    """An ArcFace embedding network: faces (N, 3, 112, 112), RGB in [-1, 1], to vectors (N, 512) of any length.

    Args:
        name: "arcface_ir_se50" (43.8 M parameters) or "arcface_ir101" (65.2 M).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        excite = name == "arcface_ir_se50"
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, inputs = [], 64
        for width, count in zip((64, 128, 256, 512), _BLOCKS[name], strict=True):
            for index in range(count):
                blocks.append(_Block(inputs, width, 1 if index else 2, excite))
                inputs = width
        self.body = nn.Sequential(*blocks)
        # Identity: the dropout of training, kept so that the keys after it fit
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Identity(), nn.Flatten(), nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512, affine=excite),
        )  # fmt: skip
        self.eval().requires_grad_(False)

    def forward(self, faces: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(faces)))


def check_align(align: str) -> None:
    if align not in get_args(Align):
        raise ConvloraError(f'align must be "pool", "center_crop" or "5pt", not {align!r}')


def aligned(images: Tensor, align: Align, landmarks: Tensor | None = None) -> Tensor:
    """Faces (N, 3, 112, 112) from images (N, 3, R, R) with R of 112 or more.

    - "pool": the whole image, averaged down: what My3DGen's and MyStyle's code measures with.
    - "center_crop": rows 35 to 223, columns 32 to 220 of the image brought to 256, averaged down: what pSp's
      identity loss takes of FFHQ's crops.
    - "5pt": turned, scaled and moved so that five landmarks (N, 5, 2), x and y in pixels (the first pixel's centre is
      at 0), come closest to ArcFace's template: what the networks were trained on.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < SIDE:
        raise ConvloraError(f"identity needs images (N, 3, R, R) with R of {SIDE} or more, got {tuple(images.shape)}")
    if align == "5pt":
        if landmarks is None or landmarks.shape != (len(images), 5, 2):
            got = "none" if landmarks is None else tuple(landmarks.shape)
            raise ConvloraError(f'align="5pt" needs landmarks ({len(images)}, 5, 2) of the images, got {got}')
        return _warp(images, landmarks.to(images))
    if align == "center_crop":
        images = F.adaptive_avg_pool2d(images, 256)[..., 35:223, 32:220]
    return F.adaptive_avg_pool2d(images, SIDE)


def _warp(images: Tensor, landmarks: Tensor) -> Tensor:
    """Sample where the template's pixels lie in each image, by the similarity that takes the landmarks to the template.

    Least squares as in Umeyama (1991). In complex numbers a similarity of the plane is z ↦ turn·z + shift, and its
    fit one division.
    """
    template = torch.view_as_complex(torch.tensor(TEMPLATE, device=images.device))
    points = torch.view_as_complex(landmarks.float().contiguous())
    spread = points - points.mean(1, keepdim=True)
    turn = (spread.conj() * (template - template.mean())).sum(1) / spread.abs().square().sum(1)
    shift = template.mean() - turn * points.mean(1)
    at = torch.arange(SIDE, device=images.device, dtype=torch.float32)
    pixels = torch.complex(at[None, :].expand(SIDE, SIDE), at[:, None].expand(SIDE, SIDE))
    where = torch.view_as_real((pixels - shift[:, None, None]) / turn[:, None, None])
    sides = torch.tensor([images.shape[-1], images.shape[-2]], device=images.device)
    return F.grid_sample(images, (2 * where + 1) / sides - 1, "bilinear", "zeros", align_corners=False)
