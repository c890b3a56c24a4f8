"""Portable tiled attention in Triton."""

from distflash.kernels.triton.kernel import TritonKernel

__all__ = ["TritonKernel"]
