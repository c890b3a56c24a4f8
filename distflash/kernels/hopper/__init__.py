"""Gluon kernels for Hopper (sm_90): warp-specialised, fed by TMA, the forward persistent."""

from distflash.kernels.hopper.host import HopperKernel

__all__ = ["HopperKernel"]
