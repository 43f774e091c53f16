"""Celery tasks. The folder of the broker and of the results is in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from billiard.util import set_pdeathsig
from celery import Celery
from celery.signals import worker_init, worker_process_init

from tests.process_life.programs import clients

folder = Path(os.environ["CELERY_FOLDER"])
app = Celery("tasks", broker="filesystem://", backend=f"file://{folder / 'results'}")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "control_folder": str(folder / "control"),
    },
    broker_connection_retry_on_startup=False,
    worker_max_tasks_per_child=3,
    result_expires=None,
)


@worker_init.connect
def warm_up(**_: object) -> None:
    """Before the fork of the workers."""
    if os.environ["BEFORE"] == "used":
        clients.everything()


@worker_process_init.connect
def outlive_a_thread(**_: object) -> None:
    """Have the kernel not kill this child when its parent dies. Celery has asked for that, but to the kernel the parent
    is the thread that forked, and that is one of the pool's for a child that takes another one's place: it ends first
    when the worker does. A child that is killed while it waits for a task leaves its lock taken, for which the worker
    then waits for ever (celery 5.7.0, billiard 4.3.2). The tests kill the group."""
    set_pdeathsig(0)


@app.task
def call() -> tuple[int, list[str]]:
    return os.getpid(), clients.everything()
