"""`spiketrain COMMAND …`: the entry point of all commands, and the launcher of several ranks on one machine.

spiketrain pretrain --config configs/pretrain/laptop.yaml
spiketrain pretrain --ranks 2 --config configs/pretrain/laptop.yaml
spiketrain prepare_data --help

A command is the script launch/COMMAND.py, run unchanged. With `--ranks N`, N processes of it run on this machine, with
the environment variables that torchrun would set. This module imports nothing slow.
"""

import contextlib
import ctypes
import math
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_DIRECTORY = Path(__file__).resolve().parent
COMMANDS = {
    "prepare_data": "turn documents into token files",
    "pretrain": "pre-train a language model",
    "prepare_rows": "generate rows of a task that a program can check",
    "posttrain": "fine-tune on answers, or learn from rewards",
    "generate": "sample text from a checkpoint",
    "serve": "OpenAI's HTTP interface over a checkpoint",
    "evaluate": "bits per byte of a checkpoint",
    "convert": "weights in and out, hybrids, experts, spikes, staged recipes",
    "compression": "what compressed activations cost the gradient, and bits by place",
    "plan": "what a run would take of a cluster",
    "bench": "benchmarks, ours beside a peer",
    "report": "draw training curves",
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_EXIT_CONFIG_ERROR, _EXIT_STOPPED = 2, 75
# After one rank has exited, for whatever reason, the others have this many seconds.
_SECONDS_TO_LEAVE = 30.0
_SECONDS_BETWEEN_LOOKS = 0.5
# si_code of signals that the kernel sends, as for Ctrl-C (SI_KERNEL), and the option number from linux/prctl.h.
_FROM_TERMINAL = 0x80
_PR_SET_PDEATHSIG = 1


def usage() -> str:
    """The text of `--help`."""
    lines = [f"  {name:<13} {description}" for name, description in COMMANDS.items()]
    return "\n".join(
        (
            "usage: spiketrain COMMAND [--ranks N] [options; spiketrain COMMAND --help lists them]\n",
            *lines,
            "\n--ranks N starts N processes on this machine (pretrain, posttrain, convert run).",
            "On a cluster use torchrun or launch/slurm.",
        )
    )


def main() -> int:
    """Run the command named by the first argument."""
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        return _refuse(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
    try:
        ranks, options = take_ranks(arguments[1:])
    except ValueError as error:
        return _refuse(str(error))
    script = _DIRECTORY / f"{name}.py"
    if ranks == 1:
        sys.argv = [f"spiketrain {name}", *options]
        runpy.run_path(str(script), run_name="__main__")
        return 0
    if name not in ("pretrain", "posttrain") and [name, *options[:1]] != ["convert", "run"]:
        return _refuse(f"--ranks {ranks}: only pretrain, posttrain and convert run use several ranks")
    return Ranks([sys.executable, str(script), *options], environments_of(ranks)).wait()


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def take_ranks(arguments: list[str]) -> tuple[int, list[str]]:
    """Extract the number after `--ranks` (1 by default) from the arguments.

    Raises:
        ValueError: it is not a positive number.
    """
    others, given = [], "1"
    values = iter(arguments)
    for argument in values:
        option, equals, value = argument.partition("=")
        if option == "--ranks":
            given = value if equals else next(values, "")
        else:
            others.append(argument)
    if not given.isdigit() or int(given) < 1:
        raise ValueError(f"--ranks {given}: give the number of processes to start, 1 or more")
    return int(given), others


def environments_of(count: int) -> list[dict[str, str]]:
    """The environments of processes that are the ranks of one launch on this machine, as torchrun would set them."""
    shared = {
        # Distinguishes this launch from others: see trainer.run_lock.launch_id.
        "SPIKETRAIN_LAUNCH": f"{socket.gethostname()} {os.getpid()} {time.time_ns()}",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]


class Ranks:
    """Processes of one command that end together. Their output is passed through.

    A signal sent to this process alone is forwarded. Signals from a terminal reach the whole process group anyway.

    Args:
        command: Command that each process runs.
        environments: The environment of each process (`environments_of`).
    """

    def __init__(self, command: list[str], environments: Sequence[Mapping[str, str]]) -> None:
        # nohup ignores SIGHUP. Blocking the signal would make it pending and thus forward it.
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._signals = {*_SIGNALS} - ({signal.SIGHUP} if ignores_hangup else set())
        # Signals stay pending until `wait` collects them, so none is lost while ranks are still being started.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*self._signals, signal.SIGCHLD})
        prepare = _preparation(self._mask)
        self._ranks = {
            number: subprocess.Popen(
                command,
                env=environment,
                preexec_fn=prepare,
            )
            for number, environment in enumerate(environments)
        }
        self._exit_code = 0
        self._deadline = math.inf

    def wait(self) -> int:
        """Wait for all ranks. Returns 0, or the exit code of the first that failed (128 + N if signal N killed it)."""
        while self._ranks:
            if number := _next_signal(self._signals, _SECONDS_BETWEEN_LOOKS):
                self._send(number)
            for rank, process in list(self._ranks.items()):
                if process.poll() is not None:
                    del self._ranks[rank]
                    self._note_end(rank, process)
            if time.monotonic() > self._deadline:
                self._send(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return self._exit_code

    def _send(self, number: int) -> None:
        for process in self._ranks.values():
            process.send_signal(number)

    def _note_end(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.returncode
        # Only the first exit decides: the others are its consequence.
        if self._exit_code or (code == 0 and self._deadline < math.inf):
            return
        self._deadline = time.monotonic() + _SECONDS_TO_LEAVE
        self._exit_code = code if code >= 0 else 128 - code
        if code < 0:
            name = signal.Signals(-code).name
            print(f"error: rank {rank} (pid {process.pid}) was ended by {name}", file=sys.stderr, flush=True)
        elif code not in (0, _EXIT_CONFIG_ERROR, _EXIT_STOPPED):
            print(f"error: rank {rank} (pid {process.pid}) exited with {code}", file=sys.stderr, flush=True)
        if code not in (0, _EXIT_STOPPED):
            # Ranks that finished or stopped on request need no signal: their peers are about to exit too.
            self._send(signal.SIGTERM)


def _next_signal(signals: set[signal.Signals], seconds: float) -> int | None:
    """Wait up to `seconds` for a signal to forward; returns None at once when a child exits."""
    if not hasattr(signal, "sigtimedwait"):
        # macOS cannot tell the sender, so a signal may arrive twice; ranks treat both as one request.
        time.sleep(seconds)
        pending = signal.sigpending() & signals
        return signal.sigwait(pending) if pending else None
    info = signal.sigtimedwait({*signals, signal.SIGCHLD}, seconds)
    # After a stop (SIGSTOP, SIGCONT) that outlasts the wait, Python returns a structure that nobody has filled.
    if info is None or info.si_signo not in signals or info.si_code == _FROM_TERMINAL:
        return None
    return info.si_signo


def _preparation(mask: set[int | signal.Signals]) -> Callable[[], None]:
    """Function that a rank runs before exec: unblocks signals, and asks for SIGTERM if this process dies (Linux).

    It ignores SIGUSR2, the request to save, until the run installs its handler: the default action would kill the rank.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return prepare


def free_port() -> int:
    """A port of this machine that nobody listens at, nor is given who asks for any: ranks listen seconds later."""
    while True:
        # Systems give ports from 32768 on to those who ask for any.
        port = 16384 + secrets.randbelow(16384)
        with socket.socket() as holder, contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    sys.exit(main())
