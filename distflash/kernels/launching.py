"""What every launch of a Triton kernel holds: of ranks that are threads, one compiles a kernel and the others find it."""

from __future__ import annotations

import threading

LAUNCHING = threading.Lock()  # Triton takes none: each thread that misses a kernel would compile it
