"""A real Slurm of one node on this machine's loopback: munged, slurmctld and slurmd, in a folder of their own.

Tests and experiments start it beside whatever else runs here: ports and key are its own, and it is gone afterwards.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Debian keeps daemons where users do not look."""
DAEMONS = ("munged", "slurmctld", "slurmd")
PATIENCE_S = 120.0
"""How long to wait for what takes seconds, on a machine that is busy with something else."""

SETTINGS = """
ClusterName=bitplan
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
KillWait=2
MinJobAge=3600
SchedulerParameters=batch_sched_delay=1,sched_interval=2
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mib} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""`cred_expire` is also how long a requeued job waits before it starts again; fewer than 5 seconds are not allowed."""


def is_installed() -> bool:
    """Whether the daemons are on this machine."""
    return all(shutil.which(daemon, path=PATH) for daemon in DAEMONS)


@dataclass(frozen=True)
class Slurm:
    """A running Slurm.

    Attributes:
        folder: Where its settings, state and logs are.
        host: Name of its only node.
    """

    folder: Path
    host: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `sbatch` and all others speak to it."""
        return {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Runs a command of Slurm's, such as `scontrol`, and returns what it prints.

        Raises:
            RuntimeError: If it fails.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def restore(self) -> None:
        """Brings the node back after it was set down, unless it has come back by itself, as it does once it reports."""

        def is_up() -> bool:
            with suppress(RuntimeError):  # which it is already
                self.call("scontrol", "update", f"nodename={self.host}", "state=RESUME")
            return self.call("sinfo", "--noheader", "--format=%T").strip() in (
                "idle",
                "mixed",
                "allocated",
                "completing",
            )

        wait_for(is_up, "the node's return")

    def jobs(self) -> list[dict[str, str]]:
        """What `scontrol show job` says of all jobs, by `ArrayTaskId` where they have one, else by `JobId`."""
        lines = self.call("scontrol", "show", "job", "--oneliner").splitlines()
        rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if "JobId=" in line]
        return sorted(rows, key=lambda row: (int(row.get("ArrayJobId", row["JobId"])), int(row["JobId"])))


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Waits until a condition holds.

    Raises:
        TimeoutError: If it does not within `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about within {PATIENCE_S:.0f} s")
        time.sleep(0.1)


@contextmanager
def single_node(folder: Path, cpus: int = 4, memory_mib: int = 64_000) -> Iterator[Slurm]:
    """Starts a Slurm of one node, and stops it and its jobs when the block ends.

    Args:
        folder: Where its files go; kept short, because a socket's path is limited to some hundred characters.
        cpus: How many processors the node claims to have, whatever the machine has.
        memory_mib: Likewise its memory; jobs that ask for none are not limited.

    Raises:
        RuntimeError: If a daemon ends early; the message holds its log.
        TimeoutError: If the node does not come up.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": _free_port(), "node_port": _free_port()}
    names = {"folder": folder, "host": host, "user": getpass.getuser(), "cpus": cpus, "memory_mib": memory_mib}
    (folder / "slurm.conf").write_text(SETTINGS.format(**names, **ports))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    slurm = Slurm(folder, host)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{name}" for option, name in munge.items()]
    with ExitStack() as running:
        munged = running.enter_context(_daemon(slurm, "munged", "--force", "--foreground", *options))
        _wait_for_start(slurm, munged, (folder / "munge.socket").exists)
        controller = running.enter_context(_daemon(slurm, "slurmctld", "-D"))
        node = running.enter_context(_daemon(slurm, "slurmd", "-D", "-N", host))
        running.callback(_end_jobs, slurm)
        _wait_for_start(slurm, controller, lambda: _is_idle(slurm))
        _wait_for_start(slurm, node, lambda: _is_idle(slurm))
        yield slurm


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _daemon(slurm: Slurm, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which(name, path=PATH)
    assert program, f"{name} is not installed"
    log = slurm.folder / f"{name}.out"
    environment: Mapping[str, str] = slurm.environment
    with log.open("wb") as out:
        process = subprocess.Popen([program, *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_start(slurm: Slurm, daemon: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    name = Path(str(daemon.args[0])).name  # type: ignore[index]

    def has_started() -> object:
        if daemon.poll() is not None:
            raise RuntimeError(f"{name} ended: {(slurm.folder / f'{name}.out').read_text()[-2000:]}")
        return condition()

    wait_for(has_started, f"{name}'s start")


def _is_idle(slurm: Slurm) -> bool:
    try:
        return slurm.call("sinfo", "--noheader", "--format=%T").strip() == "idle"
    except RuntimeError:
        return False  # the controller does not answer yet


def _end_jobs(slurm: Slurm) -> None:
    """Leaves no process of a job behind; slurmd alone would."""
    slurm.call("scancel", f"--user={getpass.getuser()}")
    wait_for(lambda: not slurm.call("squeue", "--noheader").strip(), "the end of all jobs")
