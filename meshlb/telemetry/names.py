"""Every name that telemetry exports, and nothing else: the place to change when the conventions move.

OpenTelemetry semantic conventions 1.44: HTTP (stable) and RPC (release candidate: ``rpc.system.name``, a fully
qualified ``rpc.method`` and ``rpc.response.status_code`` as the status' name, instead of the older ``rpc.system``,
``rpc.service`` and ``rpc.grpc.status_code``). What they have no name for is under ``meshlb.``.
"""

from __future__ import annotations

from typing import Final

SCOPE: Final = "meshlb"
"""The instrumentation scope of all spans and instruments."""
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

# -- attributes of the conventions -----------------------------------------------------------------------------

HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_REQUEST_METHOD_ORIGINAL: Final = "http.request.method_original"
HTTP_REQUEST_RESEND_COUNT: Final = "http.request.resend_count"
HTTP_RESPONSE_STATUS_CODE: Final = "http.response.status_code"
URL_FULL: Final = "url.full"
URL_SCHEME: Final = "url.scheme"
RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_RESPONSE_STATUS_CODE: Final = "rpc.response.status_code"
SERVER_ADDRESS: Final = "server.address"
"""The logical service, as the caller named it; never the instance."""
SERVER_PORT: Final = "server.port"
"""The port of the logical URL (its scheme's default if it names none), which is what the ``Host`` header says. The
instance's own port is ``network.peer.port``. Absent on RPCs: a target like ``consul:///orders`` has none."""
NETWORK_PEER_ADDRESS: Final = "network.peer.address"
NETWORK_PEER_PORT: Final = "network.peer.port"
NETWORK_PROTOCOL_VERSION: Final = "network.protocol.version"
ERROR_TYPE: Final = "error.type"

OTHER: Final = "_OTHER"
"""The conventions' value for what is not among the known ones."""
GRPC: Final = "grpc"

KNOWN_HTTP_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
"""RFC 9110, PATCH (RFC 5789) and QUERY. Any other becomes ``_OTHER``, so that a caller cannot make names at will."""

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

# -- attributes of ours ----------------------------------------------------------------------------------------

SERVICE: Final = "meshlb.service"
TAG: Final = "meshlb.tag"
DATACENTER: Final = "meshlb.datacenter"
SOURCE: Final = "meshlb.source"
"""Where a target's service is asked for, if not in the mesh's own discovery."""
ZONE: Final = "meshlb.zone"
ATTEMPT: Final = "meshlb.attempt"
"""1 for the first attempt of a call, 2 for its first retry, and so on."""
OUTCOME: Final = "meshlb.outcome"
"""Whose fault the end was: ``ok``, ``failure``, ``overload`` or ``ignored`` (the caller's own doing)."""
LATENCY: Final = "meshlb.latency"
"""Seconds to the start of the response: the figure that balancing and the duration histogram took in."""
ENDPOINT_STATE: Final = "meshlb.endpoint.state"
CHECK_RESULT: Final = "meshlb.health_check.result"
"""``passed`` or ``failed``."""

# -- instruments -----------------------------------------------------------------------------------------------

HTTP_CLIENT_REQUEST_DURATION: Final = "http.client.request.duration"
RPC_CLIENT_CALL_DURATION: Final = "rpc.client.call.duration"

DURATION_BOUNDARIES: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds: the buckets that both conventions advise. The SDK's default ones are meant for milliseconds."""

ENDPOINT_IN_FLIGHT: Final = "meshlb.endpoint.in_flight"
ENDPOINT_LATENCY: Final = "meshlb.endpoint.latency"
ENDPOINT_STATES: Final = "meshlb.endpoint.state"
ENDPOINT_WEIGHT: Final = "meshlb.endpoint.weight"
ENDPOINT_CALLS: Final = "meshlb.endpoint.calls"
ENDPOINT_FAILURES: Final = "meshlb.endpoint.failures"
ENDPOINT_HEALTH_CHECKS: Final = "meshlb.endpoint.health_checks"
SERVICE_ENDPOINTS: Final = "meshlb.service.endpoints"
SERVICE_RETRIES: Final = "meshlb.service.retries"
SERVICE_EJECTIONS: Final = "meshlb.service.ejections"
SERVICE_PANIC: Final = "meshlb.service.panic"
SERVICE_THROTTLED: Final = "meshlb.service.throttled"
LIMITS_IN_USE: Final = "meshlb.limits.in_use"
LIMITS_WAITING: Final = "meshlb.limits.waiting"
LIMITS_REJECTED: Final = "meshlb.limits.rejected"
DISCOVERY_AGE: Final = "meshlb.discovery.age"

# -- context keys ----------------------------------------------------------------------------------------------

SUPPRESS_INSTRUMENTATION: Final = "suppress_instrumentation"
"""The context key by which instrumentations of other libraries (contrib's httpx, grpc) are told to stay silent."""
