"""Models by name, as far as attention and a step's matmuls depend on them: from their published configurations (Hugging Face)."""

from __future__ import annotations

from dataclasses import dataclass

from distflash.cost.traffic import Shape


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float

    def shape(self, batch: int = 1, itemsize: int = 2) -> Shape:
        return Shape(self.heads, self.kv_heads, self.head_dim, self.head_dim, batch, itemsize)

    def matmul_flops(self, tokens: int) -> float:
        """Of a step outside attention, forward and backward: 6 for each parameter and token (Kaplan et al., arXiv:2001.08361, §2.1)."""
        return 6 * self.parameters * tokens

    def state(self, ranks: int) -> float:
        """Bytes a rank of parameters and gradients in bf16, and fp32 master weights and Adam's moments, sharded over all ranks."""
        return 16 * self.parameters / ranks

    def activations(self, tokens: int) -> float:
        """Bytes of what checkpointed layers keep of a rank's tokens, bf16: a layer's input, q, k, v, out, and lse in fp32."""
        return tokens * self.layers * (2 * self.hidden + 2 * self.head_dim * 2 * (self.heads + self.kv_heads) + 4 * self.heads)


MODELS = {
    "gpt-2": Model(12, 768, 12, 12, 64, 124e6),
    "gpt-2-medium": Model(24, 1024, 16, 16, 64, 355e6),
    "gpt-2-xl": Model(48, 1600, 25, 25, 64, 1.56e9),
    "llama-2-7b": Model(32, 4096, 32, 32, 128, 6.74e9),
    "llama-3-8b": Model(32, 4096, 32, 8, 128, 8.03e9),
    "llama-3-70b": Model(80, 8192, 64, 8, 128, 70.6e9),
    "llama-3-405b": Model(126, 16384, 128, 8, 128, 406e9),
    "mistral-7b": Model(32, 4096, 32, 8, 128, 7.25e9),
    "qwen3-8b": Model(36, 4096, 32, 8, 128, 8.19e9),
    "qwen3-32b": Model(64, 5120, 64, 8, 128, 32.8e9),
    "gemma-2-9b": Model(42, 3584, 16, 8, 256, 9.24e9),
}
