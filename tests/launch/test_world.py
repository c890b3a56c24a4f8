"""launch/world.py: devices, one process, adoption, and the second call."""

import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distflash.launch import World, devices, init, shutdown, world
from distflash.launch.environment import MPI_FAMILIES, Place
from tests.launch.programs import ROOT, start

VARIABLES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "TORCHELASTIC_RUN_ID",
    "SLURM_PROCID",
    *(name for family in MPI_FAMILIES for name in family[1:]),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(world, "_session", world._Session())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def launched(monkeypatch):
    """One rank of a launcher that names a free port."""
    from tests.launch.test_rendezvous import free_port

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_plain_python_is_a_world_of_one_without_a_group():
    alone = init()
    assert alone == World(0, 0, 1, 1, torch.device("cpu"), None, "single")
    assert alone.is_main and not dist.is_initialized()
    shutdown()


def test_a_second_call_returns_the_same_world():
    assert init() is init(backend="gloo")


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"CROSS_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_one_rank_needs_nobody_to_meet(environ, monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    alone = init(timeout=10)
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size, alone.backend) == (0, 1, 0, 1, "gloo")
    shutdown()


def test_a_group_that_exists_is_adopted_and_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    adopted = init()
    assert (adopted.rank, adopted.size, adopted.backend) == (0, 1, "gloo")
    with pytest.raises(ValueError, match="already joined with backend 'gloo', got 'nccl'"):
        init(backend="nccl")
    shutdown()
    assert dist.is_initialized()


def test_a_group_created_after_a_single_process_init_is_adopted():
    assert init().backend is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert init().backend == "gloo"


@pytest.mark.usefixtures("launched")
def test_one_rank_of_a_launcher_has_a_group_and_can_begin_again():
    for _ in range(2):
        assert init().launcher == "env" and dist.is_initialized()
        shutdown()
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "mpi"}, "backend must be"),
        ({"timeout": 0}, "timeout must be positive seconds, at most 1e\\+09, got 0"),
        ({"backend": "nccl"}, "needs a GPU that torch can use, got none"),
        ({"nccl_ctas": 0}, "nccl_ctas must be a positive integer or None"),
        ({"nccl_ctas": True}, "nccl_ctas must be a positive integer or None"),
        ({"nccl_ctas": 8}, "nccl_ctas=8 needs the backend nccl, and ranks of this job would talk over gloo"),
        ({"nccl_ctas": 8, "backend": "gloo"}, "nccl_ctas=8 needs the backend nccl"),
    ],
)
def test_arguments_that_cannot_be_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        init(**arguments)


class FakeOptions:
    """NCCL's options, which a torch without CUDA does not have."""

    def __init__(self, is_high_priority_stream):
        self.is_high_priority_stream, self._timeout = is_high_priority_stream, None
        self.config = SimpleNamespace(min_ctas=None, max_ctas=None)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("ctas", [None, 6])
def test_nccl_runs_on_a_stream_of_high_priority_and_in_no_more_blocks_than_asked_for(ctas, monkeypatch):
    made, real = {}, dist.init_process_group

    def without_nccl(name, *, pg_options, device_id, **options):
        made.update(name=name, pg_options=pg_options)
        real("gloo", **options)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=FakeOptions), raising=False)
    monkeypatch.setattr(dist, "init_process_group", without_nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "claim", lambda place, backend: torch.device("cuda", 0))
    init(timeout=77.0, nccl_ctas=ctas)
    options = made["pg_options"]
    assert made["name"] == "nccl" and options.is_high_priority_stream and options._timeout == timedelta(seconds=77)
    assert options.config.max_ctas == ctas and (options.config.min_ctas or 1) <= (ctas or 1)
    assert init(nccl_ctas=ctas).backend == "nccl"
    with pytest.raises(ValueError, match=f"already joined with nccl_ctas={ctas}, got 7: call distflash.launch.shutdown"):
        init(nccl_ctas=7)
    shutdown()


@pytest.mark.usefixtures("launched")
def test_a_second_call_that_asks_for_something_else_is_refused():
    world = init(timeout=77.0, heartbeat=0)
    assert init() is init(timeout=77.0, heartbeat=0) is init(heartbeat=0.0) is world
    for name, had, value in (("timeout", "77.0", 60.0), ("heartbeat", "0", 5), ("interface", "None", "eth7")):
        with pytest.raises(ValueError, match=rf"already joined with {name}={had}.*, got {value}: call distflash.launch.shutdown"):
            init(**{name: value})
    shutdown()


def test_the_options_of_somebody_elses_group_are_theirs():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"nccl_ctas=8 comes too late, torch.distributed is already initialised: leave it out"):
        init(nccl_ctas=8)


def test_each_local_rank_has_a_gpu_of_its_own():
    assert [devices.gpu_index(Place("torchrun", r, 8, r % 4, 4), 4, None) for r in range(8)] == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match="4 ranks on this host need as many GPUs, got 2: start 2 ranks a host"):
        devices.gpu_index(Place("torchrun", 0, 4, 0, 4), 2, None)
    with pytest.raises(ValueError, match="2 ranks on this host"):
        devices.gpu_index(Place("torchrun", 1, 2, 1, 2), 1, "3")


def test_srun_may_show_each_task_one_gpu():
    assert devices.gpu_index(Place("slurm", 3, 4, 3, 4), 1, "3") == 0


def test_a_failure_is_noted_with_its_time_for_the_launcher(tmp_path):
    import json

    path = tmp_path / "error.json"
    world._write_failure(str(path), 5_000_000_123, "Traceback\nRuntimeError: why\n", lost_connection=False)
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "RuntimeError: why"
    assert message["extraInfo"] == {
        "py_callstack": "Traceback\nRuntimeError: why\n",
        "timestamp": "5",
        "time_ns": 5_000_000_123,
        "lost_connection": False,
    }


def test_a_rank_that_ends_while_it_notes_its_failure_leaves_no_half_of_a_note(tmp_path, monkeypatch):
    """torchrun's launcher ends on one, and tells nothing."""

    def half(note, file):
        file.write('{"message": {"mes')
        file.flush()
        raise SystemExit(75)

    monkeypatch.setattr(world.json, "dump", half)
    with pytest.raises(SystemExit):
        world._write_failure(str(tmp_path / "error.json"), 1, "RuntimeError: why\n", lost_connection=True)
    assert not (tmp_path / "error.json").exists()


def test_the_note_of_somebody_else_stays(tmp_path):
    (tmp_path / "error.json").write_text("theirs")
    world._write_failure(str(tmp_path / "error.json"), 1, "RuntimeError: why\n", lost_connection=True)
    assert (tmp_path / "error.json").read_text() == "theirs"


def test_importing_changes_nothing_and_a_plain_script_exits_in_silence(tmp_path):
    code = "import os; before = dict(os.environ); import distflash.launch; assert dict(os.environ) == before; distflash.launch.init()"
    done = start([sys.executable, "-W", "error", "-c", code], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_example_runs_as_one_process(tmp_path):
    done = start([sys.executable, str(ROOT / "examples" / "hello.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rank 0 of 1 on ")


def test_a_job_keeps_its_name_over_restarts_and_shares_it_with_no_other(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert world.job() == "torchrun/abc"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default: every job's
    ours = world.job()
    monkeypatch.setattr(world.os, "getppid", lambda: 1)
    assert ours.startswith("torchrun/none/") and ours != world.job()
