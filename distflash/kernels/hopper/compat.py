"""The names that differ between Triton 3.6 and 3.9, and the few instructions that Gluon has no name for. Nothing else looks at versions."""

from __future__ import annotations

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout, _core
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "LATER",
    "NVMMASharedLayout",
    "TensorDescriptor",
    "group_sync",
    "named_barrier",
    "thread_barrier",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
]

_RELEASE = tuple(int(n) for n in triton.__version__.split(".")[:2])
_KNOWN = ((3, 6), (3, 9))  # compiled and inspected with these (check.py); run on a GPU with the first and the last
if not _KNOWN[0] <= _RELEASE <= _KNOWN[1]:
    raise ImportError(f"hopper kernels are written in Gluon as Triton 3.6 to 3.9 have it, this is Triton {triton.__version__}")

LATER = _RELEASE >= (3, 8)  # keeps more addresses in registers over the loops: what spills there has another configuration (configs.py)

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # (desc, coordinates, barrier, shared memory)

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # of this partition's threads

tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # (desc, coordinates, shared memory)

if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:

    @_core.builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
        """Add shared memory to global memory by TMA; 3.6 has the operation but no name for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.constexpr_function
def _bar(verb, threads):
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p bar.{verb} $1, {threads}; mov.b32 $0, $1; }}"


@gluon.jit
def named_barrier(VERB: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr = 4, pred=True):
    """`sync` on, or only `arrive` at, a named barrier of several partitions, THREADS threads in all; once a thread of this one's WARPS,
    if `pred` holds.

    Numbers 0..8 belong to Triton (one for each partition and the rejoin barriers); ours start at 9 and end at 15.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    each = gl.full([32 * WARPS], number, gl.int32, layout=layout)
    wanted = gl.full([32 * WARPS], pred, gl.int32, layout=layout)
    gl.inline_asm_elementwise(_bar(VERB, THREADS), "=r,r,r", [each, wanted], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def group_sync(ID: gl.constexpr, THREADS: gl.constexpr):
    """named_barrier("sync", ...) of 4-warp partitions."""
    named_barrier("sync", ID, THREADS)
