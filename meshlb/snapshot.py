"""A cluster as plain data: what an operator, the status page and the exporters read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meshlb.model import Status
from meshlb.resilience.breaker import BreakerState
from meshlb.tiering import describe_tiers
from meshlb.topology import Standing

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Node
    from meshlb.resilience import ConcurrencyLimiter


def cluster_snapshot(cluster: Cluster, nodes: Iterable[Node], last_error: Exception | None) -> dict[str, Any]:
    """JSON types only. Times are seconds; ``age`` is None until the registry has answered."""
    now = cluster.clock()
    view = cluster.view
    eligible = set(view.nodes)
    tier_of = {} if view.layout is None else view.layout.tier_of
    return {
        "service": cluster.service,
        "query": str(cluster.query),
        "policy": cluster.policy.name,
        "version": view.version,
        "age": cluster.age,
        "panic": view.panic,
        "tiers": describe_tiers(view.layout),
        "subset": cluster.subset,
        "last_error": None if last_error is None else str(last_error),
        "retries": cluster.retries,
        "ejections": cluster.ejections,
        "limits": None if cluster.limiter is None else _limits(cluster.limiter),
        "retry_balance": None if cluster.budget is None else cluster.budget.balance,
        "endpoints": [
            endpoint_snapshot(node, now, eligible=node in eligible, tier=tier_of.get(node, 0)) for node in nodes
        ],
    }


def _limits(limiter: ConcurrencyLimiter) -> dict[str, int | None]:
    return {
        "in_use": limiter.in_use,
        "max_concurrency": limiter.options.max_concurrency,
        "waiting": limiter.waiting,
        "max_queue": limiter.options.max_queue,
        "rejected": limiter.rejected,
    }


def endpoint_snapshot(node: Node, now: float, *, eligible: bool, tier: int = 0) -> dict[str, Any]:
    """One row. ``reason`` says in words why the state is what it is; empty for a healthy endpoint."""
    endpoint = node.endpoint
    breaker = node.breaker
    return {
        "address": endpoint.address,
        "id": endpoint.id,
        "node": endpoint.node,
        "datacenter": endpoint.datacenter,
        "zone": endpoint.zone,
        "status": endpoint.status.value,
        "state": node.standing.value,
        "reason": _reason(node, now),
        "health": None if node.health is None else node.health.describe(now),
        "eligible": eligible,
        "weight": node.effective_weight(now),
        "slow_start": 1.0 if node.ramp is None else node.ramp.at(now),
        "tier": tier,
        "in_flight": node.in_flight,
        "latency": node.latency.at(now) if node.latency.has_history else None,
        "oldest_wait": node.oldest_wait(now),
        "breaker": None if breaker is None else breaker.state.value,
        "failure_rate": node.failure_rate(),
        "max_in_flight": None if node.limit is None else node.limit.limit,
        "calls": node.calls,
        "successes": node.successes,
        "failures": node.failures,
        "overloads": node.overloads,
        "ignored": node.ignored,
        "last_failure": node.last_failure,
    }


def _reason(node: Node, now: float) -> str:
    match node.standing:
        case Standing.DRAINING:
            return f"left the registry; {node.in_flight} calls still open"
        case Standing.MAINTENANCE | Standing.CRITICAL:
            return node.endpoint.status_reason or f"the registry says {node.endpoint.status.value}"
        case Standing.UNHEALTHY | Standing.UNCHECKED if node.health is not None:
            return node.health.describe(now)
        case Standing.OPEN if node.is_forced_open and node.breaker is not None:
            return node.breaker.reason
        case Standing.OPEN if node.breaker is not None:
            return f"{node.breaker.reason}; probed in {max(0.0, node.breaker.retry_at - now):.1f} s"
        case Standing.EJECTED:
            return f"{node.outlier}; back in {max(0.0, node.readmitted_at - now):.1f} s"
        case Standing.HALF_OPEN if node.breaker is not None:
            return f"{node.breaker.reason}; being probed"
        case Standing.OUT_OF_SUBSET:
            return "not in the subset that this process uses"
    if node.ramp is not None and (factor := node.ramp.at(now)) < 1.0:
        return f"slow start: takes {factor:.0%} of its share"
    if node.health is not None and node.health.in_doubt:
        return node.health.describe(now)
    if node.endpoint.status is Status.WARNING:
        return node.endpoint.status_reason or "the registry says warning"
    if node.breaker is not None and node.breaker.state is BreakerState.DISABLED:
        return node.breaker.reason
    if node.breaker is not None and node.refused:
        return f"{node.breaker.cause} ({node.last_failure}); used all the same, since too many are out"
    if node.breaker is not None and node.breaker.state is BreakerState.CLOSED and node.breaker.failures:
        return f"{node.breaker.failures} consecutive failures ({node.last_failure})"
    return ""
