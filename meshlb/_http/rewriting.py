"""Where a request is addressed to, and the same request readdressed to one endpoint.

Both are in the way of every call, and both have a public way and a quick one: what the package has parsed and checked
is taken over as it is. The names of those parts are private to it, so the quick way is used only if, here and now, it
comes to the same as the public one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Locate = Callable[[Any], tuple[str, str]]
Readdress = Callable[[Any, Any, Any, dict[str, Any]], Any]

_SAMPLES: Final = (
    "http://orders",
    "https://orders:8443/v1/orders/42?x=1&y=%20a%2Fb#part",
    "http://user:secret@orders.service.consul//a/./b?",
)
_ENDPOINTS: Final = ("http://10.0.0.1:8080", "https://[fd00::1]", "http://host.example:80")
_HEADERS: Final = ((b"Host", b"orders"), (b"x-Ray", b"1"), (b"X-ray", b"\xe9"))


def locator(module: Any) -> Locate:
    """``locate(url)``: its scheme and its host, as that is written on the wire."""
    try:
        for url in map(module.URL, (*_SAMPLES, *_ENDPOINTS, "http://b\xfccher")):
            if _locate_by_parts(url) != _locate(url):
                return _locate
    except (AttributeError, TypeError):
        return _locate
    return _locate_by_parts


def _locate(url: Any) -> tuple[str, str]:
    return url.scheme, url.raw_host.decode("ascii")


def _locate_by_parts(url: Any) -> tuple[str, str]:
    parts = url._uri_reference
    return parts.scheme, parts.host


def readdresser(module: Any) -> Readdress:
    """``readdress(request, base, stream, extensions)``: a request like the given one, to the endpoint ``base`` (a URL).

    It has a copy of the headers (Host among them keeps naming the service), this stream and these extensions, and the
    path and query of the request's URL, but neither its user info nor its fragment.

    Parsing the new URL takes 13 us, and copy_with 20: more than all else that a call through the mesh adds; the
    constructors of Request, URL and Headers are five Python calls more. The quick way takes 0.7 us.
    """
    public = _by_construction(module)
    try:
        fast = _by_parts(module)
        for url in _SAMPLES:
            request = module.Request("POST", url, headers=_HEADERS, content=b"body", extensions={"meshlb": {}})
            for base in map(module.URL, _ENDPOINTS):
                arguments = request, base, request.stream, {"timeout": {"connect": 1.0}}
                if not same(fast(*arguments), public(*arguments)):
                    return public
    except (AttributeError, TypeError):
        return public
    return fast


def _by_construction(module: Any) -> Readdress:
    def readdress(request: Any, base: Any, stream: Any, extensions: dict[str, Any]) -> Any:
        url = f"{base.scheme}://{base.netloc.decode('ascii')}{request.url.raw_path.decode('ascii')}"
        return module.Request(request.method, url, headers=request.headers, stream=stream, extensions=extensions)

    return readdress


def _by_parts(module: Any) -> Readdress:
    request_class, url_class, headers_class = module.Request, module.URL, module.Headers
    parts_class = type(module.URL(_SAMPLES[0])._uri_reference)
    new, new_tuple = object.__new__, tuple.__new__

    def readdress(request: Any, base: Any, stream: Any, extensions: dict[str, Any]) -> Any:
        attempt = new(request_class)
        attempt.method = request.method
        attempt.url = url = new(url_class)
        at, parts = base._uri_reference, request.url._uri_reference
        url._uri_reference = new_tuple(
            parts_class, (at.scheme, "", at.host, at.port, parts.path or "/", parts.query, None)
        )
        given = request.headers
        if type(given) is headers_class:
            headers = new(headers_class)
            headers._list = given._list.copy()
            headers._encoding = None
        else:
            headers = headers_class(given)
        attempt.headers = headers
        attempt.extensions = extensions
        attempt.stream = stream
        return attempt

    return readdress


def same(one: Any, other: Any) -> bool:
    """Whether two requests are alike in every part, those that are the package's own included."""
    return bool(
        vars(one).keys() == vars(other).keys()
        and (one.method, one.stream, one.extensions) == (other.method, other.stream, other.extensions)
        and vars(one.headers) == vars(other.headers)
        and one.headers.raw == other.headers.raw
        and vars(one.url) == vars(other.url)
        and str(one.url) == str(other.url)
        and _parts(one.url) == _parts(other.url)
    )


def _parts(url: Any) -> tuple[Any, ...]:
    return url.raw_scheme, url.raw_host, url.port, url.raw_path, url.netloc, url.userinfo, url.fragment
