"""What the hub client writes to disk: resumed, checked, kept inside its cache; against a real HTTP server on this machine (hub_server)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import OLD, TOKEN, UNET, WEIGHTS, ask, message, serve, server  # noqa: F401

from latentgen.errors import ModelError
from latentgen.models import hub, transfer
from latentgen.models.hub import fetch


def partials(cache):
    return [path for path in cache.rglob("*.incomplete")]


def test_a_broken_download_goes_on_where_it_stopped(server, ask, tmp_path):
    server.cuts[UNET] = 300_000
    with pytest.raises(ModelError, match="broke off.*300,000 of 1,048,576 bytes are kept") as excinfo:
        fetch(ask(), [UNET])
    message(excinfo)
    assert [path.stat().st_size for path in partials(tmp_path)] == [300_000]
    assert not [path for path in tmp_path.rglob(Path(UNET).name)]
    told = []
    folder = fetch(ask(), [UNET], progress=lambda *now: told.append(now))
    assert (folder / UNET).read_bytes() == WEIGHTS and told[0][0] > 300_000 and not partials(tmp_path)
    assert [headers.get("Range") for path, headers in server.seen if "/resolve/" in path] == [None, "bytes=300000-"]


def test_within_one_call_it_goes_on_by_itself(server, ask, monkeypatch):
    monkeypatch.setattr(transfer, "_PAUSES", (0.0,))
    server.cuts[UNET] = 300_000
    assert (fetch(ask(), [UNET]) / UNET).read_bytes() == WEIGHTS
    assert [headers.get("Range") for path, headers in server.seen if "/resolve/" in path] == [None, "bytes=300000-"]


def test_a_server_without_ranges_sends_it_again(server, ask):
    server.cuts[UNET], server.no_ranges = 300_000, True
    with pytest.raises(ModelError, match="are kept"):
        fetch(ask(), [UNET])
    assert (fetch(ask(), [UNET]) / UNET).read_bytes() == WEIGHTS


def test_a_stop_by_the_caller_keeps_what_came(server, ask, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, name):
        raise Stop

    with pytest.raises(Stop):
        fetch(ask(), [UNET], progress=stop)
    assert partials(tmp_path)[0].stat().st_size > 0
    assert (fetch(ask(), [UNET]) / UNET).read_bytes() == WEIGHTS


@pytest.mark.parametrize(("sent", "says"), [
    (WEIGHTS[:-1], "1,048,576 bytes in the hub's listing, but 1,048,575 were sent"), (WEIGHTS + b"x", "but 1,048,577 were sent"),
    (WEIGHTS[:-1] + b"x", "does not have the content that 127.0.0.1 lists"),
])
def test_other_content_than_listed_is_thrown_away(server, ask, tmp_path, sent, says):
    server.swapped[UNET] = sent
    with pytest.raises(ModelError, match=says):
        fetch(ask(), [UNET])
    assert not partials(tmp_path) and not [path for path in tmp_path.rglob(Path(UNET).name)]
    server.swapped.clear()
    assert (fetch(ask(), [UNET]) / UNET).read_bytes() == WEIGHTS


def test_small_files_are_checked_too(server, ask):
    server.swapped["README.md"] = b"wards"
    with pytest.raises(ModelError, match="its hash differs"):
        fetch(ask(), ["README.md"])


def test_a_resumed_file_that_became_shorter(server, ask, tmp_path):
    server.cuts[UNET] = 300_000
    with pytest.raises(ModelError, match="are kept"):
        fetch(ask(), [UNET])
    server.swapped[UNET] = WEIGHTS[:1000]
    with pytest.raises(ModelError, match="the file ends before byte 300,000"):
        fetch(ask(), [UNET])
    assert not partials(tmp_path)


def test_a_damaged_file_in_the_cache_is_fetched_again(server, ask):
    path = fetch(ask(), [UNET]) / UNET
    path.write_bytes(WEIGHTS[:10])
    with pytest.raises(ModelError, match="offline"):
        fetch(ask(offline=True), [UNET])
    assert (fetch(ask(), [UNET]) / UNET).read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a/../../b", "a//b", "a\\..\\b", "C:/x", "x\0y", "."])
def test_names_that_lead_outside_are_refused(server, ask, tmp_path, name):
    server.commits[OLD][name] = b"x"
    with pytest.raises(ModelError, match="leads outside"):
        ask()
    del server.commits[OLD][name]
    with pytest.raises(ModelError, match="leads outside"):
        fetch(ask(), [name])
    assert not list(tmp_path.rglob("*escaped*"))


def test_links_out_of_the_cache_are_refused(server, ask, tmp_path):
    folder = fetch(ask(), ["README.md"])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    (folder / "code.py").symlink_to(tmp_path / "secret" / "config.json")
    with pytest.raises(ModelError, match="code.py of org/model is a link that leads out"):
        fetch(ask(), ["code.py"])
    (folder / "unet").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leads out"):
        fetch(ask(), ["unet/config.json"])
    with pytest.raises(ModelError, match="leads out"):
        fetch(ask(), [UNET])
    assert os.listdir(tmp_path / "secret") == ["config.json"]


def test_a_full_disk(server, ask, monkeypatch, tmp_path):
    snapshot = ask()
    usage = hub.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"needs 0.0 GB more but the cache's disk has 0.0 GB free: make room"):
        fetch(snapshot, [UNET])
    assert len(server.seen) == 1
    monkeypatch.undo()

    def full(done, total, name):  # what a write raises on a disk that fills up meanwhile
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="the disk is full.*what was received is kept") as excinfo:
        fetch(snapshot, [UNET], progress=full)
    message(excinfo)


def test_a_file_too_large_for_plain_http(ask, monkeypatch):
    monkeypatch.setattr(hub, "_PLAIN_HTTP", 1000)
    with pytest.raises(ModelError, match=f"run `hf download org/model {UNET} --revision {OLD}`"):
        fetch(ask(), [UNET])


def test_a_redirect_elsewhere_does_not_carry_the_token(server, ask):
    other = serve()
    server.cdn = other.url.replace("127.0.0.1", "localhost")
    assert (fetch(ask(token=TOKEN), [UNET]) / UNET).read_bytes() == WEIGHTS
    other.shutdown()
    other.server_close()
    assert "Authorization" in server.seen[-1][1] and [headers.get("Authorization") for _, headers in other.seen] == [None]


def test_threads_that_want_the_same_file_fetch_it_once(server, ask):
    snapshot = ask()
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch(snapshot, [UNET]), range(4)))
    assert (folders[0] / UNET).read_bytes() == WEIGHTS
    assert len([path for path, _ in server.seen if path.endswith(UNET)]) == 1
