"""Runs one program that nobody trusts, confined by the kernel: `python -I -S -B confined.py FD`, as sandbox.py does.

What the kernel refuses, for this process and everything in it, before the first line of the program is compiled:

- files, by Landlock: reading but for the interpreter's library, system libraries and time zones; writing, creating,
  removing and truncating but in the directory of this run. Names and sizes of other files can be seen.
- system calls, by seccomp: sockets (but for pairs within the process), other processes (fork, exec), signals to them,
  their memory and limits, namespaces, mounts, identities, kernel modules, keys, io_uring, shared memory of System V;
  chmod, chown and times of files do nothing.
- capabilities: all are dropped. Root becomes nobody if the interpreter's library is readable for everyone.
- limits: CPU time, address space, open files, size of a file, no core dumps. It dies with its parent.

Landlock must have version 3 (Linux 6.2) and the processor be x86-64 or ARM64, else the program is not run.

This file imports the standard library alone, because the sandbox sees nothing else.
"""

import builtins
import ctypes
import errno
import io
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from types import CodeType
from typing import Any, NoReturn

# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_SECCOMP_MODE_FILTER = 2
# linux/landlock.h: rights of the first three versions.
_READ_FILE, _WRITE_FILE, _EXECUTE, _READ_DIR, _TRUNCATE = 1 << 2, 1 << 1, 1 << 0, 1 << 3, 1 << 14
_ALL_RIGHTS, _DEVICES_AND_SOCKETS = (1 << 15) - 1, 1 << 6 | 1 << 9 | 1 << 11
_SCOPES = 0b11  # abstract sockets and signals, from version 6
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_OLDEST_LANDLOCK = 3
_NOBODY = 65534

# Exit codes of this script; a program's own end is told by its report.
NOT_CONFINED = 90

# linux/audit.h, and the place of each processor in the tables.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Numbers on x86-64 and ARM64, of asm/unistd_64.h and asm-generic/unistd.h.
# fmt: off
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "bind": (49, 200), "connect": (42, 203), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "tkill": (200, 130), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "userfaultfd": (323, 282), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "setuid": (105, 146), "setgid": (106, 144),
    "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149),
    "setgroups": (116, 159), "setfsuid": (122, 151), "setfsgid": (123, 152), "capset": (126, 91),
    "personality": (135, 92), "setsid": (112, 157), "setpgid": (109, 154), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "mknod": (133, None), "mknodat": (259, 33), "syslog": (103, 116), "vhangup": (153, 58),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "shmget": (29, 194),
    "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "execve": (59, 221), "execveat": (322, 281), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "link": (86, None), "linkat": (265, 37),
}
_WITHOUT_EFFECT: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
}
# fmt: on
_FORK, _VFORK, _CLONE, _CLONE3 = (57, None), (58, None), (56, 220), (435, 435)
_KILL, _TGKILL, _PRLIMIT, _FCNTL = (62, 129), (234, 131), (302, 261), (72, 25)
_CLONE_THREAD = 0x10000
_SET_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: who is sent signals of a file


def missing() -> str | None:
    """What this machine lacks for a sandbox; None if it has it all."""
    if sys.platform != "linux":
        return "the sandbox is made of Landlock and seccomp, which are Linux's"
    if platform.machine() not in _ARCHITECTURES:
        return f"there is no table of system calls for {platform.machine()}"
    version = _landlock_version()
    if version < _OLDEST_LANDLOCK:
        found = f"version {version}" if version > 0 else "none"
        return f"the kernel must offer Landlock version {_OLDEST_LANDLOCK} (Linux 6.2), and offers {found}"
    return None


def _landlock_version() -> int:
    return int(_syscall(_LANDLOCK_CREATE, None, 0, 1))


def _syscall(number: int, *arguments: Any) -> int:
    plain = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *plain))


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *arguments: Any) -> None:
    plain = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    plain += [ctypes.c_ulong(0)] * (4 - len(plain))
    _check(ctypes.CDLL(None, use_errno=True).prctl(option, *plain), f"prctl {option}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux); `parent` is its process."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    # It may have ended before that call.
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(limits: dict[str, int]) -> None:
    """Set limits by the names of resource.RLIMIT_…, none above what is allowed already."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _become_nobody(folder: str) -> None:
    """As root: drop to nobody where nobody can read the interpreter's library, and all capabilities in any case."""
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, 0)
        try:
            with open(os.__file__, "rb"):
                os.chdir(folder)
        except OSError:
            os.setresuid(0, 0, 0)
            os.chown(folder, 0, 0)
        else:
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3 of linux/capability.h, this process
    _check(ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)), "capset")


def _confine_files(readable: Sequence[str], folder: str) -> None:
    """Landlock: reading in `readable` (paths that do not exist are left out), everything in `folder`, nothing else."""
    version = _landlock_version()
    attributes = struct.pack("=QQQ", _ALL_RIGHTS, 0, _SCOPES)
    size = 24 if version >= 6 else 8
    ruleset = _check(_syscall(_LANDLOCK_CREATE, attributes, size, 0), "landlock_create_ruleset")
    for path, rights in [
        *((path, _READ_FILE | _READ_DIR | _EXECUTE) for path in readable),
        (folder, _ALL_RIGHTS & ~_DEVICES_AND_SOCKETS),
    ]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = rights if os.path.isdir(path) else rights & ~_READ_DIR
        rule = struct.pack("=Qi", allowed, place)
        _check(_syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule of {path}")
        os.close(place)
    _check(_syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _filter(architecture: int, column: int, pid: int) -> bytes:
    """The seccomp program (struct sock_filter of linux/filter.h) as bytes."""
    load, equal, at_least, bits, back = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    number_at, architecture_at, first_argument, second_argument = 0, 4, 16, 24

    def error(code: int) -> int:
        return 0x00050000 | code

    def statement(code: int, value: int) -> tuple[int, int, int, int]:
        return code, 0, 0, value

    # A jump's two numbers are instructions to pass over: if it holds, and if not.
    program = [
        statement(load, architecture_at),
        (equal, 1, 0, architecture),
        statement(back, kill),
        statement(load, number_at),
        # x86-64's second set of numbers for the same calls (x32).
        (at_least, 0, 1, 0x40000000),
        statement(back, error(errno.ENOSYS)),
    ]
    plain = [(numbers, errno.EPERM) for numbers in _REFUSED.values()]
    plain += [(numbers, 0) for numbers in _WITHOUT_EFFECT.values()]
    # libc falls back from clone3, whose flags are out of sight, to clone.
    plain += [(_FORK, errno.EAGAIN), (_VFORK, errno.EAGAIN), (_CLONE3, errno.ENOSYS)]
    for numbers, code in plain:
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column] or 0), statement(back, error(code))]
    for numbers, argument, test, values, held, else_ in (
        (_CLONE, first_argument, bits, (_CLONE_THREAD,), allow, error(errno.EAGAIN)),
        (_KILL, first_argument, equal, (pid,), allow, error(errno.EPERM)),
        (_TGKILL, first_argument, equal, (pid,), allow, error(errno.EPERM)),
        (_PRLIMIT, first_argument, equal, (0, pid), allow, error(errno.EPERM)),
        (_FCNTL, second_argument, equal, _SET_OWNERS, error(errno.EPERM), allow),
    ):
        block = [statement(load, argument)]
        for value in values:
            block += [(test, 0, 1, value), statement(back, held)]
        block.append(statement(back, else_))
        program += [(equal, 0, len(block), numbers[column] or 0), *block]
    program.append(statement(back, allow))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _confine_calls() -> None:
    """Install the filter of system calls."""
    program = _filter(*_ARCHITECTURES[platform.machine()], os.getpid())
    held = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a length, and a pointer after padding.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(held))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header))


def _confine(request: dict[str, Any]) -> None:
    """Everything of the module's docstring, in the order in which it is still allowed."""
    folder = request["folder"]
    limit_resources(request["limits"])
    if request["sandbox"]:
        lack = missing()
        if lack is not None:
            raise OSError(errno.ENOSYS, lack)
        _become_nobody(folder)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        # Not even others of the same user may look into its memory.
        _prctl(_PR_SET_DUMPABLE, 0)
    # A change of identity cancels it.
    die_with_parent(request["parent"])
    os.chdir(folder)
    if request["sandbox"]:
        _confine_files(request["readable"], folder)
        _confine_calls()


def _kind(error: BaseException) -> str:
    """The kind of failure (base.ERRORS) of what a program raised."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.EAGAIN):
        return "refused"
    if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EMFILE):
        return "limit"
    # How starting a thread fails when its stack does not fit.
    return "memory" if isinstance(error, RuntimeError) and "start new thread" in str(error) else "exception"


def _run_tests(program: CodeType, tests: Sequence[str]) -> dict[str, Any]:
    """Run the program, then each test with a copy of its globals."""
    space: dict[str, Any] = {"__name__": "candidate"}
    exec(program, space)
    passed, kind = 0, None
    for test in tests:
        try:
            exec(compile(test, "<test>", "exec"), dict(space))
            passed += 1
        except AssertionError:
            pass
        except BaseException as error:
            kind = kind or _kind(error)
    return {"passed": passed, "error": kind}


def _run_script(program: CodeType) -> dict[str, Any]:
    """Run the program as a script that reads stdin and writes stdout."""
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code not in (None, 0):
            return {"passed": 0, "error": "exception"}
    sys.stdout.flush()
    return {"passed": 1, "error": None}


def main(descriptor: int) -> NoReturn:
    """Read the request from a descriptor, confine this process, run the program, report."""
    with os.fdopen(descriptor, "rb") as file:
        request = json.loads(file.read())
    report = request.pop("report")
    key = request.pop("key")
    try:
        _confine(request)
    except OSError as error:
        os.write(report, json.dumps({"failure": str(error)}).encode())
        os._exit(NOT_CONFINED)
    sys.argv = ["program.py"]
    sys.path.extend(request["packages"])
    # As `site` would, which -S leaves out.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    for stream in (sys.stdin, sys.stdout):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="replace")
    write, leave = os.write, os._exit
    encode = json.JSONEncoder().encode
    try:
        program = compile(request["program"], "<completion>", "exec")
        tests = request["tests"]
        result = _run_script(program) if tests is None else _run_tests(program, tests)
    except BaseException as error:
        result = {"passed": 0, "error": _kind(error)}
    write(report, encode(result | {"key": key}).encode())
    # Without waiting for the program's threads.
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
