"""URLs as they may be exported: without what could let a reader in."""

from __future__ import annotations

import re
from typing import Final

_REDACTED: Final = "REDACTED"

_USERINFO: Final = re.compile(r"^([^:/?#]+://)([^/?#]*)@")
"""Credentials before the host. Greedy: of several ``@`` only the last one begins the host (RFC 3986 3.2)."""

_SECRET_PARAMETER: Final = re.compile(
    r"([?&](?:AWSAccessKeyId|Signature|sig|X-Goog-Signature)=)[^&#]*",
)
"""Query parameters that sign a URL: those that the conventions say must be redacted by default."""


def redact(url: str) -> str:
    """The URL with credentials and signatures replaced by ``REDACTED``, as the convention of ``url.full`` says."""
    if "@" in url:
        url = _USERINFO.sub(_redacted_userinfo, url)
    if "?" in url:
        url = _SECRET_PARAMETER.sub(rf"\1{_REDACTED}", url)
    return url


def _redacted_userinfo(match: re.Match[str]) -> str:
    scheme, userinfo = match.groups()
    return f"{scheme}{_REDACTED}:{_REDACTED}@" if ":" in userinfo else f"{scheme}{_REDACTED}@"
