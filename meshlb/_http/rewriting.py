"""The logical request, readdressed to one endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Rewrite = Callable[[Any, Any], Any]

PHASES: Final = ("connect", "read", "write", "pool")

_SAMPLES: Final = (
    "http://orders",
    "https://orders:8443/v1/orders/42?x=1&y=%20a%2Fb#part",
    "http://user:secret@orders.service.consul//a/./b?",
)
_ENDPOINTS: Final = ("http://10.0.0.1:8080", "https://[fd00::1]", "http://host.example:80")


def url_rewriter(module: Any) -> Rewrite:
    """``rewrite(url, base)``: the path and query of ``url`` at the endpoint ``base``; neither user info nor fragment.

    Parsing the new URL takes 13 us, and copy_with 20: more than all else that a call through the mesh adds. Taking
    over the parts that the package has parsed already takes 0.5 us, but they are private to it. So that way is used
    only if, here and now, its results equal those of the public one.
    """
    try:
        fast = _by_parts(module)
        for sample in map(module.URL, _SAMPLES):
            for base in map(module.URL, _ENDPOINTS):
                if not _same(fast(sample, base), _by_parsing(module)(sample, base)):
                    return _by_parsing(module)
    except (AttributeError, TypeError):
        return _by_parsing(module)
    return fast


def _by_parsing(module: Any) -> Rewrite:
    def rewrite(url: Any, base: Any) -> Any:
        return module.URL(f"{base.scheme}://{base.netloc.decode('ascii')}{url.raw_path.decode('ascii')}")

    return rewrite


def _by_parts(module: Any) -> Rewrite:
    url_class = module.URL
    parts_class = type(module.URL(_SAMPLES[0])._uri_reference)
    new = object.__new__

    def rewrite(url: Any, base: Any) -> Any:
        rewritten = new(url_class)
        parts = url._uri_reference
        at = base._uri_reference
        rewritten._uri_reference = parts_class(at.scheme, "", at.host, at.port, parts.path or "/", parts.query, None)
        return rewritten

    return rewrite


def _same(one: Any, other: Any) -> bool:
    return bool(
        one == other
        and str(one) == str(other)
        and (one.raw_scheme, one.raw_host, one.port, one.raw_path, one.netloc, one.userinfo, one.fragment)
        == (other.raw_scheme, other.raw_host, other.port, other.raw_path, other.netloc, other.userinfo, other.fragment)
    )


def phase_timeouts(
    given: Mapping[str, float | None] | None, connect_timeout: float, limit: float | None
) -> dict[str, float | None]:
    """The timeouts of one attempt's phases: a copy of the caller's, connecting within ``connect_timeout``, and no
    phase above ``limit`` (seconds; None: no limit)."""
    phases = {} if given is None else dict(given)
    connect = phases.get("connect")
    if connect is None or connect > connect_timeout:
        phases["connect"] = connect_timeout
    if limit is not None:
        for phase in PHASES:
            seconds = phases.get(phase)
            if seconds is None or seconds > limit:
                phases[phase] = limit
    return phases
