"""Numbers for objects, as operators take integers and tensors only. A handle keeps nothing alive."""

from __future__ import annotations

import secrets
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

_COUNTER = count(secrets.randbits(62))  # not from 0: what a graph that another process saved holds must name nothing here
_OBJECTS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new(thing: Any) -> int:
    """A number for `thing` that no other object of this process has had."""
    handle = next(_COUNTER)
    _OBJECTS[handle] = thing
    return handle


def find(handle: int, kind: type[T]) -> T:
    """The object of that number. Raises RuntimeError if it is gone."""
    thing = _OBJECTS.get(handle)
    if not isinstance(thing, kind):
        raise RuntimeError(
            f"{kind.__name__} {handle} is gone: keep what an attention call was given until its backward has run. In a graph that was "
            "saved and loaded it is another process's: torch.export can save calls without seq and mask, torch.jit none"
        )
    return thing
