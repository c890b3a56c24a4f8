"""Nothing in the package unpickles what it was sent, and no shell reads what it was told."""

import ast
import re
from pathlib import Path

import distflash

SOURCES = sorted(Path(next(iter(distflash.__path__))).rglob("*.py"))
FORBIDDEN = re.compile(r"(?:.*_object(?:_list)?|pickle|cPickle|dill|cloudpickle|os\.system|os\.popen|torch\.load|eval|exec)")
MPI_PICKLES = {"bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce", "isend", "irecv", "sendrecv"}


def name_of(node):
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def sins(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if FORBIDDEN.fullmatch(name.split(".")[0]))
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
    source = (Path(next(iter(distflash.__path__))) / "launch" / "rendezvous.py").read_text()
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
    ):
        assert list(sins(sin)), sin
