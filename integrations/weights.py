"""Other people's weights: where each is published, on what terms, and how it comes here. Nothing is bundled.

A source is a path, `https://host/file#sha256=…`, or `hf://user/repository[@revision]/file` on the Hugging Face Hub.
What was fetched once lies in a cache and is used from there without a network.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

from convlora import files, hub
from convlora._version import __version__
from convlora.errors import ConvloraError, FileError, HubError

_TIMEOUT = 60  # seconds without a byte
HUB_FILE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>.+)")


@dataclass(frozen=True)
class Weights:
    """The published weights of one network.

    `sha256` is empty where none is published.
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
    "alexnet": Weights(
        _TORCH + "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        _TORCH_LICENCE,
        "trunk of LPIPS (alex)",
    ),
    "vgg16": Weights(
        _TORCH + "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        _TORCH_LICENCE,
        "trunk of LPIPS (vgg) and DISTS",
    ),
    "squeezenet1_1": Weights(
        _TORCH + "squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        _TORCH_LICENCE,
        "trunk of LPIPS (squeeze)",
    ),
    "lpips_alex": Weights(
        _LPIPS + "alex.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        "BSD-2-Clause",
        "linear heads of LPIPS 0.1 (alex)",
    ),
    "lpips_vgg": Weights(
        _LPIPS + "vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        "BSD-2-Clause",
        "linear heads of LPIPS 0.1 (vgg)",
    ),
    "lpips_squeeze": Weights(
        _LPIPS + "squeeze.pth",
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        "BSD-2-Clause",
        "linear heads of LPIPS 0.1 (squeeze)",
    ),
    "dists": Weights(
        "https://github.com/dingkeyan93/DISTS/raw/master/DISTS_pytorch/weights.pt",
        "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
        "MIT",
        "alpha and beta of DISTS",
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
    address, _, fragment = str(source).partition("#sha256=") if "://" in str(source) else (str(source), "", "")
    sha256 = (sha256 or fragment).lower()
    if not re.fullmatch("[0-9a-f]{0,64}", sha256):
        raise FileError(f"{sha256!r} is no SHA-256: that is 64 hexadecimal digits, or the first of them")
    if match := HUB_FILE.fullmatch(address):
        return _checked(hub.pull(match["repo"], match["file"], revision=match["revision"]), sha256)
    if address.startswith("http://") and len(sha256) < 64:
        raise FileError(f"{address} is not protected on its way here: use https://, or append #sha256= and its digest")
    if re.match(r"https?://", address):
        return _download(address, sha256)
    if "://" in address:
        raise FileError(f"{address} is no address: https://host/file, hf://user/repository/file, or a path")
    if not Path(source).is_file():
        raise FileError(f"no such file: {source}")
    return _checked(Path(source), sha256)


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
    from tqdm import tqdm

    name = unquote(urlsplit(address).path.rpartition("/")[2]) or "file"
    path = cache_dir() / hashlib.sha256(address.encode()).hexdigest()[:16] / name.replace("/", "_")
    if path.is_file() and (not sha256 or digest(path).startswith(sha256)):
        return path
    request = urllib.request.Request(address, headers={"User-Agent": f"convlora/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, files.replacing(path) as temporary:
            if address.startswith("https://") and not answer.geturl().startswith("https://") and len(sha256) < 64:
                raise HubError(f"{address} leads to {answer.geturl()}, which is not protected on its way here")
            announced = int(answer.headers.get("Content-Length") or 0)
            with (
                open(temporary, "wb") as file,
                tqdm(desc=name, total=announced or None, unit="B", unit_scale=True, leave=False) as bar,
            ):
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
                got = file.tell()
            if got < announced:
                raise HubError(f"{address} broke off after {got:,} of {announced:,} bytes; nothing was kept: try again")
            _checked(temporary, sha256, f"what {address} gave")
    except (URLError, OSError, ValueError, http.client.HTTPException) as error:
        raise HubError(f"{address} cannot be fetched ({getattr(error, 'reason', None) or error})") from None
    return path


def _checked(path: Path, sha256: str, name: str = "") -> Path:
    if sha256 and not (found := digest(path)).startswith(sha256.lower()):
        raise FileError(f"{name or path} has SHA-256 {found}, not {sha256}: it is damaged or another file")
    return path
