"""What a test may have left behind: threads, child processes, open files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.support.processes import reaper_pid

CONTROL_THREAD = "meshlb-control"
"""The control loop's thread. It is a daemon, but once the last mesh is closed it has to be gone."""


def running_threads() -> set[threading.Thread]:
    """The threads that a test has to end: all but daemons, and the control loop."""
    return {
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and (not thread.daemon or thread.name == CONTROL_THREAD)
    }


def child_processes() -> set[int]:
    """The pids of this process's children, zombies too; without the helpers that live as long as the test process."""
    own = str(os.getpid()).encode()
    children: set[int] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # After the name in parentheses, which may hold anything: state, then the parent.
                    if file.read().rpartition(b")")[2].split()[1] == own:
                        children.add(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
    return {pid for pid in children if pid != reaper_pid() and b"multiprocessing.resource_tracker" not in _command(pid)}


def describe(threads: set[threading.Thread], processes: set[int]) -> str:
    """What is left, for a failure message."""
    lines = [f"thread {thread.name}{' (a mesh is open)' * (thread.name == CONTROL_THREAD)}" for thread in threads]
    lines += [f"process {pid}: {_command(pid).replace(bytes(1), b' ').decode(errors='replace')}" for pid in processes]
    return ", ".join(sorted(lines))


def open_files() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd")) - 1  # listing takes one itself


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() or b"(zombie)"
    except OSError:
        return b"(gone)"
