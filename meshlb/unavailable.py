"""Why nobody can be called: the error that says so, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from meshlb.errors import CircuitOpen, DiscoveryError, DiscoveryTimeout, LimitExceeded, MeshError, NoEndpoints
from meshlb.topology import Standing

if TYPE_CHECKING:
    from meshlb.discovery.base import ServiceQuery
    from meshlb.node import Node
    from meshlb.resilience import ConcurrencyLimiter


def why_unavailable(
    query: ServiceQuery,
    nodes: Collection[Node],
    *,
    answered: bool,
    error: Exception | None,
    patience: float,
    limiter: ConcurrencyLimiter | None = None,
) -> MeshError:
    """``answered``: whether the registry ever has; ``error``: what it failed with since (or at all); ``patience``: the
    seconds that a first call waits for it."""
    name = f"service '{query}'"
    if not answered:
        if error is not None:
            return DiscoveryError(f"{name}: no instances are known: {error}")
        return DiscoveryTimeout(
            f"{name}: the registry has not answered in time; is it reachable? (A first call waits "
            f"{patience:g} s, as set by ServiceConfig.discovery_timeout, or until its own deadline.)"
        )
    if not nodes:
        if error is not None:
            return NoEndpoints(f"{name}: the registry knows no instance of it: {error}")
        return NoEndpoints(
            f"{name}: the registry knows no instance of it; check the name, and whether an instance is registered"
        )
    counts = Counter(node.standing for node in nodes)
    states = ", ".join(f"{count} {standing.value}" for standing, count in sorted(counts.items()))
    message = f"{name}: none of its {len(nodes)} endpoints can be called ({states})"
    if limiter is not None and counts[Standing.READY]:
        return LimitExceeded(describe_limits(query, limiter))
    if counts[Standing.OPEN] or counts[Standing.HALF_OPEN] or counts[Standing.EJECTED]:
        return CircuitOpen(
            f"{message}: their calls failed or were too slow; they are tried again and come back by themselves, unless "
            "opened by hand (the reasons: Cluster.snapshot())"
        )
    if counts[Standing.UNHEALTHY] or counts[Standing.UNCHECKED]:
        return NoEndpoints(
            f"{message}: see what their active health checks were answered, and their checks in the registry "
            "(both: Cluster.snapshot())"
        )
    return NoEndpoints(f"{message}: see their checks in the registry (the reasons: Cluster.snapshot())")


def describe_limits(query: ServiceQuery, limiter: ConcurrencyLimiter) -> str:
    """What of the limits is reached."""
    most = limiter.options.max_concurrency
    if most is not None and limiter.in_use >= most:
        return (
            f"service '{query}': refused here, without an attempt: {limiter.in_use} attempts are under way "
            f"(Limits.max_concurrency {most})"
        )
    return (
        f"service '{query}': refused here, without an attempt: every endpoint has as many attempts under way as it may "
        f"({limiter.in_use} in all; Limits.max_concurrency_per_endpoint, Limits.adaptive)"
    )
