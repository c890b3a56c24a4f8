"""A job that hangs or crashes costs its own figure; the rest of its names and the other jobs come through."""

from __future__ import annotations

import sys
import time

from benchmarks import children

CHILD = """
import os, sys, time
from benchmarks import children
def work(job):
    rows = []
    for name in job["names"]:
        children.starting(name)
        if name == "crash":
            os.kill(os.getpid(), 9)
        if name == "hang":
            time.sleep(60)
        if name == "raise":
            raise RuntimeError("CUDA error: gone")
        print("not a message")
        rows.append({"name": name, "n": job["n"]})
    return rows
children.serve(sys.argv[1], work)
"""


def run(*jobs, limit=20.0, seconds=60.0, log=sys.stderr):
    made = [{"n": n, "names": list(names)} for n, names in enumerate(jobs)]
    return children.run(made, [sys.executable, "-c", CHILD], limit=limit, deadline=time.time() + seconds, log=log, env={})


def test_rows_come_back_in_the_order_of_the_jobs(tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert run(["a", "b"], ["c"], log=log) == [[{"name": "a", "n": 0}, {"name": "b", "n": 0}], [{"name": "c", "n": 1}]]


def test_what_crashes_raises_or_hangs_is_an_error_and_all_else_is_done(tmp_path):
    with (tmp_path / "log").open("w") as log:
        found = run(["a", "crash", "b"], ["raise", "c"], ["hang"], ["d"], limit=3.0, log=log)
    by_name = {row["name"]: row for rows in found for row in rows}
    assert all(by_name[name]["n"] == n for name, n in {"a": 0, "b": 0, "c": 1, "d": 3}.items())
    assert by_name["crash"]["error"] == "the process ended with -9" and by_name["hang"]["error"] == "silent for 3 s"
    assert by_name["raise"]["error"] == "RuntimeError: CUDA error: gone" and len(by_name) == 7


def test_past_the_deadline_the_rest_is_an_error(tmp_path):
    with (tmp_path / "log").open("w") as log:
        found = run(["a", "b"], ["c"], seconds=0.0, log=log)
    assert [row["error"] for rows in found for row in rows] == ["no time left"] * 3


def test_lots_run_side_by_side(tmp_path):
    with (tmp_path / "log").open("w") as log:
        options = {"command": [sys.executable, "-c", CHILD], "limit": 20.0, "deadline": time.time() + 60, "log": log, "env": {}}
        lots = [[{"n": n, "names": [name]}] for n, name in enumerate("abc")]
        assert children.parallel(lots, 2, **options) == [[[{"name": name, "n": n}]] for n, name in enumerate("abc")]
