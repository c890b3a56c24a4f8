"""torch.compile(fullgraph=True) around attention: no graph break, what eager mode gives, one graph for many sequences.

Graphs are made by Dynamo and AOTAutograd; one test goes through Inductor too, and is skipped where there is no C++ compiler.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distflash
from distflash.cost.traffic import Shape
from distflash.kernels.base import Problem
from distflash.kernels.select import select
from distflash.parallel.agreement import Disagreement
from distflash.parallel.autograd import CLOCK, Scheme
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalWire
from distflash.testing import spmd, spmd_processes
from distflash.train.model import Llama, ModelConfig
from tests.schemes import inputs

S, H = 13, 6
OPTIONS = {
    "causal": {"causal": True, "return_lse": True},
    "a window": {"window_size": (3, 1)},
    "a scale": {"softmax_scale": 0.3, "deterministic": True},
    "a scale that is a tensor": {"softmax_scale": torch.tensor(0.3)},
    "softcap": {"softcap": 2.0, "causal": True},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 1.0, H)},
    "slopes of each sequence": {"alibi_slopes": torch.linspace(0.1, 1.0, 2 * H).view(2, H), "causal": True},
    "sinks": {"sinks": torch.linspace(-1, 1, H, dtype=torch.float64)},
    "dropout": {"dropout_p": 0.3},
    "a mask": {"mask": Slices.prefix_lm(S, 4)},
    "a kernel by name": {"kernel": "reference", "causal": True},
}
ALONE = {
    "documents": {"cu_seqlens_q": torch.tensor([0, 5, S]), "causal": True},
    "documents of keys": {"cu_seqlens_q": torch.tensor([0, 5, S]), "cu_seqlens_k": torch.tensor([0, 4, S])},
    "documents in a list": {"cu_seqlens_q": [0, 5, S]},
}


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def elsewhere(code, folder=None):
    """Run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=folder)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def layer(q, k, v, w, seq=None, **options):
    """Two attentions and something around them."""
    out = distflash.attention(q @ w, k, v, seq, **options)
    out = out[0] * out[1].transpose(1, 2)[..., None] if isinstance(out, tuple) else out
    found = distflash.attention(torch.tanh(out) @ w, k.sin(), v, seq, **options)
    return found[0] if isinstance(found, tuple) else found


def step(f, x, seq=None, **options):
    """The output and every gradient, of local tokens."""
    torch.manual_seed(7)
    if seq is not None:
        seq.sp.seed_dropout(7)
    weight = torch.linspace(-0.5, 0.5, x.q.shape[-1] ** 2, dtype=x.q.dtype).view(x.q.shape[-1], -1)
    leaves = [(t if seq is None else seq.shard(t)).detach().requires_grad_() for t in x[:3]] + [weight.requires_grad_()]
    options = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if "sinks" in options:
        leaves.append(options["sinks"].requires_grad_())
    out = f(*leaves[:4], seq, **options)
    return [out.detach(), *torch.autograd.grad((out * out).sum(), leaves)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {n} differs by {(a - b).abs().max()}"


@pytest.mark.parametrize("case", OPTIONS | ALONE)
def test_every_option_gives_in_a_graph_what_it_gives_in_eager_mode(case):
    x, options = inputs(S, heads=H, kv_heads=3, v_dim=8), (OPTIONS | ALONE)[case]
    assert_equal(step(compiled(layer), x, **options), step(layer, x, **options))
    assert graphs() == 1


def test_three_dimensions_and_another_size_of_values():
    q, k, v = (torch.randn(S, h, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 5)))
    expected = distflash.attention(q, k, v, causal=True, return_lse=True)
    assert_equal(compiled(distflash.attention)(q, k, v, causal=True, return_lse=True), expected)


REFUSED = {
    "an unknown kernel": ({"kernel": "fast"}, "kernel='fast' is not known"),
    "a scale with a gradient": ({"softmax_scale": torch.ones((), requires_grad=True)}, "softmax_scale gets no gradient"),
    "slopes with a gradient": ({"alibi_slopes": torch.ones(H, requires_grad=True)}, "alibi_slopes get no gradient"),
    "a softcap below 0": ({"softcap": -1.0}, "softcap=-1.0 must be"),
    "sinks of another number": ({"sinks": torch.ones(2)}, "sinks must hold one logit for each of the 6"),
    "a mask and causal": ({"mask": Slices.prefix_lm(S, 4), "causal": True}, "leave these out"),
    "a mask that is a tensor": ({"mask": torch.ones(S, S)}, "mask must be distflash.Slices"),
    "heads": ({"kv_heads": 4}, "query heads must be a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_with_the_same_words(case):
    options, words = REFUSED[case]
    options = dict(options)
    q, k, v = inputs(S, heads=H, kv_heads=options.pop("kv_heads", 3))[:3]
    with pytest.raises(Exception, match=words):
        compiled(distflash.attention)(q, k, v, **options)


def test_a_graph_serves_every_sequence_and_gives_each_its_own_result():
    x, f = inputs(S, heads=H, kv_heads=3), compiled(partial(layer, causal=True))
    sp = distflash.SequenceParallel.single()
    outs = []
    for borders in ([0, S], [0, 5, S], [0, 3, 3, S], [0, 1, S]):
        seq = sp.sequence(cu_seqlens=borders)
        outs.append(step(f, x, seq))
        assert_equal(outs[-1], step(layer, x, seq, causal=True))
    assert not any(torch.equal(outs[0][0], out[0]) for out in outs[1:])
    assert graphs() == 1, "new documents of the same length made a new graph"
    for length in (11, 9, 17):
        shorter = inputs(length, heads=H, kv_heads=3)
        assert_equal(step(f, shorter, sp.sequence(length)), step(layer, shorter, sp.sequence(length), causal=True))
    assert graphs() == 2, "lengths became dynamic only once"


def test_a_whole_model_that_reads_its_positions_is_one_graph_for_all_batches():
    model = Llama(ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, hidden=24, vocab=31))
    tokens = torch.arange(S)[None] % 31

    def loss(tokens, seq):
        return model(seq.shard(tokens), seq).square().mean()

    f, sp = compiled(loss), distflash.SequenceParallel.single()
    for borders in ([0, S], [0, 5, S], [0, 1, 9, S]):
        seq = sp.sequence(cu_seqlens=borders)
        found, expected = (torch.autograd.grad(g(tokens, seq), list(model.parameters())) for g in (f, loss))
        assert_equal(found, expected)
    assert graphs() == 1


def test_documents_slopes_scales_and_masks_of_each_call_are_read_at_each_call():
    x = inputs(S, heads=H, kv_heads=3)
    for name, values in {
        "cu_seqlens_q": [torch.tensor([0, n, S]) for n in (5, 2, 11)],
        "alibi_slopes": [torch.full((H,), n) for n in (0.1, 0.5, 2.0)],
        "softmax_scale": [torch.tensor(n) for n in (0.1, 0.5, 2.0)],
        "mask": [Slices.prefix_lm(S, n) for n in (3, 5, 9)],
    }.items():
        torch._dynamo.reset()
        counters.clear()
        f = compiled(layer)
        outs = []
        for value in values:
            outs.append(step(f, x, **{name: value}))
            assert_equal(outs[-1], step(layer, x, **{name: value}))
        assert not torch.equal(outs[0][0], outs[1][0]), name
        assert graphs() <= 2, name


@pytest.mark.parametrize("name, values", [("softmax_scale", (0.1, 0.2, 0.3)), ("softmax_scale", (1, 2, 3)), ("softcap", (2.0, 3.0, 4.0))])
def test_a_number_may_have_another_value_at_each_call(name, values):
    x, f = inputs(S, heads=H, kv_heads=3), compiled(layer)
    for value in values:  # layers of one class that differ in it, each compiled
        assert_equal(step(f, x, **{name: value}), step(layer, x, **{name: value}))


def test_a_scale_that_is_no_number_is_refused_in_a_graph_too():
    q, k, v = inputs(S, heads=H, kv_heads=3)[:3]
    for value in (float("nan"), True, "0.5", (1.0,)):
        with pytest.raises(Exception, match="must be None, a finite number, or a 0-d tensor of one"):
            compiled(distflash.attention)(q, k, v, softmax_scale=value)


def test_a_graph_trains_with_what_was_first_used_in_inference_mode():
    """In a process of its own: where the package is imported in inference mode, as whoever generates before training does."""
    code = """if True:
        import torch, distflash
        q = torch.randn(1, 8, 2, 4)
        with torch.inference_mode():
            seq = distflash.SequenceParallel.single().sequence(8)
            distflash.attention(q, q, q, seq)
        q.requires_grad_()
        torch.compile(distflash.attention, fullgraph=True, backend="aot_eager")(q, q, q, seq).sum().backward()
        print(float(q.grad.isfinite().all()))"""
    done = elsewhere(code)
    assert done.stdout.strip() == "1.0", done.stderr


def test_dropout_in_a_graph_drops_others_at_each_call():
    q, k, v = inputs(S)[:3]
    f = compiled(partial(distflash.attention, dropout_p=0.5))
    assert not torch.equal(f(q, k, v), f(q, k, v))


class Exported(torch.nn.Module):
    def forward(self, q, cu):
        return distflash.attention(q, q, q, causal=True, cu_seqlens_q=cu)


def test_an_exported_program_serves_other_lengths_and_documents_also_in_another_process(tmp_path):
    q, cu, length = torch.randn(1, S, 2, 8), torch.tensor([0, 5, S]), {1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(Exported(), (q, cu), dynamic_shapes=(length, None))
    torch.export.save(program, tmp_path / "program.pt2")
    longer, others = torch.randn(1, 2 * S, 2, 8), torch.tensor([0, 20, 2 * S])
    expected = Exported()(longer, others)
    torch.save((longer, others, expected), tmp_path / "tensors.pt")
    assert torch.equal(program.module()(longer, others), expected)
    code = """if True:
        import torch, distflash
        longer, others, expected = torch.load("tensors.pt")
        for n in range(20):  # calls of its own that have numbers, too
            distflash.attention(longer, longer, longer, window_size=(n, 0))
        print(torch.equal(torch.export.load("program.pt2").module()(longer, others), expected))"""
    done = elsewhere(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_what_a_saved_graph_names_of_its_process_is_nothing_in_another(tmp_path):
    """Were objects numbered from 0, it would be whatever has that number there."""
    save = """if True:
        import torch, distflash
        trace = torch.jit.trace(lambda q: distflash.attention(q, q, q, causal=True), torch.randn(1, 8, 2, 4), check_trace=False)
        torch.jit.save(trace, "trace.pt")"""
    load = """if True:
        import torch, distflash
        q = torch.randn(1, 8, 2, 4)
        for n in range(5):
            distflash.attention(q, q, q, window_size=(n, 0))
        torch.jit.load("trace.pt")(q)"""
    assert elsewhere(save, tmp_path).returncode == 0
    done = elsewhere(load, tmp_path)
    assert "is gone: " in done.stderr and "another process" in done.stderr, done.stderr


def test_what_a_graph_needs_for_its_backward_lives_as_long_as_that():
    x = inputs(S, heads=H, kv_heads=3)
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    seq = distflash.SequenceParallel.single().sequence(cu_seqlens=[0, 4, S])
    expected = step(layer, x, seq, causal=True)[1:4]
    weight = torch.linspace(-0.5, 0.5, 64, dtype=torch.float64).view(8, 8)
    out = compiled(partial(layer, causal=True))(*leaves, weight, seq)
    del seq
    gc.collect()
    assert_equal(torch.autograd.grad((out * out).sum(), leaves), expected)


def test_a_graph_keeps_no_scheme_of_a_call_that_is_over():
    def alive():
        gc.collect()
        return sum(isinstance(thing, Scheme) for thing in gc.get_objects())

    x, f = inputs(S, heads=H, kv_heads=3), compiled(partial(layer, causal=True))
    sp = distflash.SequenceParallel.single()
    step(f, x, sp.sequence(cu_seqlens=[0, 4, S]))
    before = alive()
    for n in range(5, 9):
        step(f, x, sp.sequence(cu_seqlens=[0, n, S]))
    assert alive() == before


# several ranks


@pytest.mark.parametrize(("ranks", "ulysses"), [(2, 1), (3, 1), (2, 2), (4, 2)])
def test_ranks_give_in_a_graph_what_they_give_in_eager_mode(ranks, ulysses):
    x, options = inputs(S, heads=H, kv_heads=3), {"causal": True, "dropout_p": 0.2, "alibi_slopes": torch.linspace(0.1, 1.0, H)}
    f = compiled(partial(layer, **options))

    def work(group):
        sp = distflash.SequenceParallel(group, ulysses=ulysses)
        for seq in (sp.sequence(S), sp.sequence(cu_seqlens=[0, 4, 5, S])):
            assert_equal(step(f, x, seq), step(layer, x, seq, **options))

    spmd(ranks, work)


def test_processes_give_in_a_graph_what_they_give_in_eager_mode():
    x, f = inputs(S, heads=H, kv_heads=3), compiled(partial(layer, causal=True, return_lse=True))

    def work():
        seq = distflash.SequenceParallel(ulysses=1).sequence(cu_seqlens=[0, 4, S])
        assert_equal(step(f, x, seq), step(layer, x, seq, causal=True, return_lse=True))
        return graphs()

    assert spmd_processes(2, work) == [1, 1]


def test_ranks_that_disagree_in_a_graph_say_so_before_anything_is_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(LocalWire, "exchange", lambda self, sends, recvs: sent.append(self.rank))

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(cu_seqlens=[0, 4 + group.rank, 14])
        q = torch.zeros(1, seq.local_length, 2, 4)
        with pytest.raises(Disagreement, match=r"documents: rank 0 says \(0, 4, 14\); rank 1 says \(0, 5, 14\)"):
            compiled(partial(distflash.attention, causal=True))(q, q, q, seq)

    spmd(2, work)
    assert not sent


# activation checkpoints


def counted(monkeypatch, *messages):
    """Calls of the ring's loops, and of what moves messages: (class, method), of wires between threads unless given."""
    calls = {}

    def count(owner, name):
        original, calls[name] = getattr(owner, name), 0

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("forward", "backward"):
        count(distflash.parallel.ring, name)
    for owner, name in messages or ((LocalWire, "exchange"),):
        count(owner, name)
    return calls


@pytest.mark.parametrize(("how", "ulysses", "p"), [("eager", 1, 0.0), ("eager", 2, 0.2), ("compiled", 1, 0.2), ("compiled", 2, 0.0)])
def test_a_checkpointed_layer_runs_attention_and_its_communication_once(how, ulysses, p, monkeypatch):
    x, calls, found = inputs(S, heads=H, kv_heads=3), counted(monkeypatch), {}
    body = partial(layer, causal=True, dropout_p=p)
    contexts = partial(create_selective_checkpoint_contexts, distflash.save_attention)

    def again(q, k, v, w, seq):
        return checkpoint(body, q, k, v, w, seq, use_reentrant=False, context_fn=contexts)

    for name, f in {"plain": body, "checkpointed": again}.items():
        f = compiled(f) if how == "compiled" else f
        calls |= dict.fromkeys(calls, 0)

        def work(group, f=f):
            return step(f, x, distflash.SequenceParallel(group, ulysses=ulysses, check="never").sequence(S))

        found[name] = spmd(2, work), dict(calls)
    (plain, expected), (checkpointed, counts) = found.values()
    assert counts == expected
    assert expected["forward"] == expected["backward"] == 4  # two calls, two ranks
    assert expected["exchange"] > 0
    for a, b in zip(plain, checkpointed, strict=True):
        assert_equal(a, b)


# operators


@pytest.mark.parametrize(("ulysses", "softcap", "slopes", "p"), [(1, 0.0, False, 0.0), (1, 1.0, True, 0.2), (2, 0.0, True, 0.2)])
def test_operators_pass_pytorchs_own_checks(ulysses, softcap, slopes, p):
    """Grouped heads, Ulysses (one rank of two, the other doing the same), slopes and a seed; backward and prepare too."""
    x = inputs(8, heads=4, kv_heads=2, v_dim=5)

    def work(group):
        seq = distflash.SequenceParallel(group, ulysses=ulysses).sequence(8)
        asked = (*["softcap"] * bool(softcap), *["alibi_slopes"] * slopes, *["dropout_p"] * bool(p))
        kernel = select("eager", Problem(x.q.device, x.q.dtype, 4, 2, 8, 5, variants=asked))
        mask = distflash.parallel.mask.Mask(None, 0, seq.cu_seqlens)
        scheme = seq.scheme(mask, kernel, 0.3, Shape(4, 2, 8, 5), (softcap, p) if asked else None)
        leaves = [seq.shard(t).detach().requires_grad_() for t in x[:3]]
        rest = torch.linspace(0.1, 1, 4).expand(2, 4) if slopes else None, torch.tensor([5]) if p else None, None
        check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        check(torch.ops.distflash.attention.default, (*leaves, scheme.ticket(), scheme.gathered, *rest))
        out, lse, extra = (t for t in torch.ops.distflash.attention(*leaves, scheme.ticket(), scheme.gathered, *rest))
        ring = [t.detach() for t in (extra or [*leaves, lse])]
        given = (torch.ones_like(out), torch.ones_like(lse), *ring[:3], out.detach(), ring[3], scheme.ticket(), 2, *rest)
        check(torch.ops.distflash.attention_backward.default, given)
        options = {"causal": True, "window_size": [-1, -1], "softcap": softcap, "dropout_p": p, "deterministic": False}
        options |= {"kernel_name": "auto", "return_lse": False, "gradients": True}
        call = (CLOCK, seq.ticket, None, *(t.detach() for t in leaves), 0.3, None, rest[0], None, None, None)
        check(torch.ops.distflash.prepare.default, call, options)

    spmd(2, work)


# Inductor


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_result_and_keeps_the_order_in_which_ranks_communicate(monkeypatch):
    """Without order, Inductor runs the backward of these two calls in an order that depends on the sizes that a rank has."""
    order = []
    for name in ("forward", "backward"):
        original = getattr(distflash.parallel.ring, name)
        at = {"forward": 3, "backward": 4}[name]
        monkeypatch.setattr(
            distflash.parallel.ring,
            name,
            lambda *a, original=original, name=name, at=at, **k: (order.append((name, a[at].shape[0])), original(*a, **k))[1],
        )

    def three(x, y, z, w, a, b, c):
        found = [distflash.attention(t @ w, t * 2, t, seq) for t, seq in ((x, a), (y, b), (z, c))]
        return found[1].sum((0, 1)) + found[0].sum((0, 1)) * found[2].sum((0, 1))

    sp = distflash.SequenceParallel.single()
    xs = [torch.randn(batch, 4, 2, 8, dtype=torch.float64).requires_grad_() for batch in (2, 3, 4)]
    w = torch.randn(8, 8, dtype=torch.float64).requires_grad_()
    seqs = [sp.sequence(4) for _ in xs]
    found = torch.autograd.grad(compiled(three, backend="inductor")(*xs, w, *seqs).sum(), [*xs, w])
    assert order == [*(("forward", n) for n in (2, 3, 4)), *(("backward", n) for n in (4, 3, 2))]
    for a, b in zip(found, torch.autograd.grad(three(*xs, w, *seqs).sum(), [*xs, w]), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
