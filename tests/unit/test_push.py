"""`lgp push` against a local server that speaks what the hub's API needs for an upload."""

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from run_helpers import LIMIT_S, has

TOKEN = "hf_test"


@dataclass
class Hub:
    """Repositories by name: the files of each commit. Large files come by git's LFS, as from the hub without xet."""

    address: str = ""
    made: dict[str, str] = field(default_factory=dict)
    """Repository to visibility."""
    commits: list[dict[str, bytes]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """By sha256."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    facts = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def say(self, status: int, content: object = None) -> None:
            body = json.dumps(content or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            facts.large[hashlib.sha256(content).hexdigest()] = content
            self.say(200)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.split("?")[0]
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.say(401, {"error": "Invalid username or password."})
            if path == "/api/validate-yaml":
                return self.say(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization']}/{given['name']}"
                if name.startswith("other/"):
                    return self.say(403, {"error": "You don't have the rights to create a model under other."})
                status = 409 if name in facts.made else 200
                facts.made.setdefault(name, given.get("visibility") or "public")
                return self.say(status, {"url": f"{facts.address}/{name}", "name": name})
            repository = path.removeprefix("/api/models/")
            if path.endswith("/preupload/main"):
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".onnx")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.say(200, {"files": files})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{facts.address}/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self.say(200, {"transfer": "basic", "objects": objects})
            assert repository.endswith("/commit/main"), path
            lines = [json.loads(line) for line in body.splitlines()]
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = facts.large[value["oid"]]
            facts.commits.append(files)
            self.say(200, {"commitUrl": f"{facts.address}/me/pool/commit/{'a' * 40}", "commitOid": "a" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    facts.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True).start()
    with contextlib.closing(server.socket):
        yield facts
        server.shutdown()


def pushed(folder: Path, name: str, address: str, token: str, *options: str) -> subprocess.CompletedProcess[str]:
    """In its own process, since huggingface_hub reads its variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(folder.parent / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "lgp_dist", "push", str(folder), name, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)


@pytest.mark.slow
def test_a_folder_becomes_a_commit(hub: Hub, tmp_path: Path) -> None:
    """Every file of it with its bytes, in one commit, and nothing else; a second push goes into the same repository.

    Six processes import huggingface_hub, and one waits for a server that is not there."""
    folder, files = tmp_path / "export", {"README.md": b"# A pool of 2 models\n", "verify.json": b"{}\n"}
    folder.mkdir()
    files |= {"model.safetensors": bytes(range(256)) * 64, "r0.0-3+r1.4-5.onnx": b"graph", "paths.json": b"[]"}
    for name, content in {**files, ".lock": b"of a writer"}.items():
        (folder / name).write_bytes(content)
    done = pushed(folder, "me/pool", hub.address, TOKEN, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.commits == [files] and hub.made == {"me/pool": "private"}
    has(done.stdout, "5 files in", f"{hub.address}/me/pool/commit/")
    (folder / "verify.json").write_bytes(b'{"images": 64}\n')
    assert pushed(folder, "me/pool", hub.address, TOKEN).returncode == 0
    assert hub.commits[1] == files | {"verify.json": b'{"images": 64}\n'} and hub.made == {"me/pool": "private"}
    refused = {
        ("other/pool", hub.address, TOKEN): ("The hub did not take other/pool", "403"),
        ("me/pool", hub.address, "hf_wrong"): ("The hub did not take me/pool", "401"),
        ("me/po ol", hub.address, TOKEN): ("The hub did not take me/po ol",),
        ("me/pool", "http://127.0.0.1:9", TOKEN): ("The hub did not take me/pool", "connection"),
    }
    for (name, address, token), pieces in refused.items():
        done = pushed(folder, name, address, token)
        assert done.returncode == 2 and done.stderr.startswith("lgp: ") and done.stderr.count("\n") == 1, done.stderr
        has(done.stderr, *pieces)
    assert len(hub.commits) == 2
