"""`lgp doctor`."""

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Doctor:
    """Say what this machine lacks for training; status 1 if it lacks something."""

    data: str = ""
    """A data.root to reach, as folder or address."""
    json: bool = False
    """Print a list of objects."""


def run_doctor(action: Doctor) -> None:
    """Prints every finding; ends with 1 where something is to do."""
    from lgp_dist.commands.doctor import examine  # libraries of remote shards

    findings = examine(action.data)
    if action.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{'ok' if finding.ok else 'to do':<6} {finding.name + ':':<15} {finding.text}\n")
    if not all(finding.ok for finding in findings):
        sys.exit(1)
