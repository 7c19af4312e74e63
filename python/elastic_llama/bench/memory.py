"""Memory that this process really holds."""

from __future__ import annotations

import sys
from pathlib import Path


def resident_bytes() -> int | None:
    """Resident set of this process in bytes, None where the system does not say."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return None
