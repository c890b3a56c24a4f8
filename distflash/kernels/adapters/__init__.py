"""Other people's kernels behind the Kernel protocol: cuDNN, FlashAttention-2, -3 and -4. Chosen by name only.

So that a user can bring a kernel, and rings can be compared with equal kernels inside. One launch a tile of the tile table, or a few
where a kernel cannot express the tile's band (`pieces`). What they cost against this library's own kernels: results leave them in
the inputs' dtype, so each tile adds a rounding, and merging is a pass over memory of its own. cuDNN builds a plan and FlashAttention-4
compiles for each new shape or mask: the first calls take seconds. All of them group heads themselves: K and V are never repeated.
"""

from distflash.kernels.adapters.cudnn import CudnnKernel
from distflash.kernels.adapters.flash import Fa2Kernel, Fa3Kernel, Fa4Kernel

__all__ = ["CudnnKernel", "Fa2Kernel", "Fa3Kernel", "Fa4Kernel"]
