"""Have the Celery worker do so many tasks; print what came of them."""

from __future__ import annotations

import json
import sys

from tests.process_life.programs.tasks import call

if __name__ == "__main__":
    results = [call.delay() for _ in range(int(sys.argv[1]))]
    print(json.dumps([result.get(timeout=90, interval=0.05) for result in results]))
