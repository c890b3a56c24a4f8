"""Tests here run Triton kernels in its interpreter, which cannot share a process with compiled ones: ../test_triton.py starts it.

Collected by a plain `pytest tests/`, they would fail or switch the whole session to the interpreter, so they are left out unless the
process already is an interpreting one.
"""

import numpy as np
from triton import knobs

collect_ignore_glob = [] if knobs.runtime.interpret else ["test_*.py"]

if knobs.runtime.interpret:
    import triton.language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _upcast(x):
        """The interpreter keeps bf16 as uint16 and multiplies the bit patterns: hand tl.dot what they stand for."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    _create_fp_trunc = interpreter.InterpreterBuilder.create_fp_trunc

    def _trunc(self, source, dst_type):
        """The interpreter cuts fp32 to bf16 where every GPU rounds to nearest even: twice the error, and a bias."""
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _create_fp_trunc(self, source, dst_type)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = np.where(np.isnan(source.data), bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return interpreter.TensorHandle((rounded >> 16).astype(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.create_fp_trunc = _trunc
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, c, *rest: _create_dot(self, _upcast(a), _upcast(b), c, *rest)
