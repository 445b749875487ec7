"""`lgp study` and `lgp report`: what they call."""

import sys
import time
from pathlib import Path

from lgp_dist.config.run_config import RunConfig


def run_study(
    name: str,
    base: RunConfig,
    out: str,
    seeds: tuple[int, ...],
    jobs: int,
    variants: tuple[str, ...],
) -> None:
    """Runs what is left of the study and prints its tables."""
    from lgp_dist.study.study import study  # torch and timm, as above

    folder = Path(out or f"runs/study/{name}")
    text = study(name, base, seeds, folder, jobs, variants, _say)
    sys.stdout.write(f"{text}\n\nResults: {folder}/study.json, table.md, variants.png, paths.png\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def run_report(runs: tuple[str, ...], snnet: str, out: str) -> None:
    """Prints one table of all runs and draws one figure."""
    from lgp_dist.report.compare import write_comparison  # matplotlib, which `lgp --help` must not wait for

    text = write_comparison([Path(run) for run in runs], snnet, Path(out))
    sys.stdout.write(f"{text}\n\nResults: {out}/compare.md, compare.png, compare.svg\n")
