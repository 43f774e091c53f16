"""Where the consul program is: $CONSUL_BIN, on PATH, or Debian's own package, fetched once into .cache/ without root.

`python -m tests.support.consul_binary` prints the path. Debian *bullseye* carries Consul 1.8.7, the oldest that meshlb
supports; later releases of Debian carry none.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.debian_mirror import DebianSource, debian_sources

CACHE = Path(__file__).resolve().parents[2] / ".cache"
UNPACKED = CACHE / "consul-1.8.7"
# consul_1.8.7+dfsg1-2+b3_amd64.deb. This, not the mirror, is what is trusted.
SHA256 = "e4e888bba104daba1d9161f49bfc52649a7e4efd45b1a7ead5bc54f2cb9c89d9"
SUITE = "bullseye"


class ConsulUnavailableError(RuntimeError):
    """No consul could be found or fetched; says what was tried and what to do."""


@functools.cache
def consul_binary() -> str:
    """The path of a consul program; ConsulUnavailableError where none can be had.

    Such tests fail, they are not skipped: without a real Consul nothing here is proven.
    """
    if named := os.environ.get("CONSUL_BIN"):
        if not os.access(named, os.X_OK):
            raise ConsulUnavailableError(f"CONSUL_BIN={named} is not an executable file")
        return named
    if installed := shutil.which("consul"):
        return installed
    binary = UNPACKED / "usr/bin/consul"
    if not binary.exists():
        CACHE.mkdir(exist_ok=True)
        with open(CACHE / "consul.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # parallel pytest workers fetch once
            if not binary.exists():
                _fetch()
    return str(binary)


def _fetch() -> None:
    tried = []
    for source in debian_sources():
        try:
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="consul-fetch-") as folder:
                package = _download(source, Path(folder))
                _verify(package)
                _run("dpkg", "-x", str(package), f"{folder}/root")
                os.rename(f"{folder}/root", UNPACKED)
                return
        except (ConsulUnavailableError, OSError) as error:
            tried.append(f"{source.uri}: {error}")
    raise ConsulUnavailableError(
        "the tests need a real Consul. Install one on PATH or name it in CONSUL_BIN. Fetching Debian's package failed: "
        + ("; ".join(tried) or "this machine's apt configuration names no Debian mirror")
    )


def _download(source: DebianSource, folder: Path) -> Path:
    for needed in ("lists/partial", "archives/partial"):
        (folder / needed).mkdir(parents=True)
    (folder / "status").touch()  # nothing is installed, as far as this apt knows
    (folder / "consul.sources").write_text(source.for_suite(SUITE))
    options = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::sourcelist": folder / "consul.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Sandbox::User": "root",  # _apt may not write into this folder
        "APT::Update::Post-Invoke-Success": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _run(*apt, "update")
    _run(*apt, "download", "consul", cwd=folder)
    packages = list(folder.glob("consul_*.deb"))
    if len(packages) != 1:
        raise ConsulUnavailableError(f"apt-get downloaded {len(packages)} packages")
    return packages[0]


def _verify(package: Path) -> None:
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ConsulUnavailableError(f"{package.name} has SHA-256 {digest}, not {SHA256} (another architecture?)")


def _run(*command: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ConsulUnavailableError(str(error)) from error
    if done.returncode:
        raise ConsulUnavailableError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-500:]}")


if __name__ == "__main__":
    print(consul_binary())
