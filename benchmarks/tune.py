"""Time every known variant of the Hopper kernels at one cell each: where the shipped configurations in hopper/configs.py come from.

python -m benchmarks.tune --d 64 --only forward      a thin front of bench_kernel.py without peers
"""

from __future__ import annotations

import argparse
import subprocess
import sys

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", nargs="+", default=["64", "128", "256"])
    parser.add_argument("--only", choices=["forward", "backward"])
    parser.add_argument("--out", default="tune.json")
    args = parser.parse_args()
    command = [sys.executable, "-m", "benchmarks.bench_kernel", "--quick", "--variants", "all", "--peers", "--out", args.out]
    sys.exit(subprocess.call([*command, "--part", *(f"d{d}" for d in args.d), *(["--only", args.only] if args.only else [])]))
