"""launch/environment.py: who we are, from fake environments of every launcher."""

import pytest

from distflash.launch.environment import Place, detect, first_host

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}
EXPORTED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def where(environ):
    place = detect(environ)
    return place.launcher, place.rank, place.size, place.local_rank, place.local_size


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("single", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 3, 4, 1, 2)),
        (DEEPSPEED, ("deepspeed", 1, 2, 1, 2)),
        (OPENMPI, ("mpi", 5, 8, 1, 4)),
        (MPICH, ("mpi", 5, 8, 1, 4)),
        (MVAPICH, ("mpi", 5, 8, 1, 4)),
        (SLURM, ("slurm", 5, 9, 1, 4)),
        (EXPORTED, ("env", 1, 2, 1, 2)),
    ],
)
def test_each_launcher_is_recognised(environ, expected):
    assert where(environ) == expected


@pytest.mark.parametrize("stale", [OPENMPI, MPICH, MVAPICH, SLURM, {**OPENMPI, **SLURM}])
def test_torchrun_and_deepspeed_win_over_what_surrounds_them(stale):
    assert where({**stale, **TORCHRUN}) == where(TORCHRUN)
    assert where({**stale, **DEEPSPEED}) == where(DEEPSPEED)


@pytest.mark.parametrize("mpi", [OPENMPI, MPICH, MVAPICH])
def test_mpirun_wins_over_the_slurm_step_that_carries_it(mpi):
    assert where({**SLURM, **mpi}) == where(mpi)


def test_srun_with_pmi2_is_slurm():
    assert where({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "9"})[0] == "slurm"


def test_mpi_without_local_ranks_leaves_them_to_mpi():
    assert where({"PMI_RANK": "1", "PMI_SIZE": "2"}) == ("mpi", 1, 2, None, None)


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"},  # salloc
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        {**SLURM, "SLURM_STEP_ID": "4294967290"},  # salloc with an interactive step
        {**SLURM, "SLURM_STEP_ID": "4294967291"},  # the batch script
        {k: v for k, v in SLURM.items() if k not in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")},  # the batch script, older
        {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"},  # srun -n 1 --mpi=pmi2
        {"WORLD_SIZE": "1"},
    ],
)
def test_plain_python_inside_an_allocation_is_one_process(environ):
    assert detect(environ) == Place("single")


def test_slurm_names_a_meeting_point_that_all_ranks_agree_on():
    first, other = detect(SLURM), detect({**SLURM, "SLURM_PROCID": "8", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"})
    assert (first.address, first.port, first.job) == (other.address, other.port, other.job)
    assert first.address == "gpu003" and 15000 <= (first.port or 0) < 31000
    assert other.local_size == 1
    assert detect({**SLURM, "SLURM_JOB_ID": "78"}).port != first.port
    named = detect({**SLURM, "MASTER_ADDR": "node-1", "MASTER_PORT": "1234"})
    assert (named.address, named.port) == ("node-1", 1234)


def test_torchrun_says_how_often_it_has_restarted_and_that_its_store_outlives_attempts():
    assert [detect(TORCHRUN | count).restarts for count in ({}, {"TORCHELASTIC_RESTART_COUNT": "2"})] == [1, 2]
    assert detect(TORCHRUN).agent_store and not detect(DEEPSPEED).agent_store


@pytest.mark.parametrize("started", [OPENMPI, MPICH, SLURM])
def test_a_world_size_of_another_job_is_an_error(started):
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 is exported, but (mpirun|srun) says [89]: `unset WORLD_SIZE`"):
        detect({**started, "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"RANK=1 is exported, but (mpirun|srun) says 5"):
        detect({**started, "RANK": "1"})


def test_exported_variables_that_agree_are_welcome():
    place = detect({**OPENMPI, "RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    assert (place.launcher, place.address, place.port) == ("mpi", "node1", 1234)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "needs MASTER_ADDR and MASTER_PORT"),
        ({**EXPORTED, "MASTER_ADDR": "node1"}, "needs LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ({**EXPORTED, "RANK": "2"}, r"rank must be in 0..1 for size 2, got 2"),
        ({**EXPORTED, "RANK": "one"}, "RANK must be an integer >= 0, got 'one'"),
        ({**EXPORTED, "MASTER_PORT": "70000"}, "expected a port in 1..65535, got 70000"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "expected 0 <= local rank < local size"),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "-8"}, "OMPI_COMM_WORLD_SIZE must be an integer"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "must add up to SLURM_STEP_NUM_TASKS=9"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2),$(id)"}, "must look like"),
    ],
)
def test_what_cannot_be_is_an_error_with_a_cure(environ, message):
    with pytest.raises(ValueError, match=message):
        detect(environ)


@pytest.mark.parametrize("host", ["a;reboot", "$(id)", "-oProxyCommand=x", "a\nb", "a b", "", "`id`"])
def test_host_names_that_are_none_are_refused(host):
    with pytest.raises(ValueError, match="host name"):
        detect({**TORCHRUN, "MASTER_ADDR": host})
    with pytest.raises(ValueError, match="host name"):
        detect({**SLURM, "SLURM_STEP_NODELIST": host})


@pytest.mark.parametrize("host", ["localhost", "10.0.0.1", "gpu-003.cluster_a.example", "::1", "fd00::2"])
def test_host_names_and_addresses_are_accepted(host):
    assert detect({**TORCHRUN, "MASTER_ADDR": host}).address == host


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-007,9],login", "gpu003"),
        ("r1-gpu[1,2]-ib", "r1-gpu1-ib"),
        ("gpu7,gpu[1-3]", "gpu7"),
        ("rack[0-1]_blade[0-3]", "rack0_blade0"),
        ("r[01,3]c[10-12]n,x", "r01c10n"),
        ("r[1,2],s[3]", "r1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
