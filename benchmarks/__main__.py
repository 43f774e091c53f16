"""``python -m benchmarks [picks] [rebuilds] [contention] [own] [grpc] [http] [hosts] [--quick]``."""

from __future__ import annotations

import argparse
import platform

from benchmarks import contention, http, own_work, picks, rebuilds, rpc

SECTIONS = ["picks", "rebuilds", "contention", "own", "grpc", "http", "hosts"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="What meshlb costs, on this machine, now.")
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not to quote")
    options = parser.parse_args()
    wanted = options.sections or SECTIONS
    rounds, batch = (3, 50) if options.quick else (31, 300)
    print(f"CPython {platform.python_version()} on {platform.machine()}; medians of {rounds} interleaved batches")
    if "picks" in wanted:
        picks.run((10, 1_000) if options.quick else picks.SIZES)
    if "rebuilds" in wanted:
        rebuilds.run(1_000 if options.quick else rebuilds.SIZE)
    if "contention" in wanted:
        contention.run(100 if options.quick else contention.SIZE)
    if "own" in wanted:
        own_work.run(rounds=rounds, batch=batch)
    if "grpc" in wanted:
        rpc.run(rounds=rounds, batch=batch)
    if "http" in wanted:
        http.run(rounds=rounds, batch=batch)
    if "hosts" in wanted:
        http.run_many_hosts(rounds=2 if options.quick else 5)


if __name__ == "__main__":
    main()
