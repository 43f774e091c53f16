"""Where the calls of sticky sessions go, ahead of the policy. One for each service that has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from meshlb.model import CallContext, Status

if TYPE_CHECKING:
    from meshlb.node import Node
    from meshlb.sessions import Sticky
    from meshlb.view import View


class Stickiness:
    """Reads the session of a call, and notes where it is. Safe from any thread."""

    __slots__ = ("_fails", "_names", "_options")

    def __init__(self, options: Sticky) -> None:
        self._options = options
        self._fails = options.when_gone == "fail"
        self._names: dict[Node, str] = {}
        """Kept over rebuilds, since a name is a hash of the identity; replaced as a whole."""

    def hosts(self, members: Iterable[Node], eligible: Iterable[Node]) -> Mapping[str, Node]:
        """The instances that keep their sessions, by name: those that are eligible, and those in maintenance, which get
        no new ones (gRFC A55: DRAINING). For the control plane, before a view is put in place."""
        keeping = set(eligible)
        names = self._names
        self._names = named = {node: names.get(node) or self._options.host_of(node.endpoint) for node in members}
        return {
            name: node for node, name in named.items() if node in keeping or node.endpoint.status is Status.MAINTENANCE
        }

    def choose(self, view: View, call: CallContext) -> Node | None:
        """The session's own instance, if it may still be used; else the policy's choice, if the session may move."""
        session = call.session
        if session is not None and session.host is not None:
            node = view.hosts.get(session.host)
            if node is not None and node not in call.excluded:
                return node
            if self._fails:
                return None
        return view.picker.pick(call)

    def pins(self, call: CallContext) -> bool:
        """Whether the call can go to its session's instance alone."""
        return self._fails and call.session is not None and call.session.host is not None

    def lost(self, view: View, call: CallContext) -> bool:
        """Whether the instance of the call's session is gone, and the session may not move."""
        session = call.session
        return self.pins(call) and session is not None and session.host not in view.hosts

    def settle(self, call: CallContext, node: Node) -> None:
        """An attempt of the call has begun there: that is where its session is."""
        if call.session is not None and (name := self._names.get(node)) is not None:
            call.session.assign(name)
