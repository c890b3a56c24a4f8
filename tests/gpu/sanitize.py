"""compute-sanitizer over GPU tests: `make sanitize`, or `python -m tests.gpu.sanitize [--jobs 6] [--tool memcheck ...]`.

Each tool runs its `parts` in a process each, after a run without any, which compiles the kernels. Findings in kernels that are not ours
are torch's. What is found in ours fails unless KNOWN says why it is no fault; so do a test that fails, a process that gives no
summary and one that takes longer than LIMIT seconds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

OURS = re.compile(r"\b(forward|backward|dkv|dq|delta|stats)_kernel\b")
TESTS = ("odd and 129-127", "merge and 128", "merge and 256", "nothing")  # of test_kernels.py; 256: dk and dv in a pass of their own
PARTS = [f"{test} and {kernel}" for kernel in ("hopper", "triton") for test in TESTS]
PARTS += [f"short and hopper-{head_dim}" for head_dim in (64, 96, 128, 256)]  # several items a program, out by TMA
TOOLS = {  # initcheck must see what torch's kernels write
    "memcheck": ("--report-api-errors", "no", "--kernel-name-exclude", "kernel_substring=at::"),
    "racecheck": ("--kernel-name-exclude", "kernel_substring=at::"),
    "initcheck": (),
}
LIMIT = 280
KNOWN = {  # by tool: a finding's first line, and why it is none
    "racecheck": {
        r"Error: Race reported between Read access at (forward|backward|dkv|dq)_kernel\+0x1?[0-9a-f]{2} in": "the byte in shared memory by "
        "which warp_specialize tells a worker's warps at the kernel's start which partition to run: Triton writes and reads it between two "
        "bar.sync of the same barrier, which the tool does not pair",
    },
}


def parts(tool: str | None) -> list[str]:
    """What a tool runs, as pytest selects it. initcheck does not see what TMA writes: it takes each element for one that nobody wrote, and
    goes on saying so for longer than LIMIT. So none of the Hopper kernels for it but what zeroes out and dq first."""
    return [part for part in PARTS if tool != "initcheck" or "triton" in part or part == "nothing and hopper"]


def findings(log: str) -> list[str]:
    """What a tool reports, one text each, without its margin."""
    told = "\n".join(line[9:] for line in log.splitlines() if line.startswith("========="))
    blocks = (block.strip("\n ") for block in re.split(r"^\s*$", told, flags=re.MULTILINE))
    wordy = (re.sub(r"\A(\s*COMPUTE-SANITIZER\n?)|^.*SUMMARY.*$", "", block, flags=re.MULTILINE).strip() for block in blocks)
    return [block for block in wordy if block]


def verdict(tool: str, log: str) -> tuple[int, list[str]]:
    """(findings in our kernels that are known, what is wrong)."""
    found, known = [block for block in findings(log) if OURS.search(block)], KNOWN.get(tool, {})
    new = [block for block in found if not any(re.match(pattern, block) for pattern in known)]
    summary = re.search(r"SUMMARY: (\d+) (?:error|hazard)", log)
    if summary is None:
        new.append("no summary: the tool did not end")
    elif int(summary[1]) > len(findings(log)):
        new.append(f"{summary[1]} findings, of which {len(findings(log))} could be read: raise --print-limit")
    return len(found) - sum(block in found for block in new), new


def run(tool: str | None, selected: str) -> tuple[int, list[str]]:
    """`verdict` of the tests that are selected; without a tool, whether they pass."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-k", selected, "tests/gpu/test_kernels.py"]
    under = ["compute-sanitizer", "--tool", str(tool), *TOOLS.get(str(tool), ()), "--print-limit", "100000"] if tool else []
    alone = ["timeout", "-k", "5", str(LIMIT), "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # ends the tool's child too; with exit code 124
    done = subprocess.run([*alone, *under, *pytest], capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    known, new = verdict(tool, log) if tool else (0, [])
    return known, new + ([f"exit code {done.returncode}:\n{log[-2000:]}"] if done.returncode else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=[*TOOLS])
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time")
    asked, failed = parser.parse_args(), 0
    for tools in ([None], asked.tool):
        jobs = [(tool, part) for tool in tools for part in parts(tool)]
        with ThreadPoolExecutor(asked.jobs) as pool:
            for (tool, selected), (known, new) in zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True):
                print(f"{tool or 'no tool'}, {selected}: {known} known, {len(new)} new", *new, sep="\n  ", flush=True)
                failed += bool(new)
        if failed:
            sys.exit(1)
    for tool in asked.tool:
        print(*(f"known of {tool}: {why}" for why in KNOWN.get(tool, {}).values()), sep="\n")


if __name__ == "__main__":
    main()
