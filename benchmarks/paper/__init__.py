"""The results of FlashAttention (arXiv:2205.14135) on this machine's GPU: one program each, `--quick` on any CPU."""
