"""Examples that no test of a single integration runs."""

import re
import runpy
from pathlib import Path

from tests.launch.programs import start
from tests.launch.test_mpi import mpirun

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_under_mpirun_ranks_share_documents_and_get_the_gradient_of_one_process(tmp_path):
    done = start(mpirun(str(EXAMPLES / "mpi.py")), tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d of 2 on cpu: \d+ of 1104 tokens", done.stdout)) == [
        f"rank {rank} of 2 on cpu: 552 of 1104 tokens" for rank in range(2)
    ]
    errors = [float(x) for x in re.search(r"out within (\S+), gradient within (\S+)", done.stdout).groups()]
    assert max(errors) < 1e-5


def test_the_cells_of_the_long_context_run_in_order(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cells = runpy.run_path(str(EXAMPLES / "long_context.py"))
    told = capsys.readouterr().out
    assert told.startswith("2,048 tokens on cpu") and cells["q"].grad.isfinite().all()
    shares = dict(re.findall(r"^(\S.*\S) +(\d+\.\d+)% of all pairs", told, re.MULTILINE))
    assert float(shares["causal"]) > 50 > float(shares["4 sinks and a window"]) > float(shares["8 packed documents"])
    errors = [float(x) for x in re.findall(r"within (\S+?)[, \n]", told)]
    assert len(errors) == 3 and max(errors) < 1e-5, told


def test_every_example_says_how_it_is_started_and_is_short():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert f"\npython examples/{path.name}" in text or f" examples/{path.name}" in text.split('"""')[1], f"{path.name} does not"
        assert len(text.splitlines()) < 80, f"{path.name} is too long to be read at once"
