"""What a process does once when it joins the others."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from run_helpers import LIMIT_S

from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.workers import Workers, addresses
from lgp_dist.files import Holder

CODE = """
import gc
import weakref
from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.workers import Workers

class Own:
    pass

kept = gc.get_freeze_count()
alive = len(gc.get_objects())
Workers.start(EngineConfig(device="cpu"))
first = gc.get_freeze_count()
assert first - kept > 0.9 * alive and len(gc.get_objects()) < 0.1 * alive
own = Own()
own.itself, seen = own, weakref.ref(own)
Workers.start(EngineConfig(device="cpu"))
del own
gc.collect()
assert seen() is None and gc.get_freeze_count() <= first
"""


@pytest.mark.slow
def test_what_imports_made_is_not_searched_for_garbage() -> None:
    """What is made later is, also where a process joins twice; and the end of it says nothing."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and "leaked" not in done.stderr + done.stdout, done.stderr


BY_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [{}]:35121"
HOSTS = {"n1": ["10.77.0.1"], "n2": ["10.77.0.2", "fe80::2"], "n3": ["10.77.0.3"]}


@pytest.mark.parametrize(
    ("hosts", "address", "dead", "expected"),
    [
        (("n1", "n2"), "10.77.0.2", None, "Rank 1 on n2 has exited"),
        (("n1", "n2"), "10.88.0.2", None, "Rank 1 on n2 has exited"),
        (("n1", "n2", "n3"), "10.77.0.3", None, "Rank 2 on n3 has exited"),
        (("n1", "n2", "n3"), "fe80::2", None, "Rank 1 on n2 has exited"),
        (("n1", "n2", "n3"), "10.88.0.2", None, "Another rank has exited"),
        (("n1", "n1", "n2", "n2"), "10.77.0.2", None, "One of ranks 2, 3 on n2 has exited"),
        (("n1", "n1", "n2"), "127.0.0.1", 1, "Rank 1 on n1 has exited"),
        (("n1", "n1", "n1"), "10.77.0.1", 2, "Rank 2 on n1 has exited"),
        ((), "10.77.0.1", None, "Another rank has exited"),
    ],
)
def test_who_has_exited(hosts: tuple[str, ...], address: str, dead: int | None, expected: str) -> None:
    """A process of this machine that is dead, or whoever has the address in gloo's message."""
    me = replace(Holder.this_process(), host="n1")
    away, gone = replace(me, system="another boot"), replace(me, began="0")
    peers = [
        (replace(gone if rank == dead else me if host == "n1" else away, host=host), HOSTS[host])
        for rank, host in enumerate(hosts)
    ]
    launch = Launch(len(hosts), 1, False, 0, "no", None)
    workers = Workers(launch, EngineConfig(), 0, len(hosts), torch.device("cpu"), peers=peers)
    said = str(workers.exited(RuntimeError(BY_GLOO.format(address))))
    assert said.startswith(f"{expected};") and said.count(".") == 1


def test_addresses_are_those_that_others_reach() -> None:
    assert not any(address.startswith("127.") for address in addresses())
