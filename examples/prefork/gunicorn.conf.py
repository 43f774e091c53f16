"""gunicorn -c examples/prefork/gunicorn.conf.py app:app"""

from __future__ import annotations

from pathlib import Path

chdir = str(Path(__file__).parent)
bind = "127.0.0.1:8080"
preload_app = True
workers = 3
worker_class = "gthread"
threads = 4
