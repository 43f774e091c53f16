"""Whether an empty answer is empty, or only looks so to a token that may not see what is there.

Consul filters what a token may not read out of a list and answers 200. Since 1.11 a header says that it did. To know
it of older servers too, Consul is asked what the token may read, with the request that its own web interface has used
since 1.7.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from meshlb.errors import DiscoveryError

if TYPE_CHECKING:
    from meshlb.discovery.consul_client import AsyncConsul


async def hidden_by_acl(
    client: AsyncConsul, headers: Mapping[str, str], service: str, nodes: Iterable[str], datacenter: str | None
) -> bool:
    """Whether instances of ``service`` may be hidden from the token that was used.

    ``nodes`` are those known to have run it; without any, the token has to be good for nodes in general. ``headers``
    are those of the empty answer. False whenever that cannot be found out: no ACLs, no such request, no answer.
    """
    if headers.get("x-consul-results-filtered-by-acls", "").lower() == "true":
        return True
    wanted: list[dict[str, str]] = [{"Resource": "service", "Access": "read", "Segment": service}]
    wanted += [{"Resource": "node", "Access": "read", "Segment": node} for node in nodes] or [
        {"Resource": "node", "Access": "read"}
    ]
    try:
        response = await client.http.post(
            lambda response: response,
            "/v1/internal/acl/authorize",
            params=[("dc", datacenter)] if datacenter else [],
            data=json.dumps(wanted),
        )
    except DiscoveryError:
        return False
    if response.code == 403:
        return True  # the token does not even exist any more
    return response.code == 200 and denied(response.body)


def denied(body: str) -> bool:
    """Read the verdicts: the service's first, then the nodes', of which one is enough."""
    try:
        service, *nodes = [bool(verdict["Allow"]) for verdict in json.loads(body)]
    except (ValueError, TypeError, KeyError):
        return False
    return not service or (bool(nodes) and not any(nodes))
