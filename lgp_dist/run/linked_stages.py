"""Stages that two runs share: made once, linked into the other's directory."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lgp_dist.files import replace_folder
from lgp_dist.run.artifacts import is_complete


def link_stages(source: Path, target: Path, stages: Sequence[str]) -> None:
    """Gives a run directory another's complete stages that it lacks, by hard links, each stage whole or not at all.

    No run changes an artifact's files in place. Files are copied if the file system has no hard links.
    """
    for stage in stages:
        if is_complete(source, stage) and not is_complete(target, stage):
            link = partial(shutil.copytree, source / stage, copy_function=_link, dirs_exist_ok=True)
            replace_folder(target / stage, link)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
