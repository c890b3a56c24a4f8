"""The operator: its gradient, its registration, and what activation checkpointing may not run twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import distflash
from distflash.cost.traffic import Shape
from distflash.parallel.mask import Mask
from distflash.parallel.wire.local import LocalWire
from distflash.testing import spmd
from tests.schemes import inputs

S = 7


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (2, 1), "softmax_scale": 0.9},
        {"cu_seqlens_q": torch.tensor([0, 3, 3, S]), "causal": True},
    ],
    ids=["causal", "window", "documents"],
)
def test_numerical_gradients_on_one_device(options):
    x = inputs(S, batch=1, heads=2, kv_heads=1, dim=3, v_dim=2)
    leaves = [t.requires_grad_() for t in x[:3]]
    assert gradcheck(partial(distflash.attention, return_lse=True, **options), leaves)


@pytest.mark.parametrize("ranks, ulysses", [(2, 1), (2, 2)])
def test_numerical_gradients_on_two_ranks(ranks, ulysses):
    """Ranks run forward and backward together, so the whole of them is one function with its own backward."""

    class AllRanks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *qkv):
            ctx.save_for_backward(*qkv)
            return put_back(spmd(ranks, lambda group: rank_step(group, qkv, None)), 1, 2)

        @staticmethod
        def backward(ctx, dout, dlse):
            return put_back(spmd(ranks, lambda group: rank_step(group, ctx.saved_tensors, (dout, dlse))), 1, 1, 1)

    def rank_step(group, qkv, grads):
        seq = distflash.SequenceParallel(group, ulysses=ulysses).sequence(S)
        leaves = [seq.shard(t.detach()).requires_grad_() for t in qkv]
        out, lse = distflash.attention(*leaves, seq, causal=True, return_lse=True)
        if grads is None:
            return seq.indices, out.detach(), lse.detach()
        torch.autograd.backward((out, lse), (seq.shard(grads[0]), seq.shard(grads[1], dim=2)))
        return seq.indices, *(leaf.grad for leaf in leaves)

    def put_back(results, *dims):
        index, *columns = zip(*results, strict=True)
        order = torch.argsort(torch.cat(index))
        return tuple(torch.cat(column, dim).index_select(dim, order) for column, dim in zip(columns, dims, strict=True))

    x = inputs(S, batch=1, heads=2, kv_heads=1, dim=3, v_dim=2)
    assert gradcheck(AllRanks.apply, [t.requires_grad_() for t in x[:3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_passes_pytorchs_own_checks(dtype):
    x = inputs(S, dtype=dtype)
    seq = distflash.SequenceParallel().sequence(S)
    kernel = distflash.kernels.select.select("eager", distflash.kernels.base.Problem(x.q.device, dtype, 4, 2, 8, 8))
    scheme = seq.scheme(Mask(None, 0, seq.cu_seqlens), kernel, 0.3, Shape(4, 2, 8, 8))
    leaves = [t.requires_grad_() for t in x[:3]]
    call = (scheme.ticket(), scheme.gathered, None, None, None)
    torch.library.opcheck(torch.ops.distflash.attention.default, (*leaves, *call))
    out, lse, _ = torch.ops.distflash.attention(*leaves, *call)
    backward = (torch.randn_like(out), torch.randn_like(lse), *leaves, out, lse)
    torch.library.opcheck(
        torch.ops.distflash.attention_backward.default,
        (*(t.detach() for t in backward), scheme.ticket(), 2, None, None, None),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_shapes_without_data_are_those_of_the_real_thing_on_every_rank(ulysses):
    """Fake tensors see what real ones would, also with uneven heads and shards."""
    x = inputs(S, heads=6, kv_heads=3, v_dim=5, dtype=torch.float16)

    def work(group):
        seq = distflash.SequenceParallel(group, ulysses=ulysses).sequence(S)
        leaves = [seq.shard(t) for t in x[:3]]
        kernel = distflash.kernels.select.select("eager", distflash.kernels.base.Problem(x.q.device, x.q.dtype, 6, 3, 8, 5))
        scheme = seq.scheme(Mask(), kernel, 1.0, Shape(6, 3, 8, 5))
        call = (scheme.ticket(), scheme.gathered, None, None, None)
        out, lse, extra = torch.ops.distflash.attention(*leaves, *call)
        saved = extra or [*leaves, lse]
        grads = torch.ops.distflash.attention_backward(out, lse, *saved[:3], out, saved[3], scheme.ticket(), 3, None, None, None)
        real = [out, lse, *extra, *grads]
        with torch._subclasses.FakeTensorMode() as mode:
            fake_in = [mode.from_tensor(t) for t in leaves]
            ticket, *call = (mode.from_tensor(scheme.ticket()), scheme.gathered, None, None, None)
            out, lse, extra = torch.ops.distflash.attention(*fake_in, ticket, *call)
            saved = extra or [*fake_in, lse]
            grads = torch.ops.distflash.attention_backward(out, lse, *saved[:3], out, saved[3], ticket, 3, None, None, None)
            fake = [out, lse, *extra, *grads]
        for n, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, b.is_contiguous()), f"rank {group.rank}, output {n}"

    spmd(4, work)


class Counting(TorchDispatchMode):
    """How often this thread's operators are called."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **kwargs or {})


def keep_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.distflash.attention.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("ulysses", [1, 2])
def test_a_checkpointed_layer_runs_attention_and_its_communication_once(ulysses, monkeypatch):
    x, weight = torch.randn(1, 16, 8, dtype=torch.float64), torch.randn(8, 24, dtype=torch.float64)
    exchange = LocalWire.exchange
    sent: dict[int, int] = {}

    def counted(self, sends, recvs):
        sent[self.rank] = sent.get(self.rank, 0) + 1
        return exchange(self, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counted)

    def work(group, context):
        seq = distflash.SequenceParallel(group, ulysses=ulysses).sequence(16)
        w, mine = weight.clone().requires_grad_(), seq.shard(x)

        def layer(h):
            q, k, v = (h @ w).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (2, 4)) for t in (q, k, v))
            return torch.tanh(distflash.attention(q, k, v, seq, causal=True).flatten(-2))

        with Counting() as counting:
            out = layer(mine) if context is None else checkpoint(layer, mine, use_reentrant=False, context_fn=context)
            (out**2).sum().backward()
        return w.grad, counting.calls["distflash::attention"], counting.calls["distflash::attention_backward"]

    results = {}
    for name, context in (("plain", None), ("checkpointed", partial(create_selective_checkpoint_contexts, keep_attention))):
        sent.clear()
        results[name] = spmd(4, lambda group, context=context: work(group, context)), dict(sent)
    (plain, messages), (again, messages_again) = results.values()
    assert [calls for _, *calls in again] == [[1, 1]] * 4, "attention ran again"
    assert messages == messages_again, "messages were sent again"
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(plain, again, strict=True))


def test_gradients_have_the_dtype_of_their_inputs_and_inputs_without_gradient_get_none():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, k, v = inputs(S, dtype=dtype)[:3]
        q.requires_grad_()
        out, lse = distflash.attention(q, k, v, causal=True, return_lse=True)
        out.sum().backward()
        assert out.dtype == q.grad.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert k.grad is None and v.grad is None


def test_a_scheme_lives_as_long_as_a_backward_needs_it():
    import gc

    x = inputs(S)
    leaves = [t.requires_grad_() for t in x[:3]]
    out = distflash.attention(*leaves, distflash.SequenceParallel().sequence(S), causal=True)
    gc.collect()  # the sequence is gone, and with it the plan
    out.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in inputs(S)[:3])
    (grad,) = torch.autograd.grad(distflash.attention(q, k, v, causal=True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_backward\.default but no autograd formula"):
        torch.autograd.grad(grad.sum(), k)


@pytest.mark.parametrize("kernel", ["eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_outside_of_attention_reaches_nothing_inside(kernel, dtype, where):
    x = inputs(40, dtype=torch.float32)

    def run(group, cast):
        seq = distflash.SequenceParallel(group).sequence(40)
        leaves = [(8 * seq.shard(t)).detach().requires_grad_() for t in x[:3]]
        with torch.autocast("cpu", dtype, enabled=cast and where != "backward"):
            out, lse = distflash.attention(*leaves, seq, window_size=(5, 0), return_lse=True, kernel=kernel)
        with torch.autocast("cpu", dtype, enabled=cast and where != "forward"):
            torch.autograd.backward((out, lse), (seq.shard(x.dout), seq.shard(x.dlse, dim=2)))
        return out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)

    for ranks in (1, 2):
        inside, outside = (spmd(ranks, lambda group, cast=cast: run(group, cast)) for cast in (True, False))
        assert all(torch.equal(a, b) for found, expected in zip(inside, outside, strict=True) for a, b in zip(found, expected, strict=True))


def test_transforms_of_torch_func_are_refused_where_they_reach_in():
    q, k, v = inputs(S)[:3]
    for transform in (torch.vmap, torch.func.grad, torch.func.jacrev):
        with pytest.raises(ValueError, match=r"a transform of torch.func.*use torch.autograd.grad or backward\(\), and .* batch dimension"):
            transform(lambda q: distflash.attention(q, k[0], v[0]).sum())(q if transform is torch.vmap else q[0])
    sinks = torch.zeros(q.shape[2], dtype=q.dtype)  # they join outside of the operator
    found = torch.func.grad(lambda sinks: distflash.attention(q, k, v, sinks=sinks).sum())(sinks)
    distflash.attention(q, k, v, sinks=sinks.requires_grad_()).sum().backward()
    assert torch.equal(found, sinks.grad)


@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused_and_not_0(which):
    x = inputs(S)[:3]

    def f(t):
        return distflash.attention(*x[:which], t, *x[which + 1 :], causal=True)

    with pytest.raises(ValueError, match="has no forward-mode derivative"):
        torch.func.jvp(f, (x[which],), (x[which],))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="has no forward-mode derivative"):
        f(forward_ad.make_dual(x[which], x[which]))
    with forward_ad.dual_level():
        f(x[which])  # what carries none is as good as ever
