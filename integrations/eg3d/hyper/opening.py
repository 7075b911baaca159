"""Hypernetworks by the name of their file: each is opened with the encoder that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.hyper.network import VIT, Encoder, HyperNetwork, pretrained


def open_hypernetwork(path: str | Path, device: torch.device | str = "cpu") -> HyperNetwork:
    """A frozen hypernetwork from its file, or "lab" for the one that belongs to the lab's generator.

    Raises:
        FileError: no such file, or no hypernetwork.
        ConvloraError: its encoder is not known here, or the library it is from is not installed.
    """
    if str(path) == "lab":
        from convlora.integrations.eg3d.lab.hyper import load_hypernetwork

        return load_hypernetwork(device=device)
    try:
        name = str(json.loads(files.read(Path(path))[1].get("config", "{}")).get("encoder", VIT))
    except (ValueError, AttributeError):
        raise FileError(f"{path} holds no hypernetwork: its config is no JSON object") from None
    return HyperNetwork.load(path, encoder_named(name, device)).to(device).requires_grad_(False)


def encoder_named(name: str, device: torch.device | str = "cpu") -> Encoder | None:
    """None for our own "vit"; the lab's; or "timm:MODEL" and "transformers:MODEL", whose libraries fetch them.

    Raises:
        ConvloraError: another name, or the library is not installed.
    """
    if name == VIT:
        return None
    if name == "lab-identity":
        from convlora.integrations.eg3d.lab.hyper import encoder

        return encoder(device)
    source, _, model = name.partition(":")
    if source in ("timm", "transformers") and model:
        return pretrained(model, source, device=device)
    raise ConvloraError(
        f'no encoder {name!r} is known: "{VIT}", "timm:MODEL" or "transformers:MODEL"; one of your own goes to '
        "HyperNetwork.load(path, encoder=…)"
    )
