"""What one stage hands the next: a folder that is complete or absent and says what it was made from.

    RUN/
      config.json environment.json log.txt metrics.jsonl report.html ...
      ancestry/ distil/ pool/ finetune/ evaluate/ descend/ export/
        artifact.json     stage, id, configuration, inputs, sha256 of every file, facts

A stage writes into `RUN/.STAGE.partial`, which gets its name once it is complete.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from lgp_dist.config.flat import STAGES, changed_keys, depends_on
from lgp_dist.errors import UserError
from lgp_dist.files import replace_folder, sha256, write_json


def is_complete(run: Path, stage: str) -> bool:
    """Whether a run directory has a stage's artifact, which then is whole. Files that changed since are not noticed."""
    return (run / stage / "artifact.json").is_file()


def specialised_folder(run: Path, key: str) -> Path:
    """The run directory of a path that was trained alone from a run's pool."""
    return run / "specialised" / key


def fingerprint(path: Path, setting: str) -> str:
    """sha256 of the file that a setting names; UserError if it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        kind = "JSON" if setting == "finetune.costs" else "safetensors"
        raise UserError(f"{path} cannot be read ({error.strerror}): name a {kind} file that can.") from None


class Provenance(TypedDict):
    """How an artifact was made."""

    seconds: float
    """From the stage's begin until its files are written."""
    command: str
    world: int
    """Ranks."""
    commit: str
    """Of the source tree when the run began."""
    versions: dict[str, str]


class Record(Provenance):
    """artifact.json."""

    stage: str
    id: str
    """sha256 over stage, config, inputs and files."""
    created: str
    config: dict[str, Any]
    """`RunDirectory.depends_on` of the stage."""
    inputs: dict[str, str]
    """The id of each artifact that the stage used, by its stage."""
    files: dict[str, str]
    """sha256 by the name in the folder."""
    facts: Mapping[str, Any]
    """What the stage measured: run/facts.py."""


RECORD_KEYS = {"stage", "id", "config", "inputs", "files", "facts"}
"""What every artifact.json holds at least."""


@dataclass(frozen=True)
class Artifact:
    """A complete stage."""

    folder: Path
    record: Record

    @property
    def id(self) -> str:
        """Hash over stage, settings, inputs and files."""
        return self.record["id"]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the stage measured."""
        return self.record["facts"]

    def check_files(self) -> None:
        """UserError if a file is missing, cannot be read, or differs from its hash."""
        for name, digest in self.record["files"].items():
            path = self.folder / name
            try:
                found = sha256(path)
            except OSError:
                found = ""
            if found != digest:
                raise UserError(
                    f"{path} is missing or damaged (its sha256 differs from artifact.json): make the stage again with "
                    f"`lgp {self.record['stage']} ... --force`."
                )


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, and what its artifacts are made with.

    A process hashes the files of each artifact once: a file that changes later in the same process is not noticed.
    A stage that is made again gives another artifact.
    """

    root: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`stage_settings`, and by setting the hashes of what the run reads from elsewhere: shards, weights, costs.
    `data.*` applies to every stage, `model.rows.*` from distil on, others from the stage that prefixes their name."""
    recipe: str = "RECIPE"
    """Its name, for advice."""
    _hashed: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Ids of the artifacts that this process has hashed."""

    def depends_on(self, stage: str) -> dict[str, Any]:
        """Settings and hashes that the stage's artifact depends on."""
        return depends_on(self.settings, stage)

    def check_writable(self) -> None:
        """Makes the folder; UserError if it cannot be written to."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root) as file:
                file.write(b"\0" * 65536)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"The run directory {self.root} cannot be written to ({error.strerror}): free space, or choose another "
                "with --run-dir."
            ) from None

    def find(self, stage: str) -> Artifact | None:
        """The stage's artifact; None if it is not complete. UserError if its record is damaged."""
        if not is_complete(self.root, stage):
            return None
        path = self.root / stage / "artifact.json"
        try:
            record = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON ({error}): make the stage again with --force.") from None
        if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
            raise UserError(f"{path} is not the record of an artifact: make the stage again with --force.")
        return Artifact(path.parent, cast(Record, record))

    def check_settings(self, stage: str) -> None:
        """UserError if the stage is complete, but was made with other settings or from other files."""
        artifact = self.find(stage)
        if artifact is None:
            return
        made, now = artifact.record["config"], self.depends_on(stage)
        if changed := changed_keys(made, now):
            shown = "; ".join(f"{key} was {made.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
            raise UserError(
                f"{artifact.folder / 'artifact.json'} was made with other settings ({shown}): choose another "
                "--run-dir, or make it again with --force."
            )

    def is_current(self, stage: str) -> bool:
        """Whether the stage is complete; UserError if a file is damaged, or settings or inputs were others."""
        lineage = self._lineage(stage)
        for artifact in lineage.values():
            if artifact.id not in self._hashed:
                artifact.check_files()
                self._hashed.add(artifact.id)
        return bool(lineage)

    def _lineage(self, stage: str) -> dict[str, Artifact]:
        """The stage's artifact and all that it was made from, by stage; nothing if it is not complete."""
        artifact = self.find(stage)
        if artifact is None:
            return {}
        self.check_settings(stage)
        found = {stage: artifact}
        for name, made_from in artifact.record["inputs"].items():
            current = self.find(name)
            if current is None or current.id != made_from:
                raise UserError(
                    f"{artifact.folder / 'artifact.json'} was made from another {name} than {self.root / name} "
                    "holds now: make it again with --force."
                )
            found |= self._lineage(name)
        return found

    def consistent(self) -> list[Artifact]:
        """The complete artifacts whose inputs are the ones that lie here now, in the order of their stages."""
        kept: dict[str, Artifact] = {}
        for stage in STAGES:
            artifact = self.find(stage)
            if artifact and all(name in kept and kept[name].id == i for name, i in artifact.record["inputs"].items()):
                kept[stage] = artifact
        return list(kept.values())

    def require(self, stage: str) -> Artifact:
        """The stage's artifact, whole and made with these settings; UserError otherwise."""
        if not self.is_current(stage):
            raise UserError(f"{self.root / stage} holds no complete artifact: run `lgp {stage} {self.recipe}` first.")
        found = self.find(stage)
        assert found is not None
        return found

    def write(
        self, stage: str, inputs: Iterable[Artifact], fill: Callable[[Path], Mapping[str, Any]], provenance: Provenance
    ) -> Artifact:
        """Makes the stage's artifact. `fill` writes files into a folder and returns facts."""

        def fill_and_record(partial: Path) -> Record:
            record = self._record(partial, stage, inputs, fill(partial), provenance)
            write_json(partial / "artifact.json", record)
            return record

        made = Artifact(self.root / stage, replace_folder(self.root / stage, fill_and_record))
        self._hashed.add(made.id)
        return made

    def _record(
        self,
        partial: Path,
        stage: str,
        inputs: Iterable[Artifact],
        facts: Mapping[str, Any],
        provenance: Provenance,
    ) -> Record:
        """artifact.json of the files in a folder."""
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        identity: dict[str, Any] = {
            "stage": stage,
            "config": self.depends_on(stage),
            "inputs": {artifact.record["stage"]: artifact.id for artifact in inputs},
            "files": {path.relative_to(partial).as_posix(): sha256(path) for path in files},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cast(Record, {"id": digest, "created": created, **provenance, "facts": facts, **identity})
