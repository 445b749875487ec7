"""A Slurm of two nodes on one machine: each node has a network, a host name and processes of its own.

`alone` first puts this process into namespaces of its own: nothing of the machine is changed, and all ends with it.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from run_helpers import LIMIT_S, eventually

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "ip")
OWN = ("unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A node, or all of them: with its first process all others in it end."""
INSIDE = "LGP_TEST_INSIDE"
NODES = ("n1", "n2")
ADDRESS = {"ctl": "10.79.0.254", "n1": "10.79.0.1", "n2": "10.79.0.2"}

CONFIGURATION = """
ClusterName=lgp
SlurmctldHost=ctl({address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=3,bf_interval=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeAddr=10.79.0.[1-2] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n[1-2] PriorityTier=2
"""

NODE = """
until ip link show dev eth0 >/dev/null 2>&1; do sleep 0.1; done
ip link set dev lo up
ip address add {address}/24 dev eth0
ip link set dev eth0 up
hostname {name}
slurmd -D -N {name} -L {folder}/slurmd-{name}.log &
wait
"""


def missing() -> str:
    """Why Slurm cannot be had here; empty if it can."""
    if INSIDE in os.environ:
        return ""
    if os.geteuid():
        return "only root may start its daemons"
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"there is no {program}: install slurm-wlm, munge, util-linux and iproute2"
    tried = ("ip link add name br0 type bridge", "ip link add name lgp0 type veth peer name lgp1")
    bound = "mount --bind /etc/hosts /etc/hosts"
    done = subprocess.run([*OWN, "sh", "-c", " && ".join((*tried, bound))], capture_output=True, text=True)
    return f"namespaces with a bridge are not allowed: {done.stderr.strip()}" if done.returncode else ""


def alone() -> None:
    """Starts this script again in namespaces of its own, in place of this process; returns in that one."""
    if INSIDE not in os.environ:
        os.execvpe(OWN[0], [*OWN, sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


def call(*command: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    return done.stdout.strip()


@dataclass
class Cluster:
    """Running daemons; their files and logs lie in `folder`."""

    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """Starts a node: a slurmd in namespaces of its own, with a cable to the bridge."""
        script = NODE.format(name=name, address=ADDRESS[name], folder=self.folder)
        node = self.nodes[name] = subprocess.Popen([*OWN, "bash", "-c", script], stderr=subprocess.DEVNULL)
        own = Path("/proc/self/ns/net").readlink()
        eventually(lambda: Path(f"/proc/{node.pid}/ns/net").readlink() != own, "a namespace", LIMIT_S)
        call("ip", "link", "add", "name", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", node.pid)
        call("ip", "link", "set", "dev", f"to-{name}", "master", "br0", "up")

    def kill(self, name: str) -> None:
        """kill -9 of a node with all that runs on it."""
        node = self.nodes.pop(name)
        node.send_signal(signal.SIGKILL)
        node.wait()
        eventually(lambda: f"to-{name}" not in call("ip", "link"), f"the end of to-{name}", LIMIT_S)

    def empty(self) -> None:
        """Ends all jobs and starts nodes that are dead."""
        call("scancel", "--user=root")
        for name in [name for name in NODES if name not in self.nodes]:
            self.begin(name)
        eventually(lambda: idle() == len(NODES), "idle nodes", LIMIT_S)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return call("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job).splitlines()[0]

    def restarts(self, job: str) -> int:
        """How often Slurm has started a job again."""
        found = re.search(r"Restarts=(\d+)", call("scontrol", "show", "job", job))
        return int(found[1]) if found else 0

    def minutes(self, job: str) -> int:
        """For which a job has run, since its latest start."""
        return int(call("squeue", "--noheader", "--format=%M", "--jobs", job).rpartition(":")[0] or 0)

    def set_limit(self, job: str, minutes: int) -> None:
        """The time limit of a job."""
        call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two idle nodes until the block ends, with SLURM_CONF in the environment."""
    hosts, key, configuration = folder / "hosts", folder / "munge.key", folder / "slurm.conf"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESS.items()))
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    configuration.write_text(CONFIGURATION.format(folder=folder, address=ADDRESS["ctl"]))
    (folder / "state").mkdir()
    os.environ["SLURM_CONF"] = str(configuration)
    for command in (
        ("mount", "--bind", hosts, "/etc/hosts"),
        ("hostname", "ctl"),
        ("ip", "link", "set", "dev", "lo", "up"),
        ("ip", "link", "add", "br0", "type", "bridge"),
        ("ip", "address", "add", f"{ADDRESS['ctl']}/24", "dev", "br0"),
        ("ip", "link", "set", "dev", "br0", "up"),
    ):
        call(*command)
    names = ("socket", "pid-file", "log-file", "seed-file")
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}={folder}/munge.{name}" for name in names]
    made, daemons = Cluster(folder), [subprocess.Popen(munge, stderr=subprocess.DEVNULL)]
    try:
        eventually((folder / "munge.socket").exists, "munge", LIMIT_S)
        control = ["slurmctld", "-D", "-L", folder / "slurmctld.log"]
        daemons.append(subprocess.Popen(control, stderr=subprocess.DEVNULL))
        for name in NODES:
            made.begin(name)
        eventually(lambda: idle() == len(NODES), "idle nodes", LIMIT_S)
        yield made
    finally:
        for daemon in (*made.nodes.values(), *reversed(daemons)):
            daemon.kill()


def idle() -> int:
    """Nodes that wait for jobs."""
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split().count("idle")
