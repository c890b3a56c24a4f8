"""What users hold: how ranks share a sequence, and one sequence shared that way.

Legend: P ranks, U ranks of a Ulysses group (adjacent), R = P / U ranks of a ring, T local tokens, S global tokens.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from operator import index
from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash.cost import auto, traffic
from distflash.kernels.base import Kernel
from distflash.parallel import handles
from distflash.parallel.agreement import CHECKS, Check, agree, mask_words, words
from distflash.parallel.autograd import Scheme, Variants
from distflash.parallel.direct import Direct
from distflash.parallel.layout import LAYOUTS, Layout, balanced, gathered, lengths, split
from distflash.parallel.mask import AnyMask
from distflash.parallel.messages import Messages
from distflash.parallel.plan import ORDERS, Order, Visit, plan, readers
from distflash.parallel.positions import Positions
from distflash.parallel.seeds import Seeds
from distflash.parallel.slices import Slices
from distflash.parallel.staging import copies, parsed, room, within
from distflash.parallel.ulysses import Ulysses, head_shards
from distflash.parallel.wire.base import Wire
from distflash.parallel.wire.local import LocalGroup, LocalWire
from distflash.parallel.wire.p2p import P2PWire
from distflash.parallel.wire.symmetric import SymmetricWire, Windows, obstacle

_SCHEMES = 256  # ways to carry out attention that one sequence keeps
Group = dist.ProcessGroup | DeviceMesh | LocalWire


class SequenceParallel:
    """How the ranks of a group share sequences.

    Args:
        group: None (all ranks; one device if torch.distributed is not initialised), a ProcessGroup, or a DeviceMesh: 1-D, or
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
    arguments that cannot be served, on every rank, before any attention runs.
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
        _one_of("layout", layout, ("auto", *LAYOUTS))
        _one_of("order", order, ("auto", *ORDERS))
        _one_of("wire", wire, ("auto", "p2p", "symmetric"))
        _one_of("check", check, CHECKS)
        self.staging = parsed(staging)
        mesh_says = isinstance(group, DeviceMesh) and group.ndim == 2
        asked = {"layout": layout, "order": order, "ulysses": "mesh" if mesh_says else ulysses}
        self._free = tuple(name for name, value in asked.items() if value == "auto")
        group, ulysses = _resolve(group, ulysses)
        self.wire, self.wire_reason = _wire(group, wire)
        self.direct = self.wire.size > 1 and (wire == "symmetric" or isinstance(self.wire, SymmetricWire))
        self.check: Check = check
        self.rank, self.size = self.wire.rank, self.wire.size
        if ulysses < 1 or self.size % ulysses:
            raise ValueError(f"ulysses={ulysses} must divide the {self.size} ranks of the group: use one of {_divisors(self.size)}")
        ring, per_node = self.size // ulysses, max(1, self.wire.per_node // ulysses)
        if order == "double_ring" and ring % per_node:
            raise ValueError(f"double_ring needs as many ranks on each host, got {ring} in rings of {per_node}: use ring")
        several_hosts = ring % per_node == 0 and 1 < per_node < ring
        usual = ("double_ring" if several_hosts else "ring") if order == "auto" else order
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
        return cls(LocalGroup(1, device or _default_device()).wire(0))

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
        """
        self.seeds.start(seed)

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
        cu = _one_document(length) if cu_seqlens is None else borders(cu_seqlens)
        if mask is not None:
            if not isinstance(mask, Slices):
                raise TypeError(f"mask must be distflash.Slices, got {type(mask).__name__}")
            if self.layout != "balanced":
                raise ValueError(
                    f"the layout {self.layout!r} does not look at a mask: use layout='balanced', or give it to attention() only"
                )
            mask.check(cu, cu)
        if heads is not None:
            _check_heads(heads)
        sp, why = self._chosen(cu, heads)
        return ShardedSequence(sp, cu, mask, why=why)

    def __repr__(self) -> str:
        return f"SequenceParallel(rank {self.rank} of {self.size}, {self.layout}, {self.order}, ulysses={self.ulysses}, {self.wire_name})"


class Plans(NamedTuple):
    """What one rank's ring does."""

    sent: tuple[Visit, ...]  # as blocks go from rank to rank
    forward: tuple[Visit, ...]  # what is carried out: the same, or `copies` of blocks
    backward: tuple[Visit, ...]
    limit: int | None  # bytes that others' K and V may take meanwhile; None is any number

    @property
    def copies(self) -> tuple[tuple[Visit, ...], tuple[Visit, ...]] | None:
        """(forward, backward) if blocks are copied."""
        return None if self.forward is self.sent else (self.forward, self.backward)


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
        self.lengths = lengths(self.layout)  # tokens of each rank
        self.local_length = self.lengths[sp.rank]
        self.ticket = torch.tensor([handles.new(self)], device="cpu")  # for operators; a compiled graph takes that of any sequence
        self._plans: dict[tuple[AnyMask, Order], tuple[Visit, ...]] = {}
        self._copies: dict[tuple, tuple[tuple[Visit, ...], tuple[Visit, ...]]] = {}
        self._carriers: dict[AnyMask, Direct] = {}
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._schemes: OrderedDict[tuple, Scheme] = OrderedDict()

    @property
    def indices(self) -> Tensor:
        """Global index of each local token, LongTensor (T,)."""
        if torch.compiler.is_dynamo_compiling():
            return torch.ops.distflash.places(self.ticket, self.local_length, self.sp.device, False)
        return self.indices_of(self.sp.rank, self.sp.device)

    @property
    def positions(self) -> Tensor:
        """Position of each local token inside its document, LongTensor (T,): what RoPE is fed with."""
        if torch.compiler.is_dynamo_compiling():
            return torch.ops.distflash.places(self.ticket, self.local_length, self.sp.device, True)
        return self._in_documents

    @cached_property
    def _in_documents(self) -> Tensor:
        borders = torch.tensor(self.cu_seqlens, device=self.sp.device)
        return self.indices - borders[torch.searchsorted(borders, self.indices, right=True) - 1]

    def indices_of(self, rank: int, device: torch.device) -> Tensor:
        """Global indices of the tokens that another rank holds, LongTensor."""
        if (rank, device) not in self._indices:
            spans = [torch.arange(s.start, s.stop, s.step) for s in self.layout[rank]]
            self._indices[rank, device] = torch.cat([torch.empty(0, dtype=torch.long), *spans]).to(device)
        return self._indices[rank, device]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of `x`, which is the same on every rank and has the S global tokens along `dim`.

        Differentiable: the gradient of `x` is 0 outside this rank's tokens, so that the sum over ranks is the whole gradient.
        Raises ValueError if `x` does not have S tokens along `dim`.
        """
        if x.shape[dim] != self.length:
            raise ValueError(
                f"shard() needs the {self.length} tokens of the sequence along dim {dim}, got {x.shape[dim]}: shapes {tuple(x.shape)}"
            )
        compiling = torch.compiler.is_dynamo_compiling()
        return x.index_select(dim, self.indices.to(x.device) if compiling else self.indices_of(self.sp.rank, x.device))

    def unshard(self, x_local: Tensor, dim: int = 1) -> Tensor:
        """All S tokens, on every rank, of the shards that the ranks hold along `dim`. A collective.

        Differentiable: the gradient of a shard is the sum over ranks of its part of the gradients (the exact adjoint).
        Raises ValueError if `x_local` does not have T tokens along `dim`.
        """
        if x_local.shape[dim] != self.local_length:
            raise ValueError(f"unshard() needs this rank's {self.local_length} tokens along dim {dim}, got shape {tuple(x_local.shape)}")
        dim %= x_local.dim()
        kept = tuple(n for d, n in enumerate(x_local.shape) if d != dim)
        self.agree("unshard", dim=dim, other_dims=kept, dtype=x_local.dtype, gradients=needs_gradients(x_local))
        return _Unshard.apply(x_local, self, dim)

    def agree(self, call: str, **fields: object) -> None:
        """Raise Disagreement on every rank unless all are about to make this call, with these hashable fields, on this sequence.

        Every collective begins with it; `SequenceParallel(check=...)` says when ranks really compare.
        """
        if (sp := self.sp).size > 1:
            agree(sp.wire, sp.check, call, self._shared | fields)

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
            ulysses = self.head_exchange(shape.heads, shape.kv_heads)
            asked = None if variants is None else Variants(*variants, self._positions)
            plans = self.plans(mask, shape, deterministic)
            self._schemes[key] = Scheme(plans.forward, plans.backward, self._carrier(mask), ulysses, kernel, scale, asked)
            if len(self._schemes) > _SCHEMES:  # a scale that is learned makes one a step
                self._schemes.popitem(last=False)
        return self._schemes[key]

    @cached_property
    def _positions(self) -> Positions:
        """Of what the ring works on."""
        outer = gathered(self.layout, self.sp.ulysses)
        return Positions(outer[self.sp.ring_wire.rank], outer)

    def visits(self, mask: AnyMask, order: Order | None = None) -> tuple[Visit, ...]:
        """The plan of this rank's ring for a mask, as blocks would go from rank to rank."""
        key = mask, order or self.sp._order
        if key not in self._plans:
            outer = gathered(self.layout, self.sp.ulysses)
            self._plans[key] = plan(outer, *key, self.sp.ring_wire.rank)
        return self._plans[key]

    def plans(self, mask: AnyMask, shape: traffic.Shape, deterministic: bool = False) -> Plans:
        """What is carried out for a call with tensors of this shape: within the memory that `SequenceParallel(staging=...)` allows.

        Raises ValueError if that is too little, on every rank.
        """
        sp, ranks = self.sp, self.sp.ring_wire.size
        if ranks == 1:
            visits = self.visits(mask)
            return Plans(visits, visits, visits, None)
        tokens = max(lengths(gathered(self.layout, sp.ulysses)))
        shards = head_shards(shape.heads, shape.kv_heads, sp.ulysses)[1]
        most = replace(shape, kv_heads=max(map(len, shards)))  # of any rank, so that all ranks raise or none does
        if not sp.direct:
            visits = self.visits(mask, within(sp._order, sp.staging, most.message(tokens, shape.itemsize)))
            return Plans(visits, visits, visits, sp.staging)
        space = room(sp.staging, tokens, most.token, ranks)
        key = space, shape.kv_heads, shape.heads, deterministic
        if (mask, *key) not in self._copies:
            self._copies[mask, *key] = copies(self.visits(mask), *key)
        return Plans(self.visits(mask), *self._copies[mask, *key], space * most.token)

    def _carrier(self, mask: AnyMask) -> Messages | Direct:
        """What moves blocks and gradients in this rank's ring."""
        wire, outer = self.sp.ring_wire, gathered(self.layout, self.sp.ulysses)
        if not self.sp.direct or wire.size == 1:
            return Messages(wire)
        if mask not in self._carriers:
            self._carriers[mask] = Direct(cast(Windows, wire), lengths(outer), readers(outer, mask, wire.rank))
        return self._carriers[mask]

    def head_exchange(self, heads: int, kv_heads: int) -> Ulysses | None:
        """The all-to-all of this rank's Ulysses group, None without one. Raises ValueError if heads cannot be dealt out."""
        wire = self.sp.head_wire
        if wire.size == 1:
            return None
        first = self.sp.ring_wire.rank * wire.size
        return Ulysses(wire, self.lengths[first : first + wire.size], *head_shards(heads, kv_heads, wire.size), reach=self.sp.direct)

    def __repr__(self) -> str:
        documents = len(self.cu_seqlens) - 1
        return f"ShardedSequence({self.length} tokens, {documents} document{'s' * (documents > 1)}, {self.local_length} here, {self.sp!r})"


@torch.library.custom_op("distflash::places", mutates_args=())
def _places(seq: Tensor, tokens: int, device: torch.device, in_documents: bool) -> Tensor:
    """`positions` or `indices` of a sequence, in a graph that serves any: new memory, for the graph may use it again."""
    found = handles.find(int(seq), ShardedSequence)
    return (found.positions if in_documents else found.indices).clone()


@_places.register_fake
def _(seq, tokens, device, in_documents):
    return torch.empty(tokens, dtype=torch.int64, device=device)


def needs_gradients(*tensors: Tensor) -> bool:
    """True if what is computed from these tensors will be differentiated by one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seq: ShardedSequence, dim: int) -> Tensor:
        ctx.seq, ctx.dim = seq, dim
        wire, shape = seq.sp.wire, [*x.shape]

        def room(rank: int) -> Tensor:
            return x.new_empty([*shape[:dim], seq.lengths[rank], *shape[dim + 1 :]])

        parts = _swap(wire, [x] * wire.size, room)
        whole = x.new_empty([*shape[:dim], seq.length, *shape[dim + 1 :]])
        for rank, part in enumerate(parts):
            whole.index_copy_(dim, seq.indices_of(rank, x.device), part)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        seq, dim, wire = ctx.seq, ctx.dim, ctx.seq.sp.wire
        shares = [grad.index_select(dim, seq.indices_of(rank, grad.device)) for rank in range(wire.size)]
        parts = _swap(wire, shares, lambda _: torch.empty_like(shares[wire.rank]))
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = sum((part.to(wide) for part in parts[1:]), start=parts[0].to(wide))  # rank order: the same bits every run
        return total.to(grad.dtype), None, None


def _swap(wire: Wire, outgoing: Sequence[Tensor], room) -> list[Tensor]:
    """Give `outgoing[rank]` to each rank; return what each gave us, written into `room(rank)`."""
    others = [r for r in range(wire.size) if r != wire.rank]
    arriving = {r: room(r) for r in others}
    as_bytes = {r: x.view(-1).view(torch.uint8) for r, x in arriving.items()}
    wire.exchange({r: outgoing[r].contiguous().view(-1).view(torch.uint8) for r in others}, as_bytes).wait()
    return [arriving.get(r, outgoing[r]) for r in range(wire.size)]


def _one_document(length: object) -> tuple[int, int]:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer")
    return 0, length


def borders(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Document borders as integers, checked. Reading them off a GPU tensor waits for the GPU: keep them on the CPU."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be a 1-D int32 or int64 tensor, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}")
        cu_seqlens = cu_seqlens.tolist()
    try:
        cu = tuple(index(c) for c in cu_seqlens)
    except TypeError:
        raise TypeError(f"cu_seqlens must hold integers, got {cu_seqlens!r}") from None
    if len(cu) < 2 or cu[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0 and have one border more than documents, got {_short(cu)}: prepend 0")
    falls = next((n for n in range(1, len(cu)) if cu[n] < cu[n - 1]), None)
    if falls is not None:
        raise ValueError(f"cu_seqlens must never decrease, got {cu[falls]} after {cu[falls - 1]} at index {falls}: give cumulative lengths")
    if cu[-1] == 0:
        raise ValueError("cu_seqlens ends at 0: there are no tokens to attend to")
    return cu


def _check_heads(heads: object) -> None:
    whole = isinstance(heads, tuple) and len(heads) == 3 and all(type(n) is int and n > 0 for n in heads)
    if not whole or heads[0] % heads[1]:  # type: ignore[index]
        raise ValueError(f"heads={heads!r} must be (query heads, key/value heads, head dim): integers, the first a multiple of the second")


def _short(cu: tuple[int, ...]) -> str:
    return str(list(cu)) if len(cu) <= 6 else f"[{', '.join(map(str, cu[:5]))}, ...]"


def _resolve(group: Group | None, ulysses: int | str) -> tuple[dist.ProcessGroup | LocalWire | None, int]:
    """The one group of all P ranks, and the Ulysses degree as a number."""
    if isinstance(ulysses, bool) or not (ulysses == "auto" or isinstance(ulysses, int)):
        raise TypeError(f"ulysses={ulysses!r} must be an integer or 'auto'")
    if not isinstance(group, DeviceMesh):
        if group is not None and not isinstance(group, (dist.ProcessGroup, LocalWire)):
            raise TypeError(f"group={group!r} must be None, a ProcessGroup or a DeviceMesh that this rank belongs to")
        return group, 1 if ulysses == "auto" else int(ulysses)
    if group.ndim == 1:
        return group.get_group(), 1 if ulysses == "auto" else int(ulysses)
    names = group.mesh_dim_names
    if group.ndim != 2 or names is None or set(names) != {"ring", "ulysses"}:
        raise ValueError(f"a {group.ndim}-D mesh with axes {names} was given: pass a 1-D mesh, or a 2-D one with axes 'ring' and 'ulysses'")
    degree = group.size(names.index("ulysses"))
    if ulysses not in ("auto", degree):
        raise ValueError(f"ulysses={ulysses} disagrees with the mesh, whose 'ulysses' axis has {degree} ranks: leave it 'auto'")
    if names != ("ring", "ulysses"):
        raise ValueError("the mesh's axes must be ('ring', 'ulysses'), Ulysses inner: adjacent ranks share heads")
    ranks = group.mesh.flatten().tolist()
    if ranks != sorted(ranks):  # a process group counts its members in ascending order: other ranks would become neighbours
        raise ValueError(f"the mesh must list its ranks in ascending order, row by row, got {ranks}: renumber the processes")
    return group._flatten().get_group(), degree


def _wire(group: dist.ProcessGroup | LocalWire | None, asked: str) -> tuple[P2PWire | LocalWire, str]:
    """The wire asked for among all ranks of the group, and why it is this one. Raises ValueError if it cannot be."""
    if isinstance(group, LocalWire):
        return group, "ranks are threads of one process"
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None or group.size() == 1:
        return LocalGroup(1, _default_device()).wire(0), "there is one rank"
    wire = P2PWire(group)
    if asked == "p2p":
        return wire, "asked for"
    reason = obstacle(wire)
    if reason is None:
        return SymmetricWire(group), "the GPUs of the host reach each other's memory"
    if asked == "symmetric":
        raise ValueError(f"wire='symmetric' cannot serve this group: {reason}; wire='auto' would take p2p")
    return wire, f"not symmetric: {reason}"


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, allowed))}")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
