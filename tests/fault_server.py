"""A local web server with faults by name: http://127.0.0.1:PORT/FAULT/FILE. FAULT affects tars, all-FAULT all files."""

import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from run_helpers import eventually

PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


@dataclass
class FaultServer:
    """Serves a folder."""

    folder: Path
    port: int = 0
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    """Fault, file and first byte of every request."""
    over: threading.Event = field(default_factory=threading.Event)
    """Ends everything that hangs."""
    cache: Path | None = None
    """The client's cache: a connection that ends early does so when what was sent lies there."""

    def root(self, fault: str) -> str:
        return f"http://127.0.0.1:{self.port}/{fault}"

    def count(self, name: str) -> int:
        """Requests of a file so far."""
        return sum(asked[1] == name for asked in self.asked)

    def arrives(self, count: int) -> None:
        """Waits until a file of the cache has so many bytes, but for those that its writer still buffers."""
        parts = (self.cache or self.folder) / "shards"
        wanted = count - 2 * io.DEFAULT_BUFFER_SIZE
        eventually(lambda: any(part.stat().st_size >= wanted for part in parts.glob("*.part")), f"{count} bytes arrive")


@contextlib.contextmanager
def serve(folder: Path, *, hub: bool = False) -> Iterator[FaultServer]:
    """The server, in threads of this process, until the end of the block. hub: Hugging Face's interface."""
    facts = FaultServer(folder)

    class Handler(_Hub if hub else _Handler):
        server_facts = facts

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    facts.port = server.server_address[1]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield facts
    finally:
        facts.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_facts: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        facts = self.server_facts
        _, fault, name = self.path.split("/", 2)
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        facts.asked.append((fault, name, start))
        hurt = name.endswith(".tar") or fault.startswith("all-")
        path = facts.folder / name
        if not path.is_file():
            return self.say(404, b"no such file")
        content = path.read_bytes()
        method = getattr(self, "do_" + fault.removeprefix("all-").replace("-", "_"), None) if hurt else None
        with contextlib.suppress(ConnectionError):
            if method:
                method(content, start, facts.count(name))
            else:
                self.good(content, start)

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def say(self, status: int, content: bytes, length: int | None = -1, kind: str = "application/x-tar") -> None:
        """One answer. length: of the header; -1 for the true one, None for no header."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(len(content) if length < 0 else length))
        self.end_headers()
        self.wfile.write(content)

    def good(self, content: bytes, start: int, send: int | None = None) -> None:
        """A correct answer to a request from byte `start` on, of which only `send` bytes are sent."""
        end = len(content) if send is None else min(len(content), start + send)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])
        self.wfile.flush()

    def do_404(self, content: bytes, start: int, count: int) -> None:
        self.say(404, b"gone")

    def do_403(self, content: bytes, start: int, count: int) -> None:
        self.say(403, b"no")

    def do_503(self, content: bytes, start: int, count: int) -> None:
        self.say(503, b"busy")

    def do_503_twice(self, content: bytes, start: int, count: int) -> None:
        self.say(503, b"busy") if count <= 2 else self.good(content, start)

    def do_cut(self, content: bytes, start: int, count: int) -> None:
        """Always ends after half of the file, and knows no ranges."""
        self.good(content, 0, len(content) // 2)

    def do_cut_once(self, content: bytes, start: int, count: int) -> None:
        self.good(content, start, len(content) // 2 if count == 1 else None)
        if count == 1:
            self.server_facts.arrives(len(content) // 2)

    def do_cut_often(self, content: bytes, start: int, count: int) -> None:
        """Every answer ends after 100,000 bytes more."""
        self.good(content, start, 100_000)
        if start + 100_000 < len(content):
            self.server_facts.arrives(start + 100_000)

    def do_no_answer(self, content: bytes, start: int, count: int) -> None:
        """Hangs up."""
        self.close_connection = True

    def do_stall(self, content: bytes, start: int, count: int) -> None:
        self.good(content, 0, len(content) // 2)
        self.server_facts.over.wait()

    def do_stall_once(self, content: bytes, start: int, count: int) -> None:
        self.good(content, start, len(content) // 2 if count == 1 else None)
        if count == 1:
            self.server_facts.over.wait()

    def do_stall_first(self, content: bytes, start: int, count: int) -> None:
        """Sends not even headers."""
        self.server_facts.over.wait()

    def do_drip(self, content: bytes, start: int, count: int) -> None:
        self.good(content, 0, 1)
        for place in range(1, len(content)):
            self.wfile.write(content[place : place + 1])
            if self.server_facts.over.wait(0.02):
                return

    def do_slow(self, content: bytes, start: int, count: int) -> None:
        time.sleep(0.5)
        self.good(content, start)

    def do_longer(self, content: bytes, start: int, count: int) -> None:
        self.say(200, content + b"more")

    def do_shorter(self, content: bytes, start: int, count: int) -> None:
        self.say(200, content[:-100])

    def do_lies(self, content: bytes, start: int, count: int) -> None:
        """Says more than it sends."""
        self.say(200, content, len(content) + 100)

    def do_unsaid(self, content: bytes, start: int, count: int) -> None:
        """A good answer without Content-Length."""
        self.say(200, content, None)

    def do_unsaid_short(self, content: bytes, start: int, count: int) -> None:
        self.say(200, content[: len(content) // 2], None)

    def do_unsaid_longer(self, content: bytes, start: int, count: int) -> None:
        self.say(200, content + b"more", None)

    def do_page(self, content: bytes, start: int, count: int) -> None:
        self.say(200, PAGE, kind="text/html")

    def do_page_of_right_size(self, content: bytes, start: int, count: int) -> None:
        self.say(200, PAGE.ljust(len(content)), kind="text/html")

    def do_no_range(self, content: bytes, start: int, count: int) -> None:
        """As `cut_once`, but always from the first byte."""
        self.good(content, 0, len(content) // 2 if count == 1 else None)
        if count == 1:
            self.server_facts.arrives(len(content) // 2)

    def do_other_range(self, content: bytes, start: int, count: int) -> None:
        """Answers the second request with another range than the requested one."""
        if count == 2:
            self.good(content, max(start - 7, 1))
        else:
            self.do_stall_once(content, start, count)

    def do_flipped(self, content: bytes, start: int, count: int) -> None:
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        self.good(bytes(damaged), start)


class _Hub(_Handler):
    """The part of the hub's interface that reading the files of data set me/set needs."""

    def do_GET(self) -> None:
        files = {path.name: path for path in self.server_facts.folder.iterdir()}
        if "/resolve/" in self.path:
            name = self.path.rsplit("/", 1)[1]
            content = files[name].read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            first, last = int(found[1]), int(found[2])
            self.server_facts.asked.append((f"to {last}", name, first))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(content[first : last + 1])
        elif "/tree/" in self.path:
            sizes = {name: path.stat().st_size for name, path in files.items()}
            tree = [
                {"type": "file", "path": f"d/{name}", "size": size, "oid": "a" * 40} for name, size in sizes.items()
            ]
            self.say(200, json.dumps(tree).encode(), kind="application/json")
        elif self.path.startswith("/api/datasets/me/set"):
            self.say(200, json.dumps({"id": "me/set", "sha": "b" * 40}).encode(), kind="application/json")
        else:
            self.say(404, b"{}")
