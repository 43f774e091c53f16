"""Certificates for Consul's HTTPS API, made with Consul's own tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.consul_binary import consul_binary


class ConsulCa:
    """A certificate authority in `folder`, made on first use of that folder."""

    def __init__(self, folder: Path, domain: str = "consul") -> None:
        self.folder = folder
        self.domain = domain
        self.cert = folder / f"{domain}-agent-ca.pem"
        if not self.cert.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._tls("ca", "create", f"-domain={domain}")

    def issue(self, name: str, host: str) -> tuple[Path, Path]:
        """A server certificate for an agent at `host` (also localhost and 127.0.0.1), and its key; made once a name."""
        folder = self.folder / name
        cert, key = folder / f"dc1-server-{self.domain}-0.pem", folder / f"dc1-server-{self.domain}-0-key.pem"
        if not cert.exists():
            folder.mkdir()
            for file in self.folder.glob("*.pem"):
                (folder / file.name).write_bytes(file.read_bytes())  # the tool looks for the CA where it writes
            self._tls(
                "cert", "create", "-server", f"-domain={self.domain}", f"-additional-ipaddress={host}", cwd=folder
            )
        return cert, key

    def _tls(self, *arguments: str, cwd: Path | None = None) -> None:
        subprocess.run(
            [consul_binary(), "tls", *arguments], cwd=cwd or self.folder, check=True, capture_output=True, timeout=60
        )
