"""Child processes that end with the test process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

REPO = Path(__file__).resolve().parents[2]

# Watches a pipe from the test process. When that closes (even by SIGKILL or os._exit, where no finalizer runs), it
# kills what was started and not yet reaped. SIGKILL ends a stopped process too.
_REAPER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
_lock = threading.Lock()
_reaper: subprocess.Popen[str] | None = None
_reaper_owner = 0
_running: set[ManagedProcess] = set()


def reaper_pid() -> int | None:
    """The pid of this process's reaper, which the leak guard has to know."""
    return _reaper.pid if _reaper is not None and _reaper_owner == os.getpid() else None


def _tell_reaper(sign: str, group: int) -> None:
    global _reaper, _reaper_owner
    with _lock:
        if _reaper is None or _reaper_owner != os.getpid():
            _reaper_owner = os.getpid()
            _reaper = subprocess.Popen(
                [sys.executable, "-ISc", _REAPER], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
        assert _reaper.stdin is not None
        _reaper.stdin.write(f"{sign}{group}\n")
        _reaper.stdin.flush()


class ManagedProcess:
    """A started child in a process group of its own, killed at the latest when the test process ends."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    ) -> None:
        self.popen = subprocess.Popen(
            list(command),
            cwd=REPO,
            env=None if env is None else {**os.environ, **env},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self._owner = os.getpid()
        _running.add(self)
        _tell_reaper("+", self.pid)

    @property
    def pid(self) -> int:
        """The pid, which is also the process group's id."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs (or is stopped)."""
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting connections, nobody answers."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL and reap: when it returns, the ports are free. May be called again."""
        if self.popen.returncode is None and self._owner == os.getpid():
            self.send(signal.SIGKILL)
            self._reap(10)
        self._forget()

    def terminate(self, timeout: float = 10.0) -> int:
        """SIGTERM, then SIGKILL after `timeout` seconds; the exit status."""
        if self.popen.returncode is None:
            self.thaw()  # a stopped process acts on SIGTERM only when it runs on
            self.send(signal.SIGTERM)
            try:
                self._reap(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        self._forget()
        return self.popen.wait()

    def _reap(self, timeout: float) -> None:
        self.popen.wait(timeout)
        self.send(signal.SIGKILL)  # what it had started itself

    def _forget(self) -> None:
        if self in _running and self._owner == os.getpid():
            _running.discard(self)
            _tell_reaper("-", self.pid)
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes for a process that is gone
                    stream.close()


@atexit.register
def _kill_all() -> None:
    for process in list(_running):
        process.kill()
    if _reaper is not None and _reaper_owner == os.getpid() and _reaper.stdin is not None:
        _reaper.stdin.close()
        _reaper.wait(5)
