"""Resident memory of this process, as Linux tells it."""

from pathlib import Path


def resident_bytes(peak: bool = False) -> int:
    """Bytes of memory that this process has in use now, or had in use at most.

    Raises:
        RuntimeError: the system does not say.
    """
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")
