"""The Echo service's stubs as the installed grpcio-tools generate them, beside the committed ones of an old version.

Since 1.63 stubs hand channels one more argument (_registered_method), so both kinds are worth a test.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.support.processes import REPO


def current_stubs(folder: Path) -> ModuleType:
    """A newly generated `echo_pb2_grpc`, written to `folder`; its messages are those of meshlb._proto.echo_pb2."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path=meshlb/_proto={REPO}/proto/meshlb/demo/v1"]
    subprocess.run([*command, f"--grpc_python_out={folder}", "meshlb/_proto/echo.proto"], check=True, cwd=REPO)
    spec = importlib.util.spec_from_file_location("current_echo_pb2_grpc", folder / "meshlb/_proto/echo_pb2_grpc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
