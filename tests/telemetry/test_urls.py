from __future__ import annotations

import pytest

from meshlb.telemetry.urls import redact


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://orders/v1?q=a@b", "http://orders/v1?q=a@b"),
        ("http://orders/a@b", "http://orders/a@b"),
        ("http://me:secret@orders:80/", "http://REDACTED:REDACTED@orders:80/"),
        ("http://me@orders/", "http://REDACTED@orders/"),
        ("http://me:p@ss@orders/", "http://REDACTED:REDACTED@orders/"),
        ("http://orders/?sig=abc&x=1", "http://orders/?sig=REDACTED&x=1"),
        ("http://orders/?x=1&X-Goog-Signature=abc#top", "http://orders/?x=1&X-Goog-Signature=REDACTED#top"),
        ("http://orders/?AWSAccessKeyId=a&Signature=b", "http://orders/?AWSAccessKeyId=REDACTED&Signature=REDACTED"),
        ("http://orders/?design=abc", "http://orders/?design=abc"),
        ("http://[::1]:80/?a", "http://[::1]:80/?a"),
    ],
)
def test_credentials_and_signatures_are_not_shown(url: str, shown: str):
    assert redact(url) == shown
