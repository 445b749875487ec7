"""Fetches one file from a remote root: retried, resumed where it broke off, and checked before it is used."""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lgp_dist.data.remote.transfer import FLOOR, Answer, Remote, TransferError, cut_off, stalled
from lgp_dist.errors import UserError
from lgp_dist.files import sha256

log = logging.getLogger("lgp")

WAIT_S = 30.0
"""Longest wait between two tries, seconds."""
WEB_PAGE = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a transfer may take to fail: at most (retries + 1) * timeout_s and the waits in between."""

    timeout_s: float = 60.0
    """Seconds in which at least FLOOR bytes, or the rest of the file, must come."""
    retries: int = 5
    """Further tries after a failed one; a try that brings FLOOR new bytes starts the count anew."""
    backoff_s: float = 1.0
    """Wait before the second try, seconds; it doubles each time."""

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures, slightly different for each process."""
        return min(WAIT_S, self.backoff_s * 2.0 ** (failures - 1)) * (1 + os.getpid() % 16 / 32)


def fetch(remote: Remote, name: str, part: Path, policy: RetryPolicy, size: int | None = None, digest: str = "") -> int:
    """Makes `part` the whole file and returns how many bytes were transferred.

    name: path below the root, with forward slashes. size, digest: bytes and sha256, where the manifest has them. A file
    of known size continues from what `part` already holds. Raises UserError, caused by a TransferError, with the URL,
    what happened and what to do; `part` then holds what may be continued, or is gone.
    """
    download, failures, furthest = _Download(remote, name, size, digest, part, policy.timeout_s), 0, 0
    while True:
        try:
            download.attempt()
            return download.transferred
        except TransferError as error:
            if error.drop:
                part.unlink(missing_ok=True)
            if download.have >= furthest + FLOOR:
                furthest, failures = download.have, 0
            failures += 1
            sentence = f"{remote.url(name)} {error}"
            if error.final or failures > policy.retries:
                tries = "" if error.final or failures == 1 else f", after {failures} tries"
                raise UserError(f"{sentence}{tries}: {error.todo}.") from error
            log.warning("%s, try %d of %d follows", sentence, failures + 1, policy.retries + 1)
            time.sleep(policy.wait(failures))


@dataclass
class _Download:
    """A file on its way into `part`."""

    remote: Remote
    name: str
    size: int | None
    digest: str
    part: Path
    timeout_s: float
    transferred: int = 0
    """Bytes that came, over all tries."""
    resumed: bool = False
    """Whether `part` holds bytes of an earlier try or process."""

    @property
    def have(self) -> int:
        """Bytes of `part`."""
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self) -> None:
        """Transfers what is missing and checks the file; raises TransferError."""
        size, start = self.size, self.have
        if size is None or start > size:
            start = 0  # nothing says that these bytes are of this file
        self.resumed = start > 0  # perhaps from bytes of another file: a wrong hash then only means to start over
        if start != size or not start:
            with self.remote.read(self.name, start) as answer:
                if size is not None and answer.total not in (None, size):
                    raise (
                        _web_page()
                        if answer.is_web_page
                        else self._wrong(f"has {answer.total} bytes but the manifest wants {size}")
                    )
                self._write(answer)
            total = answer.total if size is None else size
            if total is not None and self.have < total:
                raise cut_off()
        self._check()

    def _write(self, answer: Answer) -> None:
        """Writes the chunks to `part`; TransferError once fewer than FLOOR bytes have come within timeout_s."""
        size, limit, recent = self.size, time.monotonic() + self.timeout_s, 0
        try:
            with open(self.part, "r+b" if answer.offset else "wb") as file:
                file.seek(answer.offset)
                for chunk in answer.chunks:
                    file.write(chunk)
                    self.transferred += len(chunk)
                    recent += len(chunk)
                    if recent >= FLOOR:
                        limit, recent = time.monotonic() + self.timeout_s, 0
                    elif time.monotonic() > limit:
                        raise stalled()
                    if size is not None and file.tell() > size:
                        break
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"The cache {self.part.parent} cannot be written to ({error.strerror}): free space, set data.cache to"
                " another folder, or lower data.cache_bytes."
            ) from error

    def _check(self) -> None:
        """Raises TransferError unless `part` is the wanted file."""
        with self.part.open("rb") as file:
            head = file.read(256)
        if head.lstrip()[:16].lower().startswith(WEB_PAGE):
            raise _web_page()
        if self.size is not None and self.have != self.size:
            raise self._wrong(f"has more bytes but the manifest wants {self.size}")
        if self.digest and sha256(self.part) != self.digest:
            raise self._wrong("has another sha256 than the manifest", final=not self.resumed)

    def _wrong(self, what: str, final: bool = True) -> TransferError:
        return TransferError(what, "upload it again, or the manifest that belongs to it", final=final, drop=True)


def _web_page() -> TransferError:
    todo = "set data.root to the folder that holds the files"
    return TransferError("is a web page, not the file", todo, final=True, drop=True)
