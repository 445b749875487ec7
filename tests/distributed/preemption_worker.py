"""A rank that counts steps until it is asked to leave; then it saves and leaves.

preemption_worker.py RUN SECONDS_TO_SAVE
RUN/ready-R and RUN/left-R tell when; rank 0 writes the outcome. All ranks agree before they leave.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import PREEMPTED
from lgp_dist.run.run_status import RunStatus, write_run_status

run, seconds = Path(sys.argv[1]), float(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
with Preemption() as preemption:
    (run / f"ready-{rank}").write_text(str(os.getpid()))
    asked, step = torch.zeros(1), 0
    while not asked.item():
        time.sleep(0.05)
        step += 1
        asked = torch.tensor([float(preemption.asked)])
        dist.all_reduce(asked)
    time.sleep(seconds)
    if rank == 0:
        write_run_status(run, RunStatus("preempted", "finetune", step, "Asked to leave."))
    (run / f"left-{rank}").write_text(f"{step} {preemption.name}")
    dist.barrier()
    os._exit(PREEMPTED)
