"""Where shards may come from, and their bytes as a stream: a folder, or http(s), s3, gs and hf through fsspec.

A root is data, perhaps from someone else's configuration, so only the schemes of SCHEMES are opened, each by its own
file system. Nothing here runs a command: `pipe:`, `ssh:` and fsspec's chains (`simplecache::...`) are refused.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import fsspec

from lgp_dist.errors import UserError

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": ""}
"""Scheme -> the package that reads it, where one is needed. memory is fsspec's store within this process."""
PIECE = 8 * 2**20
"""Bytes that are asked for at a time from anything but http."""
READ = 2**20
"""Largest number of bytes taken from an http answer at a time."""
AGAIN = {408, 425, 429}
"""Statuses below 500 that may go away by themselves."""


class TransferError(Exception):
    """Why a transfer failed. Its text goes on after the URL: `does not exist (404)`."""

    def __init__(self, what: str, todo: str, *, final: bool = False, spoiled: bool = False) -> None:
        super().__init__(what)
        self.todo = todo
        """What the person can do."""
        self.final = final
        """Whether another try would end the same way."""
        self.spoiled = spoiled
        """Whether what has come must not be kept."""


class Missing(TransferError):
    """There is no such file."""


@dataclass(frozen=True)
class Start:
    """What the other side says before the first byte."""

    offset: int
    """Where it begins: 0 although more was asked for, if it knows no ranges."""
    total: int | None
    """Bytes of the whole file, where it says."""
    web_page: bool = False
    """Whether it calls the file one."""


def local_path(root: str) -> Path | None:
    """The folder that a root names, or None for a remote one; raises UserError for a scheme that is not read."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", root)
    if not match:
        return Path(root)
    scheme, parts = match[1].lower(), urlsplit(root)
    if scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return Path(unquote(parts.path))
    known = ", ".join(f"{name}://" for name in SCHEMES if name != "memory")
    if scheme not in SCHEMES or "://" not in root:
        raise UserError(
            f"data.root is {_shown(root)}, but '{match[1]}:' is refused, so that no data can run a command: name a"
            f" folder (./{match[1]}:... if it is called so) or one of file://, {known}."
        )
    if "?" in root or "#" in root or "@" in parts.netloc:
        raise UserError(
            f"data.root {_shown(root)} holds a password, a query or a fragment, which would be written to logs: name"
            " the folder alone, and keep credentials in the environment or in ~/.netrc."
        )
    if not parts.netloc:
        raise UserError(f"data.root is {_shown(root)}, which names no server or bucket: write {scheme}://NAME/FOLDER.")
    return None


def _shown(root: str) -> str:
    """A root without what may be secret."""
    return re.sub(r"//[^/@]*@", "//...@", re.split(r"[?#]", root)[0])


class Remote:
    """Files below one remote root. Connections are made at first use, anew in a process that was forked."""

    def __init__(self, root: str, timeout_s: float) -> None:
        self.root = root.rstrip("/")
        self.timeout_s = timeout_s
        self._made: tuple[int, Any] | None = None

    @property
    def scheme(self) -> str:
        """http, https, s3, gs, hf or memory."""
        return self.root.split(":")[0].lower()

    def url(self, name: str) -> str:
        """Address of a file; name: relative, with forward slashes."""
        return f"{self.root}/{quote(name) if self.scheme.startswith('http') else name}"

    def chunks(self, name: str, offset: int) -> Iterator[Start | bytes]:
        """One Start, then the file's bytes from there on; raises TransferError."""
        try:
            if self.scheme.startswith("http"):
                yield from self._stream(self.url(name), offset)
            else:
                yield from self._pieces(self.url(name), offset)
        except (TransferError, UserError):
            raise
        except Exception as error:  # every file system has errors of its own
            raise trouble_of(error) from error

    def _stream(self, url: str, offset: int) -> Iterator[Start | bytes]:
        """One GET, from `offset` on where the server knows ranges."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        # Block size 0 makes it a stream; with a size, whichever, fsspec does not ask for one first.
        with self._files().open(url, block_size=0, size=1, headers=headers) as stream:
            answer = stream.r
            length = answer.headers.get("Content-Length", "")
            if answer.status == 206:
                said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
                if not said or int(said[1]) != offset:
                    raise TransferError("answered with another range than asked", "look at the server", spoiled=True)
                yield Start(offset, None if said[2] == "*" else int(said[2]))
            else:
                kind = answer.headers.get("Content-Type", "")
                yield Start(0, int(length) if length.isdigit() else None, web_page=kind.startswith("text/html"))
            while content := stream.read(READ):
                yield content

    def _pieces(self, url: str, offset: int) -> Iterator[Start | bytes]:
        """Ranges of PIECE bytes, one after the other."""
        files = self._files()
        exactly = {"cache_type": "none"} if self.scheme == "hf" else {}  # it would read 5 MiB ahead of each piece
        total = int(files.info(url)["size"])
        yield Start(min(offset, total), total)
        for start in range(offset, total, PIECE):
            yield files.cat_file(url, start=start, end=min(start + PIECE, total), **exactly)

    def _files(self) -> Any:
        """fsspec's file system for this process; raises UserError where its package is missing."""
        if self._made is None or self._made[0] != os.getpid():
            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if self.scheme.startswith("http"):
                timeout = aiohttp.ClientTimeout(total=None, connect=self.timeout_s, sock_read=self.timeout_s)
                options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
            try:
                self._made = (os.getpid(), fsspec.filesystem(self.scheme, **options))
            except ImportError as error:
                package = SCHEMES[self.scheme]
                raise UserError(
                    f"data.root {self.root} needs the package {package}, which cannot be imported: run"
                    f" `pip install {package}`, or copy the shards to a folder."
                ) from error
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None}


def trouble_of(error: Exception) -> TransferError:
    """What an exception of a file system means."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return Missing("does not exist (404)", "check data.root and that everything was uploaded", final=True)
    if status in (401, 403) or isinstance(error, PermissionError):
        said = f" ({status})" if status else ""
        return TransferError(f"may not be read{said}", "give this machine the right to read it", final=True)
    if status == 416:
        return TransferError("is shorter than what had come of it before (416)", "upload it again", spoiled=True)
    if status:
        final = status < 500 and status not in AGAIN
        return TransferError(f"answered with status {status}", "look at the server, or check data.root", final=final)
    if isinstance(error, TimeoutError):
        return stall()
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransferError(f"cannot be reached ({error})", "check the name, the network and the server")
    if isinstance(error, aiohttp.ClientError | ConnectionError | EOFError):
        return cut()
    return TransferError(f"cannot be read ({type(error).__name__}: {error})", "check data.root and its credentials")


def cut() -> TransferError:
    """The connection ended too early."""
    return TransferError("was cut off before its end", "look at the network and the server, or raise data.retries")


def stall() -> TransferError:
    """Nothing came, or hardly anything."""
    return TransferError("stalled", "look at the network and the server, or raise data.timeout_s")
