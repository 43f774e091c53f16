"""Run the `meshlb` command as a program in a session of its own, and see that nothing of that session is left."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import REPO, ManagedProcess
from tests.support.wait import eventually

MESHLB = [sys.executable, "-m", "meshlb"]


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed; with a terminal everything is in `out`."""

    status: int
    out: str
    err: str = ""


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with some variables set, or removed (None)."""
    changed = {"PYTHONPATH": str(REPO), "COLUMNS": "120", "TERM": "xterm-256color", **changes}
    return {name: value for name, value in {**os.environ, **changed}.items() if value is not None}


def meshlb(*arguments: str, env: Mapping[str, str] | None = None) -> Ended:
    """Run it with pipes, as in a script."""
    return run([*MESHLB, *arguments], env)


def run(command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 100.0) -> Ended:
    """Run a program to its end."""
    process = subprocess.Popen(
        command,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.communicate()
    nothing_left(process.pid)
    return Ended(process.returncode, out, err)


def meshlb_in_terminal(
    *arguments: str, when: str = "", then: Callable[[int], object] = lambda pid: None, timeout: float = 100.0
) -> Ended:
    """Run it in a pseudo-terminal of 120 columns; as soon as `when` is on the screen, call `then(pid)`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*MESHLB, *arguments], environment())
    screen = b""
    deadline = time.monotonic() + timeout
    waiting = bool(when)
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([terminal], [], [], 0.5)
            if ready:
                try:
                    data = os.read(terminal, 65536)
                except OSError:  # EIO: the other side has ended
                    break
                if not data:
                    break
                screen += data
            if waiting and when.encode() in screen:
                waiting = False
                then(pid)
        else:
            raise AssertionError(f"still running after {timeout:g} s:\n{screen.decode(errors='replace')[-4000:]}")
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(terminal)
    nothing_left(pid)
    return Ended(os.waitstatus_to_exitcode(status), screen.decode(errors="replace"))


def session_members(session: int) -> dict[int, str]:
    """The processes of a session, with their command lines."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[3]) == session and stat[0] != b"Z":
                found[int(entry)] = command
    return found


def nothing_left(session: int) -> None:
    """All processes of the session end by themselves, soon."""
    eventually(lambda: not session_members(session), 30, message=lambda: f"left running: {session_members(session)}")


def started(*arguments: str, env: Mapping[str, str] | None = None) -> ManagedProcess:
    """Start it and do not wait."""
    return ManagedProcess(
        [*MESHLB, *arguments],
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
