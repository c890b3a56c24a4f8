"""DeepSpeed itself, on the CPU over gloo: one step of every ZeRO stage, and attention beneath its Ulysses, against one process."""

import importlib.util
import re
import socket
import sys
from functools import cache
from itertools import chain

import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.integrations.deepspeed import Section, create_mpu, distributed_attention, read_section
from distflash.parallel.agreement import Disagreement
from distflash.testing import Attention, check, keep_mask, oracle, spmd_processes
from tests.launch.programs import ROOT, start
from tests.launch.programs import distflash as command
from tests.launch.test_mpi import mpirun

if importlib.util.find_spec("deepspeed") is None and torch.cuda.is_available():
    pytest.skip("DeepSpeed is not installed on this GPU machine", allow_module_level=True)  # elsewhere it has to be

from tests.integrations import zero

EXACT, TWICE = {}, {"passes": 2, "clip": 0.05}
STEPS = {  # by ranks: (sequence parallel size, ZeRO stage, settings)
    2: [(sp, stage, EXACT) for sp in (1, 2) for stage in range(4)],
    4: [
        *((2, stage, EXACT) for stage in range(4)),
        *((2, stage, TWICE) for stage in (0, 1, 3)),
        (2, 3, {"zero": {"reduce_scatter": False}}),
        (2, 2, {"prescale_gradients": True, "zero": {"reduce_scatter": False}}),
    ],
}


@cache
def steps(ranks):
    """Loss and parameters of every rank after one step, for each case."""
    return spmd_processes(ranks, lambda: [zero.step(stage, sp, **settings) for sp, stage, settings in STEPS[ranks]], timeout=90)


@cache
def alone(sequences, passes=1, clip=0.0):
    return zero.alone(sequences, passes, clip)


@pytest.mark.parametrize(("ranks", "n"), [(ranks, n) for ranks in STEPS for n in range(len(STEPS[ranks]))])
def test_one_step_of_zero_is_that_of_one_process(ranks, n):
    sp, _, settings = STEPS[ranks][n]
    expected = alone(ranks // sp, settings.get("passes", 1), settings.get("clip", 0.0))
    for rank in steps(ranks):
        zero.assert_same(rank[n], expected)


def test_bf16_steps_have_the_right_size():
    def run():
        return [zero.step(stage, 2, bf16={"enabled": True}, communication_data_type="fp32")[1] for stage in (0, 2, 3)]

    _, expected = alone(1)
    start = dict(zero.make_model().named_parameters())
    for found in chain(*spmd_processes(2, run, timeout=60)):
        for (name, truth), x in zip(expected.items(), found, strict=True):
            moved, told = (x - start[name]).detach().flatten(), (truth - start[name]).detach().flatten().double()
            assert (moved @ told / (told @ told)).item() == pytest.approx(1, abs=0.05), name


SECTIONS = [
    ({}, "needs a section"),
    ({"distflash": "zigzag"}, "needs a section"),
    ({"distflash": {"Layout": "zigzag"}}, "'Layout' is not known in the section"),
    ({"distflash": {"layout": "zig"}}, "layout='zig' is not known"),
    ({"distflash": {"layout": 3}}, "layout=3 is not known"),
    ({"distflash": {"order": "tree"}}, "order='tree' is not known"),
    ({"distflash": {"wire": "carrier pigeon"}}, "wire='carrier pigeon' is not known"),
    ({"distflash": {"check": True}}, "check=True is not known"),
    ({"distflash": {"staging": "lots"}}, "staging=.lots. is not a positive number of bytes"),
    ({"distflash": {"ulysses": 3}}, "ulysses=3 must divide the 8 ranks"),
    ({"distflash": {"ulysses": 4, "sequence_parallel_size": 2}}, "ulysses=4 must divide the 2 ranks"),
    ({"distflash": {"ulysses": "2"}}, "ulysses='2' must be an integer or 'auto'"),
    ({"distflash": {"sequence_parallel_size": 3}}, "sequence_parallel_size=3 must be an integer that divides 8"),
    ({"distflash": {"sequence_parallel_size": 0}}, "sequence_parallel_size=0 must be"),
    ({"distflash": {"sequence_parallel_size": "2"}}, "sequence_parallel_size='2' must be"),
    ({"distflash": {"sequence_parallel_size": True}}, "sequence_parallel_size=True must be"),
    ({"distflash": {}, "sequence_parallel_size": 4}, "sequence_parallel_size=4 in the DeepSpeed config, but 8"),
    ({"distflash": {}, "data_parallel_size": 1, "sequence_parallel_size": 8}, "data_parallel_size=1 .* does not go with"),
    ({"distflash": {}, "gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum' .* averaged over all ranks"),
    ({"distflash": {}, "seq_parallel_communication_data_type": "fp32"}, "set communication_data_type|in communication_data_type"),
    ({"distflash": {}, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel=.* replace the mpu"),
    ({"distflash": {}, "expert_parallel": {"enabled": True}}, "expert_parallel=.* have not been tried"),
]


@pytest.mark.parametrize(("config", "message"), SECTIONS)
def test_sections_that_cannot_be_served_are_refused(config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read_section(config, 8)


def test_a_section_is_read():
    given = {"sequence_parallel_size": 4, "layout": "striped", "order": "all_gather", "ulysses": 2, "wire": "p2p", "check": "always"}
    given |= {"staging": "1GiB"}
    harmless = {"gradient_allreduce_op": "mean", "tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 4}
    assert read_section({"distflash": given, **harmless}, 8) == Section(**given)
    assert read_section({"distflash": {}}, 8) == Section(sequence_parallel_size=8)


def test_an_mpu_needs_a_process_group_and_a_config():
    with pytest.raises(RuntimeError, match=r"call distflash.init\(\) first"):
        create_mpu({"distflash": {}})

    def run():
        with pytest.raises(TypeError, match="must be a dict or the path"):
            create_mpu([])
        with pytest.raises(ValueError, match="layout='zig' is not known"):  # on every rank, or the ranks would not meet again
            create_mpu({"distflash": {"layout": "zig"}})
        with pytest.raises(Disagreement, match=r"create_mpu.*\n  sequence_parallel_size: rank 0 says 1; rank 1 says 2"):
            create_mpu({"distflash": {"sequence_parallel_size": 1 + dist.get_rank()}})
        config = zero.config(1, 1)
        config["distflash"] = {"sequence_parallel_size": 1}
        with pytest.raises(ValueError, match="leave out mesh_param"):
            zero.engine_of(zero.make_model(), config, mesh_param=(1, 2))
        return True

    assert spmd_processes(2, run) == [True, True]


def test_an_mpu_tells_who_works_with_whom(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"distflash": {"ulysses": 2, "order": "all_gather"}} # as DeepSpeed reads it')

    def run():
        members = dist.get_process_group_ranks
        whole, pairs = create_mpu(path), create_mpu({"distflash": {"sequence_parallel_size": 2}})
        assert (whole.sp.size, whole.sp.ulysses, whole.sp.order) == (4, 2, "all_gather")
        assert not hasattr(pairs, "get_sequence_parallel_world_size")
        with pytest.raises(AttributeError, match=r"ask mpu.sp.size"):
            pairs.get_sequence_parallel_world_size()
        return [
            members(whole.get_sequence_parallel_group()), whole.get_sequence_parallel_rank(), members(whole._ring),
            members(pairs.get_sequence_parallel_group()), members(pairs._ring), pairs.get_data_parallel_rank(),
            pairs.get_data_parallel_world_size(), members(pairs.group), members(pairs.get_model_parallel_group()),
        ]  # fmt: skip

    everyone = [0, 1, 2, 3]
    assert spmd_processes(4, run) == [
        [[0, 1], 0, [0, 2], [0], [0, 1], 0, 2, everyone, [0]],
        [[0, 1], 1, [1, 3], [1], [0, 1], 0, 2, everyone, [1]],
        [[2, 3], 0, [0, 2], [2], [2, 3], 1, 2, everyone, [2]],
        [[2, 3], 1, [1, 3], [3], [2, 3], 1, 2, everyone, [3]],
    ]


def test_deepspeeds_loader_gives_the_ranks_of_a_sequence_the_same_one():
    def run():
        engine, _ = zero.engine_of(zero.make_model(), zero.config(1, 2))
        return [int(x) for x in engine.deepspeed_io([torch.tensor(n) for n in range(8)], num_local_io_workers=0)]

    first, same, second, likewise = spmd_processes(4, run)
    assert first == same and second == likewise and sorted(first + second) == list(range(8))


HEADS = {  # what is attended to: (sp, ulysses, heads, kv heads, batch_dim, layout)
    "ring": (4, 1, 4, 2, 0, "zigzag"),
    "ulysses": (4, 4, 4, 4, 1, "zigzag"),
    "ulysses x ring": (4, 2, 4, 2, 0, "zigzag"),
    "two sequences": (2, 2, 4, 2, 1, "striped"),
    "heads that two ranks cannot share evenly": (4, 2, 3, 3, 0, "contiguous"),
}


def attended(sp, ulysses, heads, kv_heads, batch_dim, layout):
    """(out, dq, dk, dv) of all tokens, by DeepSpeed's Ulysses and what is beneath."""
    mpu = create_mpu({"distflash": {"sequence_parallel_size": sp, "ulysses": ulysses, "layout": layout}})
    zero.deepspeed.utils.groups.mpu = mpu  # as deepspeed.initialize does
    attn, documents = distributed_attention(mpu, batch_dim=batch_dim), (0, 9, 32)
    seq = mpu.sp.sequence(cu_seqlens=documents)
    q, k, v, dout = drawn(heads, kv_heads)
    local = [seq.shard(x).transpose(0, batch_dim).contiguous().requires_grad_() for x in (q, k, v)]
    out = attn(*local, batch_dim, seq=seq, causal=True, window_size=(11, -1))
    out.backward(seq.shard(dout).transpose(0, batch_dim))
    return [seq.unshard(x.transpose(0, batch_dim).contiguous()) for x in (out.detach(), *(x.grad for x in local))]


def drawn(heads, kv_heads):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 32, h, 8, generator=generator).to(zero.DEVICE) for h in (heads, kv_heads, kv_heads, heads)]


@cache
def all_attended():
    return spmd_processes(4, lambda: [attended(*case) for case in HEADS.values()], timeout=60)


def assert_dense(found, heads, kv_heads):
    *qkv, dout = drawn(heads, kv_heads)
    keep = keep_mask(32, 32, causal=True, window_size=(11, -1), cu_seqlens_q=(0, 9, 32))
    truth, low = (oracle(*qkv, dout, keep, dtype=dtype) for dtype in (torch.float64, torch.float32))
    out, dq, dk, dv = found
    check(Attention(out, truth.lse, dq, dk, dv), truth, low, torch.float32)


@pytest.mark.parametrize("case", HEADS)
def test_distributed_attention_is_dense_attention(case):
    for rank in all_attended():
        assert_dense(rank[list(HEADS).index(case)], *HEADS[case][2:4])


def test_distributed_attention_shares_out_what_belongs_to_heads_and_refuses_what_it_cannot_do():
    slopes, sinks = torch.tensor([0.5, 0.25, 0.125, 0.1]), torch.tensor([0.3, -1.0, 2.0, 0.0])

    def run():
        mpu = create_mpu({"distflash": {"ulysses": 2}})
        attn, seq, uneven = distributed_attention(mpu), mpu.sp.sequence(length=32), mpu.sp.sequence(length=33)
        q, k, v, _ = drawn(4, 2)
        local = [seq.shard(x) for x in (q, k, v)]
        refusals = [
            (
                ValueError,
                "must hold as many tokens each",
                lambda: attn(*(uneven.shard(x[:, [0, *range(32)]]) for x in (q, k, v)), 0, seq=uneven),
            ),
            (ValueError, "given 32 tokens, but this rank holds 8", lambda: attn(q, k, v, 0, seq=seq)),
            (ValueError, "batch_dim_idx=1, but", lambda: attn(*local, 1, seq=seq)),
            (TypeError, "needs a sequence made by", lambda: attn(*local, 0)),
            (TypeError, "needs a sequence made by", lambda: attn(*local, 0, None, mpu.beneath.sequence(seq))),
            (ValueError, "dropout_p=0.1 beneath", lambda: attn(*local, 0, seq=seq, dropout_p=0.1)),
            (ValueError, "return_lse=True", lambda: attn(*local, 0, seq=seq, return_lse=True)),
            (ValueError, "sinks must hold one value for each of 2 x 2", lambda: attn(*local, 0, seq=seq, sinks=sinks[:3])),
            (RuntimeError, "3 key/value heads over 2 ranks", lambda: attn(*(x[:, :, [0, 1, 1]] for x in local), 0, seq=seq)),
            (ValueError, "batch_dim=2 must be", lambda: distributed_attention(mpu, batch_dim=2)),
        ]
        for kind, message, call in refusals:
            with pytest.raises(kind, match=message):
                call()
        return seq.unshard(attn(*local, 0, seq=seq, causal=True, alibi_slopes=slopes, sinks=sinks))

    q, k, v, _ = drawn(4, 2)
    expected = distflash.attention(q, k, v, causal=True, alibi_slopes=slopes, sinks=sinks)
    for found in spmd_processes(4, run):
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


losses_of_the_example: dict[str, list[float]] = {}
LAUNCHERS = {
    "distflash run, which is torchrun's agent": lambda: command("run", "-n", "2"),
    "deepspeed": lambda: [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())],
    "mpirun": mpirun,
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example_learns_the_same_under_every_launcher(launcher, tmp_path):
    quick = ["env", "DS_ACCELERATOR=cpu", "TORCHDYNAMO_DISABLE=1"]  # without it, importing the compiler takes longer than all the rest
    done = start(
        [*quick, *LAUNCHERS[launcher](), str(ROOT / "examples/deepspeed_zero3.py"), "--steps", "2", "--length", "201"],
        tmp_path,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = [float(x) for x in re.findall(r"^step \d loss (\S+)$", done.stdout, re.MULTILINE)]
    assert len(found) == 2 and found[0] > found[1]
    assert found == losses_of_the_example.setdefault("first", found)
