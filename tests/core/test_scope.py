from __future__ import annotations

import errno
import socket

import anyio
import pytest

from meshlb import CircuitOpen, Outcome, OutcomeKind, Sent
from meshlb.scope import outcome_of
from tests.core.parts import OVERLOAD, assert_adds_up, make_cluster


@pytest.mark.parametrize(
    ("error", "kind", "sent"),
    [
        (None, OutcomeKind.OK, Sent.ANSWERED),
        (KeyboardInterrupt(), OutcomeKind.IGNORED, Sent.MAYBE),
        (SystemExit(1), OutcomeKind.IGNORED, Sent.MAYBE),
        (GeneratorExit(), OutcomeKind.IGNORED, Sent.MAYBE),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), OutcomeKind.IGNORED, Sent.MAYBE),
        (OSError(errno.EMFILE, "too many"), OutcomeKind.IGNORED, Sent.NOT_SENT),
        (OSError(errno.EADDRNOTAVAIL, "no port left"), OutcomeKind.IGNORED, Sent.NOT_SENT),
        (MemoryError(), OutcomeKind.IGNORED, Sent.NOT_SENT),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OutcomeKind.FAILURE, Sent.NOT_SENT),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), OutcomeKind.FAILURE, Sent.NOT_SENT),
        (ConnectionResetError(), OutcomeKind.FAILURE, Sent.MAYBE),
        (TimeoutError(), OutcomeKind.FAILURE, Sent.MAYBE),
        (ValueError(), OutcomeKind.FAILURE, Sent.MAYBE),
    ],
)
def test_what_the_end_of_a_block_means(error: BaseException | None, kind: OutcomeKind, sent: Sent) -> None:
    outcome = outcome_of(error)
    assert (outcome.kind, outcome.sent) == (kind, sent)
    if outcome.kind is OutcomeKind.FAILURE:
        assert outcome.reason == type(error).__name__


def test_a_block_is_an_attempt() -> None:
    mesh, cluster = make_cluster(1)
    [node] = cluster.nodes
    with cluster.lease(key="user-42") as lease:
        assert lease.node is node
        assert node.in_flight == 1
    with pytest.raises(ConnectionResetError), cluster.lease():
        raise ConnectionResetError
    with cluster.lease() as lease:
        lease.close(OVERLOAD)  # says more than the end of the block
    assert (node.successes, node.failures, node.overloads, node.in_flight) == (1, 1, 1, 0)
    assert_adds_up(cluster.nodes)
    mesh.close()


def test_a_scope_is_for_one_attempt() -> None:
    mesh, cluster = make_cluster(1)
    scope = cluster.lease()
    with scope:
        pass
    with pytest.raises(RuntimeError, match=r"cluster\.lease\(\) again"), scope:
        pass
    assert cluster.nodes[0].calls == 1
    mesh.close()


def test_entering_raises_what_start_raises() -> None:
    mesh, cluster = make_cluster(0)
    with pytest.raises(Exception, match="no instance"), cluster.lease():
        pytest.fail("entered")
    assert not isinstance(cluster.unavailable(), CircuitOpen)
    mesh.close()


async def test_a_cancelled_block_is_nobodys_fault() -> None:
    mesh, cluster = make_cluster(1)
    with anyio.move_on_after(0.01):
        async with cluster.lease():
            await anyio.sleep_forever()
    async with cluster.lease(timeout=1):
        pass
    [node] = cluster.nodes
    assert (node.ignored, node.successes, node.failures, node.in_flight) == (1, 1, 0, 0)
    mesh.close()


def test_outcome_given_by_the_block_is_kept_when_it_raises() -> None:
    mesh, cluster = make_cluster(1)

    def attempt() -> None:
        with cluster.lease() as lease:
            lease.close(Outcome(OutcomeKind.IGNORED))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        attempt()
    assert (cluster.nodes[0].ignored, cluster.nodes[0].failures) == (1, 0)
    mesh.close()
