"""Ranks as threads: what multi-rank tests stand on."""

from __future__ import annotations

import pytest
import torch

from distflash.parallel.wire import base
from distflash.parallel.wire.local import LocalGroup, RankLost
from distflash.testing import spmd


def test_messages_of_one_pair_arrive_in_the_order_in_which_they_were_sent():
    def work(wire):
        other = 1 - wire.rank
        made = [torch.full((4,), 10 * wire.rank + n, dtype=torch.uint8) for n in range(3)]
        rooms = [torch.empty(4, dtype=torch.uint8) for _ in made]
        pending = [wire.exchange({other: message}, {other: room}) for message, room in zip(made, rooms, strict=True)]
        for one in pending:
            one.wait()
        return [int(room[0]) for room in rooms]

    assert spmd(2, work) == [[10, 11, 12], [0, 1, 2]]


def test_a_message_is_what_the_buffer_held_when_it_was_sent():
    def work(wire):
        message, room = torch.ones(2, dtype=torch.uint8), torch.empty(2, dtype=torch.uint8)
        pending = wire.exchange({1 - wire.rank: message}, {1 - wire.rank: room})
        message.zero_()
        pending.wait()
        return room.tolist()

    assert spmd(2, work) == [[1, 1], [1, 1]]


def test_the_nth_message_asked_for_is_the_nth_sent_whichever_is_waited_on_first():
    def work(wire):
        rooms = [torch.empty(1, dtype=torch.uint8) for _ in range(3)]
        pending = [
            wire.exchange({1 - wire.rank: torch.tensor([n], dtype=torch.uint8)}, {1 - wire.rank: room}) for n, room in enumerate(rooms)
        ]
        for n in (2, 0, 1):
            pending[n].wait()
        return [int(room) for room in rooms]

    assert spmd(2, work) == [[0, 1, 2]] * 2


def test_empty_messages_are_not_sent():
    nothing = torch.empty(0, dtype=torch.uint8)

    def work(wire):
        wire.exchange({1 - wire.rank: nothing}, {1 - wire.rank: nothing}).wait()
        return sum(map(len, wire.group.mail.values()))

    assert spmd(2, work) == [0, 0]


def test_ranks_of_a_sub_wire_are_renumbered_in_the_given_order():
    def work(wire):
        if wire.rank == 1:
            return None
        sub = wire.sub((3, 0, 2))
        room = torch.empty(1, dtype=torch.uint8)
        message = torch.tensor([wire.rank], dtype=torch.uint8)
        sub.exchange({(sub.rank + 1) % 3: message}, {(sub.rank - 1) % 3: room}).wait()
        return sub.rank, sub.size, int(room), sub.all_reduce(torch.tensor([1.5, wire.rank])).tolist()

    assert spmd(4, work) == [(1, 3, 3, [4.5, 5.0]), None, (2, 3, 0, [4.5, 5.0]), (0, 3, 2, [4.5, 5.0])]


def test_all_reduce_is_bit_equal_on_every_rank():
    parts = torch.randn(5, 7)
    found = spmd(5, lambda wire: wire.all_reduce(parts[wire.rank]))
    assert all(torch.equal(x, found[0]) for x in found) and torch.allclose(found[0], parts.sum(0))


def test_the_error_of_a_rank_is_raised_and_those_who_wait_for_it_are_woken():
    def work(wire):
        if wire.rank == 1:
            raise ZeroDivisionError("rank 1's own error")
        room = torch.empty(1, dtype=torch.uint8)
        with pytest.raises(RankLost, match=f"rank {wire.rank} waited for a message of rank 1"):
            wire.exchange({}, {1: room}).wait()

    with pytest.raises(ZeroDivisionError, match="rank 1's own error"):
        spmd(3, work)


def test_a_message_of_the_wrong_size_is_not_accepted():
    def work(wire):
        room = torch.empty(3 + wire.rank, dtype=torch.uint8)
        wire.exchange({1 - wire.rank: torch.empty(3, dtype=torch.uint8)}, {1 - wire.rank: room}).wait()

    with pytest.raises(AssertionError, match="3 bytes came, 4 were expected"):
        spmd(2, work)


@pytest.mark.parametrize(
    "shapes", [[(2, 3), (5,)], [(0, 3), (4,)], [(1,), (1,), (1,)], [()]], ids=["two", "an empty one", "three small ones", "a scalar"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_what_is_packed_is_unpacked_from_aligned_places(shapes, dtype):
    tensors = [torch.randn(shape, dtype=torch.float64).mul(100).to(dtype) for shape in shapes]
    tensors.append(torch.randn(6, 4)[:, ::2])  # strided, another dtype
    forms = [(t.shape, t.dtype) for t in tensors]
    message = base.pack(tensors)
    assert message.dtype == torch.uint8 and message.dim() == 1 and message.numel() == base.empty(forms, message.device).numel()
    for found, tensor in zip(base.unpack(message, forms), tensors, strict=True):
        assert torch.equal(found, tensor) and found.storage_offset() * found.element_size() % 128 == 0


def test_a_rank_may_come_while_another_looks_at_the_others():
    group = LocalGroup(3)
    looking = iter(group.journals.items())
    next(looking)
    group.wire(2)
    assert len(list(looking)) == 2
    assert group.wire(0).others().keys() == {1, 2}
