from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.telemetry.rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A mesh with one service of two endpoints, exporting to a real SDK."""
    with Rig() as made:
        yield made
