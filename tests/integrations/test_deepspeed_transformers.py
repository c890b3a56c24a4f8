"""Transformers' models under DeepSpeed: one step of ZeRO with `UlyssesSPAttentionHF` and our core against the model's own attention."""

import importlib.util
import os
import re
from functools import cache

import pytest
import torch

from distflash.integrations.deepspeed import create_mpu, enable_ulysses
from distflash.testing import spmd_processes

if torch.cuda.is_available() and not (importlib.util.find_spec("deepspeed") and importlib.util.find_spec("transformers")):
    pytest.skip("DeepSpeed or Transformers is not installed on this GPU machine", allow_module_level=True)  # elsewhere they have to be

from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from distflash.integrations.transformers import IGNORE, shard
from tests.integrations import zero
from tests.launch.programs import ROOT

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 32, "vocab_size": 61}
MODELS = {
    "llama": LlamaConfig(num_key_value_heads=2, **SMALL),
    "llama with one key/value head": LlamaConfig(num_key_value_heads=1, **SMALL),
    "gpt-oss": GptOssConfig(
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=5,
        pad_token_id=0,
        experts_implementation="eager",
        **SMALL,
    ),  # another one has no fp32 on GPUs
}
CASES = [  # (model, sequence parallel size, ulysses, ZeRO stage)
    ("llama", 4, 2, 3),
    ("llama", 2, 2, 1),
    ("llama", 4, 1, 3),  # which is `enable` alone
    ("llama with one key/value head", 4, 4, 0),
    ("gpt-oss", 4, 2, 2),
    ("gpt-oss", 2, 1, 3),
]


def make_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").to(zero.DEVICE)


def batch(n, tokens):
    """Two rows for the n-th data parallel rank, the second with padding; `tokens` of them are none."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(1, 61, (2, tokens // 2 + 3), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens - ids.shape[1] :] = 0
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.2 * (n + 1)) | (mask == 0), IGNORE, ids)
    return {name: x.to(zero.DEVICE) for name, x in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def tokens(ulysses):
    return 37 if ulysses == 1 else 32  # DeepSpeed's Ulysses needs even shards


@cache
def alone(name, sequences, ulysses):
    """(loss, how far each parameter moved, by name) of one process."""
    model, data = make_model(name), [batch(n, tokens(ulysses)) for n in range(sequences)]
    count = sum((x["labels"][:, 1:] != IGNORE).sum() for x in data)
    loss = sum(model(**x, num_items_in_batch=count, use_cache=False).loss for x in data)
    loss.backward()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=zero.LR).step()
    return loss.item(), {name: (p - start[name]).detach() for name, p in model.named_parameters()}


def step(name, sp, ulysses, stage):
    """What `alone` returns, without names, with this rank's share of the work."""
    model = make_model(name)
    start = [p.detach().clone() for p in model.parameters()]
    settings = zero.config(stage, sp)
    settings["distflash"]["ulysses"] = ulysses
    engine, mpu = zero.engine_of(model, settings)
    enable_ulysses(model, mpu)
    loss = engine(**shard(batch(mpu.get_data_parallel_rank(), tokens(ulysses)), mpu.sp, group=mpu.group)).loss
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    moved = [p - before for p, before in zip(zero.parameters(engine).values(), start, strict=True)]
    return total.item() / torch.distributed.get_world_size(), moved


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for (parameter, truth), moved in zip(expected[1].items(), found[1], strict=True):
        assert (moved - truth).norm() <= 2e-5 * truth.norm() + 1e-6, parameter


@cache
def steps():
    return spmd_processes(4, lambda: [step(*case) for case in CASES], timeout=90)


@pytest.mark.parametrize("n", range(len(CASES)), ids=[f"{m}, sp {sp}, ulysses {u}, stage {stage}" for m, sp, u, stage in CASES])
def test_one_step_beneath_deepspeeds_ulysses_is_that_of_eager_attention(n):
    name, sp, ulysses, _ = CASES[n]
    for rank in steps():
        assert_same(rank[n], alone(name, 4 // sp, ulysses))


def test_what_deepspeeds_ulysses_cannot_serve_is_refused_before_anything_is_sent():
    def run():
        mpu, model = create_mpu({"distflash": {"ulysses": 2}}), make_model("llama")
        enable_ulysses(model, mpu)
        with pytest.raises(ValueError, match="must hold as many tokens each"):
            model(**shard(batch(0, 33), mpu.sp))
        with pytest.raises(TypeError, match=r"needs a sequence made by mpu.sp.sequence\(\), got None"):
            model(**batch(0, 32), use_cache=False)
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(ValueError, match=r"dropout_p=0.1 beneath"):
            model(**shard(batch(0, 32), mpu.sp))
        return True

    assert spmd_processes(4, run) == [True] * 4


def test_the_page_runs(tmp_path):
    page = (ROOT / "docs/deepspeed.md").read_text()
    (config,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "ds_config.json").write_text(config)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))

    def run():
        os.chdir(tmp_path)
        os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        names = {}
        exec(compile(code, "docs/deepspeed.md", "exec"), names)
        assert names["mpu"].sp.ulysses == 2 and names["out"].shape == (1, 24, 4, 16)
        return names["loss"]

    assert len({float(loss) for loss in spmd_processes(4, run)}) == 1
