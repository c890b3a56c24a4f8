"""The decoder against plain PyTorch, its positions, and what a checkpointed layer does not run twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distflash
from distflash.train.model import (
    MODELS,
    Llama,
    ModelConfig,
    attention_flops,
    initial_value,
    model_config,
    rope_table,
    rotate,
)
from distflash.train.placement import build

CONFIG = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48)
CU = torch.tensor([0, 5, 6, 17, 24], dtype=torch.int32)


def make(config: ModelConfig = CONFIG, recompute: bool = False) -> Llama:
    return build(config, torch.device("cpu"), seed=0, dtype=torch.float32, kernel="auto", recompute=recompute).model


def plain_forward(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """One document (S,) -> logits (S, V), written from the papers with complex rotations and dense attention, fp64."""
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    x, s, d = w["embed.weight"][tokens], len(tokens), model.config.head_dim
    angles = torch.arange(s).double()[:, None] * c.rope_theta ** -(torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [S, 1, D/2]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt() * w[name]

    def rope(x):
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    for n in range(c.layers):
        y, at = norm(x, f"blocks.{n}.attention_norm.weight"), f"blocks.{n}.attention"
        q, k, v = ((y @ w[f"{at}.{m}.weight"].T).view(s, -1, d) for m in ("query", "key", "value"))
        q, k = rope(q), rope(k)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
        x = x + torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ w[f"{at}.out.weight"].T
        y, at = norm(x, f"blocks.{n}.feed_forward_norm.weight"), f"blocks.{n}.feed_forward"
        x = x + (F.silu(y @ w[f"{at}.gate.weight"].T) * (y @ w[f"{at}.up.weight"].T)) @ w[f"{at}.out.weight"].T
    return norm(x, "norm.weight") @ w["embed.weight" if c.tied else "head.weight"].T


@pytest.mark.parametrize("tied", [True, False])
def test_packed_documents_get_the_logits_they_get_alone(tied):
    model = make(ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, tied=tied))
    tokens = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(0))
    found = model(tokens, distflash.SequenceParallel.single().sequence(cu_seqlens=CU))
    expected = torch.cat([plain_forward(model, piece) for piece in tokens[0].split(CU.diff().tolist())])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_rope_restarts_in_each_document_and_turns_pairs():
    positions = distflash.SequenceParallel.single().sequence(cu_seqlens=CU).positions
    assert positions.tolist() == [*range(5), 0, *range(11), *range(7)]
    cos, sin = rope_table(positions, 8, 100.0)
    assert cos.dtype == torch.float32
    x = torch.randn(1, 24, 2, 8)
    y = rotate(x, (cos, sin))
    torch.testing.assert_close(y[0, [0, 5, 6, 17]], x[0, [0, 5, 6, 17]])  # position 0: nothing turns
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    at = lambda x, p: rotate(x, rope_table(torch.tensor([p]), 16, 1e4))  # noqa: E731
    torch.testing.assert_close((at(q, 30) * at(k, 21)).sum(), (at(q, 109) * at(k, 100)).sum(), rtol=1e-4, atol=1e-5)


def test_a_checkpointed_layer_gives_the_same_gradients_and_runs_attention_once():
    tokens = torch.randint(257, (1, 24))
    seq = distflash.SequenceParallel.single().sequence(cu_seqlens=CU)
    gradients, calls = [], []
    for recompute in (False, True):
        model = make(recompute=recompute)
        with Calls() as counted:
            model(tokens, seq).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(counted.forward)
    assert calls == [CONFIG.layers, CONFIG.layers]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often attention's forward is run (a checkpoint's replay from its store does not reach this mode)."""

    forward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func == torch.ops.distflash.attention.default
        return func(*args, **(kwargs or {}))


def test_initial_values_depend_on_seed_and_name_only():
    make_one = lambda name, seed: initial_value(name, torch.Size([8, 4]), CONFIG, seed, torch.device("cpu"))  # noqa: E731
    assert torch.equal(make_one("a.weight", 1), make_one("a.weight", 1))
    assert not torch.equal(make_one("a.weight", 1), make_one("a.weight", 2))
    assert not torch.equal(make_one("a.weight", 1), make_one("b.weight", 1))


@pytest.mark.parametrize(("name", "billions"), [("tiny", 0.0004), ("small", 0.15), ("1b", 1.0), ("8b", 7.0)])
def test_sizes_are_what_their_names_say(name, billions):
    with torch.device("meta"):
        model = Llama(model_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.2)


def test_bad_shapes_are_refused_with_a_cure():
    with pytest.raises(ValueError, match="there is no model 'huge': choose one of tiny"):
        model_config("huge")
    with pytest.raises(ValueError, match="heads x an even head dim, got dim=30 heads=4"):
        ModelConfig(dim=30, layers=1, heads=4, kv_heads=2, hidden=8)
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        ModelConfig(dim=32, layers=1, heads=4, kv_heads=3, hidden=8)
    assert MODELS["8b"].head_dim == 128


def test_attention_flops_count_documents_not_the_row():
    one = attention_flops(CONFIG, torch.tensor([0, 4]))
    assert one == 14 * 10 * CONFIG.dim * CONFIG.layers
    assert attention_flops(CONFIG, torch.tensor([0, 4, 8])) == 2 * one
