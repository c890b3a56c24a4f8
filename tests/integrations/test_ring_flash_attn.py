"""ring-flash-attn's names: its signatures and who holds what, in the words of the module's docstring; results equal the oracle's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distflash.integrations import ring_flash_attn as rfa
from distflash.integrations import ring_flash_attn_llama3 as llama3
from distflash.integrations import ring_flash_attn_schemes as schemes
from distflash.parallel import planning, sequence
from distflash.parallel.layout import lengths
from distflash.testing import Attention, Variants, dense, errors, keep_mask, spmd, spmd_processes
from tests.schemes import START, Call, inputs, truth_of, whole

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, group=None"
)
LLAMA3 = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice"
PLAIN, VARLEN = ("ring", "zigzag_ring", "stripe"), ("ring", "zigzag_ring")
FAMILIES = (
    {f"{kind}_flash_attn": f"{{}}, {TAIL}" for kind in PLAIN}
    | {f"{kind}_flash_attn_varlen": f"{{}}, cu_seqlens, max_seqlen, {TAIL}" for kind in VARLEN}
    | {"llama3_flash_attn_varlen": f"{{}}, {LLAMA3}, {TAIL}"}
)
PACKINGS = {"func": "q, k, v", "kvpacked_func": "q, kv", "qkvpacked_func": "qkv"}
SLOPES = torch.tensor([0.5, 0.25, 0.7, 0.1])


def held(kind: str, rank: int, ranks: int, documents: tuple[int, ...]) -> list[int]:
    """The tokens of a rank in the order in which it holds them, by the words of the module's docstring."""
    tokens = list(range(documents[-1]))
    if kind == "stripe":
        return tokens[rank::ranks]
    if kind == "llama3":
        return _part(tokens, rank, ranks)
    parts = [tokens[a:b] for a, b in pairwise(documents)]
    if kind == "ring":
        return [token for part in parts for token in _part(part, rank, ranks)]
    return [token for part in parts for chunk in (rank, 2 * ranks - 1 - rank) for token in _part(part, chunk, 2 * ranks)]


def _part(tokens: list[int], n: int, parts: int) -> list[int]:
    size = len(tokens) // parts
    assert size * parts == len(tokens)
    return tokens[n * size : (n + 1) * size]


def packed(packing: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    if packing == "func":
        return q, k, v
    return (q, torch.stack((k, v), -3)) if packing == "kvpacked_func" else (torch.stack((q, k, v), -3),)


def extra(family: str, documents: tuple[int, ...], rank: int, ranks: int, causal: bool, stride: int, device: Any = "cpu") -> dict[str, Any]:
    """What a function is told about documents."""
    cu = torch.tensor(documents, dtype=torch.int32, device=device)
    if family.startswith("llama3"):
        cu_q, cu_k, max_q, max_k, keys = rfa.llama3_flash_attn_prepare_cu_seqlens(cu, causal, rank, ranks)
        found = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return found | {"heads_k_stride": stride, "local_k_slice": keys}
    longest = max(b - a for a, b in pairwise(documents))
    return {"cu_seqlens": cu // ranks, "max_seqlen": longest // ranks} if family.endswith("varlen") else {}


def part(
    family: str, call: Call, x, group: Any, rank: int, ranks: int, packing: str = "func", stride: int = 1, padding: int = 0
) -> tuple[Tensor, Attention]:
    """The function called by a rank with its shard: (global indices of its tokens, results)."""
    documents = call.documents or (0, x.q.shape[1])
    index = torch.tensor(held(family.partition("_")[0], rank, ranks, documents), device=x.q.device)
    leaves = [t[:, index].detach().requires_grad_() for t in (x.q, x.k, x.v)]
    schemes.parallel(group, "all_gather" if family.startswith("llama3") else "auto").seed_dropout(START)
    tensors = leaves
    if family.endswith("varlen"):
        behind = x.q.new_full((padding,), float("nan"))
        tensors = [torch.cat([leaf[0], behind[:, None, None].expand(-1, *leaf.shape[2:])]) for leaf in leaves]
    function = getattr(rfa, f"{family}_{packing}")
    told = extra(family, documents, rank, ranks, call.causal, stride, x.q.device)
    asked = {name: call.options[name] for name in ("causal", "window_size", "dropout_p", "deterministic", "alibi_slopes", "softmax_scale")}
    out, lse, nothing = function(*packed(packing, *tensors), **told, **asked, return_attn_probs=True, group=group)
    assert nothing is None
    if family.endswith("varlen"):
        rows = len(index)
        assert out.dim() == 3 and lse.shape == (out.shape[1], rows + padding)
        assert not out[rows:].any() and (lse[:, rows:] == float("-inf")).all()
        out, lse = out[None, :rows], lse[None, :, :rows]
    dout, dlse = x.dout[:, index], x.dlse[:, :, index]
    finite = torch.where(lse > float("-inf"), lse, 0.0)
    ((out * dout).sum() + (finite * dlse).sum()).backward()
    return index, Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def run(family: str, call: Call, x, ranks: int, **how: Any) -> Attention:
    """The function called by `ranks` ranks with their shards, put together again."""
    return whole(spmd(ranks, lambda group: part(family, call, x, group, group.rank, ranks, **how)))


def check(family: str, call: Call, ranks: int, **how: Any) -> None:
    varlen = family.endswith("varlen")
    heads = {"kv_heads": 4} if how.get("packing") == "qkvpacked_func" else {}
    x = inputs((call.documents or (0, 48))[-1], batch=1 if varlen else 2, **heads)
    broken = errors(run(family, call, x, ranks, **how), truth_of(call, x), truth_of(call, x), torch.float64)
    assert not broken, broken


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_names_order_and_defaults_are_those_of_ring_flash_attn(family, packing):
    function = getattr(rfa, f"{family}_{packing}")
    shown = inspect.signature(function).parameters.values()
    spelled = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in shown)
    assert spelled == FAMILIES[family].format(PACKINGS[packing])
    assert function.__name__ == f"{family}_{packing}" and function.__doc__


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", [f"{kind}_flash_attn" for kind in PLAIN])
@pytest.mark.parametrize("asked", [{"causal": True}, {}, {"causal": True, "window_size": (5, -1)}])
def test_plain_functions_on_their_layout_equal_the_oracle(family, ranks, asked):
    check(family, Call(**asked), ranks)


EVEN = (0, 16, 16, 24, 64, 72)  # each part divisible by 2P
ANY = (0, 7, 8, 8, 37, 40)  # for llama3, whose parts are cut anywhere


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", [f"{kind}_flash_attn_varlen" for kind in (*VARLEN, "llama3")])
@pytest.mark.parametrize("asked", [{"causal": True}, {}, {"window_size": (5, 2)}])
def test_varlen_functions_on_their_layout_equal_the_oracle(family, ranks, asked):
    llama3 = family.startswith("llama3")
    check(family, Call(documents=ANY if llama3 else EVEN, **asked), ranks, padding=0 if llama3 else 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", ["kvpacked_func", "qkvpacked_func"])
def test_packed_variants_are_the_same(family, packing):
    documents = {"documents": EVEN} if family.endswith("varlen") else {}
    check(family, Call(causal=True, **documents), 2, packing=packing)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", [{"slopes": SLOPES, "scale": 0.7, "deterministic": True}, {"dropout_p": 0.3}])
def test_what_is_an_assertion_there_is_served_here(family, asked):
    documents = {"documents": EVEN} if family.endswith("varlen") else {}
    check(family, Call(causal=True, **documents, **asked), 2, stride=2)


def test_llama3_takes_heads_in_strides_with_the_slopes_that_are_theirs():
    check("llama3_flash_attn_varlen", Call(causal=True, documents=ANY, slopes=SLOPES), 2, stride=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [(0, 7, 14, 16), (0, 16), (0, 4, 4, 8, 12, 16, 16), (0, 1, 2, 15, 16)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_prepared_borders_are_those_of_the_queries_and_of_what_they_see(documents, ranks, causal):
    length, document = 16 // ranks, [n for n, (a, b) in enumerate(pairwise(documents)) for _ in range(a, b)]
    for rank in range(ranks):
        found = rfa.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(documents, dtype=torch.int32), causal, rank, ranks)
        cu_q, cu_k, max_q, max_k, keys = found
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == tuple((cu[1:] - cu[:-1]).max().item() for cu in (cu_q, cu_k))
        mine, seen = document[rank * length : (rank + 1) * length], torch.tensor(document)[keys].tolist()
        assert seen == [n for token, n in enumerate(document) if n in mine and (token < (rank + 1) * length or not causal)]
        for cu, whose in ((cu_q, mine), (cu_k, seen)):
            lists = [whose[a:b] for a, b in pairwise(cu.tolist()) if a < b]
            assert [part[0] for part in lists] == sorted(set(whose)) and all(len(set(part)) == 1 for part in lists)
            assert cu[0] == 0 and cu[-1] == len(whose)


def test_borders_that_the_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="17 tokens must be divisible by the 2 ranks"):
        rfa.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 17]), True, 0, 2)


def on_two_ranks(change: Callable[[dict[str, Any]], None]) -> None:
    """llama3's function on two ranks, its arguments changed."""

    def work(group) -> None:
        x = torch.randn(20, 4, 8)
        asked = {"q": x, "k": x, "v": x, "causal": True, "group": group}
        asked |= extra("llama3", ANY, group.rank, 2, True, 1)
        change(asked)
        rfa.llama3_flash_attn_varlen_func(**asked)

    spmd(2, work)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.update(local_k_slice=slice(0, 20)), "must be the one that llama3_flash_attn_prepare_cu_seqlens gave"),
        (lambda a: a.update(causal=False), "causal=False, got what was prepared .* causal=True: prepare anew"),
        (lambda a: a.update(extra("llama3", ANY, 1 - a["group"].rank, 2, True, 1)), "prepared for rank"),
        (lambda a: a.update(cu_seqlens_q=torch.tensor([0, 20]), max_seqlen_q=20), "must be those prepared with local_k_slice"),
        (lambda a: a.update(heads_k_stride=3), "heads_k_stride=3 must divide the 4 key/value heads"),
        (lambda a: a.update(heads_k_stride=0), "heads_k_stride=0 must divide"),
        (lambda a: a.update(max_seqlen_k=2), "max_seqlen_k=2 must be at least"),
        (lambda a: a.update(k=a["k"][:, :3], v=a["v"][:, :3]), "multiple of key/value heads"),
    ],
)
def test_what_does_not_fit_what_was_prepared_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        on_two_ranks(change)


def test_chunks_of_unequal_length_are_refused_where_there_are_several_ranks():
    x = torch.randn(1, 5, 2, 8)
    assert rfa.zigzag_ring_flash_attn_func(x, x, x).shape == x.shape, "one rank holds everything"
    with pytest.raises(ValueError, match="a border of its parts is 5: pad documents to multiples of 4"):
        spmd(2, lambda group: rfa.zigzag_ring_flash_attn_func(x, x, x, group=group))
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="a border of its parts is 3"):
        spmd(2, lambda group: rfa.zigzag_ring_flash_attn_varlen_func(*x.expand(3, -1, -1, -1), cu, 3, group=group))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_steps_share_one_plan(family, monkeypatch):
    made = []
    plan = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *args: made.append(args) or plan(*args))

    def work(group) -> None:
        shape = (36, 2, 8) if family.endswith("varlen") else (1, 36, 2, 8)
        for _ in range(3):  # steps, with tensors of their own
            told = extra(family, EVEN, group.rank, 2, True, 2)
            for _ in range(2):  # layers
                x = torch.randn(shape, requires_grad=True)
                getattr(rfa, f"{family}_func")(x, x, x, **told, causal=True, group=group).sum().backward()

    spmd(2, work)
    assert len(made) == 2, "one a rank"


def test_a_sequence_holds_the_layout_that_it_is_given():
    spans = ((range(2), range(6, 9)), (range(2, 6),))

    def work(group):
        seq = sequence.ShardedSequence(sequence.SequenceParallel(group), (0, 9), layout=spans)
        assert seq.layout == spans and seq.lengths == lengths(spans)
        x = torch.randn(1, 9, 2)
        torch.testing.assert_close(seq.unshard(seq.shard(torch.arange(9.0), 0), 0), torch.arange(9.0))
        return seq.indices.tolist(), seq.shard(x).shape[1]

    assert spmd(2, work) == [([0, 1, 6, 7, 8], 5), ([2, 3, 4, 5], 4)]


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_with_ulysses_ranks_hold_what_yunchang_deals_out(layout):
    """As docs/migrating.md says: the ring's layout, each rank's tokens cut into pieces for adjacent Ulysses ranks."""
    ring, ulysses, length = 2, 3, 24

    def work(group):
        found = sequence.SequenceParallel(group, layout=layout, ulysses=ulysses).sequence(length).indices.tolist()
        outer = held({"zigzag": "zigzag", "striped": "stripe"}[layout], group.rank // ulysses, ring, (0, length))
        assert found == _part(outer, group.rank % ulysses, ulysses)

    spmd(ring * ulysses, work)


def test_ranks_with_different_layouts_disagree_before_anything_is_sent():
    def work(group):
        x = torch.randn(1, 4, 2, 8)
        (rfa.stripe_flash_attn_func if group.rank else rfa.ring_flash_attn_func)(x, x, x, group=group)

    with pytest.raises(RuntimeError, match=r"(?s)disagree on attention.*layout"):
        spmd(2, work)


def test_without_a_group_all_processes_share_the_sequence():
    def work():
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 8, 2, 4, dtype=torch.float64) for _ in range(3))
        rank = torch.distributed.get_rank()
        mine = [x.chunk(2, dim=1)[rank] for x in (q, k, v)]
        out = rfa.ring_flash_attn_func(*mine, causal=True)
        alone = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        torch.testing.assert_close(out, alone.transpose(1, 2).chunk(2, dim=1)[rank], rtol=0, atol=1e-12)

    spmd_processes(2, work)


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """A Llama of two layers with grouped heads, and what its own eager attention computes of each document."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, max_position_embeddings=64, attn_implementation="eager", **sizes)
    model = transformers.LlamaForCausalLM(config).to(device, dtype)
    ids, documents = torch.randint(32, (1, 12)).to(device), (0, 5, 12)
    logits = torch.cat([model(ids[:, a:b]).logits for a, b in pairwise(documents)], dim=1)
    logits.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(documents)])[None].to(device)
    return model, ids, positions, torch.tensor(documents, dtype=torch.int32), logits.detach(), grads


def on_half(model, ids, positions, cu, logits, grads, atol: float = 1e-7) -> None:
    """One of two ranks: the model's logits and summed gradients are those that `tiny` found."""
    rank = torch.distributed.get_rank()
    rfa.substitute_hf_flash_attn(None, 1)
    model.config._attn_implementation = "flash_attention_2"
    mine = slice(6 * rank, 6 * rank + 6)
    with pytest.raises(RuntimeError, match="call update_ring_flash_attn_params"):
        model(ids[:, mine], position_ids=positions[:, mine])
    with pytest.raises(ValueError, match="13 tokens must be divisible by the 2 ranks"):
        rfa.update_ring_flash_attn_params(torch.tensor([0, 13]), None)
    rfa.update_ring_flash_attn_params(cu, None)
    out = model(ids[:, mine], position_ids=positions[:, mine]).logits
    torch.testing.assert_close(out, logits[:, mine], rtol=1e-5, atol=atol)  # eager takes its softmax in fp32
    out.square().sum().backward()
    for name, p in model.named_parameters():
        torch.distributed.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=atol)
    with pytest.raises(ValueError, match="one row of packed documents without padding"):
        model(ids[:, mine], position_ids=positions[:, mine], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]], device=ids.device))


def test_a_model_of_transformers_computes_flash_attention_2_across_ranks():
    case = tiny()
    spmd_processes(2, lambda: on_half(*case))


def test_a_layer_of_transformers_gets_what_it_asks_for_or_raises(monkeypatch):
    from transformers import AttentionInterface

    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    layer, sinks = torch.nn.Module(), torch.randn(4)
    before = AttentionInterface._global_mapping["flash_attention_2"]
    try:
        rfa.substitute_hf_flash_attn(None, 2)
        rfa.update_ring_flash_attn_params(torch.tensor([0, 4, 10]), None)
        call = AttentionInterface._global_mapping["flash_attention_2"]
        out, none = call(layer, q, k, v, None, scaling=0.3, sliding_window=3, softcap=2.0, s_aux=sinks, position_ids=torch.arange(10)[None])
        assert none is None
        keep = keep_mask(10, 10, causal=True, window_size=(2, 0), cu_seqlens_q=(0, 4, 10))
        wanted, _ = dense(*(x.transpose(1, 2) for x in (q, k, v)), keep, 0.3, sinks, Variants(softcap=2.0))
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        for asked, words in (
            ({"cu_seq_lens_q": torch.tensor([0, 10])}, "cu_seq_lens_q"),
            ({"position_bias": torch.zeros(1, 4, 10, 10)}, "position_bias, which it does not compute"),
            ({"whatever_comes_next": 3}, "whatever_comes_next, which it does not compute"),
            ({"sliding_window": 3, "is_causal": False}, "ambiguous"),
        ):
            with pytest.raises(ValueError, match=words):
                call(layer, q, k, v, None, **asked)
        asked = {}
        monkeypatch.setattr(llama3, "attend", lambda q, *_, **options: (asked.update(options), (q, None))[1])
        for given in (None, True):
            call(layer, q, k, v, None, deterministic=given)
            assert asked["deterministic"] is bool(given)
        rfa.substitute_hf_flash_attn(None, 1)
        with pytest.raises(ValueError, match="sinks need heads_k_stride=2"):
            AttentionInterface._global_mapping["flash_attention_2"](layer, q, k, v, None, s_aux=sinks)
    finally:
        AttentionInterface.register("flash_attention_2", before)
