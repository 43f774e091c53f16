"""What the documentation shows is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.backends import grpc_backends, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.processes import REPO
from tests.support.registered import registered

PAGES = [REPO / "README.md", REPO / "examples/README.md", *sorted((REPO / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced piece of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(str(page.relative_to(REPO)), line, match[1], match[2]))
    return found


# Run in a process of its own, as a reader would; `await` works at the top level, as in a notebook. What a page may
# leave out: the imports of its running example, and the generated modules of a service called orders.
RUNNER = """
import ast, asyncio, inspect, sys, types
from meshlb._proto import echo_pb2, echo_pb2_grpc
orders_pb2_grpc = types.ModuleType("orders_pb2_grpc")
orders_pb2_grpc.OrdersStub = echo_pb2_grpc.EchoStub
sys.modules["orders_pb2_grpc"] = orders_pb2_grpc
names = {"__name__": "__main__", "orders_pb2_grpc": orders_pb2_grpc}
exec("import grpc, httpx, meshlb; from meshlb import *; from meshlb.discovery import *", names)
with open(sys.argv[1]) as file:
    code = compile(file.read(), sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

async def run():
    result = eval(code, names)
    if inspect.iscoroutine(result):
        await result
    if "stub" in names and "await" not in code.co_names:
        answer = names["stub"].Say(echo_pb2.EchoRequest(text="hello"), timeout=10)
        print((await answer if inspect.isawaitable(answer) else answer).text)

asyncio.run(run())
"""


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block: Block, consul_agent: ConsulAgent, tmp_path: Path):
    (tmp_path / "block.py").write_text(block.text)
    start = grpc_backends if "grpc" in block.text else http_backends
    with (
        start(2) as backends,
        registered(consul_agent, "orders", backends),
        http_backends(1) as database,
        registered(consul_agent, "postgres", database),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", RUNNER, "block.py"],
            cwd=tmp_path,
            env={**os.environ, "CONSUL_HTTP_ADDR": consul_agent.address, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, f"{block}\n{block.text}\n{ended.stdout}{ended.stderr}"
        if "stub" in block.text and "await" not in block.text:
            assert ended.stdout.endswith("hello\n")


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of a page's `sh` blocks, and every `make ...` in its text."""
    found = []
    for block in blocks("sh", "console"):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append((f"{block}: {' '.join(words)}", words))
    for page in PAGES:
        inline = re.findall(r"`((?:make|meshlb|pip install) [^`]+)`", page.read_text())
        found += [(f"{page.relative_to(REPO)}: {command}", shlex.split(command)) for command in inline]
    return found


@pytest.mark.parametrize("words", [words for _, words in commands()], ids=[name for name, _ in commands()])
def test_command(words: list[str], consul_agent: ConsulAgent):
    match words:
        case ["make", *targets]:
            subprocess.run(["make", "-n", *targets], cwd=REPO, check=True, capture_output=True)
        case ["meshlb", *arguments]:
            answer = subprocess.run([sys.executable, "-m", "meshlb", *arguments, "--help"], cwd=REPO, check=True)
            assert answer.returncode == 0
        case ["pip", "install", requirement]:
            project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
            name, _, extras = requirement.rstrip("]").partition("[")
            assert name == project["name"]
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
        case ["consul", *_]:
            pass  # somebody else's program
        case [program, script, *_] if program.startswith(".venv/bin/"):
            if script.endswith(".py"):
                assert (REPO / script).is_file()
        case _:
            pytest.fail(f"nobody checks this command: {words}")


def test_make_demo_is_the_demo():
    """What `make demo` runs, for a few seconds instead of twenty."""
    command = ["make", "-n", "--no-print-directory", "demo"]  # under `make test` it would tell where it is
    said = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    program, *arguments = shlex.split(said.strip().splitlines()[-1])
    assert program == ".venv/bin/meshlb"
    entry = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]["meshlb"]
    assert entry == "meshlb.cli:main"
    ended = subprocess.run(
        [sys.executable, "-m", "meshlb", *arguments, "--seconds", "4", "--plain"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"errors seen by callers +0\n", ended.stdout), ended.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_nothing_is_left_to_be_filled_in():
    for page in PAGES:
        assert not re.search(r"^(BENCHMARKS|TODO|TBD)$", page.read_text(), re.MULTILINE), page
