"""The process's default mesh: what ``mesh=None`` means everywhere."""

from __future__ import annotations

import os
import threading
from typing import Final

from meshlb.mesh import Mesh

CONFIG_FILE: Final = "meshlb.toml"
"""Read from the working directory if it is there; otherwise the environment alone configures the default mesh."""

_lock = threading.Lock()
_mesh: Mesh | None = None


def default_mesh() -> Mesh:
    """The one mesh that is shared by everything in the process that was not given a mesh of its own.

    Made at first use, from ``meshlb.toml`` in the working directory or else from the CONSUL_* environment variables;
    made anew if it was closed. Raises ConfigError if either is wrong.
    """
    global _mesh
    with _lock:
        if _mesh is None or _mesh.closed:
            _mesh = Mesh.from_file(CONFIG_FILE) if os.path.isfile(CONFIG_FILE) else Mesh()
        return _mesh


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it, and does not exist here


os.register_at_fork(after_in_child=_after_fork_in_child)
