"""What the tests run."""

from __future__ import annotations

import signal

DUMP = signal.SIGRTMIN
"""On this signal, which no server uses, a program says on standard error what each of its threads is at."""
