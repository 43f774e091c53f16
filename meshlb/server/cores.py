"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_LEAST: Final = 0.01
"""Of a processor. Less than any container gets, and no division by nothing."""


def available_cores(root: Path = Path("/")) -> float:
    """Processors that this process may use: those of its affinity mask, less if its control group has a quota.

    A container's limit shows in neither ``os.cpu_count()`` nor the affinity mask. ``root`` is for tests.
    """
    try:
        count = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS
        count = float(os.cpu_count() or 1)
    quota = _quota(root)
    return max(count if quota is None else min(count, quota), _LEAST)


def _quota(root: Path) -> float | None:
    """Processors by the quotas of control groups (version 2, else 1): the least of our group and those above it."""
    base = root / "sys/fs/cgroup"
    group = base
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            group = base / path.lstrip("/")
    quotas = [_ratio(*_read(at / "cpu.max").split()) for at in (group, *group.parents) if at.is_relative_to(base)]
    quotas.append(_ratio(_read(base / "cpu/cpu.cfs_quota_us"), _read(base / "cpu/cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def _ratio(quota: str = "", period: str = "") -> float | None:
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return ratio if ratio > 0 else None  # version 1 says -1 for none


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
