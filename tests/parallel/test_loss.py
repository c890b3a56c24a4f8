"""One token-weighted mean over all ranks, and gradients that reduce as documented."""

from __future__ import annotations

import pytest
import torch

import distflash
from distflash.testing import spmd

S, D = 23, 6


def model(x, targets, ignore, weights, seq, group):
    """One layer: positions in, attention across ranks, a loss for each token."""
    h = x @ weights[0]
    h = h + torch.sin(seq.positions.to(h.dtype))[None, :, None]
    q, k, v = (h.unflatten(-1, (2, D // 2)) * n for n in (1, 2, 3))
    h = distflash.attention(q, k, v, seq, causal=True).flatten(-2) @ weights[1]
    return distflash.token_mean(((h - targets) ** 2).sum(-1), seq, ignore=ignore, group=group)


def step(seq, x, targets, ignore, group=None):
    """The loss of the whole batch and this rank's gradients of the weights."""
    drawn = D**-0.5 * torch.randn(2, D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = [w.clone().requires_grad_() for w in drawn]
    loss = model(*(seq.shard(t) for t in (x, targets, ignore)), weights, seq, group)
    loss.backward()
    return loss.detach(), [w.grad for w in weights]


@pytest.mark.parametrize("ranks, options", [(2, {}), (4, {"ulysses": 2}), (3, {"layout": "striped"}), (4, {"layout": "contiguous"})])
def test_averaged_gradients_of_all_ranks_are_those_of_one_process(ranks, options):
    x, targets, ignore = torch.randn(2, S, D).double() / 2, torch.randn(2, S, D).double(), torch.rand(2, S) > 0.6
    ignore[:, : S // 2] = True  # with contiguous shards a rank has no valid label
    loss, grads = step(distflash.SequenceParallel.single().sequence(S), x, targets, ignore)
    for found, mine in (results := spmd(ranks, lambda g: step(distflash.SequenceParallel(g, **options).sequence(S), x, targets, ignore))):
        assert abs(found - loss) < 1e-12 and all(torch.isfinite(grad).all() for grad in mine)
    for n, expected in enumerate(grads):
        average = sum(mine[n] for _, mine in results) / ranks
        assert (average - expected).abs().max() < 1e-11, f"weight {n}: the averaged gradient is not that of one process"


def test_it_is_the_mean_of_the_valid_tokens_and_not_of_the_ranks_means():
    loss, ignore = torch.arange(10.0), torch.zeros(10, dtype=torch.bool)
    ignore[5:9] = True

    def work(group):
        seq = distflash.SequenceParallel(group, layout="contiguous").sequence(10)
        return distflash.token_mean(seq.shard(loss, 0), seq, ignore=seq.shard(ignore, 0))

    assert [x.item() for x in spmd(2, work)] == [pytest.approx((0 + 1 + 2 + 3 + 4 + 9) / 6)] * 2


def test_what_an_ignored_token_holds_is_not_read_not_even_nan():
    def work(group):
        loss = torch.tensor([1.0, float("nan")], requires_grad=True)
        seq = distflash.SequenceParallel(group, layout="contiguous").sequence(4)
        mean = distflash.token_mean(loss, seq, ignore=torch.tensor([False, True]))
        mean.backward()
        return mean.detach(), loss.grad

    for mean, grad in spmd(2, work):
        assert mean == 1 and grad.tolist() == [1.0, 0.0]  # 2 ranks * 1/2, averaged later


def test_a_rank_without_a_valid_token_contributes_nothing_and_none_at_all_give_zero():
    def work(group, empty):
        seq = distflash.SequenceParallel(group, layout="contiguous").sequence(4)
        loss = torch.full((2,), 3.0, requires_grad=True)
        mean = distflash.token_mean(loss, seq, ignore=torch.full((2,), group.rank in empty))
        mean.backward()
        return mean.item(), loss.grad.tolist()

    assert spmd(2, lambda group: work(group, (1,))) == [(3.0, [1.0, 1.0]), (3.0, [0.0, 0.0])]
    assert spmd(2, lambda group: work(group, (0, 1))) == [(0.0, [0.0, 0.0])] * 2


def test_without_a_sequence_it_is_the_plain_mean_of_any_shape():
    loss = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ignore = torch.rand(3, 4) > 0.5
    assert distflash.token_mean(loss).item() == pytest.approx(loss.mean().item(), abs=1e-15)
    mean = distflash.token_mean(loss, ignore=ignore)
    assert mean.item() == pytest.approx(loss[~ignore].mean().item(), abs=1e-15)
    assert torch.autograd.gradcheck(lambda x: distflash.token_mean(x, ignore=ignore), (loss,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_losses_are_added_up_in_more(dtype):
    loss = torch.ones(4096, dtype=dtype, requires_grad=True)
    mean = distflash.token_mean(loss)
    mean.backward()
    assert mean == 1 and mean.dtype == torch.float32 and loss.grad.dtype == dtype


@pytest.mark.parametrize("ignore", [torch.zeros(3, dtype=torch.bool), torch.zeros(4)])
def test_a_mask_of_another_shape_or_dtype_is_refused(ignore):
    with pytest.raises(ValueError, match=r"ignore must be a bool tensor of the loss's shape \(4,\), got"):
        distflash.token_mean(torch.zeros(4), ignore=ignore)


def test_a_loss_that_is_a_mean_already_is_refused():
    """Ranks hold unequal numbers of tokens: the mean of their means would be another loss, and look like this one."""

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(7)
        with pytest.raises(ValueError, match=r"a loss for each token, got a scalar: .* reduction='none'"):
            distflash.token_mean(torch.zeros(seq.local_length).mean(), seq)

    spmd(2, work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_second_derivative_is_that_of_one_process_on_every_rank(ranks):
    x, ignore = torch.linspace(0.5, 2, 7, dtype=torch.float64), torch.arange(7) == 3

    def second(seq, whole):
        local = seq.shard(x, dim=0).detach().requires_grad_()
        loss = (seq.unshard(local, dim=0) ** 3).sum() if whole else distflash.token_mean(local**3, seq, ignore=seq.shard(ignore, 0)) ** 2
        (grad,) = torch.autograd.grad(loss, local, create_graph=True)
        grad, again = grad / seq.sp.size, torch.autograd.grad((grad**2).sum(), local)[0] / seq.sp.size**2  # averaged, as gradients are
        return [seq.unshard(t.detach(), dim=0) for t in (grad, again)]

    for whole in (True, False):
        expected = second(distflash.SequenceParallel.single().sequence(7), whole)
        for found in spmd(ranks, lambda group, whole=whole: second(distflash.SequenceParallel(group).sequence(7), whole)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_no_sequence_is_refused():
    with pytest.raises(TypeError, match=r"seq must come from SequenceParallel\.sequence\(\), got SequenceParallel"):
        distflash.token_mean(torch.zeros(4), distflash.SequenceParallel.single())
