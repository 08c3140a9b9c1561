"""The hub client's names, commits, cache and refusals, against a real HTTP server on this machine (hub_server). Nothing leaves the machine."""

import logging
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from hub_server import NEW, OLD, REPO, TOKEN, UNET, WEIGHTS, FakeHub, ask, message, server  # noqa: F401

from latentgen.errors import ModelError
from latentgen.models import transfer
from latentgen.models.hub import RepoName, fetch, fetch_pipeline, files, parse


@pytest.mark.parametrize(("text", "parts"), [
    ("org/name", ("org/name", None, None)), ("org/na.me-2_x@v1.0", ("org/na.me-2_x", "v1.0", None)),
    ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None)), ("org/name:file.safetensors", ("org/name", None, "file.safetensors")),
    ("org/name@rev:sub/file.safetensors", ("org/name", "rev", "sub/file.safetensors")),
])
def test_a_hub_name_is_read(text, parts):
    assert parse(text) == RepoName(*parts)


@pytest.mark.parametrize("text", [
    "", "name", "glyph", "/org/name", "./org/name", "../org", "~/models", "C:/models", "C:\\models\\x", "org/name/sub", "org//name",
    "org/name/", "org/.name", "-org/name", "org/na--me", "org/na..me", "org/name.git", "models/file.safetensors", "models/file.GGUF",
    "org/name@", "org/name:", "org/name@a..b", "org/name@-x", "org/name@a b", "org/name:../x", "org/name:/etc/x", "org/name:a//b",
    "org/name:a\\b", "org/name:a\nb", "org/name:a:b",
    "https://hub/org/name", "org/nam\u00e9", "org/name\n", "o/" + "n" * 96, None, 7, Path("org/name"),
])
def test_anything_else_is_not_a_hub_name(text):
    assert parse(text) is None


def test_a_name_becomes_files_of_one_commit(server, ask):
    snapshot = ask()
    assert (snapshot.repo, snapshot.commit, snapshot.cached) == ("org/model", OLD, False)
    assert {file.name: file.size for file in files(snapshot)} == {name: len(content) for name, content in REPO.items()}
    told = []
    folder = fetch(snapshot, ["unet/config.json", UNET], progress=lambda *now: told.append(now))
    assert folder.parts[-2:] == ("snapshots", OLD)
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there == {name: REPO[name] for name in ("unet/config.json", UNET)}
    assert told[-1] == (len(WEIGHTS) + 2, len(WEIGHTS) + 2, UNET)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert len(server.seen) == 3  # the revision with its listing, and two files


def test_other_programs_find_what_was_fetched_and_it_finds_theirs(server, ask, tmp_path):
    """The cache is huggingface_hub's own: its functions read ours with no request, and ours theirs."""
    fetch(ask(), [UNET])
    seen = len(server.seen)
    assert Path(huggingface_hub.hf_hub_download("org/model", UNET, cache_dir=tmp_path / "hub", local_files_only=True)).read_bytes() == WEIGHTS
    assert huggingface_hub.try_to_load_from_cache("org/model", "README.md", cache_dir=tmp_path / "hub") is None
    assert huggingface_hub.scan_cache_dir(tmp_path / "hub").warnings == []
    theirs = tmp_path / "theirs" / "models--org--model"
    for path, text in ((f"snapshots/{OLD}/unet/config.json", "{}"), ("refs/main", OLD)):
        (theirs / path).parent.mkdir(parents=True, exist_ok=True)
        (theirs / path).write_text(text)
    snapshot = ask(cache=tmp_path / "theirs")
    assert snapshot.cached and (fetch(snapshot, ["unet/config.json"]) / "unet/config.json").read_text() == "{}"
    assert len(server.seen) == seen


def test_the_same_name_tomorrow_asks_nobody(server, ask):
    fetch(ask(), [UNET, "README.md"])
    server.branches["main"] = NEW
    before = len(server.seen)
    again = ask()
    assert again.cached and again.commit == OLD
    assert fetch(again, [UNET, "README.md"]).is_dir() and files(again)
    assert fetch(ask(f"org/model@{OLD}"), [UNET]).is_dir()
    assert len(server.seen) == before


def test_a_named_branch_asks_anew_and_moves_the_plain_name(server, ask):
    first = ask()
    server.commits[NEW] = REPO | {"README.md": b"new words"}
    server.branches["main"] = NEW
    assert ask().commit == OLD and ask("org/model@main").commit == NEW and ask().commit == NEW
    assert ask("org/model@refs/pr/1").commit == ask("org/model", revision="refs/pr/1").commit == OLD
    assert (fetch(first, ["README.md"]) / "README.md").read_bytes() == b"words"
    assert (fetch(ask(), ["README.md"]) / "README.md").read_bytes() == b"new words"


def test_files_come_from_the_pinned_commit_while_the_repository_moves_on(server, ask):
    snapshot = ask()
    fetch(snapshot, ["unet/config.json"])
    server.commits[NEW] = {name: content[::-1] for name, content in REPO.items()}
    server.branches["main"] = NEW
    assert (fetch(snapshot, [UNET]) / UNET).read_bytes() == WEIGHTS
    assert all(OLD in path for path, _ in server.seen if "/resolve/" in path)


def test_a_commit_is_never_asked_for(server, ask):
    snapshot = ask(f"org/model@{OLD.upper()}")
    assert (snapshot.commit, snapshot.cached, server.seen) == (OLD, False, [])
    assert (fetch(snapshot, ["README.md"]) / "README.md").read_bytes() == b"words"


@pytest.mark.parametrize(("status", "name", "says"), [
    ((401, "X-Error-Code", "GatedRepo"), "org/model", "gated.*accept its licence.*log in"),
    ((403, "X-Error-Code", "GatedRepo"), "org/model", "gated.*accept its licence.*log in"),
    ((403,), "org/model", "gated.*accept its licence"), ((401,), "org/model", "not on 127.0.0.1, or is private or gated.*HF_TOKEN"),
    ((401, "X-Error-Message", "Invalid credentials in Authorization header"), "org/model", "refused the token"),
    ((403, "X-Error-Message", "Access to this resource is disabled."), "org/model", "disabled"),
    ((), "org/other", "no model org/other on 127.0.0.1: check the name"), ((404,), "org/model", "no model org/model"),
    ((), "org/model@nowhere", "does not have the revision 'nowhere': expected a branch"), ((429,), "org/model", "busy.*few minutes"),
    ((503,), "org/model", "status 503"), ((418,), "org/model", "status 418"), ((200,), "org/model", "does not answer like a model hub"),
])
def test_what_the_hub_refuses(server, ask, status, name, says):
    server.status = status
    with pytest.raises(ModelError, match=says) as excinfo:
        ask(name)
    message(excinfo)


def test_a_file_that_is_not_there(server, ask):
    snapshot = ask()
    with pytest.raises(ModelError, match=r"no file 'unet/confg.json' at commit aaaaaaaaaa: did you mean 'unet/config.json'"):
        fetch(snapshot, ["README.md", "unet/confg.json"])
    assert len(server.seen) == 1  # said before anything is fetched
    del server.commits[OLD]["README.md"]
    with pytest.raises(ModelError, match="does not have the file README.md"):
        fetch(snapshot, ["README.md"])


def test_offline_uses_what_is_there_and_asks_nothing(server, ask, monkeypatch):
    fetch(ask(), ["README.md"])
    seen = len(server.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("org/model", "org/model@main", f"org/model@{OLD}"):
        assert (fetch(ask(name), ["README.md"]) / "README.md").read_bytes() == b"words"
    for attempt in (lambda: ask("org/other"), lambda: ask("org/model@v2"), lambda: fetch(ask(), [UNET]), lambda: files(ask(f"org/model@{NEW}"))):
        with pytest.raises(ModelError, match="not in the cache, and offline mode is on.*HF_HUB_OFFLINE"):
            attempt()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError, match="offline mode is on"):
        ask("org/other", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as it is where the variable was set when the program began
    with pytest.raises(ModelError, match="offline mode is on"):
        ask("org/other", offline=False)
    assert len(server.seen) == seen


def test_offline_without_a_listing_takes_the_disk_for_it(ask, tmp_path):
    fetch(ask(), ["README.md", UNET])
    next(tmp_path.rglob("trees")).rename(tmp_path / "away")
    assert [file.name for file in files(ask(offline=True))] == ["README.md", UNET]


def test_no_connection(server, ask):
    fetch(ask(), ["README.md"])
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()  # the connection that is still open
    with pytest.raises(ModelError, match=f"cannot be reached.*the revision 'main'.*write org/model@{OLD}") as excinfo:
        ask("org/model@main")
    message(excinfo)
    with pytest.raises(ModelError, match="cannot be reached.*check the connection"):
        fetch(ask(), [UNET])
    with pytest.raises(ModelError, match="cannot be reached") as excinfo:
        files(ask(f"org/model@{NEW}"))
    message(excinfo)
    assert fetch(ask(), ["README.md"]).is_dir()


def test_no_answer_in_time(server, ask, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUT", 0.05)
    monkeypatch.setattr(FakeHub, "revision", lambda self, _: self.rfile.read(1))  # waits for the client to give up
    with pytest.raises(ModelError, match="did not answer within 0 seconds"):
        ask()


def test_the_token_is_sent_and_never_shown(server, ask, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    snapshot = ask(token=TOKEN)
    fetch(snapshot, ["README.md"])
    assert {headers["Authorization"] for _, headers in server.seen} == {f"Bearer {TOKEN}"}
    server.status, shown = (403, "X-Error-Code", "GatedRepo"), [repr(snapshot), str(snapshot.hub)]
    attempts = (lambda: ask("org/model@x", token=TOKEN), lambda: fetch(snapshot, [UNET]), lambda: ask(token=TOKEN + "\n", revision="x"))
    for echoed in (False, True):
        if echoed:  # a server that sends it back; what the HTTP client traces of such an answer is not ours to change, so logs are read before
            shown.append(caplog.text)
            server.status = (403, "X-Error-Message", f"no access for {TOKEN}")
        for attempt in attempts:
            with pytest.raises(ModelError) as excinfo:
                attempt()
            shown.append("".join(traceback.format_exception(excinfo.value)))
    assert "HTTP Request: GET" in "".join(shown) and "the token that was sent may not read it" in shown[2]
    assert not [text for text in shown if TOKEN in text]


def test_a_saved_token_goes_to_the_configured_hub_only(server, ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ask()
    assert "Authorization" not in server.seen[-1][1]
    ask("org/model@main", token=True)
    assert server.seen[-1][1]["Authorization"] == f"Bearer {TOKEN}"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    ask("org/model@main", endpoint=None)
    assert server.seen[-1][1]["Authorization"] == f"Bearer {TOKEN}"
    ask("org/model@main", endpoint=None, token=False)
    assert "Authorization" not in server.seen[-1][1]
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    ask("org/model@main", endpoint=None)
    assert "Authorization" not in server.seen[-1][1]


def test_a_saved_token_that_is_not_there_or_not_readable(server, ask, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ModelError, match="none is saved: log in"):
        ask(token=True)
    (tmp_path / "token").mkdir()
    with pytest.raises(ModelError, match="cannot be read.*log in again") as excinfo:
        ask(token=True)
    message(excinfo)
    assert server.seen == []


@pytest.mark.parametrize("options", [
    {"endpoint": "ftp://x"}, {"endpoint": "hub"}, {"endpoint": "https://me:secret@hub"}, {"revision": "a..b"}, {"name": "nothing"},
    {"name": "org/model@a", "revision": "b"},
])
def test_odd_arguments_are_refused_without_a_request(server, ask, options):
    with pytest.raises(ModelError, match="expected") as excinfo:
        ask(**options)
    assert server.seen == [] and "secret@" not in str(excinfo.value)


def test_the_cache_is_where_other_programs_have_it(server, ask, monkeypatch, tmp_path):
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert fetch(ask(cache=None), ["README.md"]).is_relative_to(tmp_path / "home" / "hub")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", "$PLACE/named")
    assert fetch(ask(cache=None), ["README.md"]).is_relative_to(tmp_path / "named")


def test_a_pipeline_is_what_its_index_names(server, ask):
    folder = fetch_pipeline(ask())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"model_index.json", "unet/config.json", UNET, "scheduler/scheduler_config.json"}
    assert max(Counter(path for path, _ in server.seen).values()) == 1
    before = len(server.seen)
    assert fetch_pipeline(ask()) == folder and fetch_pipeline(ask(), parts=["unet"]) == folder and len(server.seen) == before
    assert (fetch_pipeline(ask(), variant="fp16") / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    server.commits[NEW] = {"model.safetensors": b"x"}
    with pytest.raises(ModelError, match="no model_index.json.*'org/name:model.safetensors'"):
        fetch_pipeline(ask(f"org/model@{NEW}"))


def test_importing_it_imports_no_client():
    code = "import sys, latentgen.models.hub; assert not {'huggingface_hub', 'httpx', 'httpx2', 'torch', 'filelock'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr == ""
