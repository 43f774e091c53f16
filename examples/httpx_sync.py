"""httpx, from threads: the host of the URL is the service's name in Consul."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from meshlb import Mesh
from meshlb.httpx import MeshTransport


def main() -> None:
    with Mesh() as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:

        def fetch(number: int) -> str:
            response = client.get(f"http://orders/v1/orders/{number}")
            response.raise_for_status()
            return f"order {number}: {response.status_code} from {response.headers['x-backend']}"

        with ThreadPoolExecutor(4) as pool:
            for line in pool.map(fetch, range(20)):
                print(line)

        for endpoint in mesh.cluster("orders").snapshot()["endpoints"]:
            print(f"{endpoint['id']} at {endpoint['address']}: {endpoint['state']}, {endpoint['calls']} calls")


if __name__ == "__main__":
    main()
