# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark ran on, for its JSON."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["described"]


def described() -> dict[str, str | int | float]:
    """Date, processor, cores, kernel, Python, and the load before and during (of the last minute and of five)."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    one, five, _ = os.getloadavg()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": one,
        "load_5min": five,
    }
