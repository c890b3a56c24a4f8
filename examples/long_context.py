"""A long sequence on one device: what masks cost, that results are exact, and how attention over parts of the keys is merged.

A script, or cells in an editor that knows # %% (VS Code, PyCharm, Jupytext). 131,072 tokens on a GPU, 2,048 on a CPU:

python examples/long_context.py
"""

# %%
import time

import torch

import distflash

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokens, dtype = (131072, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
heads, kv_heads, head_dim = 8, 2, 64
torch.manual_seed(0)
q = torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype, requires_grad=True)  # (B, S, H, D)
k, v = (torch.randn(1, tokens, kv_heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(2))  # (B, S, Hk, D)
print(f"{tokens:,} tokens on {device}: scores of all heads would take {heads * tokens**2 * q.element_size() / 2**30:.2f} GiB")
print(distflash.explain(q.shape, k.shape, causal=True, dtype=dtype, device=device))

# %% [markdown]
# ## What a mask hides is not computed

# %%
masks = {
    "causal": {"causal": True},
    "window of 256": {"causal": True, "window_size": (256, 0)},
    "4 sinks and a window": {"mask": distflash.Slices.sinks_and_window(tokens, 4, 256)},
    "prefix-LM": {"mask": distflash.Slices.prefix_lm(tokens, tokens // 4)},
    "8 packed documents": {"mask": distflash.Slices.documents(range(0, tokens + 1, tokens // 8))},
}


def milliseconds(**asked):
    """Time of the second call: the first one makes the plan and, on a GPU, compiles the kernel."""
    for _ in range(2):
        start = time.perf_counter()
        distflash.attention(q, k, v, **asked).sum().item()  # .item() waits for the GPU
    return 1e3 * (time.perf_counter() - start)


with torch.no_grad():
    for name, asked in masks.items():
        pairs = distflash.explain(q.shape, k.shape, **asked, dtype=dtype, device=device).pairs_kept
        print(f"{name:22} {pairs / tokens**2:7.2%} of all pairs  {milliseconds(**asked):8.1f} ms")

# %% [markdown]
# ## Exactness: the last 16 queries compared with the formula in fp64

# %%
out, lse = distflash.attention(q, k, v, causal=True, return_lse=True)  # (B, S, H, D), (B, H, S)
wide = [x.detach().double().repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (q[:, -16:], k, v)]  # (B, H, S, D)
scores = wide[0] @ wide[1].transpose(2, 3) * head_dim**-0.5 + torch.full((16, tokens), -torch.inf, device=device).triu(tokens - 15)
expected = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
print(
    f"out within {(out[:, -16:] - expected).abs().max():.1e} of fp64, lse within {(lse[..., -16:] - scores.logsumexp(-1)).abs().max():.1e}"
)

# %% [markdown]
# ## Two halves of the keys, merged by their lse, give the whole: this is what a ring does between GPUs

# %%
parts = [distflash.attention(q, k[:, half], v[:, half], return_lse=True) for half in (slice(tokens // 2), slice(tokens // 2, None))]
weight = torch.sigmoid(parts[0][1] - parts[1][1]).transpose(1, 2)[..., None]  # (B, S, H, 1)
merged = weight * parts[0][0] + (1 - weight) * parts[1][0]
print(f"merged within {(merged - distflash.attention(q, k, v)).abs().max():.1e}")

# %%
out.float().square().mean().backward()
print("gradients: " + ", ".join(f"{name} {tuple(x.grad.shape)} {x.grad.norm():.2e}" for name, x in (("q", q), ("k", k), ("v", v))))
