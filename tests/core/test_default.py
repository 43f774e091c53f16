from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlb import ConfigError, default, default_mesh
from meshlb.discovery import ConsulDiscovery, StaticDiscovery


@pytest.fixture(autouse=True)
def nobodys_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(default, "_mesh", None)
    yield
    if default._mesh is not None:
        default._mesh.close()


def test_one_for_the_process_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "10.9.8.7:8501")
    mesh = default_mesh()
    assert default_mesh() is mesh
    assert isinstance(mesh.discovery, ConsulDiscovery)
    assert "10.9.8.7:8501" in repr(mesh)


def test_a_closed_one_is_replaced() -> None:
    mesh = default_mesh()
    mesh.close()
    assert default_mesh() is not mesh


def test_from_the_file_in_the_working_directory() -> None:
    Path("meshlb.toml").write_text('[static.services]\norders = ["127.0.0.1:80"]\n')
    discovery = default_mesh().discovery
    assert isinstance(discovery, StaticDiscovery)
    assert discovery.knows("orders")


def test_an_error_in_the_file_is_raised_each_time() -> None:
    Path("meshlb.toml").write_text("policy = 3\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"meshlb\.toml"):
            default_mesh()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # since Python 3.12: it forks with threads
def test_a_lock_held_by_another_thread_at_the_fork_does_not_hang_the_child() -> None:
    with default._lock:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # in the parent it is pytest's
                signal.alarm(10)
                default_mesh()
                code = 0
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
