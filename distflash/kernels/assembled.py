"""A kernel compiled for a GPU that need not be there, with what the assembler said of it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget


def assembled(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    """(compiled kernel, ptxas -v: registers, spilled bytes, warnings). Raises what Triton raises."""
    knobs.compilation.always_compile = True  # a cached kernel has no log
    knobs.nvidia.dump_ptxas_log = True  # printed to stdout
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=options)
    return compiled, log.getvalue()
