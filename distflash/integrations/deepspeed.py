"""DeepSpeed: groups for ZeRO 0 to 3 over data x sequence parallel ranks, and our attention beneath DeepSpeed's Ulysses.

    mpu = create_mpu(config)  # reads the section "distflash" of the DeepSpeed config
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)
    seq = mpu.sp.sequence(length=S)
    engine.backward(distflash.token_mean(per_token_loss, seq, group=mpu.group))

Legend: P = N x R x U ranks: N data parallel, R of a ring, U of Ulysses (adjacent); B batch, S global tokens, H heads, D head dim.

Gradients of parameters are averaged over all P ranks, in every stage: the rule of `token_mean`, of DDP and of FSDP2. A DeepSpeed
that is told a sequence parallel size divides by N in stages 0, 1 and 2, but by P in stage 3 with reduce_scatter. So it is not told:
the mpu has no get_sequence_parallel_world_size, and ZeRO sees one group of P ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distflash.integrations.deepspeed_ulysses import Beneath, LocalAttention, distributed_attention, enable_ulysses
from distflash.parallel.agreement import agree
from distflash.parallel.sequence import SequenceParallel
from distflash.parallel.wire.local import LocalGroup
from distflash.parallel.wire.p2p import P2PWire

__all__ = ["LocalAttention", "Mpu", "Section", "create_mpu", "distributed_attention", "enable_ulysses", "read_section"]

SECTION = "distflash"

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {  # a setting of DeepSpeed: when it is refused, and what to do
    "data_parallel_size": (lambda _: True, "the mpu says which ranks are data parallel, leave it out"),
    "gradient_allreduce_op": (lambda op: op != "mean", "gradients are averaged over all ranks, leave it out"),
    "seq_parallel_communication_data_type": (lambda _: True, "gradients travel in communication_data_type, set that"),
    "tensor_parallel": (lambda tp: tp.get("autotp_size", 0) > 1, "DeepSpeed would replace the mpu by one of its own, leave it out"),
    "expert_parallel": (lambda ep: ep.get("enabled", False), "experts have not been tried with sharded sequences, leave it out"),
}
ABSENT = {  # what others may look for on an mpu
    "get_sequence_parallel_world_size": "DeepSpeed would divide gradients by it in some stages: ask mpu.sp.size or mpu.sp.ulysses",
    "get_data_parallel_group": "ZeRO partitions and averages over all ranks: use mpu.group",
}


@dataclass(frozen=True)
class Section:
    """The section "distflash" of a DeepSpeed config: how many adjacent ranks share a sequence (None is all), and how.

    All fields but the first are arguments of `distflash.SequenceParallel`, which checks them.
    """

    sequence_parallel_size: int | None = None
    layout: Any = "auto"
    order: Any = "auto"
    ulysses: Any = "auto"
    wire: Any = "auto"
    check: Any = "first"
    staging: Any = None

    @property
    def scheme(self) -> dict[str, Any]:
        """The arguments of `SequenceParallel`."""
        return {name: value for name, value in vars(self).items() if name != "sequence_parallel_size"}


def read_section(config: Mapping[str, Any], ranks: int) -> Section:
    """The section of a config for a job of `ranks` ranks, every field checked. Raises ValueError or TypeError; nothing is sent."""
    given, names = config.get(SECTION), [field.name for field in dataclasses.fields(Section)]
    if not isinstance(given, Mapping):
        raise ValueError(f'the DeepSpeed config needs a section "{SECTION}", got {given!r}: add "{SECTION}": {{}} for the defaults')
    for name in given:
        if name not in names:
            raise ValueError(f'{name!r} is not known in the section "{SECTION}" of the DeepSpeed config: use one of {", ".join(names)}')
    for name, (wrong, cure) in REFUSED.items():
        if name in config and wrong(config[name]):
            raise ValueError(f"{name}={config[name]!r} in the DeepSpeed config does not go with the mpu of distflash: {cure}")
    size = given.get("sequence_parallel_size")
    size = ranks if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or ranks % size:
        raise ValueError(
            f'"{SECTION}" in the DeepSpeed config: sequence_parallel_size={size!r} must be an integer that divides {ranks} ranks'
        )
    if config.get("sequence_parallel_size", size) != size:  # DeepSpeed's own, which zero.Init may read
        other = config["sequence_parallel_size"]
        raise ValueError(
            f'sequence_parallel_size={other!r} in the DeepSpeed config, but {size} in its section "{SECTION}": leave out the former'
        )
    section = Section(**{**given, "sequence_parallel_size": size})
    try:
        SequenceParallel(LocalGroup(size).wire(0), **section.scheme)  # all its checks, and no message
    except (TypeError, ValueError) as error:
        raise type(error)(f'"{SECTION}" in the DeepSpeed config: {error}') from None
    return section


def create_mpu(config: Mapping[str, Any] | str | Path) -> Mpu:
    """The `mpu` for `deepspeed.initialize` (and `zero.Init`), from a DeepSpeed config: a dict, or the path of its JSON file.

    Every rank calls it, after `distflash.init()`. Ranks 0 .. sequence_parallel_size - 1 share the first sequence, as many next ones the
    second, and so on: DeepSpeed's batch sizes count sequences, and its data loader deals them out so.

    Raises ValueError or TypeError, on every rank and before any communication, on a section or on other settings that cannot be
    served; RuntimeError without a process group; Disagreement, on every rank, where ranks have different sections.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group yet: call distflash.init() first, under deepspeed, torchrun, mpirun or distflash run")
    if isinstance(config, (str, Path)):
        import hjson  # what DeepSpeed reads its files with

        config = hjson.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict or the path of a JSON file, got {type(config).__name__}")
    section = read_section(config, dist.get_world_size())
    import deepspeed

    deepspeed.init_distributed(verbose=False)  # it adopts torch's process group
    return Mpu(section)


class Mpu:
    """What DeepSpeed asks about groups; `sp`, how the ranks of this one's sequence share it; `group`, all P ranks. See `create_mpu`.

    What DeepSpeed calls sequence parallel here is its Ulysses: the U ranks among which heads are exchanged, 1 unless the section says so.
    """

    def __init__(self, section: Section):
        size, world = section.sequence_parallel_size, dist.group.WORLD
        assert size is not None and world is not None
        self.group: dist.ProcessGroup = world
        if world.size() > 1:  # ranks that make other groups than their peers would wait for ever
            agree(P2PWire(world), "always", "create_mpu", vars(section))
        self._section, ranks = section, range(world.size())
        shards = [ranks[i : i + size] for i in ranks[::size]]  # the ranks of each sequence
        self._data, self._sequences = dist.get_rank() // size, len(shards)
        group = _subgroup(shards)
        self.sp = SequenceParallel(group, **section.scheme)
        u = self.sp.ulysses
        self._alone = _subgroup([[rank] for rank in ranks])
        if u in (1, size):
            self._heads, self._ring = (self._alone, group) if u == 1 else (group, self._alone)
        else:
            self._heads = _subgroup([shard[i : i + u] for shard in shards for i in range(0, size, u)])
            self._ring = _subgroup([shard[i::u] for shard in shards for i in range(u)])

    @cached_property
    def beneath(self) -> Beneath:
        """What attention sees beneath DeepSpeed's Ulysses. The first use is a collective."""
        ring = self.sp if self.sp.ulysses == 1 else SequenceParallel(self._ring, **dataclasses.replace(self._section, ulysses=1).scheme)
        return Beneath(self.sp, ring)

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """DeepSpeed tells by this name an mpu of sequence parallelism from one of tensor parallelism. The groups exist: raises."""
        raise RuntimeError(f"the groups of this mpu exist: set sequence_parallel_size={sequence_parallel_size} in create_mpu's config")

    def get_data_parallel_rank(self) -> int:
        """Which sequences this rank works on, 0 .. N - 1."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """N: how many micro-batches there are at a time."""
        return self._sequences

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All P ranks. Raises ValueError if `deepspeed.initialize` was given a mesh too, which would take the mpu's place."""
        from deepspeed.utils import groups

        if groups.mesh_device is not None:
            raise ValueError("deepspeed.initialize has a mesh and an mpu, which say different things: leave out mesh_param")
        return self.group

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank among all P."""
        return self.group.rank()

    def get_sequence_data_parallel_world_size(self) -> int:
        """P."""
        return self.group.size()

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The U ranks of this one's DeepSpeed Ulysses."""
        return self._heads

    def get_sequence_parallel_rank(self) -> int:
        """This rank among those U."""
        return self._heads.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone: every rank has whole layers. Norms of gradients are summed over it."""
        return self._alone

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the mpu has no {name}" + (f": {ABSENT[name]}" if name in ABSENT else ""))


def _subgroup(lists: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The group of this rank, among disjoint ones that all ranks are in and that every rank creates in the same order."""
    if all(len(ranks) == 1 for ranks in lists):  # each by itself: no rank waits for P groups of others
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    else:
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in lists])
    assert isinstance(group, dist.ProcessGroup)
    return group
