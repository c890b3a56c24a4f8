"""`distflash doctor`: what this machine has, what distflash would use on it and why, and what to do about what is missing.

examine    facts as plain data: versions, GPUs, links, MPI, packages, kernels
_measure   rates as a device that `distflash plan` takes (measure.py)
judge      facts -> (problems, advice); problems make the exit code 1
_show      both as text
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distflash.launch.early import check_file

Facts = dict[str, Any]

OLDEST_TORCH = (2, 9)
PACKAGES = {  # distribution -> what it is for
    "mpi4py": "start with mpirun",
    "deepspeed": "DeepSpeed integration",
    "transformers": "Transformers integration",
    "accelerate": "Accelerate integration",
    "safetensors": "checkpoints of `distflash train`",
    "pyarrow": "parquet data for `distflash train`",
    "matplotlib": "plots",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    measure: Annotated[
        Path | None, typer.Option(help="Also measure rates, of links too if several ranks are started, and write them to this .json file.")
    ] = None,
) -> None:
    """Look at this machine: what is here, what would be used and why, what is missing."""
    if measure is not None:
        _measure(measure)
    facts = examine()
    problems, advice = judge(facts)
    if as_json:
        print(json.dumps({**facts, "problems": problems, "advice": advice, "usable": not problems}, indent=2))
    else:
        _show(facts, problems, advice)
    raise typer.Exit(1 if problems else 0)


def _measure(path: Path) -> None:
    """Write what this machine can do, for `distflash plan --device`. Only rank 0 goes on from here."""
    import distflash
    from distflash.launch.measure import measure

    if path.suffix != ".json":
        raise typer.BadParameter(f"--measure writes JSON, and `distflash plan --device` knows such files by their ending: {path}.json")
    world = distflash.init()
    try:
        if world.is_main:
            check_file("--measure", path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    device = measure(world)
    if not world.is_main:
        raise typer.Exit
    path.write_text(device.to_json() + "\n")
    typer.echo(
        f"{device.name}: {device.matmul / 1e12:.3g} TFLOP/s, {device.hbm / 1e9:.3g} GB/s of memory"
        + "".join(f", {link.bandwidth / 1e9:.3g} GB/s over {name}" for name, link in device.wires.items() if world.size > 1)
        + f"; wrote {path}",
        err=True,
    )


def examine() -> Facts:
    """Everything the verdict rests on."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "versions": versions(),
        "driver": _nvidia_driver(),
        "gpus": [_gpu(index) for index in range(gpus)],
        "peer_access": [[a == b or torch.cuda.can_device_access_peer(a, b) for b in range(gpus)] for a in range(gpus)],
        "nvlink": _nvlink() if gpus > 1 else None,
        "mpi": _mpi(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": _kernels(gpus),
        "wire": _wire(gpus),
    }


def judge(facts: Facts) -> tuple[list[str], list[str]]:
    """Problems (something here is broken) and advice (something more would be possible), each with its cure."""
    versions, driver, gpus = facts["versions"], facts["driver"], facts["gpus"]
    problems, advice = [], []
    if tuple(int(part) for part in versions["torch"].split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        problems.append(
            f"torch {versions['torch']} is too old, {'.'.join(map(str, OLDEST_TORCH))} or newer is needed: pip install -U torch"
        )
    if driver and not versions["cuda"] and not versions["hip"]:
        problems.append(
            f"this machine has an NVIDIA GPU ({driver}), but torch {versions['torch']} is a CPU build: install a CUDA build of torch"
        )
    elif driver and not gpus:
        problems.append(
            f"this machine has an NVIDIA GPU ({driver}), but torch {versions['torch']} finds none: check CUDA_VISIBLE_DEVICES, "
            f"and that the driver serves CUDA {versions['cuda']} (nvidia-smi)"
        )
    if gpus and not versions["triton"]:
        problems.append("GPUs without triton run the slow eager kernel: pip install triton, the version that this torch asks for")
    if len(gpus) > 1 and not versions["nccl"] and not versions["hip"]:
        problems.append("several GPUs, but this torch has no NCCL: install a CUDA build of torch from pytorch.org")
    for kernel in facts["kernels"]:
        if kernel["chosen"] is None:
            problems.append(
                f"no kernel serves {kernel['dtype']} on {kernel['device']}: report this, with the output of `distflash doctor --json`"
            )

    if not gpus and not driver:
        advice.append("no GPU: everything runs on the CPU with gloo, for tests and small runs")
    if not all(all(row) for row in facts["peer_access"]):
        advice.append("some pairs of GPUs cannot reach each other's memory: NCCL goes through the host there")
    if facts["mpi"]["mpirun"] and not facts["mpi"]["library"]:
        advice.append(
            f"mpirun is here, but mpi4py cannot load an MPI ({facts['mpi']['error']}): pip install 'distflash[mpi]' to start with mpirun"
        )
    if not facts["packages"]["safetensors"]:
        advice.append("`distflash train` needs the extra: pip install 'distflash[train]'")
    return problems, advice


def versions() -> dict[str, str | None]:
    """Of Python and of what DistFlash stands on or can use; None where it is not installed."""
    import torch
    import torch.distributed as dist
    from torch.cuda.nccl import version as nccl_version

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = nccl_version() if torch.version.cuda and dist.is_available() and dist.is_nccl_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "distflash": _version("distflash"),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": str(cudnn) if cudnn else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    """Why we think that there is an NVIDIA GPU, whatever torch says; None if nothing hints at one."""
    if Path("/dev/nvidia0").exists():
        return "/dev/nvidia0"
    listing = output(["nvidia-smi", "--list-gpus"])
    return listing.splitlines()[0] if listing and listing.startswith("GPU ") else None


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
    }


def _nvlink() -> str | None:
    """nvidia-smi's matrix of links, as it prints it."""
    return output(["nvidia-smi", "topo", "-m"])


def _mpi() -> dict[str, str | None]:
    """mpirun's version, and the MPI that mpi4py loads: asked in a child, since loading it could end the process."""
    lines = (output(["mpirun", "--version"]) or "").splitlines()
    facts: dict[str, str | None] = {"mpirun": lines[0] if lines else None, "library": None, "error": None}
    if importlib.util.find_spec("mpi4py") is None:
        return {**facts, "error": "mpi4py is not installed"}
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return {**facts, "error": "loading MPI took more than 30 s"}
    said = (child.stdout if child.returncode == 0 else child.stderr).replace("\0", "").strip().splitlines()
    if child.returncode == 0 and said:
        return {**facts, "library": said[0]}
    return {**facts, "error": said[-1] if said else f"exit code {child.returncode}"}


def output(command: list[str]) -> str | None:
    """What a program prints, or None if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _kernels(gpus: int) -> list[dict[str, Any]]:
    """For each device and dtype of interest: the kernel "auto" would take, and why those before it were passed over."""
    import torch

    from distflash.kernels.base import Problem
    from distflash.kernels.select import candidates

    rows = []
    for device in [torch.device("cuda", 0)] * bool(gpus) + [torch.device("cpu")]:
        for dtype in (torch.bfloat16, torch.float32):
            problem = Problem(device=device, dtype=dtype, heads=32, kv_heads=8, head_dim=128, v_head_dim=128)
            tried = [(str(name), reason) for name, reason in candidates(problem)]
            chosen = next((name for name, reason in tried if reason is None), None)
            ahead = tried[: [name for name, _ in tried].index(chosen)] if chosen else tried
            rows.append(
                {
                    "device": device.type,
                    "dtype": str(dtype).removeprefix("torch."),
                    "chosen": chosen,
                    "passed_over": {n: str(r) for n, r in ahead},
                }
            )
    return rows


def _wire(gpus: int) -> dict[str, str]:
    """What moves keys and values between ranks."""
    if gpus:
        return {"chosen": "p2p over NCCL", "why": f"{gpus} CUDA device{'s' if gpus > 1 else ''}, one rank each"}
    return {"chosen": "p2p over gloo", "why": "no GPU that torch can use"}


def _show(facts: Facts, problems: list[str], advice: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title="distflash doctor", show_header=False, title_justify="left")
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("found", overflow="fold")
    for name, value in facts["versions"].items():
        table.add_row(name, Text(value or "-"))
    for gpu in facts["gpus"]:
        found = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}, {gpu['processors']} SMs"
        table.add_row(f"GPU {gpu['index']}", Text(found))
    if not facts["gpus"]:
        table.add_row("GPUs", "none")
    if len(facts["gpus"]) > 1:
        reach = [f"{a}: {' '.join('x' if ok else '.' for ok in row)}" for a, row in enumerate(facts["peer_access"])]
        table.add_row("peer access", Text("\n".join(reach)))
    mpi = facts["mpi"]
    table.add_row("mpirun", Text(mpi["mpirun"] or "-"))
    table.add_row("mpi4py", Text(mpi["library"] or mpi["error"] or "-"))
    for name, version in facts["packages"].items():
        if name != "mpi4py":
            table.add_row(name, Text(version or f"- ({PACKAGES[name]})"))
    for kernel in facts["kernels"]:
        why = "".join(f"\n  not {name}: {reason}" for name, reason in kernel["passed_over"].items())
        table.add_row(f"kernel {kernel['device']} {kernel['dtype']}", Text(f"{kernel['chosen'] or 'none'}{why}"))
    table.add_row("wire", Text(f"{facts['wire']['chosen']}: {facts['wire']['why']}"))
    console.print(table)
    if facts["nvlink"]:
        console.print(Text(facts["nvlink"]))
    for text, style, lines in (("broken", "bold red", problems), ("advice", "yellow", advice)):
        for line in lines:
            console.print(Text.assemble((f"{text}: ", style), line))
    if not problems:
        console.print(Text("ready", style="bold green"))
