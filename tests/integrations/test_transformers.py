"""Models of Transformers, tiny and random, with our attention: loss and gradients are those of their own eager attention."""

from __future__ import annotations

import copy
import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import distflash
from distflash.integrations.transformers import IGNORE, enable, shard
from distflash.integrations.transformers_masks import read
from distflash.parallel.agreement import Disagreement
from distflash.testing import spmd

VOCABULARY = 61
CU = [0, 5, 6, 22, 31]  # borders of the packed documents
LAYERS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LONG = {"full_attention": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}}
MODELS = {  # architecture: its configuration beyond SIZES
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {**LAYERS, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "Gemma3": {**LAYERS, "query_pre_attn_scalar": 8},
    "GptOss": {**LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "attn_implementation": "eager",
}  # fmt: skip


def tiny(name: str, head: str = "ForCausalLM", **settings: Any) -> Any:
    """A random model in fp32: Transformers' eager attention takes its softmax in no wider dtype."""
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, name + head)(config(**SIZES | MODELS[name] | settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (1, CU[-1]) if kind == "packed" else (3, 14))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(CU)])[None]
        batch["labels"][0, CU[:-1]] = IGNORE
    if kind == "padded":
        batch["attention_mask"] = torch.ones(3, 14, dtype=torch.long)
        batch["attention_mask"][0, 9:] = batch["attention_mask"][1, :6] = 0
        batch["labels"][batch["attention_mask"] == 0] = IGNORE
        batch["labels"][1, 6] = IGNORE  # eager attention would count what padding predicts
    return batch


def truth(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """By eager attention. Gpt-oss makes its masks without positions, so that packed documents mix: give it one a row."""
    if isinstance(model, transformers.GptOssForCausalLM) and "position_ids" in batch:
        rows = {name: pad_sequence([batch[name][0, a:b] for a, b in pairwise(CU)], True, IGNORE) for name in ("input_ids", "labels")}
        mask = rows["input_ids"] != IGNORE
        batch = {"input_ids": rows["input_ids"].clamp(min=0), "labels": rows["labels"], "attention_mask": mask}
    return step(model, batch | {"use_cache": False})


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def on_ranks(size: int, model: Any, batch: dict[str, Any], **scheme: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The means over ranks of what each of them computes, as data parallelism takes them."""

    def rank(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sp = distflash.SequenceParallel(group, **scheme)
        mine = copy.deepcopy(model)
        enable(mine, sp)
        return step(mine, shard(batch, sp))

    found = spmd(size, rank)
    return sum(loss for loss, _ in found) / size, {name: sum(grads[name] for _, grads in found) / size for name in found[0][1]}


def agree(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values())
    for name, g in expected[1].items():
        error = (found[1][name] - g).norm() / max(g.norm(), 1e-3 * largest)
        assert error < tolerance, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_eager_attention(name, kind):
    model, batch = tiny(name), batch_of(kind)
    expected = truth(model, batch)
    alone = copy.deepcopy(model)
    enable(alone)
    borders = {"cu_seq_lens_q": torch.tensor(CU)} if (name, kind) == ("GptOss", "packed") else {}
    agree(step(alone, batch | borders | {"use_cache": False}), expected)
    for size in (1, 2, 3, 4) if kind == "packed" else (2,):
        agree(on_ranks(size, model, batch), expected)


@pytest.mark.parametrize("scheme", [{"layout": "striped"}, {"ulysses": 2}, {"layout": "balanced", "order": "all_gather"}], ids=str)
def test_any_scheme_serves_a_model(scheme):
    model, batch = tiny("GptOss"), batch_of("packed")
    agree(on_ranks(4, model, batch, **scheme), truth(model, batch))


def test_labels_across_the_border_of_documents_count_as_they_do_in_transformers():
    model, batch = tiny("Llama"), batch_of("packed")
    batch["labels"] = batch["input_ids"].clone()
    agree(on_ranks(2, model, batch), truth(model, batch))


def test_borders_given_as_cu_seq_lens_are_those_given_as_positions():
    model, batch = tiny("Gemma3"), batch_of("packed")
    expected = truth(model, batch)
    cu = torch.tensor(CU, dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 16, "max_length_k": 16}
    unmarked = {name: x for name, x in batch.items() if name != "position_ids"}  # RoPE knows distances only
    for marked in (batch | given, unmarked | given):
        agree(on_ranks(2, model, marked), expected)
    enable(model)
    for marked in (batch | given, unmarked | given):
        agree(step(model, marked | {"use_cache": False}), expected)


def test_checkpointed_layers_meet_their_own_sequence_again():
    model, first, second = tiny("Llama"), batch_of("packed"), batch_of("plain")
    expected = truth(model, first), truth(model, second)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def rank(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sp = distflash.SequenceParallel(group)
        mine = copy.deepcopy(model)
        enable(mine, sp)
        losses = [mine(**shard(batch, sp)).loss for batch in (first, second)]  # both before either runs again
        sum(losses).backward()
        return sum(losses).detach(), {name: p.grad for name, p in mine.named_parameters()}

    found = spmd(2, rank)
    total = {name: g + expected[1][1][name] for name, g in expected[0][1].items()}
    mean = {name: sum(grads[name] for _, grads in found) / 2 for name in total}
    agree((sum(loss for loss, _ in found) / 2, mean), (expected[0][0] + expected[1][0], total))


def test_a_rank_without_labels_adds_nothing():
    model, batch = tiny("Llama"), batch_of("plain")
    batch["labels"][:, 5:] = IGNORE  # with contiguous shards, all of them are the first rank's
    batch["labels"][1:] = IGNORE
    expected = truth(model, batch)
    agree(on_ranks(2, model, batch, layout="contiguous"), expected)


def test_labels_of_more_than_one_batch_are_counted_once():
    model, batches = tiny("Llama"), [batch_of("plain"), batch_of("packed")]
    total = torch.tensor(sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches))
    for batch in batches:
        batch["num_items_in_batch"] = total
        agree(on_ranks(2, model, batch), truth(model, batch))


def test_a_batch_without_a_single_label_has_loss_zero():
    batch = batch_of("plain")
    batch["labels"][:] = IGNORE
    loss, grads = on_ranks(2, tiny("Llama"), batch)
    assert loss == 0
    assert all((g == 0).all() for g in grads.values())


def test_logits_come_back_in_order():
    model, batch = tiny("Qwen3"), batch_of("packed")
    expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    def rank(group: Any) -> Tensor:
        sp = distflash.SequenceParallel(group)
        mine = copy.deepcopy(model)
        enable(mine, sp)
        local = shard({k: x for k, x in batch.items() if k != "labels"}, sp)
        assert "labels" not in local
        return local["sharded_sequence"].unshard(mine(**local).logits).detach()

    for found in spmd(3, rank):
        torch.testing.assert_close(found, expected)


def test_embeddings_are_shared_as_tokens_are():
    model, batch = tiny("Llama"), batch_of("packed")
    expected = truth(model, batch)
    embeds = model.model.embed_tokens(batch.pop("input_ids")).detach()

    def rank(group: Any) -> Tensor:
        sp = distflash.SequenceParallel(group)
        mine = copy.deepcopy(model)
        enable(mine, sp)
        return mine(**shard(batch | {"inputs_embeds": embeds}, sp)).loss.detach()

    torch.testing.assert_close(torch.stack(spmd(2, rank)).mean(), expected[0])


def test_dropout_of_attention_is_the_same_on_any_number_of_ranks():
    model, batch = tiny("Llama", attention_dropout=0.5), batch_of("packed")
    model.train()

    def rank(group: Any) -> Tensor:
        sp = distflash.SequenceParallel(group)
        sp.seed_dropout(7)
        mine = copy.deepcopy(model)
        enable(mine, sp)
        return mine(**shard(batch, sp)).loss.detach()

    one, two = (torch.stack(spmd(size, rank)).mean() for size in (1, 2))
    torch.testing.assert_close(one, two)
    assert abs(one - model.eval()(**batch, use_cache=False).loss) > 1e-3


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_generation_with_a_cache_writes_what_eager_attention_writes(name):
    model, batch = tiny(name).eval(), batch_of("plain")
    prompt = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    prompt["attention_mask"][0, :6] = 0  # padding on the left
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(**prompt, **settings)
    enable(model)
    assert torch.equal(model.generate(**prompt, **settings), expected)


def test_under_autocast_attention_runs_in_its_dtype():
    model, batch = tiny("Llama"), batch_of("packed")
    enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss, model(**batch, use_cache=False).loss, rtol=0.02, atol=0)


# Masks


def masks(kind: str) -> Any:
    from transformers import masking_utils

    return getattr(masking_utils, f"create_{kind}_mask", None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal", "chunked_causal", "bidirectional", "bidirectional_sliding_window"])
def test_what_is_read_off_a_mask_is_the_mask(kind, padded):
    create = masks(kind)
    if create is None:
        pytest.skip(f"this version of transformers has no {kind} mask")
    batch = batch_of("padded" if padded else "packed")
    embeds = torch.zeros(*batch["input_ids"].shape, 8)
    config = transformers.LlamaConfig(attn_implementation="eager", sliding_window=4, attention_chunk_size=6)
    known = {
        "attention_mask": batch.get("attention_mask"), "position_ids": batch.get("position_ids"), "past_key_values": None,
        "inputs_embeds": embeds, "input_embeds": embeds, "cache_position": torch.arange(embeds.shape[1]),  # by version
    }  # fmt: skip
    arguments = {name: x for name, x in known.items() if name in inspect.signature(create).parameters}
    if "bidirectional" in kind:
        arguments.pop("past_key_values", None)
    dense = create(config=config, **arguments)
    rows, tokens = batch["input_ids"].shape
    expected = torch.ones(rows, tokens, tokens, dtype=torch.bool) if dense is None else (dense == 0)[:, 0]
    transformers.AttentionMaskInterface.register("read", read)
    config._attn_implementation = "read"
    seen = create(config=config, **arguments)
    valid = torch.ones(rows, tokens, dtype=torch.bool) if seen.valid is None else seen.valid
    document = (~seen.joined).cumsum(1)
    left, right = (tokens if w == -1 else w for w in seen.window_size(seen.causal))
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]  # key - query
    found = (document[:, None] == document[:, :, None]) & (ahead >= -left) & (ahead <= right) & valid[:, None]
    assert torch.equal(found[valid], expected[valid])


def test_a_mask_that_is_no_window_in_documents_is_refused():
    blocks = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])

    def mixed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:  # causal, but an image sees itself
        return (k <= q) | ((blocks[q] == 1) & (blocks[k] == 1))

    with pytest.raises(ValueError, match="no window inside a document"):
        read(batch_size=1, q_length=8, kv_length=8, mask_function=mixed)
    with pytest.raises(ValueError, match="a mask function of its own"):
        read(batch_size=1, q_length=8, kv_length=8, mask_function=mixed, use_vmap=True)
    with pytest.raises(ValueError, match="caches of a fixed size"):
        read(batch_size=1, q_length=8, kv_length=12, mask_function=mixed)


@pytest.mark.parametrize("decoder", [10, 7, 13])
@pytest.mark.parametrize("name", ["Bart", "T5Gemma"])
def test_decoders_attend_to_a_padded_encoder_of_any_length(name, decoder):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    module = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | {
        "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    configuration = {
        "Bart": lambda: transformers.BartConfig(vocab_size=VOCABULARY, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, **sizes),
        "T5Gemma": lambda: transformers.T5GemmaConfig(encoder=module, decoder=module, dropout_rate=0.0, vocab_size=VOCABULARY),
    }[name]()
    configuration._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(configuration)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_attn_implementation("eager")
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = mask[1, :3] = 0
    ids = torch.randint(3, VOCABULARY, (3, 10))
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, VOCABULARY, (3, decoder))}
    batch |= {"labels": batch["decoder_input_ids"], "use_cache": False}
    expected, mine = step(model, batch), copy.deepcopy(model)
    enable(mine)
    agree(step(mine, batch), expected)
    settings = {"max_new_tokens": 6, "do_sample": False}
    written = (m.generate(input_ids=ids, attention_mask=mask, **settings) for m in (model, mine))
    assert torch.equal(*written)


def test_a_single_query_sees_an_encoder_whose_last_key_is_padding():
    enable(tiny("Llama"))  # registers it
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    seen = read(batch_size=2, q_length=1, q_offset=3, kv_length=4, mask_function=lambda row, head, q, k: k >= 0, attention_mask=mask)
    q, k = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 4, 8)
    found = transformers.AttentionInterface()["exact_auto"](torch.nn.Module(), q, k, k, seen, is_causal=False)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask[:, None, None].bool())
    torch.testing.assert_close(found, expected.transpose(1, 2))


# Refusals


def refused(words: str, model: Any, batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        model(**batch)


def test_what_alone_cannot_be_computed_is_refused():
    model, packed, padded = tiny("Llama"), batch_of("packed"), batch_of("padded")
    enable(model)
    refused("position_ids start anew", model, packed)  # use_cache
    refused("position_ids start anew", model, packed | {"attention_mask": torch.ones(1, 31), "use_cache": False})
    refused("mask of one's own", model, padded | {"attention_mask": torch.ones(3, 1, 14, 14)})
    refused("position_bias", model, padded | {"position_bias": torch.ones(1)})
    refused("output_attentions", model, padded | {"output_attentions": True})
    refused("padding between its tokens", model, padded | {"attention_mask": torch.tensor([[1, 0, 1] + [1] * 11] * 3)})
    cu = torch.tensor([0, 5, 31])
    refused("cu_seq_lens_q and cu_seq_lens_k differ", model, packed | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu + 1, "use_cache": False})
    refused("must cover all tokens", model, packed | {"cu_seq_lens_q": cu - 1 + torch.tensor([1, 0, 0]), "use_cache": False})
    refused("without cu_seq_lens_q", model, packed | {"cu_seq_lens_k": cu, "use_cache": False})
    sp = distflash.SequenceParallel.single()
    refused("comes from shard", model, shard(packed, sp))
    enable(model, sp)
    refused("not sharded", model, packed)
    refused("output_router_logits", model, shard(packed, sp) | {"output_router_logits": True})


def test_code_that_calculates_with_a_mask_is_told_so():
    sizes = {name: x for name, x in SIZES.items() if name not in ("head_dim", "attn_implementation")}
    doge = transformers.DogeForCausalLM(transformers.DogeConfig(**sizes))
    enable(doge)  # its layers add to their mask
    x, mask = torch.ones(4, 4), read(batch_size=1, q_length=4, kv_length=4, mask_function=lambda row, head, q, k: k <= q)
    for calculate in (
        lambda: doge(torch.ones(1, 4, dtype=torch.long)), lambda: mask.dtype, lambda: mask[:, 0], lambda: x + mask, lambda: mask * x,
        lambda: torch.cat([x, mask]),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match="calculates with its mask, which is no tensor here"):
            calculate()
    assert not hasattr(mask, "to")  # Accelerate asks whatever it moves to a device
    assert copy.deepcopy(mask).lengths == (4, 4)


def test_a_layer_that_contradicts_its_mask_is_refused():
    enable(tiny("Llama"))  # registers it
    layer = transformers.AttentionInterface()["exact_auto"]
    x = torch.randn(1, 2, 6, 8)
    causal = read(batch_size=1, q_length=6, kv_length=6, mask_function=lambda row, head, q, k: k <= q)
    plain = distflash.attention(*[x.transpose(1, 2)] * 3, causal=True)
    torch.testing.assert_close(layer(torch.nn.Module(), x, x, x, causal)[0], plain)
    torch.testing.assert_close(layer(torch.nn.Module(), x, x, x, None, is_causal=True)[0], plain)
    last = layer(torch.nn.Module(), x[:, :, 4:], x, x, None, is_causal=True)[0]  # queries are the last keys'
    torch.testing.assert_close(last, plain[:, 4:])
    wrong = [
        ("is_causal=False contradicts", causal, {"is_causal": False}),
        ("sliding_window=3 contradicts", causal, {"sliding_window": 3}),
        ("neither a mask nor is_causal", None, {}),
        ("a window without either", None, {"is_causal": False, "sliding_window": 3}),
    ]
    for words, mask, arguments in wrong:
        with pytest.raises(ValueError, match=words):
            layer(torch.nn.Module(), x, x, x, mask, **arguments)
    longer = torch.cat([x, x[:, :, :3]], 2)
    with pytest.raises(ValueError, match="6 queries to 9 keys, but the model's mask is of 6 and 6"):
        layer(torch.nn.Module(), x, longer, longer, causal)  # as layers do that bring compressed keys along


def test_a_mask_without_two_tokens_of_a_document_is_of_either_direction():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, **special, attn_implementation="eager")).eval()
    one = torch.ones(2, 1, dtype=torch.long)
    expected = model(input_ids=one).last_hidden_state
    enable(model)  # its layers say is_causal=False and a window of two sides
    torch.testing.assert_close(model(input_ids=one).last_hidden_state, expected)
    enable(tiny("Llama"), distflash.SequenceParallel.single())  # registers it
    layer = transformers.AttentionInterface()["exact_sharded_auto"]
    alone = read(batch_size=1, q_length=3, kv_length=3, mask_function=lambda row, head, q, k: k == q)
    seq = distflash.SequenceParallel.single().sequence(length=3)
    x, either = torch.randn(1, 2, 3, 8), torch.nn.Module()
    for words, is_causal in (("is bidirectional", False), ("no two tokens of a document here", None)):
        with pytest.raises(ValueError, match=f"only causal models are computed, and this mask .*{words}"):
            layer(either, x, x, x, alone, is_causal=is_causal, sharded_sequence=seq)
    either.is_causal = True
    causal = distflash.attention(*[x.transpose(1, 2)] * 3, causal=True)
    torch.testing.assert_close(layer(either, x, x, x, alone, sharded_sequence=seq)[0], causal)


@pytest.mark.parametrize(
    ("words", "name", "head", "settings"),
    [
        ("not that of next tokens", "Llama", "ForSequenceClassification", {"pad_token_id": 0}),
        ("type dynamic depends", "Llama", "ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "type longrope depends",
            "Gemma3",
            "ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}} | LONG},
        ),
        ("chunked_attention would see", "Qwen3", "ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}),
        ("router's loss", "GptOss", "ForCausalLM", {"output_router_logits": True}),
    ],
)
def test_models_of_which_a_shard_would_be_wrong_are_refused(words, name, head, settings):
    with pytest.raises(ValueError, match=words):
        enable(tiny(name, head, **settings), distflash.SequenceParallel.single())


def test_models_that_mix_tokens_by_other_layers_are_refused():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Lfm2Config(num_key_value_heads=2, layer_types=["conv", "full_attention"], **sizes)
    with pytest.raises(ValueError, match="conv would see only the tokens of its rank"):
        enable(transformers.Lfm2ForCausalLM(config), distflash.SequenceParallel.single())
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1)
    bart = transformers.BartForConditionalGeneration(config)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        enable(bart, distflash.SequenceParallel.single())


def hybrid(name):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "attn_implementation": "eager"}
    if name == "Lfm2":
        config = transformers.Lfm2Config(layer_types=["full_attention", "conv"], **sizes)
    else:
        heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        kinds = ["full_attention", "linear_attention"]
        config = transformers.Qwen3NextConfig(layer_types=kinds, head_dim=8, **sizes, **heads, **experts)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["Qwen3Next", "Lfm2"])
def test_packed_documents_that_other_layers_than_attention_would_mix_are_refused(name):
    model = hybrid(name)
    batch = {word: x for word, x in batch_of("packed").items() if word != "labels"} | {"use_cache": False}
    first = batch["input_ids"].clone()
    first[0, : CU[1]] = (first[0, : CU[1]] + 1) % VOCABULARY  # of the first document
    eager = [model(**batch | {"input_ids": ids}).logits[0, CU[1]] for ids in (batch["input_ids"], first)]
    assert (eager[0] - eager[1]).abs().max() > 1e-3  # on its own, such a model lets documents see each other
    enable(model)
    for borders in ({}, {"cu_seq_lens_q": torch.tensor(CU, dtype=torch.int32)}):
        with pytest.raises(ValueError, match=r"packed documents of a row.*would mix them.*give each document a row of its own"):
            model(**batch | borders)
    with pytest.raises(ValueError, match="would see only the tokens of its rank"):
        enable(model, distflash.SequenceParallel.single())


@pytest.mark.parametrize("name", ["Qwen3Next", "Lfm2"])
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_a_model_with_other_layers_beside_attention_computes_whole_rows(name, kind):
    model, batch = hybrid(name), batch_of(kind)
    expected = truth(model, batch)
    enable(model)
    agree(step(model, batch | {"use_cache": False}), expected, 1e-4)


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "Data2VecText", "OPT"])
def test_models_that_number_positions_themselves_are_refused(name):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
    more = {"ffn_dim": 32, "word_embed_proj_dim": 32} if name == "OPT" else {"intermediate_size": 32, "is_decoder": True}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **more))
    enable(model)
    with pytest.raises(ValueError, match="numbers positions itself"):
        enable(model, distflash.SequenceParallel.single())


def test_models_whose_attention_cannot_be_exchanged_are_refused():
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="cannot be exchanged"):
        enable(bloom)
    with pytest.raises(TypeError, match="must be a transformers"):
        enable(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kernel='fastest' is not known"):
        enable(tiny("Llama"), kernel="fastest")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("how ranks share pixel_values", {"pixel_values": torch.ones(3, 3)}),
        ("a cache is not shared", {"use_cache": True}),
        ("must hold input_ids", {"input_ids": None}),
        ("attention_mask must be", {"attention_mask": torch.ones(3, 1, 14, 14)}),
        ("position_ids must be", {"position_ids": torch.ones(3, 3, 14)}),
        ("apart only without one", {"position_ids": torch.arange(14)[None] % 5, "attention_mask": torch.ones(3, 14, dtype=torch.long)}),
        ("cu_seq_lens_q and cu_seq_lens_k differ", {"cu_seq_lens_q": torch.tensor([0, 42]), "cu_seq_lens_k": torch.tensor([0, 9, 42])}),
        ("without cu_seq_lens_q", {"cu_seq_lens_k": torch.tensor([0, 42])}),
        ("must end at the 42 tokens", {"cu_seq_lens_q": torch.tensor([0, 42])}),
        ("without one, but models need one", {"input_ids": torch.ones(1, 1, dtype=torch.long), "labels": None}),
    ],
)
def test_batches_that_ranks_cannot_share_are_refused(words, change):
    def rank(group: Any) -> None:
        with pytest.raises(ValueError, match=words):
            shard(batch_of("plain") | change, distflash.SequenceParallel(group))

    spmd(2, rank)


def test_ranks_that_hold_different_batches_are_told_so():
    batches = [batch_of("plain"), batch_of("plain")]

    def rank(group: Any) -> None:
        with pytest.raises(Disagreement, match="ranks disagree on shard"):
            shard(batches[group.rank], distflash.SequenceParallel(group))

    spmd(2, rank)


def test_options_reach_the_kernel():
    model, batch = tiny("Llama"), batch_of("plain")
    enable(model, kernel="fa3")
    with pytest.raises(ValueError, match="kernel='fa3' cannot serve"):
        model(**batch)
    enable(model, kernel="reference", deterministic=True)
    assert model.config._attn_implementation == "exact_reference_deterministic"
    assert model(**batch).loss.isfinite()
