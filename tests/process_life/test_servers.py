"""gunicorn, uvicorn and Celery as they are run, with clients that are made when the program is imported."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.process_life.conftest import PATIENCE, PROGRAMS, Fleet, Program, members, running
from tests.support.ports import free_port, loopback_host
from tests.support.wait import eventually


def http_client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://{loopback_host()}:{port}", timeout=PATIENCE)


def workers_seen(program: Program, client: httpx.Client, done: Callable[[set[object]], bool]) -> set[object]:
    """Ask until the workers that answered are as they should be."""
    workers: set[object] = set()

    def asked() -> bool:
        said = program.get(client)
        if said is not None:
            workers.add(said["worker"])
            assert said["served_by"]
        return done(workers)

    eventually(asked, PATIENCE, 0.02, lambda: f"{workers}\n{program.log}")
    return workers


@pytest.mark.parametrize(
    ("preload", "support"),
    [(True, None), (False, None), (True, "0")],
    ids=["preload", "no preload", "preload, no fork support in gRPC"],
)
def test_gunicorn(preload: bool, support: str | None, fleet: Fleet, tmp_path: Path) -> None:
    """A worker ends after a few requests and another one is forked; all of them call both services."""
    port = free_port()
    command = ["-m", "gunicorn", f"{PROGRAMS}.web:app", "--bind", f"{loopback_host()}:{port}", "--workers", "2"]
    command += ["--worker-class", "gthread", "--threads", "2", "--max-requests", "5", "--timeout", "90"]
    command += ["--graceful-timeout", "30", *(["--preload"] if preload else [])]
    environment = fleet.environment(**({} if support is None else {"GRPC_ENABLE_FORK_SUPPORT": support}))
    with (
        running(command, environment, tmp_path / "log", ends_with={0, -signal.SIGTERM}) as program,
        http_client(port) as client,
    ):
        workers_seen(program, client, lambda workers: len(workers) >= 3)


def test_gunicorn_reloaded_by_a_signal(fleet: Fleet, tmp_path: Path) -> None:
    """SIGHUP: new workers, the old ones end."""
    port = free_port()
    command = ["-m", "gunicorn", f"{PROGRAMS}.web:app", "--bind", f"{loopback_host()}:{port}", "--timeout", "90"]
    with (
        running(command, fleet.environment(), tmp_path / "log", ends_with={0, -signal.SIGTERM}) as program,
        http_client(port) as client,
    ):
        first = workers_seen(program, client, bool)
        program.process.popen.send_signal(signal.SIGHUP)
        workers_seen(program, client, lambda workers: len(workers - first) == 1)


def test_uvicorn_with_reload(fleet: Fleet, tmp_path: Path) -> None:
    port = free_port()
    source = tmp_path / "source"
    source.mkdir()
    module = source / "reloaded.py"
    text = f"import os\nos.environ['VERSION'] = '%s'\nfrom {PROGRAMS}.web import asgi\n"
    module.write_text(text % "one")
    command = ["-m", "uvicorn", "reloaded:asgi", "--app-dir", str(source), "--reload", "--reload-dir", str(source)]
    command += ["--host", loopback_host(), "--port", str(port)]
    with (
        running(command, fleet.environment(), tmp_path / "log", ends_with={0, -signal.SIGTERM}) as program,
        http_client(port) as client,
    ):
        for version in ("one", "two"):
            module.write_text(text % version)

            def new(version: str = version) -> bool:
                said = program.get(client)
                return said is not None and said["version"] == version and said["served_by"] == fleet.ids

            eventually(new, PATIENCE, 0.05, lambda: program.log)


def test_uvicorn_with_workers(fleet: Fleet, tmp_path: Path) -> None:
    port = free_port()
    command = ["-m", "uvicorn", f"{PROGRAMS}.web:asgi", "--host", loopback_host(), "--port", str(port)]
    command += ["--workers", "2"]
    with (
        running(command, fleet.environment(), tmp_path / "log", ends_with={0, -signal.SIGTERM}) as program,
        http_client(port) as client,
    ):
        workers_seen(program, client, lambda workers: len(workers) == 2)


@pytest.mark.parametrize("before", ["unused", "used"])
def test_celery(before: str, fleet: Fleet, tmp_path: Path) -> None:
    """Prefork, where a child ends after three tasks and another one is forked."""
    for name in ("queue", "control", "results"):
        (tmp_path / name).mkdir()
    environment = fleet.environment(CELERY_FOLDER=str(tmp_path), BEFORE=before)
    command = ["-m", "celery", "--app", f"{PROGRAMS}.tasks", "worker", "--pool", "prefork", "--concurrency", "2"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    with running(command, environment, tmp_path / "log", ends_with={0}) as program:
        sent = fleet.run("-m", f"{PROGRAMS}.send", "8", CELERY_FOLDER=str(tmp_path), BEFORE=before)
        assert sent.returncode == 0, sent.stderr + program.log
        done = json.loads(sent.stdout)
        assert len(done) == 8
        assert all(served_by == fleet.ids for _, served_by in done), done
        assert len({pid for pid, _ in done}) >= 3, done  # none does more than three

        # A pool that is closed while it replaces a child tells one child too few to end, and waits for it for ever
        # (billiard 4.3.2: TaskHandler.tell_others counts the children, Supervisor changes them).
        tired = {pid for pid, tasks in Counter(pid for pid, _ in done).items() if tasks == 3}

        def replaced() -> bool:
            running_now = set(members(program.process.pid))
            return not running_now & tired and len(running_now) >= 3

        eventually(replaced, PATIENCE, 0.05, lambda: f"{members(program.process.pid)} {tired}\n{program.log}")
