"""requirements.lock: what pyproject.toml asks for, all that it needs, each version with hashes, and nothing else."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *(t for e in ("dev", "audit", "imagenet", "onnx") for t in PROJECT["optional-dependencies"][e]),
    )
    if not text.startswith("lgp_dist")
]
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def entries() -> dict[str, tuple[Requirement, list[str]]]:
    """Name -> what is locked, and the lines that follow it."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        text = line.removesuffix(" \\")
        if line.startswith(" "):
            found[next(reversed(found))][1].append(text)
        else:
            requirement = Requirement(text)
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = requirement, []
    return found


def needed(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """Names of all that a requirement brings on this machine, as the installed packages say."""
    for extra in ("", *requirement.extras):
        name = canonicalize_name(requirement.name)
        if f"{name}[{extra}]" in seen:
            continue
        seen.add(f"{name}[{extra}]")
        yield name
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                yield from needed(inner, seen)


def test_every_entry_is_one_version_with_hashes() -> None:
    """No address, no path, no option of pip: a name, one version, and the sha256 of its files."""
    for name, (requirement, lines) in entries().items():
        versions = [(part.operator, "*" in part.version) for part in requirement.specifier]
        assert versions == [("==", False)] and not requirement.url, name
        assert lines and all(HASH.fullmatch(line) for line in lines) and len(set(lines)) == len(lines), name


@pytest.mark.parametrize("requirement", NAMED, ids=str)
def test_what_the_project_asks_for_is_locked(requirement: Requirement) -> None:
    """In a version that pyproject.toml allows."""
    locked = entries()[canonicalize_name(requirement.name)][0]
    (pin,) = locked.specifier
    assert requirement.specifier.contains(pin.version) and locked.marker is None


def test_what_that_needs_is_locked() -> None:
    """Every package that the installed ones require here, at any depth."""
    locked, seen = entries(), set[str]()
    names = {name for requirement in NAMED for name in needed(requirement, seen)}
    assert len(names) > 60 and names <= locked.keys(), sorted(names - locked.keys())


@pytest.mark.slow
def test_the_bill_of_materials_is_the_lock(tmp_path: Path) -> None:
    """Every package of the lock, in its version and with all its hashes, and no other."""
    out = tmp_path / "sbom.json"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment, command = {**os.environ, "PATH": path}, ["scripts/audit", "--sbom", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bill = json.loads(out.read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "lgp_dist")
    listed = {canonicalize_name(each["name"]): each for each in bill["components"]}
    locked = entries()
    assert len(bill["components"]) == len(listed) and listed.keys() == locked.keys()
    for name, (requirement, lines) in locked.items():
        hashes = {kept["content"] for source in listed[name]["externalReferences"] for kept in source.get("hashes", ())}
        assert requirement.specifier.contains(listed[name]["version"])
        assert hashes == {line.split("sha256:")[1] for line in lines}
