"""Time every known variant of the Hopper kernels at one cell each: where the shipped configurations in hopper/configs.py come from.

PYTHONPATH=. python3 benchmarks/tune.py --d 64 --only fwd      a thin front of bench_kernel.py without peers
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", default="64,128,256")
    parser.add_argument("--only", choices=["fwd", "bwd", "both"], default="both")
    parser.add_argument("--out", default="tune.json")
    args = parser.parse_args()
    bench = Path(__file__).with_name("bench_kernel.py")
    command = [sys.executable, str(bench), "--variants", "all", "--peers", "", "--only", args.only, "--d", args.d, "--out", args.out]
    sys.exit(subprocess.call(command))
