"""check_numerics: the rank, the layer and the tensor of the first NaN or infinity, and nothing where there is none."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import distflash
from distflash.testing import spmd
from tests.launch.faults import fault, launch

B, S, H, D = 1, 24, 2, 8


class Layer(nn.Module):
    """Attention with its projections and a residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(H * D), nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x, seq):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, H, D)).unbind(2)
        return x + self.o(self.attend(q, k, v, seq).flatten(2))

    def attend(self, q, k, v, seq):
        return distflash.attention(q, k, v, seq, causal=True)


class Model(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.layers, self.recompute = nn.ModuleList([Layer(), Layer(), Layer()]), recompute

    def forward(self, x, seq):
        for layer in self.layers:
            x = checkpoint(layer, x, seq, use_reentrant=False) if self.recompute else layer(x, seq)
        return x


def ready(ranks, recompute=False):
    """A model for each rank, all alike, and what they are fed with."""
    model = Model(recompute)
    return [deepcopy(model) for _ in range(ranks)], torch.randn(B, S, H * D)


def step(group, model, x, watch=True):
    seq = distflash.SequenceParallel(group).sequence(S)
    with distflash.check_numerics(model, rank=group.rank) if watch else nullcontext():
        model(seq.shard(x), seq).square().mean().backward()


def told(spoil, victim=1, ranks=3, recompute=False):
    """What the error says if `spoil(model, x)` is done to one rank."""
    models, x = ready(ranks, recompute)
    fed = [x.clone() for _ in range(ranks)]
    spoil(models[victim], fed[victim])
    with pytest.raises(FloatingPointError) as caught:
        spmd(ranks, lambda group: step(group, models[group.rank], fed[group.rank]))
    return str(caught.value)


def spoilt_weight(model, x):
    model.layers[1].qkv.weight.data[3, 2] = float("nan")


def test_a_broken_weight_is_named_with_its_rank_and_layer():
    words = told(spoilt_weight)
    assert words.startswith("rank 1, layers.1.qkv, forward: result 0 of aten::addmm holds"), words
    assert words.endswith("its mat2 held some already"), words


def test_an_input_that_is_broken_is_named_by_the_first_layer_that_reads_it():
    def spoil(model, x):
        x[:, :, 0] = float("inf")

    words = told(spoil, victim=2)
    assert words.startswith("rank 2, layers.0.norm, forward: ") and words.endswith("its input held some already"), words


def test_what_attention_itself_makes_is_called_its_out():
    def spoil(model, x):
        model.layers[2].attend = lambda q, k, v, seq: distflash.attention(1e38 * q, 1e38 * k, v, seq, causal=True)

    words = told(spoil, ranks=1, victim=0)
    assert words.startswith("rank 0, layers.2, forward: out of distflash::attention holds ") and words.endswith("its inputs were finite"), (
        words
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_is_named_with_the_layer_whose_backward_made_it(recompute):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / torch.zeros_like(grad)

    def spoil(model, x):
        model.layers[1].attend = lambda *given: Broken.apply(distflash.attention(*given, causal=True))

    words = told(spoil, victim=0, recompute=recompute)
    assert words.startswith("rank 0, layers.1, backward: result 0 of aten::div holds"), words


def test_the_gradients_of_attention_have_their_names(monkeypatch):
    from distflash.kernels import eager

    right = eager.EagerKernel.backward

    def wrong(self, *args, **more):
        dq, dk, dv = right(self, *args, **more)
        return dq, dk * float("nan"), dv

    monkeypatch.setattr(eager.EagerKernel, "backward", wrong)
    words = told(lambda model, x: None, ranks=1, victim=0)
    assert words.startswith("rank 0, layers.2, backward: dk of distflash::attention_backward holds"), words


def test_a_sound_step_passes_with_the_same_bits_and_leaves_nothing_behind():
    watched, x = ready(3)
    plain = deepcopy(watched)
    spmd(3, lambda group: step(group, watched[group.rank], x))
    spmd(3, lambda group: step(group, plain[group.rank], x, watch=False))
    for a, b in zip(watched, plain, strict=True):
        assert all(torch.equal(p.grad, r.grad) for p, r in zip(a.parameters(), b.parameters(), strict=True))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in a.modules())


def test_infinities_that_were_asked_for_pass():
    x = torch.randn(5, 5, requires_grad=True)
    q = torch.randn(B, 6, H, D, requires_grad=True)
    with distflash.check_numerics():
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        scores = x.masked_fill(mask, float("-inf")) + torch.full((5, 5), float("-inf")).triu(1)
        scores.softmax(-1).square().sum().backward()
        out, lse = distflash.attention(q, q[:, :3], q[:, :3], causal=True, return_lse=True)  # the first queries see no key
        assert lse.isinf().any()
        out.sum().backward()


FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda x, dtype=dtype: x.abs().to(dtype) for dtype in FP8),
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.complex(x, x),
        lambda x: torch.fft.rfft(x),
        lambda x: torch.sparse.mm(x.to_sparse(), x),
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged) * 2,
    ],
    ids=[*map(str, FP8), "coo", "csr", "complex", "fft", "sparse product", "nested"],
)
def test_tensors_of_every_kind_pass_and_are_looked_at(make):
    x = torch.ones(4, 4)
    with distflash.check_numerics():
        make(x)
    x[2, 2] = float("nan")
    with (
        pytest.raises(FloatingPointError, match=r"rank 0, outside of the model, forward: result 0 of .* holds"),
        distflash.check_numerics(),
    ):
        make(x)


def test_what_is_overwritten_is_looked_at_too():
    x = torch.ones(4)
    words = "rank 0, outside of the model, forward: self of aten::div_ holds 0 NaN and 4 infinities"
    with pytest.raises(FloatingPointError, match=words), distflash.check_numerics():
        x.div_(0)


def test_the_other_processes_hear_who_it_was_and_what(tmp_path):
    def body(rank):
        torch.manual_seed(0)
        model, seq = Model(), distflash.SequenceParallel().sequence(S)
        if rank == 1:
            fault(tmp_path)
            spoilt_weight(model, None)
        with distflash.check_numerics(model):
            model(seq.shard(torch.randn(B, S, H * D)), seq)

    for end in launch(tmp_path, body):
        assert "rank 1, layers.1.qkv, forward: result 0 of aten::addmm holds" in end.said, end.said
