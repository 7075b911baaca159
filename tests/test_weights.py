"""Other people's weights: found, fetched once, checked; or an error that says where to get them."""

from __future__ import annotations

import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from convlora.errors import ConvloraError, FileError, HubError
from convlora.integrations import weights
from convlora.integrations.weights import REGISTRY, Weights, cache_dir, digest, locate

DATA = bytes(range(256)) * 5000  # more than one chunk of a download
SHA = hashlib.sha256(DATA).hexdigest()


class Server:
    """Files by http on loopback, some of them badly; `asked` has the paths that were asked for."""

    def __init__(self):
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                path = self.path.partition("?")[0]
                if path == "/moved.pth":
                    self.send_response(302)
                    self.send_header("Location", "/net.pth")
                elif path in ("/net.pth", "/short.pth", "/a%20net.pth", "/wrong.pth", "/no-length.pth"):
                    self.send_response(200)
                    if path != "/no-length.pth":
                        self.send_header("Content-Length", str(len(DATA)))
                else:
                    self.send_response(404)
                self.end_headers()
                if path == "/short.pth":
                    self.wfile.write(DATA[:100_000])
                elif path == "/wrong.pth":
                    self.wfile.write(DATA[::-1])
                elif path in ("/net.pth", "/a%20net.pth", "/no-length.pth"):
                    self.wfile.write(DATA)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty cache, and no way to anything but loopback."""
    monkeypatch.setenv("CONVLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVLORA_WEIGHTS", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(weights.urllib.request, "_opener", None)  # it remembers the proxies of its first use
    connect = socket.create_connection

    def loopback(address, *args, **kwargs):
        if address[0] not in ("127.0.0.1", "localhost"):
            raise OSError(f"no network: {address[0]}")
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", loopback)


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_a_path_is_itself_and_checked(tmp_path):
    file = tmp_path / "net.pth"
    with pytest.raises(FileError, match="no such file: .*net.pth"):
        locate(file)
    file.write_bytes(DATA)
    assert locate(file) == file and locate(str(file), SHA[:8]) == file and locate(file, SHA.upper()) == file
    assert digest(file) == SHA
    with pytest.raises(FileError, match=f"net.pth has SHA-256 {SHA}, not 0123: it is damaged or another file"):
        locate(file, "0123")
    with pytest.raises(FileError, match="'xyz' is no SHA-256"):
        locate(file, "xyz")
    with pytest.raises(FileError, match="ftp://host/x is no address"):
        locate("ftp://host/x")
    with pytest.raises(FileError, match="hf://user is no address: .*hf://user/repository/file"):
        locate("hf://user")


def test_a_download_happens_once(server, tmp_path):
    source = f"{server.url}/a%20net.pth#sha256={SHA}"
    path = locate(source)
    assert path.read_bytes() == DATA and path.name == "a net.pth" and kept(tmp_path) == ["a net.pth"]
    assert cache_dir() == tmp_path / "cache" and path.is_relative_to(cache_dir())
    assert locate(source) == path and server.asked == ["/a%20net.pth"]
    other = locate(f"{server.url}/no-length.pth?v=2", SHA)
    assert other.name == "no-length.pth" and other.read_bytes() == DATA
    assert locate(f"{server.url}/moved.pth", SHA).read_bytes() == DATA
    path.write_bytes(DATA[:-1])  # the copy in the cache went bad
    assert locate(source).read_bytes() == DATA and server.asked.count("/a%20net.pth") == 2


def test_without_tls_a_whole_digest_is_needed(server, tmp_path):
    for source in ("net.pth", f"net.pth#sha256={SHA[:8]}"):
        with pytest.raises(FileError, match="not protected on its way here: use https://, or append #sha256="):
            locate(f"{server.url}/{source}")
    assert server.asked == [] and kept(tmp_path) == []


@pytest.mark.parametrize("name, kind, message", [
    ("wrong.pth", FileError, f"what .*/wrong.pth gave has SHA-256 \\w+, not {SHA}: it is damaged or another file"),
    ("short.pth", HubError, r"broke off after 100,000 of 1,280,000 bytes; nothing was kept: try again"),
    ("none.pth", HubError, r"none.pth cannot be fetched \(Not Found\)"),
])  # fmt: skip
def test_a_failed_download_leaves_nothing(server, tmp_path, name, kind, message):
    for _ in range(2):
        with pytest.raises(kind, match=message):
            locate(f"{server.url}/{name}#sha256={SHA}")
    assert kept(tmp_path) == [] and len(server.asked) == 2


def test_without_a_network_the_message_says_so(server, tmp_path):
    with pytest.raises(HubError, match=r"https://example.org/net.pth cannot be fetched \(.*no network: example.org"):
        locate("https://example.org/net.pth")
    source = f"{server.url}/net.pth#sha256={SHA}"
    path = locate(source)
    server.server.shutdown()
    server.server.server_close()
    assert locate(source) == path, "what was fetched once is used from the cache"
    with pytest.raises(HubError, match="cannot be fetched"):
        locate(f"{server.url}/other.pth#sha256={SHA}")


def test_an_address_that_leads_away_from_tls_is_refused(server, tmp_path, monkeypatch):
    """https:// that redirects to http://: simulated where the answer comes in, for want of a certificate here."""
    real = weights.urllib.request.urlopen

    def urlopen(request, timeout):
        plain = request.full_url.replace("https://host", server.url)
        return real(plain, timeout=timeout)

    monkeypatch.setattr(weights.urllib.request, "urlopen", urlopen)
    with pytest.raises(HubError, match="https://host/net.pth leads to http://127.*not protected"):
        locate("https://host/net.pth")
    assert kept(tmp_path) == []
    assert locate(f"https://host/net.pth#sha256={SHA}").read_bytes() == DATA


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        repo = hub.make("opencv/zoo", private=False, net__onnx=DATA)
        repo.tags["v1"] = repo.head.oid
        for source in ("hf://opencv/zoo/net.onnx", "hf://opencv/zoo@v1/net.onnx"):
            assert locate(source, SHA).read_bytes() == DATA
        assert locate(f"hf://opencv/zoo/net.onnx#sha256={SHA}").read_bytes() == DATA
        with pytest.raises(FileError, match="SHA-256"):
            locate("hf://opencv/zoo/net.onnx#sha256=0000")
        with pytest.raises(HubError, match="there is no revision 'v2'"):
            locate("hf://opencv/zoo@v2/net.onnx")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert locate("hf://opencv/zoo/net.onnx", SHA).read_bytes() == DATA
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            locate("hf://opencv/zoo/other.onnx")


# ---- the registry --------------------------------------------------------------------------------------------------


def test_weights_by_name(server, tmp_path, monkeypatch):
    here = Weights(f"{server.url}/net.pth", SHA, "MIT", "a network")
    monkeypatch.setitem(REGISTRY, "net", here)
    assert weights.weights("net").read_bytes() == DATA
    with pytest.raises(ConvloraError, match="no weights called 'nett'; there are yunet, alexnet"):
        weights.weights("nett")
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"mine")
    assert weights.weights("net", mine) == mine, "a given path is the user's choice"
    asked = len(server.asked)
    monkeypatch.setenv("CONVLORA_WEIGHTS", str(tmp_path / "brought"))
    assert weights.weights("net").read_bytes() == DATA, "an empty folder changes nothing"
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "net.pth").write_bytes(DATA)
    assert weights.weights("net") == tmp_path / "brought" / "net.pth" and len(server.asked) == asked
    (tmp_path / "brought" / "net.pth").write_bytes(b"other")
    with pytest.raises(FileError, match="brought/net.pth has SHA-256"):
        weights.weights("net")


def test_weights_that_cannot_be_had(server, monkeypatch):
    gone = Weights(f"{server.url}/gone.pth", SHA, "MIT", "a network that moved")
    monkeypatch.setitem(REGISTRY, "gone", gone)
    said = r"'gone' are not here: a network that moved \(MIT\)\. Give its path.*CONVLORA_WEIGHTS.*fetched \(Not Found\)"
    with pytest.raises(HubError, match=said):
        weights.weights("gone")
    with pytest.raises(HubError, match="'arcface_ir_se50' have no lasting address: ArcFace.*Give its path"):
        weights.weights("arcface_ir_se50")


@pytest.mark.parametrize("name", REGISTRY)
def test_every_entry_is_an_address_with_terms(name):
    entry = REGISTRY[name]
    assert entry.licence and entry.about
    assert entry.sha256 == entry.sha256.lower() and len(entry.sha256) in (0, 8, 64)
    assert entry.source is None or entry.source.startswith(("https://", "hf://"))
    if entry.source and entry.source.startswith("hf://"):
        assert weights.HUB_FILE.fullmatch(entry.source)
