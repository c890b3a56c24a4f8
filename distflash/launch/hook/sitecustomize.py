"""Ties a rank of `distflash run` to it, puts PYTHONPATH back as it was, and gives way to the sitecustomize of the environment.

Nothing but the standard library: importing the package would cost each rank seconds.
"""

import importlib.util
import os
import sys
from pathlib import Path

_FOLDER, _LAUNCHER = Path(__file__).parent, "DISTFLASH_LAUNCHER"
_first, _, _rest = os.environ.get("PYTHONPATH", "").partition(os.pathsep)

if _first == str(_FOLDER) and _LAUNCHER in os.environ:  # else it is imported by somebody else
    if _rest:
        os.environ["PYTHONPATH"] = _rest
    else:
        del os.environ["PYTHONPATH"]  # what a rank starts is its own affair
    sys.path[:] = [path for path in sys.path if path != _first]
    _spec = importlib.util.spec_from_file_location("distflash_parent", _FOLDER.parent / "parent.py")
    assert _spec is not None and _spec.loader is not None
    _parent = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_parent)
    _parent.end_with_launcher(early=True)

    _ours = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = _ours
