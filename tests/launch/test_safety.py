"""The guards of SECURITY.md: nothing is unpickled, no shell reads what it was told, what peers and files announce is not believed."""

import ast
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.launcher import api as launcher
from typer.testing import CliRunner

import distflash
from distflash.launch import doctor, rendezvous, run, world
from distflash.launch.cli import app
from distflash.launch.environment import Place
from distflash.testing import spmd
from distflash.train import checkpoint as ckpt
from distflash.train import command as train
from tests.launch.test_rendezvous import free_port

ROOT = Path(__file__).parents[2]
PACKAGE = Path(next(iter(distflash.__path__)))
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = re.compile(
    r"(?:.*_object(?:_list)?|pickle|cPickle|dill|cloudpickle|marshal|shelve|joblib|eval|exec|os\.(?:system|popen|exec\w+|spawn\w+)|"
    r"subprocess\.get\w*output|torch\.(?:load|hub(?:\..*)?|distributed\.(?:checkpoint(?:\..*)?|rpc(?:\..*)?)))"
)
MPI_PICKLES = {"bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce", "isend", "irecv", "sendrecv"}


def name_of(node):
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def sins(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if FORBIDDEN.fullmatch(name) or FORBIDDEN.fullmatch(name.split(".")[0]))
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if FORBIDDEN.fullmatch(name) or (FORBIDDEN.fullmatch(name.rpartition(".")[2]) and "_object" in name):
                yield name
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not _is_false(keyword.value):
                    yield f"{name}({keyword.arg}=...)"


def _is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def test_the_package_neither_unpickles_nor_asks_a_shell():
    assert len(SOURCES) > 10
    assert {str(path): found for path in SOURCES if (found := list(sins(path.read_text())))} == {}


def test_mpi_moves_buffers_and_never_objects():
    source = (PACKAGE / "launch" / "rendezvous.py").read_text()
    calls = {node.func.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    assert "Bcast" in calls and not calls & MPI_PICKLES


def test_the_search_itself_finds_what_it_looks_for():
    for sin in (
        "import pickle",
        "from pickle import loads",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "subprocess.run('x', shell=True)",
        "torch.load(p)",
        "os.system('x')",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint.state_dict import get_state_dict",
        "numpy.load(p, allow_pickle=True)",
        "subprocess.getoutput('x')",
    ):
        assert list(sins(sin)), sin


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def saved(root):
    tensors = {"model": {"a": torch.arange(6.0)}}
    ckpt.save(root, {"step": 1}, tensors, gather=lambda t: t, is_main=True, world_size=1, agree=lambda good: good)
    return root / ckpt.folder_name(1)


def listed(folder, name, content):
    """Put a file into a checkpoint, and make its manifest fit, as somebody who can write there would."""
    (folder / Path(name).name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [".metadata", "model.pt", "model.safetensors", "state.json"])
def test_code_planted_in_a_checkpoint_does_not_run(tmp_path, name):
    trace, folder = tmp_path / "it ran", saved(tmp_path / "out")
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)  # noqa: S301  our own
    assert trace.exists(), "the bomb is none"
    trace.unlink()
    listed(folder, name, bomb)
    if name == "state.json":
        with pytest.raises(ckpt.CheckpointError):
            ckpt.newest(tmp_path / "out", pytest.fail)
    else:
        found = ckpt.newest(tmp_path / "out", pytest.fail)
        if name == "model.safetensors":
            with pytest.raises(SafetensorError):
                found.tensors("model")
    assert not trace.exists()


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    folder, secret = saved(tmp_path / "out"), tmp_path / "secret"
    secret.write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../../secret", str(secret)):
        facts = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | {name: facts}}))
        assert ckpt.verify(folder) == f"{name} is missing"


@pytest.mark.parametrize(("length", "end"), [(1 << 62, 8), (None, 1 << 62)])
def test_a_file_that_announces_more_than_it_holds_is_refused(tmp_path, length, end):
    folder = saved(tmp_path / "out")
    header = json.dumps({"a": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}).encode()
    listed(folder, "model.safetensors", struct.pack("<Q", length or len(header)) + header)
    found = ckpt.newest(tmp_path / "out", pytest.fail)
    with pytest.raises(SafetensorError):
        found.tensors("model")


def test_what_ranks_tell_each_other_is_of_bounded_size():
    invited, listener = rendezvous._invite(Place("mpi", 0, 4, 0, 2, "x" * 5000), None)
    assert listener is None and len(invited) <= rendezvous.MPI_MESSAGE

    def work(group):
        sizes = (4, 8) if group.rank == 0 else (4, 4)  # rank 0 sends 4 and expects 8 bytes, rank 1 sends and expects 4
        mine, theirs = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
        group.exchange({1 - group.rank: mine}, {1 - group.rank: theirs}).wait()

    with pytest.raises(AssertionError, match="4 bytes came, 8 were expected"):
        spmd(2, work)


def test_files_of_the_current_directory_are_no_modules_of_what_we_start(tmp_path, monkeypatch):
    for name in ("typer", "mpi4py", "json"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path; Path('it ran').touch()")
    monkeypatch.chdir(tmp_path)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    assert "train" in subprocess.run([sys.executable, *run.OURS, "--help"], env=environ, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    doctor._mpi()
    assert not (tmp_path / "it ran").exists()
    started = []
    monkeypatch.setattr(run, "launch", lambda target, words, ranks: started.append((target, words[0])) or 0)
    monkeypatch.setattr(train, "_check_early", lambda *given: None)
    for command in (["train", "--nproc=2"], ["verify", "--nproc=2"]):
        CliRunner().invoke(app, command)
    assert started == [(run.OURS, "train"), (run.OURS, "verify")]


def test_several_hosts_get_a_warning(monkeypatch):
    class Met(Exception):
        pass

    def meet(*args, **more):
        raise Met

    place = Place("env", 0, 2, 0, 1, "10.0.0.1", free_port())
    monkeypatch.setattr(rendezvous, "meet", lambda *given: (dist.HashStore(), place, True))
    monkeypatch.setattr(dist, "init_process_group", meet)
    with pytest.raises(Met), pytest.warns(UserWarning, match="neither authenticates nor encrypts; use it on trusted networks only"):
        world._join(place, "gloo", timedelta(seconds=5), 0.0, None)


def test_arguments_reach_the_program_as_they_are(monkeypatch):
    wicked, started = ["; touch x", "$(touch x)", "`touch x`", "a\nb", "-c", "*"], []
    monkeypatch.setattr(launcher, "elastic_launch", lambda config, program: lambda *words: started.append((program, words)))
    assert run.launch(["script.py"], wicked, 1) == 0
    ((program, words),) = started
    assert Path(program).name.startswith("python") and list(words) == ["-u", "script.py", *wicked]


def constants(source):
    """Strings of the code that are no docstrings."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def found_in_strings(pattern):
    return {str(path): found for path in SOURCES if (found := [s for s in constants(path.read_text()) if re.search(pattern, s)])}


def test_nothing_is_started_on_another_host():
    remote = r"^(ssh|pdsh|scp|rsh|rsync|clush)$|\bssh "
    assert re.search(remote, "ssh") and found_in_strings(remote) == {}
    starters = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if re.search(r"\bsubprocess\b", path.read_text())}
    assert starters <= {"kernels/hopper/check.py", "launch/doctor.py"}, "look at what they start, and where, before adding to this list"


def test_temporary_files_are_private():
    """tempfile makes files 0600 and folders 0700 under names that nobody can guess."""
    assert found_in_strings(r"^/(tmp|var/tmp|dev/shm)\b") == {}
    assert not [path for path in SOURCES if re.search(r"\bmktemp\(|gettempdir\(", path.read_text())]


def test_every_guard_in_the_page_has_a_test_that_exists():
    page = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in page[page.index("## Guards") :].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, f"no test: {row}"
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
