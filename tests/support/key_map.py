"""Who gets which key, as a process of its own finds it: `python -m tests.support.key_map POLICY ADDRESS... < keys`.

Calls each key's backend through httpx and the mesh; keys and answers are JSON.
"""

from __future__ import annotations

import json
import sys

import httpx

from meshlb import Header, Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import MeshTransport


def main() -> None:
    policy, *addresses = sys.argv[1:]
    config = ServiceConfig(policy=policy, hash_on=Header("x-user"))
    with (
        Mesh(StaticDiscovery({"orders": addresses}), defaults=config) as mesh,
        httpx.Client(transport=MeshTransport(mesh)) as client,
    ):
        found = {
            key: client.get("http://orders/", headers={"x-user": key}).headers["x-backend"]
            for key in json.load(sys.stdin)
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
