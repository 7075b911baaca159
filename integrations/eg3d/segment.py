"""Where the person is: soft masks from files, or from a network that the user brings as ONNX.

For a generator's own pictures the renderer knows how opaque each pixel is; masks from there are still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import AlbumError, ConvloraError, FileError
from convlora.integrations.eg3d.images import load_grey

#: images (N, 3, R, R) in [-1, 1] -> how much of each pixel is the person, (N, 1, R, R) in [0, 1].
Segmenter = Callable[[Tensor], Tensor]


def masks_from_files(folder: str | Path, names: Sequence[str]) -> Segmenter:
    """Masks made elsewhere: for each photo name of `names` an 8-bit grey PNG of its stem in `folder`, white = person.

    The images it is then called with must be those photos, in this order; masks of another side are resized.

    Raises:
        AlbumError: a mask is missing, unreadable, not grey, or not square.
    """
    found = []
    for name in names:
        path = Path(folder, Path(name).stem + ".png")
        if not path.is_file():
            raise AlbumError(f"no mask for {name}: {path} does not exist")
        mask = load_grey(path)
        if mask.shape[1] != mask.shape[2]:
            raise AlbumError(f"{path} is {mask.shape[2]}×{mask.shape[1]}: masks must be square, as the photos are")
        found.append(mask)

    def masks(images: Tensor) -> Tensor:
        if len(images) != len(found):
            raise ConvloraError(f"masks were read for {len(found)} photos, and {len(images)} images came")
        return torch.cat([_resized(mask[None], images.shape[-1]) for mask in found]).to(images)

    return masks


def onnx_segmenter(
    path: str | Path,
    size: int = 320,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    channel: int = -1,
) -> Segmenter:
    """A segmentation network from an ONNX file, run by OpenCV on the CPU.

    The network gets (N, 3, size, size), RGB in [0, 1] less `mean` and divided by `std` (the defaults are
    ImageNet's). Its first output is (N, K, h, w) or (N, h, w): with one channel probabilities, or logits if any
    value is outside [0, 1]; with more, the softmax over them (unless they already sum to 1), of which `channel` is
    the person.

    Raises:
        FileError: no such file, or OpenCV cannot read it.
        ConvloraError: OpenCV is not installed, or the output has another form.
    """
    try:
        import cv2
    except ImportError:
        raise ConvloraError('an ONNX segmenter needs OpenCV: pip install "convlora[faces]"') from None
    if not Path(path).is_file():
        raise FileError(f"no such file: {path}")
    try:
        net = cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise FileError(f"{path} is no ONNX network that OpenCV reads ({str(error).strip().splitlines()[0]})") from None
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def segment(images: Tensor) -> Tensor:
        side = images.shape[-1]
        inputs = (_resized((images.float().cpu() + 1) / 2, size) - shift) / scale
        net.setInput(inputs.contiguous().numpy())
        try:
            out = torch.from_numpy(net.forward()).float()
        except cv2.error as error:
            first = str(error).strip().splitlines()[0]
            raise ConvloraError(f"{path} does not run on {tuple(inputs.shape)} ({first}): give its own size") from None
        out = out[:, None] if out.ndim == 3 else out
        if out.ndim != 4 or len(out) != len(images) or not -out.shape[1] <= channel < out.shape[1]:
            raise ConvloraError(f"{path} put out {tuple(out.shape)}, not {len(images)} maps with a channel {channel}")
        return _resized(_probability(out, channel), side).clamp(0, 1).to(images)

    return segment


def _probability(out: Tensor, channel: int) -> Tensor:
    if out.shape[1] == 1:
        return out if 0 <= out.min() and out.max() <= 1 else out.sigmoid()
    probabilities = out if out.min() >= 0 and (out.sum(1) - 1).abs().max() < 1e-3 else out.softmax(1)
    return probabilities[:, channel][:, None]


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
