"""`lgp doctor`: what it prints."""

import json
import sys
from dataclasses import asdict


def run_doctor(data: str, as_json: bool) -> None:
    """Prints every finding; ends with 1 where something is to do."""
    from lgp_dist.commands.doctor import examine  # the data's libraries, which `lgp --help` must not wait for

    findings = examine(data)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{'ok' if finding.ok else 'to do':<6} {finding.name + ':':<15} {finding.text}\n")
    if not all(finding.ok for finding in findings):
        sys.exit(1)
