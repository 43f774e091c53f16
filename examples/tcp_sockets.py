"""Layer 4: a client that knows nothing of meshlb (http.client, in the place of a database's) on balanced sockets."""

from __future__ import annotations

import http.client

from meshlb import Cluster, Mesh, tcp


class Connection(http.client.HTTPConnection):
    """Whatever client lets its socket be made by somebody else can be balanced."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.service)
        self._cluster = cluster

    def connect(self) -> None:
        self.sock = tcp.connect(self._cluster, timeout=5)


def main() -> None:
    with Mesh() as mesh:
        cluster = mesh.cluster("orders")
        connections = [Connection(cluster) for _ in range(6)]
        for number, connection in enumerate(connections):
            connection.request("GET", f"/v1/orders/{number}")
            answer = connection.getresponse()
            answer.read()
            print(f"order {number}: {answer.status} from {answer.headers['x-backend']}")
        for endpoint in cluster.snapshot()["endpoints"]:
            print(f"{endpoint['address']}: {endpoint['in_flight']} connections")
        for connection in connections:
            connection.close()
        print(f"open: {sum(endpoint['in_flight'] for endpoint in cluster.snapshot()['endpoints'])}")


if __name__ == "__main__":
    main()
