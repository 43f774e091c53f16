"""What the commands change of their process, put back where tests run them in their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def level_restored() -> Iterator[None]:
    logger = logging.getLogger("meshlb")
    before = logger.level
    yield
    logger.setLevel(before)
