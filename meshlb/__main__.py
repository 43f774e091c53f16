"""``python -m meshlb``: the ``meshlb`` command."""

from __future__ import annotations

import sys

from meshlb.cli import main

sys.exit(main())
