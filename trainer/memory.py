"""Resident memory of this process, from Linux's /proc."""

from pathlib import Path


def resident_bytes(peak: bool = False) -> int:
    """Return the resident memory of this process in bytes: the current value, or the peak.

    Raises:
        RuntimeError: /proc/self/status does not contain it.
    """
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")
