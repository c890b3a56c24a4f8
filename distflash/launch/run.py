"""`distflash run -n N script.py ...`: torchrun's agent on this host, with a store that only this host can reach.

`torchrun --standalone` serves its store on every interface. Here the store is served on a socket that is bound to loopback, and
torchrun's agent, in this very process, shares it (multi_tenant). The ranks are children of this process, started from an
argument list without a shell. The exit code is that of the rank that failed first, and its traceback is the last thing printed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distflash.launch import rendezvous
from distflash.launch.heartbeat import EXIT_PEER_LOST
from distflash.launch.parent import tied
from distflash.launch.temporary import folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

OURS = ["-P", "-m", "distflash"]  # -P: files of the current directory are no modules of ours
CRASHES = {-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)}


def run(
    script: Annotated[str, typer.Argument(help="The Python script, or with -m the module, that every rank runs.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to it.", show_default=False)] = None,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=1, help="Ranks to start; by default one a GPU, or 1.", show_default=False)
    ] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT names a module, as with python -m.")] = False,
) -> None:
    """Start a script on several ranks of this host."""
    if not module and not Path(script).is_file():
        raise typer.BadParameter(f"expected a Python file, got {script!r}: check the path, or pass -m for a module")
    if script.startswith("-"):
        raise typer.BadParameter(f"expected a script before the options that are meant for it, got {script!r}")
    raise typer.Exit(launch(["-m", script] if module else [script], arguments or [], ranks or default_ranks()))


def default_ranks() -> int:
    """One rank a GPU, or 1."""
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def launch(target: list[str], arguments: list[str], ranks: int) -> int:
    """Run `python target arguments` on every rank of this host and return the exit code to pass on."""
    from datetime import timedelta

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads(ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the first failure is told below, once
    listener = rendezvous.listen(rendezvous.LOOPBACK)
    address, port = listener.getsockname()
    store = rendezvous.serve(listener, timedelta(seconds=600))
    with folder() as logs:  # of errors; torchrun's own would stay
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="static",  # the one whose store is the one at rdzv_endpoint; c10d opens a second, on every interface
            rdzv_endpoint=f"{address}:{port}",
            rdzv_configs={"rank": 0},
            local_addr=address,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        config.signals_to_handle = heeded(getattr(config, "signals_to_handle", ""))  # an older torch ends on all of them
        try:
            with tied():
                elastic_launch(config, sys.executable)("-u", *target, *arguments)
        except ChildFailedError as error:
            rank, failure = first_failure(error.failures)
            sys.stdout.flush()
            print(story(rank, failure, len(error.failures)), file=sys.stderr, flush=True)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            del store
    return 0


def heeded(signals: str) -> str:
    """Those of a list of names that this process does not ignore: whoever started it with nohup wants it to outlive the terminal."""
    return ",".join(name for name in signals.split(",") if name and signal.getsignal(signal.Signals[name]) != signal.SIG_IGN)


def threads(ranks: int) -> int:
    """CPU threads for each rank: the cores this process may use, shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose failure caused the others'.

    A crash or an exit without a traceback is nobody's consequence; of tracebacks the earliest counts, and those of lost connections
    only if nothing else does: a rank that was stopped leaves one when it wakes after the others have ended. EXIT_PEER_LOST is what
    survivors end with, SIGABRT and SIGTERM what they get from NCCL's watchdog and from the agent.
    """

    def order(rank: int) -> tuple[int, int, int]:
        code, extra = failures[rank].exitcode, _extra(failures[rank])
        when = int(extra.get("time_ns", 0))
        if code in CRASHES:
            return 0, 0, rank
        if code > 0 and code != EXIT_PEER_LOST and not when:
            return 1, 0, rank
        if when and not extra.get("lost_connection"):
            return 2, when, rank
        if code == EXIT_PEER_LOST:
            return 3, 0, rank
        return (4, when, rank) if when else (5, 0, rank)

    rank = min(failures, key=order)
    return rank, failures[rank]


def story(rank: int, failure: ProcessFailure, failed: int) -> str:
    """What to tell about the first failure: who, how, and its traceback if it left one."""
    how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {failure.signal_name()}"
    others = f"; {failed - 1} more failed after it" if failed > 1 else ""
    trace = _extra(failure).get("py_callstack")
    if failure.exitcode == -signal.SIGTERM and failed > 1 and not trace:  # the agent ends the others with it
        how += ", which the launcher sends to the others: who was the first is not known"
        return f"distflash run: {failed} ranks failed, rank {rank} (pid {failure.pid}) with {how}"
    none = "  (it left no traceback)" if failure.exitcode < 0 else "  (it noted no traceback: what it printed is above)"
    tail = _indented(trace.rstrip().splitlines()) if trace else none
    return f"distflash run: rank {rank} (pid {failure.pid}) failed first, with {how}{others}:\n{tail}"


def _extra(failure: ProcessFailure) -> dict:
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
