"""The hub: a name to files on disk. Knows names, commits and the cache on disk that other programs share; knows no family and reads no tensor.

A name is resolved to one commit first, and every file is taken from that commit. What is there is used without asking: only a name that is new here,
a named branch, or a file not yet fetched causes a request. Each file is checked by the size and hash that the hub lists, and a download that broke
off goes on where it stopped. Files only: nothing that is fetched is executed.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

from latentgen.errors import ModelError
from latentgen.models.pick import INDEX, index_parts, pick
from latentgen.models.transfer import File, Hub, Interrupted, download, not_cached, request

Progress = Callable[[int, int, str], object]  # (bytes done, bytes in all, file that is being fetched); what it raises stops the download

PUBLIC = "https://huggingface.co"
_WORD = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[^@:]+))?(?::(?P<file>[^:]+))?")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|\.lock$|[/.]$))[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
_FILE_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".bin", ".pt", ".pth", ".json", ".toml", ".zip", ".onnx", ".png", ".jpg", ".git")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN_HTTP = 50 * 10**9  # the hub serves larger files only through its own transfer program
_MAX_LISTING = 32 * 2**20


@dataclass(frozen=True)
class RepoName:
    """What the user wrote: "org/name", with "@revision" and ":file" where said."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """One state of a repository.

    Attributes:
        repo: "org/name".
        commit: 40 hex digits.
        cached: something of this commit is on disk and it was found without a request.
        hub: where it comes from.
    """

    repo: str
    commit: str
    cached: bool
    hub: Hub = field(compare=False)

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache."""
        return self.hub.cache / f"models--{self.repo.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """Where the files of this commit lie; may not exist yet."""
        return self.storage / "snapshots" / self.commit


def parse(source: object) -> RepoName | None:
    """A hub name, or None for anything else: paths, file names, bare words, names that the hub does not allow."""
    found = _NAME.fullmatch(source) if isinstance(source, str) else None
    if found is None:
        return None
    repo, revision, file = found["repo"], found["revision"], found["file"]
    bad = len(repo) > 96 or "--" in repo or ".." in repo or repo.lower().endswith(_FILE_ENDINGS)
    if bad or (revision and not _REVISION.fullmatch(revision)) or (file and not _is_inside(file)):
        return None
    return RepoName(repo, revision, file)


def resolve(name: str | RepoName, *, revision: str | None = None, token: str | bool | None = None, endpoint: str | None = None,
            cache: str | Path | None = None, offline: bool | None = None) -> Snapshot:
    """One commit for a name.

    A commit is taken as it is; a name without a revision is taken from the cache if it was resolved before; a named branch or tag asks the hub.

    Args:
        revision: branch, tag or commit, where the name has none.
        token: see `Hub`.
        endpoint, cache, offline: None reads HF_ENDPOINT, HF_HUB_CACHE (or HF_HOME) and HF_HUB_OFFLINE now.

    Raises:
        ModelError: not a hub name, unknown to the hub, no access, no connection, or offline and not in the cache.
    """
    wanted = parse(name) if isinstance(name, str) else name
    if wanted is None:
        raise ModelError(f"{name!r:.100} is not a hub name: expected 'org/name', 'org/name@revision' or 'org/name:file.safetensors'")
    if revision is not None and (wanted.revision not in (None, revision) or not _REVISION.fullmatch(revision)):
        raise ModelError(f"the revision {revision!r:.80} does not go with {name!r:.100}: expected one branch, tag or commit")
    revision, hub = revision or wanted.revision, _hub(endpoint, cache, offline, token)
    if revision and _COMMIT.fullmatch(revision.lower()):
        snapshot = Snapshot(wanted.repo, revision.lower(), False, hub)
        return replace(snapshot, cached=snapshot.folder.is_dir())
    snapshot, branch = Snapshot(wanted.repo, "", False, hub), revision or "main"
    known = _known_commit(snapshot, branch)
    if known and (revision is None or hub.offline):
        return replace(snapshot, commit=known, cached=True)
    if hub.offline:
        raise not_cached(wanted.repo if revision is None else f"{wanted.repo}@{revision}")
    try:
        commit, listing = _ask(snapshot, branch)
    except Interrupted as trouble:
        cure = f"; the last known state is in the cache: write {wanted.repo}@{known} to use it" if known else ""
        raise ModelError(f"{trouble}{cure}") from None
    snapshot = replace(snapshot, commit=commit)
    _remember(snapshot, listing)
    _write(snapshot.storage / "refs" / branch, commit)
    return snapshot


def files(snapshot: Snapshot) -> list[File]:
    """All files of a snapshot, by name; asks the hub once per commit, and offline lists what is on disk.

    Raises:
        ModelError: see `resolve`; also a listing that names files outside the repository.
    """
    listing = _recall(snapshot)
    if listing is None and snapshot.hub.offline:
        here = [path for path in snapshot.folder.rglob("*") if path.is_file()]
        listing = {name: File(name, path.stat().st_size, "") for path in here if (name := path.relative_to(snapshot.folder).as_posix())}
        if not listing:
            raise not_cached(f"{snapshot.repo}@{snapshot.commit}")
    elif listing is None:
        commit, listing = _ask(snapshot, snapshot.commit)
        if commit != snapshot.commit:
            raise ModelError(f"{snapshot.hub.host} answered with another commit of {snapshot.repo} than {snapshot.commit[:10]}: try again later")
        _remember(snapshot, listing)
    return sorted(listing.values(), key=lambda file: file.name)


def fetch(snapshot: Snapshot, names: str | Iterable[str], *, progress: Progress | None = None) -> Path:
    """Bring the named files, and no others, into the cache; those that are there cause no request.

    Returns:
        the folder that holds them under their names.

    Raises:
        ModelError: no such file, no access, no connection, disk full, or content that is not what the hub lists. What was received of a broken
            download is kept, and the next call goes on from there.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if outside := [name for name in names if not _is_inside(name)]:
        raise ModelError(f"the file name {outside[0]!r:.80} leads outside {snapshot.repo}: expected a path inside the repository")
    listing = _recall(snapshot)
    missing = [name for name in names if not _is_there(snapshot, name, listing)]
    if not missing:
        return snapshot.folder
    if snapshot.hub.offline:
        raise not_cached(f"{missing[0]} of {snapshot.repo}@{snapshot.commit[:10]}")
    listing = listing or {file.name: file for file in files(snapshot)}
    for name in missing:
        if name not in listing:
            near = difflib.get_close_matches(name, listing, n=1)
            cure = f"did you mean {near[0]!r}?" if near else "see its page for what it has"
            raise ModelError(f"{snapshot.repo} has no file {name!r} at commit {snapshot.commit[:10]}: {cure}")
        if listing[name].size > _PLAIN_HTTP:
            raise ModelError(f"{name} of {snapshot.repo} has {listing[name].size:,} bytes, more than the hub sends over plain HTTP: "
                             f"run `hf download {snapshot.repo} {name} --revision {snapshot.commit}` once, it is then found in the cache")
    _fetch_all(snapshot, [listing[name] for name in missing], progress)
    return snapshot.folder


def fetch_pipeline(snapshot: Snapshot, *, parts: Collection[str] | None = None, variant: str | None = None, progress: Progress | None = None) -> Path:
    """Bring what a diffusers layout needs into the cache: the parts that its model_index.json names (or those of them in `parts`), nothing else.

    Args:
        parts, variant: see `pick`.

    Raises:
        ModelError: see `fetch` and `pick`.
    """
    listing = files(snapshot)
    if parts is None:
        pick(listing, parts=(), variant=None)  # says so where there is no index
        index = fetch(snapshot, INDEX) / INDEX
        parts = index_parts(index.read_bytes() if index.stat().st_size < _MAX_LISTING else b"", snapshot.repo)
    return fetch(snapshot, pick(listing, parts=parts, variant=variant), progress=progress)


def _hub(endpoint: str | None, cache: str | Path | None, offline: bool | None, token: str | bool | None) -> Hub:
    """What was said, completed from the environment as it is now (huggingface_hub reads it only when it is imported)."""
    env = os.environ.get
    configured = (env("HF_ENDPOINT") or PUBLIC).rstrip("/")
    endpoint = (endpoint or configured).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", endpoint):
        raise ModelError("the hub's endpoint is not a plain web address: expected something like https://huggingface.co (secrets go into token=)")
    home = env("HF_HOME") or os.path.join(env("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    place = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")

    def on(key: str) -> bool:
        return env(key, "").upper() in ("1", "ON", "YES", "TRUE")

    if offline is None:
        offline = on("HF_HUB_OFFLINE") or on("TRANSFORMERS_OFFLINE")
    if token is None and (endpoint != configured or on("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        token = False  # a saved token belongs to the configured hub: another server gets one only if it is given
    return Hub(endpoint, Path(cache or os.path.expandvars(place)).expanduser(), offline, token)


def _is_inside(name: str) -> bool:
    """Whether a file name of a repository stays inside it, on every system."""
    windows = PureWindowsPath(name)
    odd = any(ord(sign) < 32 or sign in "\\\x7f" for sign in name)
    return not (odd or {"", ".", ".."} & set(name.split("/")) or windows.drive or windows.root)


def _known_commit(snapshot: Snapshot, branch: str) -> str | None:
    """The commit that a branch had when it was last resolved, if anything of that commit is on disk."""
    try:
        commit = (snapshot.storage / "refs" / branch).read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    known = replace(snapshot, commit=commit)
    return commit if _COMMIT.fullmatch(commit) and (known.folder.is_dir() or _recall(known) is not None) else None


def _recall(snapshot: Snapshot) -> dict[str, File] | None:
    """The listing of a commit as it was written to the cache, by this module or by huggingface_hub; None where it is absent or damaged."""
    try:
        listed = json.loads((snapshot.storage / "trees" / f"{snapshot.commit}.json").read_text("utf-8"))
        if listed["format_version"] != 1:
            return None
        return _listing([{"rfilename": name, "size": file["size"], "blobId": file["blob_id"], "lfs": {"sha256": file.get("lfs_sha256")}}
                         for name, file in listed["files"].items()])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ModelError):
        return None


def _remember(snapshot: Snapshot, listing: Mapping[str, File]) -> None:
    """Write a listing where and as huggingface_hub writes it: a commit never changes, so it is asked for once."""
    rows = {file.name: {"size": file.size, "blob_id": file.digest} for file in listing.values()}
    for file in listing.values():
        if len(file.digest) == 64:
            rows[file.name] |= {"lfs_sha256": file.digest, "lfs_size": file.size}
    _write(snapshot.storage / "trees" / f"{snapshot.commit}.json", json.dumps({"format_version": 1, "files": rows}, indent=1))


def _write(path: Path, text: str) -> None:
    """All or nothing; a cache that cannot be written (read-only, shared) is no reason to stop: the hub is then asked again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
        draft.write_text(text, "utf-8")
        os.replace(draft, path)
    except OSError:
        return


def _ask(snapshot: Snapshot, revision: str) -> tuple[str, dict[str, File]]:
    """The commit of a revision and all files in it, in one request."""
    path = f"/api/models/{snapshot.repo}/revision/{quote(revision, safe='')}"
    body = bytearray()
    with request(snapshot.hub, snapshot.repo, path, thing=f"the revision {revision!r}", params={"blobs": "true"}) as answer:
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > _MAX_LISTING:
                raise ModelError(f"the listing of {snapshot.repo} is longer than {_MAX_LISTING:,} bytes: {snapshot.hub.host} is not a model hub")
    try:
        told = json.loads(body)
        commit, rows = told["sha"], told["siblings"]
        if not _COMMIT.fullmatch(commit):
            raise ValueError
        return commit, _listing(rows)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{snapshot.hub.host} does not answer like a model hub when asked for {snapshot.repo}: check the endpoint") from None


def _listing(rows: Iterable[Mapping[str, Any]]) -> dict[str, File]:
    """Rows of the hub's answer, checked.

    Raises:
        ModelError: a name that leads outside.
        ValueError (LookupError, TypeError, AttributeError): not a listing.
    """
    listing = {}
    for row in rows:
        name, size, digest = row["rfilename"], row["size"], (row.get("lfs") or {}).get("sha256") or row["blobId"]
        if not _is_inside(name):
            raise ModelError(f"the repository lists a file {name!r:.80} that leads outside it: do not use this repository")
        if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest):
            raise ValueError
        listing[name] = File(name, size, digest)
    return listing


def _is_there(snapshot: Snapshot, name: str, listing: Mapping[str, File] | None) -> bool:
    """Whether a file is in the cache whole (by its size, where a listing tells it). Raises ModelError for a link out of the cache."""
    try:
        target = (snapshot.folder / name).resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    if not any(target.is_relative_to(place.resolve()) for place in (snapshot.storage, snapshot.hub.cache)):
        raise ModelError(f"{name} of {snapshot.repo} is a link that leads out of the cache: remove it, it is then fetched again")
    return target.is_file() and (listing is None or name not in listing or target.stat().st_size == listing[name].size)


def _fetch_all(snapshot: Snapshot, wanted: list[File], progress: Progress | None) -> None:
    """One after another; trouble with the disk as one ModelError."""
    done, total = 0, sum(file.size for file in wanted)
    try:
        _check_space(snapshot, wanted)
        for file in wanted:
            _fetch_one(snapshot, file, lambda have, name=file.name, before=done: progress and progress(before + have, total, name))
            done += file.size
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk is full while fetching {snapshot.repo}: make room and call again, what was received is kept") from None
        raise ModelError(f"the cache folder {snapshot.hub.cache.name!r} cannot be written ({error.strerror or type(error).__name__}): "
                         "set another with HF_HUB_CACHE or cache=") from None


def _check_space(snapshot: Snapshot, wanted: Iterable[File]) -> None:
    """Raises ModelError where the disk cannot hold what is still to come."""
    blobs = snapshot.storage / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    part = {file.digest: blobs / f"{file.digest}.incomplete" for file in wanted if not (blobs / file.digest).is_file()}
    needed = sum(file.size for file in wanted if file.digest in part) - sum(path.stat().st_size for path in part.values() if path.is_file())
    if needed > (free := shutil.disk_usage(blobs).free):
        raise ModelError(f"{snapshot.repo} needs {needed / 1e9:.1f} GB more but the cache's disk has {free / 1e9:.1f} GB free: make room, "
                         "or set another folder with HF_HUB_CACHE or cache=")


def _fetch_one(snapshot: Snapshot, file: File, report: Callable[[int], object]) -> None:
    """One file into the cache, in the places and under the lock that huggingface_hub uses."""
    from huggingface_hub.utils import WeakFileLock

    blob, pointer = snapshot.storage / "blobs" / file.digest, snapshot.folder / file.name
    lock = snapshot.hub.cache / ".locks" / snapshot.storage.name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if _is_there(snapshot, file.name, {file.name: file}):  # another process or thread was faster
            return
        if not blob.is_file() or blob.stat().st_size != file.size:
            blob.unlink(missing_ok=True)
            partial = blob.with_name(f"{file.digest}.incomplete")
            path = f"/{snapshot.repo}/resolve/{snapshot.commit}/{quote(file.name)}"
            download(snapshot.hub, snapshot.repo, path, file=file, partial=partial, report=report)
            os.replace(partial, blob)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if not pointer.parent.resolve().is_relative_to(snapshot.storage.resolve()):
            raise ModelError(f"the folder of {file.name} in the cache of {snapshot.repo} is a link that leads out of it: remove it")
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # a system without links: the file itself goes there, as huggingface_hub does it
            os.replace(blob, pointer)
