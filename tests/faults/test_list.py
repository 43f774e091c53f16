"""docs/faults.md names tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.support.processes import REPO

NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REPO / "docs/faults.md").read_text())


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda value: str(value).rpartition("/")[2])
def test_it_exists(path: str, name: str):
    text = (REPO / path).read_text()
    assert not name or re.search(rf"^\s*(async )?def {name}\(", text, re.MULTILINE)


def test_the_list_is_read():
    assert len(NAMED) > 35
