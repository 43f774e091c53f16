"""What went wrong between us and Consul, said so that the reader knows what to do."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Final

from meshlb.errors import DiscoveryError, DiscoveryTimeout

if TYPE_CHECKING:
    from meshlb.discovery.consul_address import ConsulAddress

_EXCERPT: Final = 160
"""Characters of an answer's body that are shown: it may be a whole HTML page."""

_TOKEN_HINT: Final = (
    "give a token that may read the service and its nodes (service:read and node:read): "
    "token=, CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE"
)


def unreachable(address: ConsulAddress, error: BaseException) -> DiscoveryError:
    """For a request that got no answer: no connection, TLS that failed, a connection that broke, a time-out."""
    import ssl

    import httpx

    for cause in _chain(error):
        if isinstance(cause, ssl.SSLError):
            return DiscoveryError(f"TLS with Consul at {address} failed: {cause}; {_tls_hint(cause)}")
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        return DiscoveryError(
            f"Consul at {address} cannot be reached ({_detail(error)}): is the agent running there? "
            f"The address is {address.source}"
            + ("" if address.source == "CONSUL_HTTP_ADDR" else "; CONSUL_HTTP_ADDR or ConsulDiscovery(address) sets it")
        )
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return DiscoveryTimeout(f"Consul at {address} accepted the query but did not answer in time; it may hang")
    if isinstance(error, httpx.DecodingError):
        return DiscoveryError(f"Consul at {address} sent a broken answer ({error}): is this a Consul agent?")
    return DiscoveryError(
        f"the connection to Consul at {address} broke ({_detail(error)}): it may be restarting, or "
        f"limits.http_max_conns_per_client of the agent (by default 200) is used up"
    )


def refused(address: ConsulAddress, status: int, body: bytes) -> DiscoveryError:
    """For an answer whose status is not 200."""
    text = excerpt(body)
    return DiscoveryError(f"Consul at {address} answered {status}{f' ({text})' if text else ''}{_hint(status, text)}")


def unreadable(address: ConsulAddress, problem: str, body: bytes) -> DiscoveryError:
    """For an answer 200 whose body is not what Consul sends."""
    text = excerpt(body)
    return DiscoveryError(
        f"Consul at {address} answered 200, but the body is {problem}{f' ({text})' if text else ''}: "
        f"is this a Consul agent's HTTP API, and does nothing between cut answers short?"
    )


def filtered(address: ConsulAddress, service: str) -> DiscoveryError:
    """For an empty answer that is empty because the ACL system left everything out."""
    return DiscoveryError(
        f"Consul at {address} answered with an empty list because the ACL token may not see instances of {service!r}: "
        f"{_TOKEN_HINT}"
    )


def excerpt(body: bytes) -> str:
    """The start of a body on one line."""
    text = re.sub(r"\s+", " ", body[: _EXCERPT * 2].decode("utf-8", "replace")).strip()
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."


def _hint(status: int, text: str) -> str:
    if status == 400 and "HTTPS server" in text:
        return ": the port speaks TLS; use an https:// address or CONSUL_HTTP_SSL=true"
    if status == 403:
        return f": {_TOKEN_HINT}"
    if status == 429:
        return ": too many connections or queries; raise limits.http_max_conns_per_client of the agent, or watch less"
    if status in {400, 500} and any(word in text for word in ("filter", "boolean expression", "evaluator")):
        return ": the filter expression is wrong"
    if "No cluster leader" in text:
        return ": the servers have no leader; consistency='stale' would go on without one"
    if "No path to datacenter" in text:
        return ": no such datacenter, or no server of it can be reached"
    if status < 500 and status != 400:
        return ": is this a Consul agent's HTTP API?"
    return ""


def _tls_hint(error: BaseException) -> str:
    text = str(error).lower()
    if "certificate verify failed" in text or "certificate_verify_failed" in text:
        return "give the CA that signed its certificate (ca_file, CONSUL_CACERT) and, if needed, tls_server_name"
    if "wrong version" in text or "record layer failure" in text:
        return "the port does not speak TLS; use an http:// address"
    if "alert" in text:
        return "the agent may want a client certificate (cert, CONSUL_CLIENT_CERT)"
    return "check ca_file, cert and tls_server_name"


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and one not in found:
            found.append(one)
            pending += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                pending += one.exceptions
    return found


def _detail(error: BaseException) -> str:
    """The operating system's word if there is one: httpx itself says "All connection attempts failed"."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno in errno.errorcode:
            return os.strerror(cause.errno).lower()
    return str(error) or type(error).__name__
