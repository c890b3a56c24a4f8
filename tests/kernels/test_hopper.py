"""What the Hopper kernel's host side decides without a GPU: which problems it takes, what it copies, where a forward writes."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

import triton

from distflash.kernels.base import Partial, Problem
from distflash.kernels.hopper import HopperKernel, check, compat, configs, gradients, host, tma
from distflash.parallel.mask import Mask, packed
from distflash.tile import Tile, Tiles

H100 = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "heads": 8, "kv_heads": 2, "head_dim": 128, "v_head_dim": 128}
REFUSED = [
    ({"device": torch.device("cpu")}, "run on NVIDIA GPUs, not on cpu"),
    ({"dtype": torch.float32}, "compute in bf16 and fp16, not in torch.float32"),
    ({"dtype": torch.float64}, "compute in bf16 and fp16, not in torch.float64"),
    ({"head_dim": 192}, "one head dim for keys and values, got 192 and 128"),
    ({"head_dim": 96, "v_head_dim": 96}, "serve head dims of 64 and 128, got 96"),
    ({"head_dim": 256, "v_head_dim": 256}, "serve head dims of 64 and 128, got 256"),
    ({"deterministic": True}, "not bit-equal from run to run"),
]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return HopperKernel()


def test_it_takes_bf16_and_fp16_heads_of_64_and_128_on_an_h100(hopper):
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (64, 128):
            assert hopper.supports(Problem(**H100 | {"dtype": dtype, "head_dim": dim, "v_head_dim": dim})) is None


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_it_refuses_everything_else_with_the_reason(hopper, change, reason):
    assert reason in hopper.supports(Problem(**H100 | change))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_it_refuses_other_gpus(hopper, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert f"need compute capability 9.0, cuda has {capability[0]}.{capability[1]}" in hopper.supports(Problem(**H100))


def test_it_refuses_rocm_whose_gfx90a_also_calls_itself_9_0(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not on ROCm" in hopper.supports(Problem(**H100))


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git1234"])
def test_a_triton_it_does_not_know_is_an_import_error(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ImportError, match=rf"Triton 3.6 to 3.9 have it, this is Triton {version}".replace("+", r"\+")):
        importlib.reload(compat)


def test_tensors_that_tma_cannot_read_are_copied_and_no_others():
    x = torch.zeros(2, 10, 4, 64, dtype=torch.bfloat16)
    message = torch.zeros(128 + x.numel() * 2, dtype=torch.uint8)[128:].view(torch.bfloat16).view(x.shape)
    for t in (
        x,
        x[:, 3:],
        x[:, 3:4],
        x[:1, :, :1],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], 2)[:, :, 2:6],
        message,
    ):
        assert tma.legal(t).data_ptr() == t.data_ptr()
    wide = torch.zeros(2, 10, 4, 65, dtype=torch.bfloat16)
    for t in (x.mT.contiguous().mT, x[:, :1].expand(2, 10, 4, 64), wide[..., :64], wide.flatten()[1 : 1 + x.numel()].view(x.shape)):
        copy = tma.legal(t)
        assert copy.data_ptr() != t.data_ptr() and copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, t)


def test_without_work_every_element_is_written_and_a_running_partial_is_kept():
    kernel, nothing = HopperKernel(), Tiles((), 5, 7)
    q, k = torch.randn(2, 5, 4, 64, dtype=torch.bfloat16), torch.randn(2, 7, 2, 64, dtype=torch.bfloat16)
    out, lse = kernel.forward(q, k, k, nothing, 0.1)
    assert out.dtype == lse.dtype == torch.float32 and (out == 0).all() and torch.isneginf(lse).all()
    ones = Partial(torch.ones(2, 4, 5, 64).transpose(1, 2), torch.zeros(2, 5, 4).transpose(1, 2))
    for dtype in (None, torch.bfloat16):
        kept = kernel.forward(q, k, k, nothing, 0.1, acc=ones, dtype=dtype)
        assert (kept.out == 1).all() and (kept.lse == 0).all() and kept.out.dtype == (dtype or torch.float32) and kept.out.is_contiguous()
    for scale in (0.1, 0.0, -0.1):
        for before in (None, torch.ones(2, 4, 5, 64).transpose(1, 2)):
            grads = kernel.backward(q, q, k, k, lse, lse, nothing, scale, dq=before, dq_dtype=torch.bfloat16)
            assert (grads[0] == (0 if before is None else 1)).all() and all((x == 0).all() for x in grads[1:])
            assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32, torch.float32] and all(x.is_contiguous() for x in grads)


@pytest.mark.parametrize(("batch", "q_len", "k_len", "heads"), [(0, 5, 7, 4), (1, 0, 7, 4), (1, 5, 0, 4), (1, 0, 0, 4), (1, 5, 7, 0)])
def test_nothing_at_all_is_served(batch, q_len, k_len, heads):
    kernel, kv_heads = HopperKernel(), min(heads, 2)
    tiles = Tiles((Tile.whole(slice(0, q_len), slice(0, k_len)),), q_len, k_len)
    q, k = torch.zeros(batch, q_len, heads, 64), torch.zeros(batch, k_len, kv_heads, 64)
    out, lse = kernel.forward(q, k, k, tiles, 0.1)
    assert out.shape == q.shape and (out == 0).all() and torch.isneginf(lse).all()
    for heads_kv in (kv_heads, 2) if heads == 0 else (kv_heads,):  # no query head, but keys
        k = torch.zeros(batch, k_len, heads_kv, 64)
        grads = kernel.backward(q, q, k, k, lse, lse, tiles, 0.1)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape] and all((x == 0).all() for x in grads)


def as_compiled(value):
    """The type of an argument, as check.py names it."""
    if isinstance(value, torch.Tensor):
        return {torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("running", [False, True])
def test_what_is_launched_is_what_the_compile_check_compiles(monkeypatch, head_dim, dtype, running):
    launches = []
    for module in (host, gradients):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append((kernel, grid, args, options)))
    monkeypatch.setattr(host, "sms", lambda device: 132)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    kernel, tiles = HopperKernel(), packed((0, 300), (0, 200), Mask(right=0))  # the first 100 queries see nothing
    q, k = torch.zeros(2, 300, 4, head_dim, dtype=kind), torch.zeros(2, 200, 2, head_dim, dtype=kind)
    acc = Partial(torch.ones(2, 300, 4, head_dim), torch.zeros(2, 4, 300)) if running else None
    out, lse = kernel.forward(q, k, k, tiles, 1, acc=acc, dtype=None if running else kind)
    grads = kernel.backward(q, q, k, k, lse, lse, tiles, 1, dq=out if running else None, dq_dtype=kind, dkv_dtype=kind)
    if running:
        assert acc is not None and out.data_ptr() == acc.out.data_ptr() and lse.data_ptr() == acc.lse.data_ptr()
    assert out.shape == q.shape and out.dtype == (torch.float32 if running else kind)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape] and {x.dtype for x in grads} == {kind}
    (forward, grid, args, options), (_, lines, stats, _), (backward, programs, args_b, options_b) = launches
    assert lines[0] * stats[6] == stats[2].numel() and stats[6] % 4 == 0
    shape = args[forward.arg_names.index("order")].shape
    assert grid == shape[:1] and args[forward.arg_names.index("rounds")] == shape[1] and programs == (2 * 2 * 2,)
    named = "fp32" if running else dtype
    for source, passed, option in (
        (check.forward_source(head_dim, configs.FORWARD[head_dim], dtype, named, running), args, options),
        (check.backward_source(head_dim, configs.BACKWARD[head_dim], dtype, dtype), args_b, options_b),
    ):
        compiled, signature, constants, registers = source
        assert compiled in (forward, backward) and option == {"num_warps": 4, "maxnreg": registers}
        assert len(passed) == len(compiled.arg_names)
        for name, value in zip(compiled.arg_names, passed, strict=True):
            if name in constants:
                assert value == constants[name], name
            elif isinstance(value, tma.TensorDescriptor):
                element = {torch.float32: "fp32"}.get(value.base.dtype, dtype)
                assert signature[name] == f"tensordesc<{element}{value.block_shape},{value.layout!r}>", name
            else:
                assert signature[name] == as_compiled(value), name
