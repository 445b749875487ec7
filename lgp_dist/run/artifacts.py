"""What one stage hands the next: folders that are complete or absent, and know what they were made from.

    RUN/
      config.json environment.json log.txt metrics.jsonl report.html ...
      ancestry/ distil/ pool/ finetune/ evaluate/ descend/ export/
        artifact.json     stage, id, configuration, inputs, sha256 of every file, facts

A stage writes into `RUN/.STAGE.partial`, which is renamed when whole.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import STAGES, changed_keys, depends_on, up_to
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.files import replace_folder, sha256, write_json


def fingerprint(path: Path, kind: str = "safetensors") -> str:
    """sha256 of a file that a person named; UserError where it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a {kind} file that can.") from None


@dataclass(frozen=True)
class Artifact:
    """A complete stage."""

    folder: Path
    record: dict[str, Any]

    @property
    def id(self) -> str:
        """Hash over configuration, inputs and files."""
        return self.record["id"]

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage measured."""
        return self.record["facts"]

    def check_files(self) -> None:
        """UserError where a file is missing or differs from its hash."""
        for name, digest in self.record["files"].items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                raise UserError(
                    f"{path} is missing or damaged (its sha256 differs from artifact.json): make the stage again with "
                    f"`lgp {self.record['stage']} ... --force`."
                )


RECORD_KEYS = {"stage", "id", "config", "inputs", "files", "facts"}
"""What every artifact.json holds at least."""


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run."""

    root: Path
    sources: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what the run reads from elsewhere (shards, weights), compared like settings.

    Those of `data` count for every stage, those of rows from `distil` on, others from the stage on that their name
    begins with."""

    def depends_on(self, config: RunConfig, stage: str) -> dict[str, Any]:
        """Settings and sources that the stage's artifact depends on."""
        earlier = up_to(stage)
        owners = {name: name.replace("model.rows", "distil", 1).split(".")[0] for name in self.sources}
        counts = {name: value for name, value in self.sources.items() if owners[name] in {"data", *earlier}}
        return depends_on(config, stage) | counts

    def check_writable(self) -> None:
        """UserError where the folder cannot be made or written to."""
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
        """The stage's artifact, if it is complete."""
        path = self.root / stage / "artifact.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON ({error}): make the stage again with --force.") from None
        if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
            raise UserError(f"{path} is not the record of an artifact: make the stage again with --force.")
        return Artifact(path.parent, record)

    def check_settings(self, stage: str, config: RunConfig) -> None:
        """UserError where the stage is complete, but was made with other settings or sources."""
        artifact = self.find(stage)
        if artifact is None:
            return
        made, now = artifact.record["config"], self.depends_on(config, stage)
        if changed := changed_keys(made, now):
            shown = "; ".join(f"{key} was {made.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
            raise UserError(
                f"{artifact.folder / 'artifact.json'} was made with other settings ({shown}): choose another "
                "--run-dir, or make it again with --force."
            )

    def is_current(self, stage: str, config: RunConfig) -> bool:
        """Whether the stage is complete; UserError where it was made with other settings or from other inputs."""
        lineage = self._lineage(stage, config)
        for artifact in lineage.values():
            artifact.check_files()
        return bool(lineage)

    def _lineage(self, stage: str, config: RunConfig) -> dict[str, Artifact]:
        """The stage's artifact and all that it was made from, each once; nothing where it is not complete."""
        artifact = self.find(stage)
        if artifact is None:
            return {}
        self.check_settings(stage, config)
        found = {stage: artifact}
        for name, made_from in artifact.record["inputs"].items():
            current = self.find(name)
            if current is None or current.id != made_from:
                raise UserError(
                    f"{artifact.folder / 'artifact.json'} was made from another {name} than {self.root / name} "
                    "holds now: make it again with --force."
                )
            found |= self._lineage(name, config)
        return found

    def consistent(self) -> list[Artifact]:
        """The complete artifacts, in the order of their stages, that were made from the others that lie here now."""
        kept: dict[str, Artifact] = {}
        for stage in STAGES:
            artifact = self.find(stage)
            if artifact and all(name in kept and kept[name].id == i for name, i in artifact.record["inputs"].items()):
                kept[stage] = artifact
        return list(kept.values())

    def require(self, stage: str, config: RunConfig) -> Artifact:
        """The stage's artifact, whole and made with these settings; UserError otherwise."""
        if not self.is_current(stage, config):
            raise UserError(
                f"{self.root / stage} does not hold a complete artifact: run `lgp {stage} {config.recipe}` first."
            )
        found = self.find(stage)
        assert found is not None
        return found

    def write(
        self,
        stage: str,
        config: RunConfig,
        inputs: list[Artifact],
        fill: Callable[[Path], dict[str, Any]],
        provenance: dict[str, Any],
    ) -> Artifact:
        """Makes the stage's artifact. `fill` writes files into a folder and returns facts."""

        def fill_and_record(partial: Path) -> dict[str, Any]:
            record = self._record(partial, stage, config, inputs, fill(partial), provenance)
            write_json(partial / "artifact.json", record)
            return record

        return Artifact(self.root / stage, replace_folder(self.root / stage, fill_and_record))

    def _record(
        self,
        partial: Path,
        stage: str,
        config: RunConfig,
        inputs: list[Artifact],
        facts: dict[str, Any],
        provenance: dict[str, Any],
    ) -> dict[str, Any]:
        """What artifact.json says of the files in the stage's partial folder."""
        files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
        identity = {
            "stage": stage,
            "config": self.depends_on(config, stage),
            "inputs": {artifact.record["stage"]: artifact.id for artifact in inputs},
            "files": {name: sha256(path) for name, path in files.items()},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {"id": digest, "created": created, **provenance, "facts": facts, **identity}
