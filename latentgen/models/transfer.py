"""One request to a hub, and one file from it, resumed where it broke off and checked against its hash. Knows HTTP; knows no cache layout or model."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from latentgen.errors import ModelError

_TIMEOUT = 30.0  # seconds without an answer or a byte
_PAUSES = (1.0, 4.0, 15.0)  # seconds before a broken download is taken up again; counted anew from the last byte that came


@dataclass(frozen=True)
class Hub:
    """Where to ask and where files are kept.

    Attributes:
        endpoint: "https://host", without a slash at the end.
        cache: folder in the layout of huggingface_hub.
        offline: ask nothing.
        token: a text, False (none), or True and None (the saved one).
    """

    endpoint: str
    cache: Path
    offline: bool
    token: str | bool | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The server's name for messages, without any credentials."""
        return urlsplit(self.endpoint).hostname or "the hub"


@dataclass(frozen=True)
class File:
    """One file of a repository: size in bytes, and the hash by which the hub knows it (64 hex digits: sha256; 40: git's blob id; "": unknown)."""

    name: str
    size: int
    digest: str


class Interrupted(ModelError):
    """The hub did not answer, or stopped halfway: worth another try."""


@contextmanager
def request(hub: Hub, repo: str, path: str, *, thing: str, params: Mapping[str, str] | None = None,
            headers: Mapping[str, str] | None = None) -> Iterator[Any]:
    """One GET as a streamed answer, through huggingface_hub's session (its proxies and certificates).

    Args:
        path: after the endpoint, quoted.
        thing: what is asked for, in words: "the revision 'main'".

    Raises:
        ModelError: any failure, and `Interrupted` for those that may pass. Raised from None: the errors below carry the request, and texts that
            a server echoes, which may hold the token.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    network_error = HfHubHTTPError.__bases__[0]  # HTTPError of httpx, or of httpx2 in later releases
    sent = {"User-Agent": "latentgen", "Accept-Encoding": "identity", **(headers or {})}
    try:  # a redirect to another host (large files lie elsewhere) drops the Authorization header
        if token := _token(hub):
            sent["Authorization"] = f"Bearer {token}"
        with get_session().stream("GET", hub.endpoint + path, params=params, headers=sent, follow_redirects=True, timeout=_TIMEOUT) as answer:
            if answer.status_code >= 400 and not (answer.status_code == 416 and "Range" in sent):  # what that means is known to who asked for a part
                raise _refusal(hub.host, repo, answer.status_code, answer.headers, thing=thing, with_token=bool(token))
            yield answer
    except OfflineModeIsEnabled:
        raise not_cached(f"{thing} of {repo}") from None
    except network_error as error:
        kind = type(error).__name__
        how = f"did not answer within {_TIMEOUT:.0f} seconds" if "Timeout" in kind else f"cannot be reached or broke off ({kind})"
        raise Interrupted(f"{hub.host} {how} when asked for {thing} of {repo}: check the connection and call again") from None


def _token(hub: Hub) -> str | None:
    """The token to send, if any."""
    from huggingface_hub import get_token

    try:
        token = hub.token if isinstance(hub.token, str) or hub.token is False else get_token()
    except Exception as error:  # a token file or a login service that cannot be read, in several libraries' words
        raise ModelError(f"the saved hub token cannot be read ({type(error).__name__}): log in again, or pass token=") from None
    if hub.token is True and not token:
        raise ModelError("token=True asks for the saved hub token, but none is saved: log in with `hf auth login` or set HF_TOKEN")
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ModelError("the hub token holds spaces or other signs that no token has: copy it again")
    return token or None


def not_cached(what: str) -> ModelError:
    """The error for something that would need a request when none may be made."""
    return ModelError(f"{what} is not in the cache, and offline mode is on: fetch it once with a connection (unset HF_HUB_OFFLINE, or offline=False)")


def _refusal(host: str, repo: str, status: int, headers: Mapping[str, str], *, thing: str, with_token: bool) -> ModelError:
    """The error for an answer of 400 and above, by status and the hub's own code."""
    code, said, page = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", ""), f"{host}/{repo}"
    login = "the token that was sent may not read it: use one that may" if with_token else "log in (`hf auth login`, HF_TOKEN or token=)"
    if "resource is disabled" in said:
        return ModelError(f"{repo} was disabled on {host}: take another model")
    if status == 401 and "Invalid credentials" in said:
        return ModelError(f"{host} refused the token when asked for {repo}: make a new one, or pass token=False for a public model")
    if code == "GatedRepo" or status == 403:
        return ModelError(f"{repo} is gated: accept its licence on the model's page ({page}), and {login}")
    if status == 401:
        return ModelError(f"{repo} is not on {host}, or is private or gated: check the name, accept the licence on its page ({page}), and {login}")
    if status == 404 and code == "RevisionNotFound":
        return ModelError(f"{repo} does not have {thing}: expected a branch, tag or commit that its page ({page}) lists")
    if status == 404 and (code == "EntryNotFound" or (not code and thing.startswith("the file"))):
        return ModelError(f"{repo} does not have {thing} at that commit: see what its page ({page}) lists")
    if status == 404:
        return ModelError(f"there is no model {repo} on {host}: check the name, or log in if it is private")
    if status in (408, 429) or status >= 500:
        return Interrupted(f"{host} is busy or in trouble (status {status}) when asked for {thing} of {repo}: call again in a few minutes")
    return ModelError(f"{host} answered with status {status} when asked for {thing} of {repo}: check the name and the endpoint")


def download(hub: Hub, repo: str, path: str, *, file: File, partial: Path, report: Callable[[int], object]) -> None:
    """Complete `partial`, which may hold the beginning already, to the content of `file`.

    Args:
        report: called with the bytes that are there, after each piece.

    Raises:
        ModelError: as `request`; not the size or hash that the hub lists (`partial` is then removed); broken off for good (it is kept).
        OSError: the disk.
    """
    pauses: list[float] = []  # none before the first byte: a hub that cannot be reached at all is said at once
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        if before > file.size:
            partial.unlink()
        try:
            _append(hub, repo, path, file=file, partial=partial, report=report)
            break
        except Interrupted as trouble:
            have = partial.stat().st_size
            pauses = list(_PAUSES) if have > before else pauses
            if not pauses:
                raise ModelError(f"{trouble}; {have:,} of {file.size:,} bytes are kept" if have else str(trouble)) from None
            time.sleep(pauses.pop(0))
    if file.digest and _digest(partial, file) != file.digest:
        partial.unlink()
        raise ModelError(f"the file {file.name} of {repo} does not have the content that {hub.host} lists (its hash differs): fetch it again")


def _append(hub: Hub, repo: str, path: str, *, file: File, partial: Path, report: Callable[[int], object]) -> None:
    """One request for what is missing of a file."""
    with open(partial, "ab") as out:
        have = out.tell()
        if have == file.size:
            return
        with request(hub, repo, path, thing=f"the file {file.name}", headers={"Range": f"bytes={have}-"} if have else {}) as answer:
            if answer.status_code == 416:
                raise _unlike(repo, file, partial, f"the file ends before byte {have:,}")
            if have and answer.status_code != 206:  # the server starts from the beginning again
                out.truncate(have := 0)
            if (told := _told_size(answer, have)) not in (None, file.size):
                raise _unlike(repo, file, partial, f"{told:,} were sent" if told >= 0 else "another part of it was sent")
            for piece in answer.iter_bytes():
                have += len(piece)
                if have > file.size:
                    raise _unlike(repo, file, partial, "more were sent")
                out.write(piece)
                report(have)
    if have < file.size:
        raise Interrupted(f"{hub.host} broke off in the file {file.name} of {repo}: check the connection and call again")


def _told_size(answer: Any, have: int) -> int | None:
    """The whole file's size as an answer's headers tell it, None where they do not, -1 where it is not the part that was asked for."""
    if answer.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        return int(found[2]) if found and int(found[1]) == have else -1
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and answer.headers.get("Content-Encoding", "identity") == "identity" else None


def _unlike(repo: str, file: File, partial: Path, what: str) -> ModelError:
    partial.unlink(missing_ok=True)
    return ModelError(f"the file {file.name} of {repo} has {file.size:,} bytes in the hub's listing, but {what}: fetch it again")


def _digest(path: Path, file: File) -> str:
    """A file's hash of the kind that its listing gives: sha256, or git's (sha1 over a short header and the content)."""
    with open(path, "rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        return hashlib.file_digest(content, lambda: hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)).hexdigest()
