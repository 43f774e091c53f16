"""What `import meshlb` costs: nothing that only some of its users need."""

from __future__ import annotations

import json
import subprocess
import sys

# grpc and httpx belong to the adapters, consul and asyncio to the control loop, tenacity to the first retry,
# OpenTelemetry to the first service, the SDK to the program, xxhash to one policy.
NOT_AT_IMPORT = [
    *("grpc", "httpx", "httpx2", "httpcore", "consul", "requests", "asyncio", "anyio", "trio", "tenacity", "xxhash"),
    *("opentelemetry", "rich", "ssl", "socket", "concurrent.futures", "tomllib", "ctypes"),
]


def test_import_loads_no_adapter_no_event_loop_and_no_sdk():
    program = f"import json, sys, meshlb; print(json.dumps([m for m in {NOT_AT_IMPORT!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
