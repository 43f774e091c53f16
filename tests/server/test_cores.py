from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshlb.server.cores import available_cores

HERE = float(len(os.sched_getaffinity(0)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_it_is_the_affinity(tmp_path: Path):
    assert available_cores(tmp_path) == HERE


@pytest.mark.parametrize(("limit", "cores"), [("50000 100000", 0.5), ("max 100000", HERE), ("9900000 100000", HERE)])
def test_the_quota_of_a_container(tmp_path: Path, limit: str, cores: float):
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", limit)
    assert available_cores(tmp_path) == cores


def test_the_least_quota_of_the_groups_above_counts(tmp_path: Path):
    write(tmp_path / "proc/self/cgroup", "1:name=systemd:/other\n0::/pods/one\n")
    write(tmp_path / "sys/fs/cgroup/pods/cpu.max", "25000 100000")
    write(tmp_path / "sys/fs/cgroup/pods/one/cpu.max", "75000 100000")
    write(tmp_path / "sys/fs/cgroup/other/cpu.max", "1000 100000")
    assert available_cores(tmp_path) == 0.25


@pytest.mark.parametrize(("quota", "cores"), [("40000", 0.4), ("-1", HERE), ("nonsense", HERE)])
def test_control_groups_of_version_1(tmp_path: Path, quota: str, cores: float):
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert available_cores(tmp_path) == cores


def test_on_this_machine():
    assert 0 < available_cores() <= HERE
