"""What an attempt's request says to the endpoint alone, beyond what the client's request said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshlb.balancing.orca import FORMAT_HEADER
from meshlb.serving import ATTEMPT_COUNT

if TYPE_CHECKING:
    from meshlb._http.pools import Route


def amend(attempt: Any, route: Route, *, limit: float | None, cookies: str | None, previous: int) -> None:
    """Complete the request of an attempt.

    ``limit``: seconds that it may take. ``cookies``: those that are for the endpoint. ``previous``: how many attempts
    came before it, here and in the layers above.
    """
    cluster, headers = route.cluster, attempt.headers
    if route.server_name is not None:
        attempt.extensions.setdefault("sni_hostname", route.server_name)
    if cluster.cookies is not None:  # the session's is between the client and this transport
        if cookies is None:
            headers.pop("cookie", None)
        else:
            headers["cookie"] = cookies
    if cluster.wants_reports:
        headers.setdefault(FORMAT_HEADER, "TEXT")
    if limit is not None and cluster.config.deadline_header is not None:
        headers[cluster.config.deadline_header] = str(max(1, int(limit * 1000)))
    if previous:
        headers[ATTEMPT_COUNT] = str(previous + 1)
