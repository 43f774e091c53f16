"""Which Debian mirror this machine's apt uses, read from both formats of its sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Main suites only: the mirrors of -updates and -security do not carry the packages of a release.
_SUITE = re.compile(r"stable|oldstable|oldoldstable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke")


@dataclass(frozen=True)
class DebianSource:
    """A mirror that carries Debian itself, and its keyring: a path, an inline key, or "" for apt's own."""

    uri: str
    signed_by: str

    def for_suite(self, suite: str) -> str:
        """An apt source of this mirror for another suite, in the deb822 format."""
        lines = ["Types: deb", f"URIs: {self.uri}", f"Suites: {suite}", "Components: main", "Check-Valid-Until: no"]
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        return "\n".join(lines) + "\n"


def debian_sources(etc: Path = Path("/etc/apt")) -> list[DebianSource]:
    """The mirrors that apt is configured with, those that look most like Debian's own first."""
    entries: list[tuple[str, str, str, str]] = []
    for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if file.suffix == ".list" and file.is_file():
            entries += _one_line_entries(file.read_text())
        elif file.suffix == ".sources" and file.is_file():
            entries += _deb822_entries(file.read_text())
    found = {
        DebianSource(uri, signed_by): None
        for uri, suite, components, signed_by in entries
        if _SUITE.fullmatch(suite.strip("/")) and "main" in components.split()
    }
    # Other vendors name their suites after Debian's too; Debian's mirrors end in /debian or are read with its keyring.
    return sorted(found, key=lambda source: not _is_debian(source))


def _is_debian(source: DebianSource) -> bool:
    return source.uri.rstrip("/").endswith("/debian") or "debian-archive" in source.signed_by


def _one_line_entries(text: str) -> list[tuple[str, str, str, str]]:
    entries = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            options, uri, suite, components = match.groups()
            signed_by = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
            entries.append((uri, suite, components, signed_by.group(1) if signed_by else ""))
    return entries


def _deb822_entries(text: str) -> list[tuple[str, str, str, str]]:
    entries = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        for uri in fields.get("uris", "").split():
            entries += [
                (uri, suite, fields.get("components", ""), fields.get("signed-by", ""))
                for suite in fields.get("suites", "").split()
            ]
    return entries
