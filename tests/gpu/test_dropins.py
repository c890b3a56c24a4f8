"""The drop-ins with tensors and borders on a GPU."""

from __future__ import annotations

import pytest
import torch

from distflash.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from distflash.testing import dense, keep_mask

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("padding", [0, 5])
def test_packed_documents_on_the_gpu_equal_the_dense_formula(padding):
    documents, total = (0, 100, 100, 357), 357
    q, k, v = (torch.randn(total + padding, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cu = torch.tensor(documents, dtype=torch.int32, device="cuda")
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, 257, 257, causal=True, return_attn_probs=True)
    wanted, wanted_lse = dense(
        *(x[None, :total].float() for x in (q, k, v)), keep_mask(total, total, causal=True, cu_seqlens_q=documents).cuda()
    )
    torch.testing.assert_close(out[:total].float(), wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[:, :total], wanted_lse[0], rtol=1e-3, atol=1e-3)
    assert not out[total:].any() and (lse[:, total:] == float("-inf")).all()
    out.sum().backward()
    assert all(x.grad[:total].isfinite().all() and not x.grad[total:].any() for x in (q, k, v))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_s_dmask_on_the_gpu_gives_the_output_back(rate):
    q, k, v = (torch.randn(2, 70, 4, 64, device="cuda", dtype=torch.float32) for _ in range(3))
    out, _, s_dmask = flash_attn_func(q, k, v, rate, causal=True, return_attn_probs=True)
    if not rate:
        assert s_dmask.numel() == 0
        return
    p = s_dmask.abs() / s_dmask.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", p * (s_dmask >= 0) / (1 - rate), v), out, rtol=1e-2, atol=1e-2)
