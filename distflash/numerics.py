"""Who made the first NaN or infinity: an opt-in check that looks at what every operator gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYER = "distflash layer"  # where a node of the autograd graph keeps the name of the module that made it
RESULTS = {"distflash::attention": ("out", "lse"), "distflash::attention_backward": ("dq", "dk", "dv")}
UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted", "resize_")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_PACKED = (torch.float4_e2m1fn_x2,)  # two numbers in a byte, neither of them ever NaN


@contextmanager
def check_numerics(model: nn.Module | None = None, *, rank: int | None = None) -> Iterator[None]:
    """Raise FloatingPointError at the first operator, forward or backward, that gives a NaN, or an infinity out of finite numbers.

        with distflash.check_numerics(model):
            loss = model(tokens)
            loss.backward()

    The message names the rank (its number in torch.distributed unless `rank` is given), the module of `model`, the operator, the tensor,
    and which of the operator's inputs held one already. Of attention these are q, k, v, out, lse, dout, dq, dk, dv. The rank that
    raises does so before it sends what it found; the others learn from its heartbeats, in `DistFlashPeerLost`, who it was and the message.

    Every operator waits for its device and its results are read once: for the steps in question, not for every day. Outside of the
    `with` nothing is left, and nothing costs. Infinities that a caller asks for pass (masks filled with -inf), and so does lse = -inf
    of rows that see no key. What runs inside torch.compile's graphs is not looked at.
    """
    own = dist.get_rank() if rank is None and dist.is_available() and dist.is_initialized() else rank or 0
    with ExitStack() as stack:
        layers: list[str] = []
        for name, module in () if model is None else model.named_modules():
            stack.callback(module.register_forward_pre_hook(_entering(name, layers), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leaving(layers), with_kwargs=True, always_call=True).remove)
        stack.enter_context(_Check(own, layers))
        yield


def _entering(name: str, layers: list[str]):
    return lambda module, args, kwargs: layers.append(name)


def _leaving(layers: list[str]):
    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Tell the nodes of the graph between a module's inputs and its results where they come from; its children's know already."""
        name = layers.pop()
        seen = {x.grad_fn for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        nodes = [x.grad_fn for x in tree_leaves(result) if isinstance(x, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                _notes(node).setdefault(LAYER, name)
                nodes += [other for other, _ in node.next_functions]

    return leave


class _Check(TorchDispatchMode):
    """Looks at every operator of this thread, and of the threads of its backward passes."""

    def __init__(self, rank: int, layers: list[str]):
        super().__init__()
        self.rank, self.layers = rank, layers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if func.namespace == "c10d" or schema.name.rpartition("::")[2] in UNWRITTEN:
            return func(*args, **kwargs)
        inputs = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        spoilt = any(_amiss(x) for name in written for x in _floats(inputs.get(name)))  # what is overwritten is looked at before
        result = func(*args, **kwargs)
        results = {} if spoilt else {name: inputs.get(name) for name in written}
        for name, value in (results | _fresh(schema, result)).items():
            for x in _floats(value):
                if not _amiss(x, lse=schema.name in RESULTS and name == "lse"):
                    continue
                held = [n for n, given in inputs.items() if n not in written and any(_amiss(y) for y in _floats(given))]
                if not x.isnan().any() and (held or any(isinstance(y, float) and not math.isfinite(y) for y in tree_leaves(inputs))):
                    continue
                raise FloatingPointError(self._told(schema.name, name, x, held))
        return result

    def _told(self, operator: str, name: str, x: Tensor, held: list[str]) -> str:
        node = torch._C._current_autograd_node()
        layer = self.layers[-1] if self.layers else "" if node is None else _notes(node).get(LAYER, "")
        place = f"{layer or ('the model' if self.layers else 'outside of the model')}, {'forward' if node is None else 'backward'}"
        tensor = name if operator in RESULTS else f"result {name}" if name.isdecimal() else name
        numbers = (
            f"{int(x.isnan().sum())} NaN and {int(x.isinf().sum())} infinities in {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        )
        origin = f"its {', '.join(held)} held some already" if held else "its inputs were finite"
        return f"rank {self.rank}, {place}: {tensor} of {operator} holds {numbers}; {origin}"


def _fresh(schema: Any, result: Any) -> dict[str, Any]:
    """What an operator returns, by name or number, without views: they show what was there."""
    values = result if len(schema.returns) > 1 else (result,)
    names = RESULTS.get(schema.name, map(str, range(len(values))))
    return {name: value for name, value, r in zip(names, values, schema.returns, strict=False) if r.alias_info is None}


def _notes(node: Any) -> dict[str, str]:
    """What may be kept with a node of the autograd graph."""
    return node.metadata


def _floats(value: Any) -> Iterator[Tensor]:
    """The numbers in a result that may be NaN: fp8 widened, of sparse and nested tensors those that are stored."""
    for x in tree_leaves(value):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            x = x._values() if x.layout is torch.sparse_coo else x.values() if x.layout in _COMPRESSED or x.is_nested else x
            if x.numel() and x.dtype not in _PACKED and x.layout is torch.strided and not x.is_meta:
                yield x.float() if x.itemsize == 1 else x


def _amiss(x: Tensor, lse: bool = False) -> bool:
    """True if x holds a NaN or an infinity, other than -inf in lse."""
    return not bool(((x < float("inf")) if lse else x.isfinite()).all())
