"""Celery tasks. The folder of the broker and of the results is in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from celery.signals import worker_init

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


@app.task
def call() -> tuple[int, list[str]]:
    return os.getpid(), clients.everything()
