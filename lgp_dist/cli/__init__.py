"""The command line: `lgp COMMAND ...`. What a command needs is imported when it is called, torch above all."""

import io
import logging
import os
import sys
from dataclasses import fields

from lgp_dist.cli.bench import BENCHES, run_bench
from lgp_dist.cli.checkpoint import CHECKPOINT, run_checkpoint
from lgp_dist.cli.descendants import (
    DescendRun,
    Downstream,
    ExportRun,
    Predict,
    Push,
    SpecialiseRun,
    descend,
    export,
    finetune_descendant,
    predict,
    push,
    specialise,
)
from lgp_dist.cli.doctor import Doctor, run_doctor
from lgp_dist.cli.exit_status import guarded
from lgp_dist.cli.launch import Check, run_launch
from lgp_dist.cli.new import New, Show, new_recipe, show_recipe
from lgp_dist.cli.parse import Command, parse
from lgp_dist.cli.shards import SHARDS, run_shards
from lgp_dist.cli.stages import SUMMARIES, Paths, list_paths, stage_commands
from lgp_dist.cli.study import ReportRuns, Study, run_report, run_study
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.launch.environment import check_variables

READ_BY_PATHS = ("model", "data.image_size", "data.channels", "data.num_classes", "debug")

READ_BY_STUDY = tuple(field.name for field in fields(RunConfig) if field.name not in ("run_dir", "seed", "force"))
"""It names a run directory for each variant and seed, and makes no stage again."""

READ_BY_BENCH = ("seed", "data", "model", "engine", "ancestry", "distil", "finetune", "checkpoint", "debug")
"""Benchmarks run no stages and write no run directory."""

COMMANDS = {
    **stage_commands({"descend": Command(DescendRun, descend), "export": Command(ExportRun, export)}),
    "specialise": Command(SpecialiseRun, specialise),
    "finetune-descendant": Command(Downstream, finetune_descendant),
    "push": Command(Push, push),
    "report": Command(ReportRuns, run_report),
    "predict": Command(Predict, predict),
    "new": Command(New, new_recipe),
    "show": Command(Show, show_recipe),
    "doctor": Command(Doctor, run_doctor),
    "launch check": Command(Check, run_launch),
    "paths": Command(Paths, list_paths, reads=READ_BY_PATHS),
    **{f"shards {name}": Command(kind, run_shards) for name, kind in SHARDS.items()},
    **{f"checkpoint {name}": Command(kind, run_checkpoint) for name, kind in CHECKPOINT.items()},
    "study": Command(Study, run_study, words=("QUESTION",), reads=READ_BY_STUDY),
    **{f"bench {name}": Command(kind, run_bench, reads=READ_BY_BENCH) for name, (kind, _) in BENCHES.items()},
}
"""Every command by its one or two words."""

GROUPS = {
    "Stages in their order: lgp STAGE RECIPE [--KEY VALUE ...]": SUMMARIES,
    "A finished run:": {
        "descend RUN": DescendRun.__doc__,
        "export RUN": ExportRun.__doc__,
        "predict FOLDER": Predict.__doc__,
        "specialise RUN": SpecialiseRun.__doc__,
        "finetune-descendant": Downstream.__doc__,
        "push": Push.__doc__,
        "report": ReportRuns.__doc__,
    },
    "Before a run:": {
        "new FILE": New.__doc__,
        "show": Show.__doc__,
        "doctor": Doctor.__doc__,
        "launch check": Check.__doc__,
        "paths": Paths.__doc__,
    },
    "Data and checkpoints:": {
        "shards": "Build, index, verify, show and reshard shards of images.",
        "checkpoint": "Verify and show checkpoints, and take the weights out of one.",
    },
    "Experiments:": {
        "study": Study.__doc__,
        "bench": "Measure this machine and this code: paths, engines, loops, loaders, operations and more.",
    },
}
"""What `lgp --help` shows of them."""


def main() -> None:
    """Entry point of `lgp` and `python -m lgp_dist`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and classes may hold any letter
    # DeepSpeed speaks while it is imported, before anything could lower its level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv[1:2] = [word for word in sys.argv[1:2] if not word.replace("_", "-").startswith("--local-rank=")]
    guarded(lambda: check_variables(os.environ), debug=False)
    call = guarded(lambda: parse(sys.argv[1:], COMMANDS, GROUPS), debug=False)
    guarded(call, call.debug, call.run_dir)
