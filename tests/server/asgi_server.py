"""An ASGI application on a real socket: uvicorn in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from tests.support.ports import loopback_host
from tests.support.wait import eventually


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """Serve until the block ends; gives host:port. ``options``: uvicorn's."""
    listener = socket.create_server((loopback_host(), 0), backlog=1024)
    config = uvicorn.Config(
        app,
        lifespan="off",
        http="h11",
        ws="none",
        proxy_headers=False,
        log_config=None,
        timeout_graceful_shutdown=5,
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"{listener.getsockname()[0]}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
