"""GPU kernels on a GPU, against fp64 dense attention: what the interpreter cannot show (compiled code, real memory).

Legend: B batch, S tokens, H query heads, Hk key/value heads, D head dim.
"""

import itertools

import pytest
import torch

import distflash
from distflash.kernels.base import Partial, Problem
from distflash.kernels.select import KERNELS, select
from distflash.parallel.mask import Mask, packed
from distflash.testing import Attention, check, keep_mask, oracle

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
GPU_KERNELS = [name for name in KERNELS if name not in ("eager", "reference")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASKS = {
    "causal": {"causal": True},
    "full": {},
    "window": {"window_size": (90, 35)},
    "causal documents": {"causal": True, "cu_seqlens_q": (0, 1, 1, 140, 260, 513, 700)},
}


def serve(name, dtype, heads, kv_heads, head_dim, v_head_dim=None, deterministic=False):
    """The kernel, or a skip with its own reason."""
    problem = Problem(torch.device("cuda"), dtype, heads, kv_heads, head_dim, v_head_dim or head_dim, deterministic)
    try:
        return select(name, problem)
    except ValueError as refusal:
        pytest.skip(str(refusal))


def inputs(dtype, q_len, k_len, heads, kv_heads, head_dim, v_head_dim=None, batch=2, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (
        (q_len, heads, head_dim),
        (k_len, kv_heads, head_dim),
        (k_len, kv_heads, v_head_dim or head_dim),
        (q_len, heads, v_head_dim or head_dim),
    )
    return [torch.randn(batch, *shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def poison():
    """What the allocator hands out next is NaN."""
    _ = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(8)]


def run(q, k, v, dout, name, mask):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = dict(mask)
    if "cu_seqlens_q" in options:
        options["cu_seqlens_q"] = torch.tensor(options["cu_seqlens_q"], dtype=torch.int32)
    out, lse = distflash.attention(*leaves, return_lse=True, kernel=name, **options)
    return Attention(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def judge(found, q, k, v, dout, mask, dtype):
    keep = keep_mask(q.shape[1], k.shape[1], **mask)
    check(found, oracle(q, k, v, dout, keep), oracle(q, k, v, dout, keep, dtype=dtype), dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bf16", 64), ("bf16", 80), ("bf16", 96), ("bf16", 128), ("bf16", 192), ("bf16", 256), ("fp16", 59), ("fp16", 128), ("fp16", 200),
     ("fp32", 64), ("bf16", 8)],
)  # fmt: skip
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_forward_and_backward_are_within_the_error_budget(name, dtype, head_dim, mask):
    kind = DTYPES[dtype]
    serve(name, kind, 8, 2, head_dim)
    tensors = inputs(kind, 700, 700, 8, 2, head_dim)
    judge(run(*tensors, name, MASKS[mask]), *tensors, MASKS[mask], kind)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 300), (2, 17), (127, 129), (129, 127), (300, 64), (1000, 257)])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_odd_and_unequal_lengths(name, q_len, k_len):
    serve(name, torch.bfloat16, 4, 4, 64)
    tensors = inputs(torch.bfloat16, q_len, k_len, 4, 4, 64)
    for mask in ({"causal": True}, {}):
        judge(run(*tensors, name, mask), *tensors, mask, torch.bfloat16)


@pytest.mark.parametrize("mask", ["causal", "causal documents"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (100, 36), (72, 48), (130, 20), (65, 200)])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_value_heads_of_another_size(name, head_dim, v_head_dim, mask):
    serve(name, torch.bfloat16, 4, 2, head_dim, v_head_dim)
    tensors = inputs(torch.bfloat16, 700, 700, 4, 2, head_dim, v_head_dim)
    judge(run(*tensors, name, MASKS[mask]), *tensors, MASKS[mask], torch.bfloat16)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_strided_inputs_give_the_same_bits(name):
    serve(name, torch.float16, 4, 2, 64)
    q, k, v, dout = inputs(torch.float16, 251, 251, 4, 2, 64)  # two blocks of keys: their two parts of dq add up to the same in any order
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)] + [dout.mT.contiguous().mT]
    for a, b in zip(run(q, k, v, dout, name, {"causal": True}), run(*strided, name, {"causal": True}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_visits_in_any_order_merge_to_one(name, head_dim):
    kernel = serve(name, torch.bfloat16, 4, 2, head_dim)
    q, k, v, dout = inputs(torch.bfloat16, 400, 600, 4, 2, head_dim)
    scale, edges = head_dim**-0.5, (0, 200, 201, 480, 600)
    blocks = [packed((0, 400), (0, b - a), Mask()) for a, b in itertools.pairwise(edges)]
    truth = oracle(q, k, v, dout, keep_mask(400, 600))
    low = oracle(q, k, v, dout, keep_mask(400, 600), dtype=torch.bfloat16)
    delta = kernel.delta(truth.out.to(q.dtype), dout)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        acc, dq, dk, dv = None, None, torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for n, at in enumerate(order):
            part = slice(edges[at], edges[at + 1])
            acc = kernel.forward(q, k[:, part], v[:, part], blocks[at], scale, acc=acc, dtype=q.dtype if n == 3 else None)
        for n, at in enumerate(order):
            part = slice(edges[at], edges[at + 1])
            dq, dk[:, part], dv[:, part] = kernel.backward(
                dout, q, k[:, part], v[:, part], acc.lse, delta, blocks[at], scale, dq=dq, dq_dtype=q.dtype if n == 3 else None
            )  # fmt: skip
        assert acc.out.dtype == dq.dtype == q.dtype
        check(Attention(acc.out, acc.lse, dq, dk, dv), truth, low, torch.bfloat16)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_rows_that_see_nothing_are_zero_and_memory_is_all_written(name):
    kernel = serve(name, torch.bfloat16, 2, 1, 64)
    q, k, v, dout = inputs(torch.bfloat16, 300, 100, 2, 1, 64, batch=1)
    poison()
    tiles = packed((0, 300), (0, 100), Mask(right=0))  # bottom-right aligned: the first 200 queries see no key
    out, lse = kernel.forward(q, k, v, tiles, 0.125, dtype=q.dtype)
    assert (out[:, :200] == 0).all() and torch.isneginf(lse[:, :, :200]).all() and torch.isfinite(lse[:, :, 200:]).all()
    dq, dk, dv = kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), tiles, 0.125)
    assert (dq[:, :200] == 0).all() and all(torch.isfinite(x).all() for x in (dq, dk, dv))
    empty = packed((0, 300), (0, 100), Mask(left=-500, right=-400))
    out, lse = kernel.forward(q, k, v, empty, 0.125)
    assert len(empty) == 0 and (out == 0).all() and torch.isneginf(lse).all()
    assert all((x == 0).all() for x in kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), empty, 0.125))
    kept = kernel.forward(q, k, v, empty, 0.125, acc=Partial(torch.ones_like(out), torch.zeros_like(lse)), dtype=q.dtype)
    assert (kept.out == 1).all() and (kept.lse == 0).all()


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_offsets_past_two_to_the_31_elements(name):
    serve(name, torch.bfloat16, 2, 2, 64)
    q, k, v, dout = inputs(torch.bfloat16, 256, 256, 2, 2, 64, batch=2)
    buffer = torch.empty(2, (1 << 31) // 2 + (1 << 20), dtype=torch.bfloat16, device="cuda")  # 4.3 GB: the second batch starts past 2^30
    rows = buffer[:, -(256 * 4096) :].view(2, 256, 4096)
    far = []
    for n, x in enumerate((q, k, v, dout)):
        view = rows[:, :, n * 128 : (n + 1) * 128].unflatten(2, (2, 64))
        far.append(view.copy_(x))
    assert far[0].stride(0) > 1 << 30 and far[0].storage_offset() + far[0].stride(0) + 255 * 4096 > 1 << 31
    near = run(q, k, v, dout, name, {"causal": True})
    for a, b in zip(near, run(*far, name, {"causal": True}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_repeats_are_bit_equal(name, head_dim):
    serve(name, torch.bfloat16, 8, 2, head_dim, deterministic=True)
    tensors = inputs(torch.bfloat16, 1500, 1500, 8, 2, head_dim)
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def once():
        out = distflash.attention(*leaves, causal=True, kernel=name, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    first = once()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("mask", ["causal", "causal documents"])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_more_blocks_of_queries_than_the_gpu_has_processors(name, mask, head_dim):
    """Programs that stay take several blocks in turn: 384 here, of lengths that differ."""
    serve(name, torch.bfloat16, 16, 4, head_dim)
    tensors = inputs(torch.bfloat16, 1500, 1500, 16, 4, head_dim)
    options = {"causal": True, "cu_seqlens_q": (0, 900, 901, 1030, 1500)} if mask == "causal documents" else MASKS[mask]
    judge(run(*tensors, name, options), *tensors, options, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_a_rectangle_whose_last_round_of_programs_is_split(name, head_dim):
    """160 blocks of keys of equal work: on 132 processors the Hopper backward does the last 30 in 4 pieces each."""
    serve(name, torch.bfloat16, 20, 10, head_dim)
    tensors = inputs(torch.bfloat16, 2048, 2000, 20, 10, head_dim, batch=1)
    judge(run(*tensors, name, {}), *tensors, {}, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_short_sequences_of_many_heads(name, head_dim):
    """As above in little, for compute-sanitizer: 192 blocks of queries, of one tile and of two, leave in the dtype of the inputs."""
    serve(name, torch.bfloat16, 16, 4, head_dim)
    tensors = inputs(torch.bfloat16, 200, 200, 16, 4, head_dim, batch=6)
    poison()
    judge(run(*tensors, name, {"causal": True}), *tensors, {"causal": True}, torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_scales_that_are_not_positive(name, scale):
    kernel = serve(name, torch.bfloat16, 4, 2, 64)
    q, k, v, dout = inputs(torch.bfloat16, 200, 333, 4, 2, 64)
    tiles, keep = packed((0, 200), (0, 333), Mask(right=0)), keep_mask(200, 333, causal=True)
    out, lse = kernel.forward(q, k, v, tiles, scale, dtype=q.dtype)
    grads = kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), tiles, scale, dq=torch.zeros(q.shape, device="cuda"))
    truth, low = oracle(q, k, v, dout, keep, scale=scale), oracle(q, k, v, dout, keep, scale=scale, dtype=torch.bfloat16)
    check(Attention(out, lse, *grads), truth, low, torch.bfloat16)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_addresses_and_strides_that_are_no_multiple_of_16_bytes(name):
    serve(name, torch.bfloat16, 4, 2, 64)
    tensors = inputs(torch.bfloat16, 130, 130, 4, 2, 64)
    odd = [torch.zeros(*x.shape[:-1], 67, dtype=x.dtype, device="cuda")[..., 1:65].copy_(x) for x in tensors]
    shifted = [torch.zeros(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x) for x in tensors]
    for moved in (odd, shifted):
        judge(run(*moved, name, {"causal": True}), *tensors, {"causal": True}, torch.bfloat16)


@pytest.mark.parametrize("mask", ["causal", "causal documents"])
@pytest.mark.parametrize("variant", ["softcap", "alibi", "dropout", "all"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 128), ("fp16", 59), ("fp32", 64)])
def test_variants_of_the_scores(dtype, head_dim, variant, mask):
    """The portable kernel beside the dense one, which reads the same seed of dropout."""
    kind = DTYPES[dtype]
    q, k, v, dout = inputs(kind, 700, 700, 8, 2, head_dim)
    asked = {
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, 8, device="cuda")},
        "dropout": {"dropout_p": 0.25},
    }
    options = dict(MASKS[mask], **(asked.get(variant) or {key: value for one in asked.values() for key, value in one.items()}))

    def found(name, *tensors):
        torch.manual_seed(5)  # of the seed that the call draws
        return run(*tensors, name, options)

    truth = found("reference", *(x.double() for x in (q, k, v, dout)))
    check(found("triton", q, k, v, dout), truth, found("reference", q, k, v, dout), kind)
