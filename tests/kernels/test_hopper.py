"""What the Hopper kernel's host side decides without a GPU: which problems it takes, what it copies, where a forward writes."""

import importlib
from dataclasses import replace

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
    ({"head_dim": 257}, "serve head dims of up to 256, values of up to 256, got 257 and 128"),
    ({"v_head_dim": 320}, "serve head dims of up to 256, values of up to 256, got 128 and 320"),
]
HEAD_DIMS = [*configs.FORWARD, (8, 8), (59, 59), (72, 48), (80, 80), (100, 36), (128, 64), (130, 20), (65, 200), (255, 1)]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return HopperKernel()


def test_it_takes_bf16_and_fp16_heads_of_every_size_up_to_256_on_an_h100(hopper):
    for dtype in (torch.bfloat16, torch.float16):
        for dim, v_dim in [*((d, d) for d in range(1, 257)), *HEAD_DIMS]:
            assert hopper.supports(Problem(**H100 | {"dtype": dtype, "head_dim": dim, "v_head_dim": v_dim})) is None


def test_it_takes_only_what_both_directions_can_do(hopper):
    small = HopperKernel(None, {(128, 64): configs.BACKWARD[128, 128]})
    assert small.supports(Problem(**H100 | {"v_head_dim": 64})) is None
    assert "up to 128, values of up to 64, got 128 and 65" in (small.supports(Problem(**H100 | {"v_head_dim": 65})) or "")
    assert "up to 128, values of up to 64, got 192 and 64" in (small.supports(Problem(**H100 | {"head_dim": 192, "v_head_dim": 64})) or "")


@pytest.mark.parametrize(
    ("head_dims", "tiles"),
    [((1, 1), (64, 64)), ((64, 64), (64, 64)), ((65, 3), (96, 96)), ((72, 48), (96, 96)), ((59, 97), (128, 128)), ((128, 64), (128, 128)),
     ((129, 64), (192, 128)), ((192, 128), (192, 128)), ((100, 150), (192, 192)), ((193, 1), (256, 256)), ((257, 64), None)],
)  # fmt: skip
def test_head_dims_are_padded_to_the_smallest_tiles_that_hold_both(head_dims, tiles):
    assert configs.fit(configs.FORWARD, *head_dims) == tiles


def test_tiles_are_read_in_one_or_two_powers_of_two():
    assert [tma.parts(d, d) for d in (64, 96, 128, 192, 256)] == [(64, 0), (64, 32), (128, 0), (128, 64), (128, 128)]
    assert [tma.parts(192, d) for d in (128, 129)] == [(128, 0), (128, 64)]  # no part without a column


@pytest.mark.parametrize("width", [1, 8, 59, 64, 80, 100, 256])
@pytest.mark.parametrize("shape", [(2, 10, 4), (1, 1, 1), (1, 10, 1), (2, 1, 4), (2, 10, 1)])
def test_heads_of_any_width_become_legal_and_are_copied_only_where_a_stride_is_not(shape, width):
    x = torch.randn(*shape, width).bfloat16()
    lines = width % 8 == 0 or shape == (1, 1, 1)  # strides of single rows are never used
    for t in (x, x.float(), x.transpose(1, 2)):
        found = tma.legal(t)
        unit = 16 // t.element_size()
        assert torch.equal(found, t) and found.stride(-1) == 1 and found.data_ptr() % 16 == 0
        assert all(step > 0 and step % unit == 0 for step, n in zip(found.stride()[:-1], t.shape[:-1], strict=True) if n > 1)
        assert (found.data_ptr() == t.data_ptr()) == (lines or width % unit == 0)
        assert tma.legal(found) is found
        for boxes in (tma.descriptor(found, t.shape[1], 64, 64), tma.descriptors(found, t.shape[1], 64, 256)[0]):
            assert boxes.shape[-1] == width and all(s * t.element_size() % 16 == 0 for s in boxes.strides[:-1])


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
        assert tma.legal(t) is t
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


def agree(source, launched, dtype):
    """What check.py compiles is what was launched."""
    (kernel, _, args, options), (compiled, signature, constants, registers) = launched, source
    assert compiled is kernel and options == {"num_warps": 4, "maxnreg": registers} and len(args) == len(kernel.arg_names)
    for name, value in zip(kernel.arg_names, args, strict=True):
        if name in constants:
            assert value == constants[name] and type(value) is type(constants[name]), name
        elif isinstance(value, tma.TensorDescriptor):
            element = {torch.float32: "fp32", torch.int32: "i32"}.get(value.base.dtype, dtype)
            assert signature[name] == f"tensordesc<{element}{value.block_shape},{value.layout!r}>", name
        else:
            assert signature[name] == as_compiled(value), name


@pytest.mark.parametrize("head_dims", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("running", "mask", "bounds"), [(False, Mask(right=0), 1), (True, Mask(right=0), 1), (False, Mask(left=50, right=0), 2)]
)
def test_the_forward_launches_what_the_compile_check_compiles(monkeypatch, head_dims, dtype, running, mask, bounds):
    launches = []
    monkeypatch.setattr(host, "launch", lambda kernel, grid, *args, **options: launches.append((kernel, grid, args, options)))
    monkeypatch.setattr(host, "sms", lambda device: 132)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    D, Dv = head_dims
    kernel, tiles = HopperKernel(), packed((0, 300), (0, 200), mask)  # the first 100 queries see nothing
    q, k, v = torch.zeros(2, 300, 4, D, dtype=kind), torch.zeros(2, 200, 2, D, dtype=kind), torch.zeros(2, 200, 2, Dv, dtype=kind)
    acc = Partial(torch.ones(2, 300, 4, Dv), torch.zeros(2, 4, 300)) if running else None
    out, lse = kernel.forward(q, k, v, tiles, 1, acc=acc, dtype=None if running else kind)
    if acc:
        assert out.data_ptr() == acc.out.data_ptr() and lse.data_ptr() == acc.lse.data_ptr()
    assert out.shape == (2, 300, 4, Dv) and out.dtype == (torch.float32 if running else kind)
    delta = kernel.delta(out, out)
    assert delta.shape == lse.shape == (2, 4, 300)
    forward, (_, lines, stats, _) = launches
    assert lines == (5 * 2 * 4,) and stats[9:13] == (300, 4, Dv, 1 << (Dv - 1).bit_length())  # a power of two for every Dv, 1 too
    _, grid, args, _ = forward
    names = forward[0].arg_names
    shape = args[names.index("order")].shape
    assert grid == shape[:1] and args[names.index("rounds")] == shape[1]
    sides = configs.fit(configs.FORWARD, D, Dv)
    assert sides
    source = check.forward_source(sides, configs.FORWARD[sides], dtype, "fp32" if running else dtype, running, head_dims, bounds)
    agree(source, forward, dtype)
    for name, n, width in (("q", 300, D), ("k", 200, D), ("v", 200, Dv)):  # true sizes: what lies past them reads as zeros
        boxes = [args[names.index(f"desc_{name}{part}")] for part in ("", "2")]
        assert all(box.shape[2:] == [n, width] for box in boxes if box)
        assert [box and box.block_shape[3] for box in boxes] == [part or None for part in tma.parts(sides[name == "v"], width)]


def test_the_deterministic_form_has_no_pass_that_adds_up_dq(hopper):
    assert hopper.supports(Problem(**H100, deterministic=True)) is None
    assert any(c.one_pass for c in hopper._backward.values()) and not any(c.one_pass for c in hopper.deterministic()._backward.values())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dims", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("running", [False, True])
def test_the_backward_launches_what_the_compile_check_compiles(monkeypatch, head_dims, dtype, running, deterministic):
    launches = []
    monkeypatch.setattr(gradients, "launch", lambda kernel, grid, *args, **options: launches.append((kernel, grid, args, options)))
    monkeypatch.setattr(gradients, "sms", lambda device: 132)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    D, Dv = head_dims
    kernel, tiles = HopperKernel(), packed((0, 300), (0, 200), Mask(right=0))
    kernel = kernel.deterministic() if deterministic else kernel
    q, k, v = torch.zeros(2, 300, 4, D, dtype=kind), torch.zeros(2, 200, 2, D, dtype=kind), torch.zeros(2, 200, 2, Dv, dtype=kind)
    dout, lse, dq = torch.zeros(2, 300, 4, Dv, dtype=kind), torch.zeros(2, 4, 300), torch.ones(2, 300, 4, D) if running else None
    grads = kernel.backward(dout, q, k, v, lse, lse, tiles, 1, dq=dq, dq_dtype=kind, dkv_dtype=kind)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and {x.dtype for x in grads} == {kind}
    (_, lines, stats, _), *passes = launches
    assert lines[0] * stats[6] == stats[2].numel() and stats[6] % 4 == 0
    sides = configs.fit(configs.BACKWARD, D, Dv)
    assert sides and len(passes) == (2 if deterministic or not configs.BACKWARD[sides].one_pass else 1)
    config = replace(configs.BACKWARD[sides], one_pass=None) if deterministic else configs.BACKWARD[sides]
    compiled = check.backward_sources(sides, config, dtype, dtype, running, head_dims)
    for launched in passes:
        sources = [source for source in compiled.values() if source[0] is launched[0]]
        agree(sources[0], launched, dtype)


@pytest.mark.parametrize("head_dims", [(64, 64), (59, 59), (128, 128), (100, 128)])
@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_every_variant_of_the_one_pass_is_launched_as_it_is_compiled(monkeypatch, head_dims, out):
    launches = []
    monkeypatch.setattr(gradients, "launch", lambda kernel, grid, *args, **options: launches.append((kernel, grid, args, options)))
    monkeypatch.setattr(gradients, "sms", lambda device: 132)
    sides = configs.fit(configs.BACKWARD, *head_dims)
    assert sides
    D, Dv = head_dims
    q, k, v, dout = (torch.zeros(1, 200, 2, n, dtype=torch.bfloat16) for n in (D, D, Dv, Dv))
    lse, tiles = torch.zeros(1, 2, 200), packed((0, 200), (0, 200), Mask(right=0))
    staged = set()
    for name, config in configs.BACKWARD_VARIANTS[sides].items():
        if config.one_pass:
            kernel = HopperKernel(None, {sides: config})
            kernel.backward(dout, q, k, v, lse, lse, tiles, 1, dkv_dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[out])
            agree(check.keys_source(sides, config.one_pass, "bf16", out, columns=head_dims), launches[-1], "bf16")
            if launches[-1][2][launches[-1][0].arg_names.index("desc_dk")]:
                staged.add(name)
    wanted = {name for name, config in configs.BACKWARD_VARIANTS[sides].items() if config.one_pass and config.one_pass.staged}
    assert staged == (wanted if out == "bf16" and head_dims in [(64, 64), (128, 128)] else set())
