"""Work in child processes under a time limit: what hangs or crashes loses its own figures and nobody else's.

A job is a dict with "names", the things it runs through one after the other. A child announces each before it starts it; if it then
dies or stays silent, that name gets an error and the job is given, without it, to a new child.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Job = dict[str, Any]
Rows = list[dict[str, Any]]


def say(word: str, *values: Any) -> None:
    """One line to the parent."""
    print(json.dumps([word, *values]), flush=True)


def serve(path: str, work: Callable[[Job], Rows]) -> None:
    """The child: run the jobs of a file, a line each when done. Ends the process, and at once if the GPU's context is lost."""
    for n, job in json.loads(Path(path).read_text()):
        try:
            say("done", n, work(job))
        except Exception as error:
            traceback.print_exc()
            say("failed", n, f"{type(error).__name__}: {str(error)[:300]}")
            os._exit(3)
    os._exit(0)


def starting(name: str) -> None:
    """Inside a job: this is what runs now."""
    say("at", name)


def run(jobs: list[Job], command: list[str], limit: float, deadline: float, log: IO[str], env: dict[str, str]) -> list[Rows]:
    """Rows of each job, in their order, {"name", "error"} of what could not be done.

    `limit` is the seconds that a child may stay silent, `deadline` (of time.time()) ends everything.
    """
    results: dict[int, Rows] = {n: [] for n in range(len(jobs))}
    waiting = dict(enumerate(jobs))
    while waiting and time.time() < deadline:
        if failure := _child(waiting, results, command, limit, deadline, log, env):
            n, name, reason = failure
            lost = [name] if name else waiting[n]["names"]
            results[n] += [{"name": one, "error": reason} for one in lost]
            waiting[n] = {**waiting[n], "names": [other for other in waiting[n]["names"] if other not in lost]}
            if not waiting[n]["names"]:
                del waiting[n]
    for n, job in waiting.items():
        results[n] += [{"name": name, "error": "no time left"} for name in job["names"]]
    return list(results.values())


def _child(
    waiting: dict[int, Job], results: dict[int, Rows], command: list[str], limit: float, deadline: float, log: IO[str],
    env: dict[str, str],
) -> tuple[int, str | None, str] | None:  # fmt: skip
    """One child over all waiting jobs. Jobs done leave `waiting`; (job, name, reason) of the one at which it stopped, if it did."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(list(waiting.items()), file)
        file.flush()
        root = Path(__file__).parent.parent
        child = subprocess.Popen([*command, file.name], stdout=subprocess.PIPE, stderr=log, text=True, cwd=root, env={**os.environ, **env})
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
        name = None
        try:
            while waiting:
                n = next(iter(waiting))
                try:
                    line = lines.get(timeout=max(1.0, min(limit, deadline - time.time())))
                except queue.Empty:
                    return (n, name, f"silent for {limit:.0f} s") if time.time() < deadline else None
                if line is None:
                    return n, name, f"the process ended with {child.wait()}"
                if not line.startswith('["'):
                    continue
                word, *values = json.loads(line)
                if word == "at":
                    name = values[0]
                elif word == "failed":
                    return n, name, values[1]
                else:
                    results[n] += values[1]
                    del waiting[n]
                    name = None
            return None
        finally:
            child.kill()
            child.wait()


def _pump(stream: IO[str], into: queue.Queue[str | None]) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


def parallel(lots: list[list[Job]], workers: int, **options: Any) -> list[list[Rows]]:
    """`run` for each lot, at most `workers` at once; the longest lots should come first."""
    results: list[list[Rows]] = [[] for _ in lots]
    pending = iter(range(len(lots)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                at = next(pending, None)
            if at is None:
                return
            results[at] = run(lots[at], **options)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def command(module: str) -> list[str]:
    """How a child of this module is started."""
    return [sys.executable, "-m", module, "--child"]
