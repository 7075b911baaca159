"""Other people's weights: where each is published, on what terms, and how it comes here. Nothing is bundled.

A source is a path, `https://host/file#sha256=…`, or `hf://user/repository[@revision]/file` on the Hugging Face Hub.
What was fetched once lies in a cache and is used from there without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

from convlora import hub
from convlora.errors import ConvloraError, FileError, HubError

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>.+)")


@dataclass(frozen=True)
class Weights:
    """The published weights of one network.

    `sha256` may be a beginning of the digest, as in torch's own file names, or empty where none is published.
    `source` is None where the authors' own address is gone: the user has to bring the file.
    """

    source: str | None
    sha256: str
    licence: str
    about: str


_TORCH = "https://download.pytorch.org/models/"
_TORCH_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet, whose pictures are for non-commercial research"
_LPIPS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"

REGISTRY: dict[str, Weights] = {
    "yunet": Weights(
        "hf://opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx",
        "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        "MIT",
        "face detector with five landmarks",
    ),
    "alexnet": Weights(_TORCH + "alexnet-owt-7be5be79.pth", "7be5be79", _TORCH_LICENCE, "trunk of LPIPS (alex)"),
    "vgg16": Weights(_TORCH + "vgg16-397923af.pth", "397923af", _TORCH_LICENCE, "trunk of LPIPS (vgg) and DISTS"),
    "squeezenet1_1": Weights(
        _TORCH + "squeezenet1_1-b8a52dc0.pth", "b8a52dc0", _TORCH_LICENCE, "trunk of LPIPS (squeeze)"
    ),
    "lpips_alex": Weights(_LPIPS + "alex.pth", "", "BSD-2-Clause", "linear heads of LPIPS 0.1 (alex)"),
    "lpips_vgg": Weights(_LPIPS + "vgg.pth", "", "BSD-2-Clause", "linear heads of LPIPS 0.1 (vgg)"),
    "lpips_squeeze": Weights(_LPIPS + "squeeze.pth", "", "BSD-2-Clause", "linear heads of LPIPS 0.1 (squeeze)"),
    "dists": Weights(
        "https://github.com/dingkeyan93/DISTS/raw/master/DISTS_pytorch/weights.pt", "", "MIT", "alpha and beta of DISTS"
    ),
    "arcface_ir101": Weights(
        "hf://minchul/cvlface_arcface_ir101_webface4m/model.safetensors",
        "",
        "MIT by its card, which adds that the terms of its training data (WebFace4M: research only) apply",
        "ArcFace identity encoder, IR-101",
    ),
    "arcface_ir_se50": Weights(
        None,
        "",
        "not stated by its author; trained on MS1M, for research",
        "ArcFace identity encoder, IR-SE50: model_ir_se50.pth of TreB1eN/InsightFace_Pytorch, the one My3DGen uses",
    ),
}


def weights(name: str, path: str | Path | None = None) -> Path:
    """The file with the weights called `name` in `REGISTRY`: `path` if given, else a cached or fresh download.

    A file of the source's own name in the folder that the environment variable CONVLORA_WEIGHTS names is used
    before any download, for machines without a network.

    Raises:
        ConvloraError: no such name.
        FileError: `path` is missing, or the file is not the published one (checksum).
        HubError: it is neither here nor can it be fetched; the message says where to get it and how to pass it.
    """
    if name not in REGISTRY:
        raise ConvloraError(f"no weights called {name!r}; there are {', '.join(REGISTRY)}")
    known = REGISTRY[name]
    if path is not None:
        return locate(path)
    brought = os.environ.get("CONVLORA_WEIGHTS")
    if brought and known.source is not None:
        beside = Path(brought, known.source.rpartition("/")[2])
        if beside.is_file():
            return _checked(beside, known.sha256)
    help_ = f"{known.about} ({known.licence}). Give its path, or put it into the folder named by CONVLORA_WEIGHTS"
    if known.source is None:
        raise HubError(f"the weights {name!r} have no lasting address: {help_}")
    try:
        return locate(known.source, known.sha256)
    except HubError as error:
        raise HubError(f"the weights {name!r} are not here: {help_}. {error}") from None


def locate(source: str | Path, sha256: str = "") -> Path:
    """The local file that `source` stands for, fetched if it is an address; a path is returned as it is.

    Args:
        source: a path, an `https://` URL, or `hf://user/repository[@revision]/file`. `#sha256=…` may follow a URL;
            without TLS, `http://`, it must.
        sha256: the digest in hexadecimal, or its first digits; empty: not checked.

    Raises:
        FileError: no such file, or its digest is another one.
        HubError: it cannot be fetched.
    """
    text = str(source)
    if match := _HUB.fullmatch(text):
        return _checked(hub.pull(match["repo"], match["file"], revision=match["revision"]), sha256)
    if not re.match(r"https?://", text):
        if not Path(source).is_file():
            raise FileError(f"no such file: {source}")
        return _checked(Path(source), sha256)
    address, _, fragment = text.partition("#")
    sha256 = sha256 or (fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else "")
    if text.startswith("http://") and len(sha256) < 64:
        raise FileError(f"{text} is not protected on its way here: use https://, or append #sha256= and its digest")
    return _download(address, sha256)


def cache_dir() -> Path:
    """Where downloads other than the Hub's are kept: CONVLORA_CACHE, or `convlora` in the user's cache folder."""
    own = os.environ.get("CONVLORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convlora"


def digest(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: object) -> str:
    found, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while count := file.readinto(chunk):  # type: ignore[attr-defined]
        found.update(chunk[:count])
    return found.hexdigest()


def _download(address: str, sha256: str) -> Path:
    import torch.hub

    name = unquote(urlsplit(address).path.rpartition("/")[2]) or "file"
    path = cache_dir() / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if path.is_file():
        return _checked(path, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256.lower() or None)
    except RuntimeError as error:  # torch's word for a wrong digest; it has removed what it fetched
        raise FileError(f"{address} is not the file with SHA-256 {sha256}…: {error}") from None
    except (URLError, OSError, ValueError) as error:
        raise HubError(f"{address} cannot be fetched ({getattr(error, 'reason', error)})") from None
    return path


def _checked(path: Path, sha256: str) -> Path:
    if sha256 and not (found := digest(path)).startswith(sha256.lower()):
        raise FileError(f"{path} has SHA-256 {found}, not {sha256}: it is damaged or another file; fetch it again")
    return path
