"""A SLURM cluster of two nodes on this machine: its own munge, slurmctld and two slurmd, all in one directory."""

import getpass
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path

from launch.main import free_port
from tests.helpers import WAIT

# Debian keeps the daemons out of an ordinary user's PATH.
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "pkill")

# AuthInfo: a job that queues again starts no sooner than a credential lives, by default two minutes.
_CONFIGURATION = """\
ClusterName=spiketrain
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n.spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first_port} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second_port} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What has to be installed before a cluster can be started."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """Start it with `start`, end it with `stop`.

    Args:
        root: An existing empty directory. Its path should be short: a socket's has at most 107 characters.

    Attributes:
        environment: Of the commands that are to speak to this cluster.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Configure and start the daemons; returns when both nodes are idle.

        Raises:
            RuntimeError: the nodes do not come up; the message has the logs.
        """
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        (self.root / "state").mkdir()
        ports = dict(zip(("controller_port", "first_port", "second_port"), _free_ports(3), strict=True))
        configuration = _CONFIGURATION.format(root=self.root, user=getpass.getuser(), **ports)
        (self.root / "slurm.conf").write_text(configuration)
        # munged wants to be alone with its files; --force has it go on where a parent directory is open to others.
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        places = [f"--{option}={self.root / name}" for option, name in (files | {"seed-file": "munge.seed"}).items()]
        self._spawn("munged", "--foreground", "--force", *places)
        self._wait(lambda: (self.root / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        self._wait(lambda: self._node_states() == ["IDLE", "IDLE"], "the nodes")

    def stop(self) -> None:
        """End every job and daemon."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        self.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Output of a command that speaks to this cluster."""
        result = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=WAIT, check=False
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout

    def job(self, number: int) -> dict[str, str]:
        """What scontrol shows of a job: JobState, ExitCode, Restarts and so on."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.root.glob("*.log")))

    def _spawn(self, *command: str) -> None:
        name = f"{command[0]}{'-' + command[-1] if command[-1] in ('n1', 'n2') else ''}"
        with (self.root / f"{name}.output.log").open("w") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
            )

    def _node_states(self) -> list[str]:
        lines = self.run("scontrol", "--oneliner", "show", "nodes", check=False).splitlines()
        return [word.split("=")[1] for line in lines for word in line.split() if word.startswith("State=")]

    def _wait(self, condition, what: str, timeout: float = WAIT) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"{what} did not come up:\n{self.logs()}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)
