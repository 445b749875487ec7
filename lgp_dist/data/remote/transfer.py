"""The bytes of one remote file, through fsspec's file systems for http(s), s3, gs and hf."""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import aiohttp
import fsspec

from lgp_dist.data.remote.address import SCHEMES
from lgp_dist.errors import UserError

FLOOR = 64 * 2**10
"""Bytes that must come within each timeout; a slower transfer counts as stalled."""
PIECE = 8 * 2**20
"""Largest number of bytes of one range request; http needs none, its answer is one stream."""
READ = 2**20
"""Largest number of bytes taken from an http answer at a time."""
TEMPORARY = {408, 425, 429}
"""Statuses below 500 after which another try may succeed."""


class TransferError(Exception):
    """Why a transfer failed. Its text continues a sentence that begins with the URL: `does not exist (404)`."""

    def __init__(self, what: str, todo: str, *, final: bool = False, drop: bool = False) -> None:
        super().__init__(what)
        self.todo = todo
        """What the person can do."""
        self.final = final
        """Whether another try would fail in the same way."""
        self.drop = drop
        """Whether the bytes received so far are of no use."""


class MissingFile(TransferError):
    """There is no such file."""


@dataclass(frozen=True)
class Answer:
    """What a server says about a file, and its bytes."""

    offset: int
    """Position of the first byte: 0 where more was asked for but the server knows no ranges."""
    total: int | None
    """Size of the whole file, where the server says it."""
    is_web_page: bool
    """Whether the server calls the file HTML."""
    chunks: Iterator[bytes]
    """The bytes in order; raises TransferError."""


@dataclass(frozen=True)
class Remote:
    """The files below one remote root. Connects at first use."""

    root: str
    """Address without a slash at its end."""
    timeout_s: float
    """Seconds without a byte after which http and s3 give up; gs and hf have their packages' own limits."""

    @property
    def scheme(self) -> str:
        """http, https, s3, gs, hf or memory."""
        return self.root.split(":")[0].lower()

    def url(self, name: str) -> str:
        """Address of a file; name: relative, with forward slashes."""
        return f"{self.root}/{quote(name) if self.scheme.startswith('http') else name}"

    @contextlib.contextmanager
    def read(self, name: str, offset: int) -> Iterator[Answer]:
        """The file's bytes from `offset` on; raises TransferError."""
        with _translated():
            answer, stream = (self._stream if self.scheme.startswith("http") else self._ranges)(self.url(name), offset)
        with stream:
            yield answer

    def _stream(self, url: str, offset: int) -> tuple[Answer, contextlib.AbstractContextManager[Any]]:
        """One GET request, from `offset` on where the server knows ranges."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        # block_size=0 makes it a stream; with any size given, fsspec does not ask for the size first.
        stream = self._files.open(url, block_size=0, size=1, headers=headers)
        said, chunks = stream.r.headers, _translated_chunks(iter(lambda: stream.read(READ), b""))
        if stream.r.status != 206:
            length, is_web_page = said.get("Content-Length", ""), said.get("Content-Type", "").startswith("text/html")
            return Answer(0, int(length) if length.isdigit() else None, is_web_page, chunks), stream
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said.get("Content-Range", ""))
        if not span or int(span[1]) != offset:
            stream.close()
            raise TransferError("answered with another range than asked for", "look at the server", drop=True)
        return Answer(offset, None if span[2] == "*" else int(span[2]), False, chunks), stream

    def _ranges(self, url: str, offset: int) -> tuple[Answer, contextlib.AbstractContextManager[Any]]:
        """Consecutive ranges. A try that fails loses one, so that a slow link gets short ones."""
        try:
            total = int(self._files.info(url)["size"])
        except PermissionError:
            self._files.cat_file(url, start=0, end=1)  # s3 gives its reason only to this request
            raise
        chunks = _translated_chunks(self._pieces(url, offset, total))
        return Answer(offset, total, False, chunks), contextlib.nullcontext()

    def _pieces(self, url: str, start: int, total: int) -> Iterator[bytes]:
        """The bytes from `start` on. Ranges grow from FLOOR to PIECE bytes, or to an eighth of the timeout."""
        no_cache = {"cache_type": "none"} if self.scheme == "hf" else {}  # it would read 5 MiB ahead of each range
        size = least = min(FLOOR, PIECE)
        while start < total:
            asked, end = time.monotonic(), min(start + size, total)
            yield self._files.cat_file(url, start=start, end=end, **no_cache)
            start, share = end, (time.monotonic() - asked) / self.timeout_s
            size = min(2 * size, PIECE) if share < 1 / 8 else max(size // 2, least) if share > 1 / 4 else size

    @cached_property
    def _files(self) -> Any:
        """fsspec's file system; UserError where its package is missing."""
        options: dict[str, object] = {}
        if self.scheme.startswith("http"):
            timeout = aiohttp.ClientTimeout(total=None, connect=self.timeout_s, sock_read=self.timeout_s)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        elif self.scheme == "s3":
            limits = dict.fromkeys(("connect_timeout", "read_timeout"), self.timeout_s)
            options["config_kwargs"] = {**limits, "retries": {"total_max_attempts": 1}}  # `fetch` tries again
        try:
            files = fsspec.filesystem(self.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
            files.retries = 1  # of s3fs and gcsfs
            return files
        except ImportError as error:
            package = SCHEMES[self.scheme]
            raise UserError(
                f"data.root {self.root} needs the package {package}, which cannot be imported: run"
                f" `pip install {package}`, or copy the shards to a folder."
            ) from error


def _translated_chunks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    with _translated():
        yield from chunks


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raises TransferError in place of what a file system raises."""
    try:
        yield
    except (TransferError, UserError):
        raise
    except Exception as error:  # every file system has errors of its own
        raise _as_transfer_error(error) from error


def _as_transfer_error(error: Exception) -> TransferError:
    """What an exception of a file system means."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return MissingFile("does not exist (404)", "check data.root and that everything was uploaded", final=True)
    kind = type(error).__name__  # of botocore and google.auth, which this package need not have
    if kind.endswith("CredentialsError"):
        todo = "set them as shards/README.md says, or FSSPEC_S3 or FSSPEC_GS where the bucket is public"
        return TransferError(f"needs credentials ({error})", todo, final=True)
    if status in (401, 403) or isinstance(error, PermissionError):
        word = getattr(error, "server_message", "") or getattr(error, "message", "") or error.args and error.args[-1]
        said = f" ({': '.join(str(part) for part in (status, word) if part)})"
        return TransferError(f"may not be read{said}", "give this machine the right to read it", final=True)
    if status:
        final = status < 500 and status not in TEMPORARY
        return TransferError(f"answered with status {status}", "look at the server, or check data.root", final=final)
    if isinstance(error, TimeoutError) or kind in ("ConnectTimeoutError", "ReadTimeoutError"):
        return stalled()
    if isinstance(error, aiohttp.ClientConnectorError) or kind == "EndpointConnectionError":
        return TransferError(f"cannot be reached ({error})", "check the name, the network and the server")
    if isinstance(error, aiohttp.ClientError | ConnectionError | EOFError):
        return cut_off()
    return TransferError(f"cannot be read ({type(error).__name__}: {error})", "check data.root and its credentials")


def cut_off() -> TransferError:
    """The connection ended too early."""
    return TransferError("was cut off before its end", "look at the network and the server, or raise data.retries")


def stalled() -> TransferError:
    """Nothing came, or next to nothing."""
    return TransferError("stalled", "look at the network and the server, or raise data.timeout_s")
