"""A small hub on this machine, for the tests of its client: real HTTP, one repository, and what can go wrong with it."""

import hashlib
import json
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest

from latentgen.errors import ModelError
from latentgen.models import transfer
from latentgen.models.hub import resolve

OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
REPO = {"model_index.json": json.dumps({"_class_name": "P", "unet": ["diffusers", "U"], "scheduler": ["diffusers", "S"], "gone": [None, None],
                                        "safety_checker": ["x", "Y"], "requires_safety_checker": True}).encode(),
        "unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors": WEIGHTS[:99],
        "unet/diffusion_pytorch_model.bin": b"pickle", "scheduler/scheduler_config.json": b"{} ", "safety_checker/model.safetensors": b"s",
        "safety_checker/config.json": b"{  }", "README.md": b"words", "code.py": b"raise SystemExit"}
TOKEN = "hf_thisIsVerySecret"
UNET = "unet/diffusion_pytorch_model.safetensors"


def digest(content, large):
    return hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(BaseHTTPRequestHandler):
    """One repository, "org/model", as the server's `commits` (commit -> name -> content) and `branches` say; `server` holds what goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.seen.append((path, dict(self.headers)))
        if server.status:
            return self.answer(server.status[0], b"{}", dict([server.status[1:]] if server.status[1:] else []))
        if path.startswith("/cdn/"):
            return self.content(*path.removeprefix("/cdn/").split("/", 1))
        if not path.removeprefix("/api/models").startswith("/org/model/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/org/model/revision/"):
            return self.revision(path.removeprefix("/api/models/org/model/revision/"))
        commit, _, name = path.removeprefix("/org/model/resolve/").partition("/")
        if server.cdn:
            return self.answer(302, b"", {"Location": f"{server.cdn}/cdn/{commit}/{name}", "X-Repo-Commit": commit})
        return self.content(commit, name)

    def revision(self, revision):
        commit = self.server.branches.get(revision, revision)
        if commit not in self.server.commits:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        rows = []
        for name, content in self.server.commits[commit].items():
            large = name.endswith(".safetensors")
            rows.append({"rfilename": name, "size": len(content), "blobId": digest(content, False)})
            if large:
                rows[-1]["lfs"] = {"sha256": digest(content, True), "size": len(content), "pointerSize": 130}
        self.answer(200, json.dumps({"id": "org/model", "sha": commit, "siblings": rows}).encode())

    def content(self, commit, name):
        body = self.server.swapped.get(name, self.server.commits[commit].get(name))
        if body is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        asked, size = self.headers.get("Range"), len(body)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and not self.server.no_ranges else 0
        if asked and start >= size:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        extra = {"ETag": f'"{digest(body, True)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if partly := asked and not self.server.no_ranges:
            extra["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.answer(206 if partly else 200, body[start:], extra, cut=self.server.cuts.pop(name, None))

    def answer(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = cut is not None or self.close_connection

    def log_message(self, *_):
        pass


def serve():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
    server.commits, server.branches, server.seen = {OLD: dict(REPO)}, {"main": OLD, "refs/pr/1": OLD}, []
    server.status, server.cuts, server.swapped, server.no_ranges, server.cdn = (), {}, {}, False, ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def server(monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "_PAUSES", ())  # one try a call, and no waiting
    huggingface_hub.close_session()
    running = serve()
    yield running
    running.shutdown()
    running.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def ask(server, tmp_path):
    """`resolve` against the server, with a cache of this test's own."""
    return lambda name="org/model", **options: resolve(name, **({"endpoint": server.url, "cache": tmp_path / "hub"} | options))


def message(excinfo):
    """An error's text; that it is one sentence of ours and nothing underneath is shown."""
    assert type(excinfo.value) is ModelError or isinstance(excinfo.value, transfer.Interrupted)
    shown = "".join(traceback.format_exception(excinfo.value))
    assert "httpx" not in shown and "huggingface_hub.errors" not in shown and "Traceback" in shown
    return str(excinfo.value)
