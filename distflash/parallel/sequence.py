"""What users hold: how ranks share a sequence, and one sequence shared that way.

Legend: P ranks, U ranks of a Ulysses group (adjacent), R = P / U ranks of a ring, T local tokens, S global tokens.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash.cost import auto, traffic
from distflash.kernels.base import Kernel
from distflash.parallel import handles
from distflash.parallel.agreement import CHECKS, Check, agree, mask_words, of_gradient, refuse, words
from distflash.parallel.autograd import Scheme, Variants, needs_gradients, number
from distflash.parallel.documents import borders, check_balanced_for, check_heads, one_document
from distflash.parallel.group import Group, default_device, one_of, resolve, usual_order, wire_of
from distflash.parallel.layout import LAYOUTS, Layout, balanced, split
from distflash.parallel.mask import AnyMask
from distflash.parallel.plan import ORDERS, Order, Visit
from distflash.parallel.planning import Planner, Plans
from distflash.parallel.seeds import Seeds
from distflash.parallel.shards import Tokens, Unshard
from distflash.parallel.slices import Slices
from distflash.parallel.staging import parsed
from distflash.parallel.ulysses import Ulysses, head_shards
from distflash.parallel.wire.local import LocalGroup
from distflash.parallel.wire.symmetric import SymmetricWire

_SCHEMES = 256  # ways to carry out attention that one sequence keeps


class SequenceParallel:
    """How the ranks of a group share sequences.

    Args:
        group: None (all ranks; one device where there is one process), a ProcessGroup, or a DeviceMesh: 1-D, or
            2-D with axes "ring" and "ulysses", Ulysses ranks adjacent.
        layout: "contiguous", "zigzag", "striped" or "balanced": which tokens a rank holds. "balanced" deals out chunks by the work of
            the very documents or mask: equal work with the fewest pieces.
        order: "ring", "all_gather" or "double_ring": when blocks move.
        ulysses: ranks that share heads instead of tokens while attention runs; the ring takes the rest.
            What is "auto" is chosen for each sequence, see `sequence`. The usual scheme, which stands where nothing is predicted to
            be faster or nothing is known of the devices: zigzag (equal causal work), a ring (double across several hosts), and 1
            rank or the "ulysses" axis of a 2-D mesh, which is never changed. `layout`, `order` and `ulysses` say the usual one.
        wire: "p2p" (messages; NCCL between GPUs, gloo between CPUs), or "symmetric" (copies between the memories of GPUs of one host
            that reach each other's). "auto" is "symmetric" where it can be, as `wire_reason` says.
        check: when ranks compare what they are about to do, before anything of it is sent: at the "first" call of each kind,
            "always", or "never". What differs raises `Disagreement` on every rank, with the ranks and their values.
        staging: how much memory other ranks' K and V may take while they are on their way: bytes, or text like "512MiB" or "2GB". From two
            blocks (the one worked on and the one that arrives) up to all of them, blocks come as early as it allows; over messages no
            earlier than `order` says. None: what `order` says; copies take all blocks at once, up to 2 GiB. Results of
            `deterministic=True` are the same bits whatever the limit. A call that needs more raises ValueError on every rank.

    Creating one is a collective: every rank of the group does it, in the same order. Raises ValueError or TypeError on
    arguments that cannot be served, on every rank, before any attention runs; RuntimeError if a launcher started several processes
    and none is given a group: `distflash.init()` makes it.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        layout: Literal["auto", "contiguous", "zigzag", "striped", "balanced"] = "auto",
        order: Literal["auto", "ring", "all_gather", "double_ring"] = "auto",
        ulysses: int | Literal["auto"] = "auto",
        wire: Literal["auto", "p2p", "symmetric"] = "auto",
        check: Check = "first",
        staging: int | str | None = None,
    ):
        one_of("layout", layout, ("auto", *LAYOUTS))
        one_of("order", order, ("auto", *ORDERS))
        one_of("wire", wire, ("auto", "p2p", "symmetric"))
        one_of("check", check, CHECKS)
        self.staging = parsed(staging)
        mesh_says = isinstance(group, DeviceMesh) and group.ndim == 2
        asked = {"layout": layout, "order": order, "ulysses": "mesh" if mesh_says else ulysses}
        self._free = tuple(name for name, value in asked.items() if value == "auto")
        group, ulysses = resolve(group, ulysses)
        self.wire, self.wire_reason = wire_of(group, wire)
        self.direct = self.wire.size > 1 and (wire == "symmetric" or isinstance(self.wire, SymmetricWire))
        self.check: Check = check
        self.rank, self.size = self.wire.rank, self.wire.size
        usual = usual_order(self.wire, order, ulysses)
        self._arrange("zigzag" if layout == "auto" else layout, usual, ulysses)
        self._device = auto.common_device(self.wire)
        self._arranged: dict[tuple[str, str, int], SequenceParallel] = {}
        self.seeds = Seeds(self.wire)

    def _arrange(self, layout: str, order: str, ulysses: int) -> None:
        """Set the scheme, nothing of it "auto", and the wires of its ring and Ulysses group."""
        self.layout, self.order, self.ulysses = layout, order, ulysses
        ring_rank, head_rank = divmod(self.rank, ulysses)
        self.head_wire = self.wire.sub(range(ring_rank * ulysses, (ring_rank + 1) * ulysses))
        self.ring_wire = self.wire.sub(range(head_rank, self.size, ulysses))
        self._order = ORDERS[order](self.ring_wire.size, max(1, self.wire.per_node // ulysses))

    def _chosen(self, cu: tuple[int, ...], heads: tuple[int, int, int] | None) -> tuple[SequenceParallel, str]:
        """The same ranks with the scheme for a sequence, and why this one. `self` if it is the usual one."""
        usual = traffic.Scheme(self.layout, self.order, self.ulysses, self.size, self.wire.per_node)
        *scheme, why = chosen = auto.choice(usual, self._free, cu, heads, self._device, self.wire_name)
        if scheme == [self.layout, self.order, self.ulysses]:
            return self, why
        if (key := chosen[:3]) not in self._arranged:
            self._arranged[key] = other = copy.copy(self)
            other._free = ()
            other._arrange(*key)
        return self._arranged[key], why

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> SequenceParallel:
        """One device alone, whatever process groups exist: the same code with communication skipped."""
        return cls(LocalGroup(1, device or default_device()).wire(0))

    @property
    def device(self) -> torch.device:
        """Where `indices` and `positions` live."""
        return self.wire.device

    @property
    def wire_name(self) -> str:
        """What moves blocks: "symmetric", or messages and what carries them."""
        return "symmetric" if self.direct else self.wire.name

    def seed_dropout(self, seed: int) -> None:
        """Let the seeds of dropout begin anew: calls from here on drop what they drop after any `seed_dropout(seed)`, on any number of
        ranks. Every rank calls it with the same number. Without it rank 0's default generator says where they begin, at the first call.

        Raises TypeError unless it is an integer. Where seeds differ, the next call with dropout that ranks compare raises `Disagreement`.
        """
        self.seeds.begin(seed)

    def sequence(
        self, length: int | None = None, *, cu_seqlens: Tensor | Sequence[int] | None = None, mask: Slices | None = None,
        heads: tuple[int, int, int] | None = None,
    ) -> ShardedSequence:  # fmt: skip
        """A sequence of `length` tokens, or packed documents with borders `cu_seqlens` (0, ..., S; int32 or int64, never falling).

        `mask` is what the layout "balanced" balances the work of, causal attention inside each document if none is given; it
        masks nothing, `attention` is told its own. Any length and any documents: nothing is padded, shards may be uneven or
        empty. Make it once a batch: layers share its plan.

        What is "auto" is chosen here, by predicted time (`distflash.cost.auto`): `sp` of the result is this object with the scheme,
        `why` says why, and `explain` tells both. `heads`, (query heads, key/value heads, head dim) of the attention to come, makes
        the choice theirs and lets it deal heads out too; without it the usual Ulysses degree stays, and 32/8 heads of 128 are
        assumed. The attention is taken to be causal.

        Raises ValueError or TypeError on a length, borders, heads or a mask that are not legal, and on a mask for a layout that
        does not look at it.
        """
        if (length is None) == (cu_seqlens is None):
            raise TypeError("sequence() takes either length or cu_seqlens: give one of them")
        cu = one_document(length) if cu_seqlens is None else borders(cu_seqlens)
        if mask is not None:
            check_balanced_for(mask, self.layout, cu)
        if heads is not None:
            check_heads(heads)
        sp, why = self._chosen(cu, heads)
        return ShardedSequence(sp, cu, mask, why=why)

    def __deepcopy__(self, _memo: dict) -> Self:
        """Itself: who copies a model that holds it copies no ranks."""
        return self

    def __repr__(self) -> str:
        return f"SequenceParallel(rank {self.rank} of {self.size}, {self.layout}, {self.order}, ulysses={self.ulysses}, {self.wire_name})"


class ShardedSequence:
    """One sequence, or packed documents, shared by the ranks of a SequenceParallel. Same on every rank but for `rank`'s view.

    `layout` is who holds what where the SequenceParallel knows none: the spans of each rank of the ring, the same on every rank.
    `why` is the reason for its scheme.
    """

    def __init__(
        self, sp: SequenceParallel, cu_seqlens: tuple[int, ...], mask: Slices | None = None, layout: Layout | None = None,
        why: str = "as asked for",
    ):  # fmt: skip
        self.sp, self.cu_seqlens, self.why = sp, cu_seqlens, why
        self.length, self.balanced_for, self._given = cu_seqlens[-1], mask, layout
        ranks = sp.ring_wire.size
        ring_layout = layout or (LAYOUTS[sp.layout](cu_seqlens, ranks) if mask is None else balanced(cu_seqlens, ranks, mask))
        self.layout: Layout = split(ring_layout, sp.ulysses)
        self._tokens = Tokens(self.layout, cu_seqlens)
        self.lengths = self._tokens.lengths  # tokens of each rank
        self.local_length = self.lengths[sp.rank]
        self.ticket = number(handles.new(self))  # for operators; a compiled graph takes that of any sequence
        self._planner = Planner(sp.ring_wire, self.layout, sp.ulysses, sp._order, sp.staging, sp.direct)
        self._schemes: OrderedDict[tuple, Scheme] = OrderedDict()

    @property
    def indices(self) -> Tensor:
        """Global index of each local token, LongTensor (T,); the caller's own."""
        if torch.compiler.is_dynamo_compiling():
            return torch.ops.distflash.places(self.ticket, self.local_length, self.sp.device, False)
        return self._tokens.indices(self.sp.rank, self.sp.device).clone()

    @property
    def positions(self) -> Tensor:
        """Position of each local token inside its document, LongTensor (T,), the caller's own: what RoPE is fed with."""
        if torch.compiler.is_dynamo_compiling():
            return torch.ops.distflash.places(self.ticket, self.local_length, self.sp.device, True)
        return self._tokens.positions(self.sp.rank, self.sp.device).clone()

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of `x`, which is the same on every rank and has the S global tokens along `dim`.

        Differentiable: the gradient of `x` is 0 outside this rank's tokens, so that the sum over ranks is the whole gradient.
        Raises ValueError if `x` does not have S tokens along `dim`.
        """
        _check_dim(x, dim)
        if x.shape[dim] != self.length:
            raise ValueError(
                f"shard() needs the {self.length} tokens of the sequence along dim {dim}, got {x.shape[dim]}: shapes {tuple(x.shape)}"
            )
        compiling = torch.compiler.is_dynamo_compiling()
        return x.index_select(dim, self.indices.to(x.device) if compiling else self._tokens.indices(self.sp.rank, x.device))

    def unshard(self, x_local: Tensor, dim: int = 1) -> Tensor:
        """All S tokens, on every rank, of the shards that the ranks hold along `dim`. A collective.

        Differentiable: the gradient of a shard is the sum over ranks of its part of the gradients (the exact adjoint).
        Raises ValueError if `x_local` does not have T tokens along `dim`.
        """
        with refusing(self, "unshard"):
            _check_dim(x_local, dim)
            if x_local.shape[dim] != self.local_length:
                given = tuple(x_local.shape)
                raise ValueError(f"unshard() needs this rank's {self.local_length} tokens along dim {dim}, got shape {given}")
        dim %= x_local.dim()
        kept = tuple(n for d, n in enumerate(x_local.shape) if d != dim)
        begin = self.agreeing_on_gradient("unshard")
        self.agree("unshard", dim=dim, other_dims=kept, dtype=x_local.dtype, gradients=needs_gradients(x_local))
        return Unshard.apply(x_local, self.sp.wire, self._tokens, dim, begin)

    def agree(self, call: str, **fields: object) -> None:
        """Raise Disagreement on every rank unless all are about to make this call, with these hashable fields, on this sequence.

        Every collective begins with it; `SequenceParallel(check=...)` says when ranks really compare.
        """
        if (sp := self.sp).size > 1:
            agree(sp.wire, sp.check, call, self._shared | fields)

    def agreeing_on_gradient(self, call: str) -> Callable[[], None]:
        """What a backward of this call begins with, as the call does with `agree`. It does not keep this sequence."""
        return of_gradient(self.sp.wire, self.sp.check, call)

    @cached_property
    def _shared(self) -> dict[str, object]:
        """What ranks have to agree on whatever they call."""
        sp, layout = self.sp, self.sp.layout if self._given is None else words(self._given)
        scheme = {"layout": layout, "order": sp.order, "ulysses": sp.ulysses, "wire": sp.wire_name, "staging": sp.staging}
        return scheme | {"length": self.length, "documents": words(self.cu_seqlens), "balanced": mask_words(self.balanced_for)}

    def scheme(
        self, mask: AnyMask, kernel: Kernel, scale: float, shape: traffic.Shape, variants: tuple[float, float] | None = None,
        deterministic: bool = False,
    ) -> Scheme:  # fmt: skip
        """How attention over this sequence is carried out; made once and shared by all layers. `variants`: (softcap, dropout_p).

        Raises ValueError if the heads cannot be dealt out to the ranks of a Ulysses group, or `staging` is too little.
        """
        key = (mask, kernel, scale, shape, variants, deterministic)
        if key not in self._schemes:
            asked = None if variants is None else Variants(*variants, self._planner.positions)
            plans = self.plans(mask, shape, deterministic)
            ulysses = self.head_exchange(shape.heads, shape.kv_heads, shape.row)
            way = plans.forward, plans.backward, self._planner.carrier(mask), ulysses
            self._schemes[key] = Scheme(
                *way, kernel, scale, asked, self._planner.unseen(mask, self.sp.rank), self.agreeing_on_gradient("attention")
            )
            if len(self._schemes) > _SCHEMES:  # a scale that is learned makes one a step
                self._schemes.popitem(last=False)
        return self._schemes[key]

    def visits(self, mask: AnyMask, order: Order | None = None) -> tuple[Visit, ...]:
        """The plan of this rank's ring for a mask, as blocks would go from rank to rank."""
        return self._planner.visits(mask, order)

    def plans(self, mask: AnyMask, shape: traffic.Shape, deterministic: bool = False) -> Plans:
        """What is carried out for a call with tensors of this shape. Raises ValueError, on every rank, if `staging` is too little."""
        return self._planner.plans(mask, shape, deterministic)

    def head_exchange(self, heads: int, kv_heads: int, row: int = 0) -> Ulysses | None:
        """This rank's Ulysses group, `row` as that has it; None without one. Raises ValueError if heads cannot be dealt out."""
        wire = self.sp.head_wire
        if wire.size == 1:
            return None
        first = self.sp.ring_wire.rank * wire.size
        row *= wire.size == self.sp.size  # one group in a ring: several would be as many times its visits, and its ranks' lengths differ
        return Ulysses(wire, self.lengths[first : first + wire.size], *head_shards(heads, kv_heads, wire.size), self.sp.direct, row)

    def __deepcopy__(self, _memo: dict) -> Self:
        """Itself: nothing of it changes."""
        return self

    def __repr__(self) -> str:
        documents = len(self.cu_seqlens) - 1
        return f"ShardedSequence({self.length} tokens, {documents} document{'s' * (documents > 1)}, {self.local_length} here, {self.sp!r})"


@contextmanager
def refusing(seq: object, call: str) -> Iterator[None]:
    """What this rank raises inside, before `agree`, is told to the ranks of `seq`: those that compare notes on the call raise as well."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(seq, ShardedSequence) and (sp := seq.sp).size > 1:
            refuse(sp.wire, sp.check, call, error)
        raise


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"shard() and unshard() need dim={dim} to hold the tokens, got a tensor of shape {tuple(x.shape)}: pass its dim")


@torch.library.custom_op("distflash::places", mutates_args=())
def _places(seq: Tensor, tokens: int, device: torch.device, in_documents: bool) -> Tensor:
    """`positions` or `indices` of a sequence, in a graph that serves any: new memory, for the graph may use it again."""
    found = handles.find(int(seq), ShardedSequence)
    return found.positions if in_documents else found.indices


@_places.register_fake
def _(seq, tokens, device, in_documents):
    return torch.empty(tokens, dtype=torch.int64, device=device)
