"""A program for two or more GPUs of one host, a process each: what copies between their memories must not change. Prints OK at the end."""

import random
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

import distflash
from distflash.parallel import ulysses
from distflash.parallel.wire.symmetric import CudaWindow, SymmetricWire

TOKENS, HEADS, KV_HEADS, D = 4099, 16, 8, 128  # shards of several lengths
ONE, ALL = 1 << 60, 1  # bytes that are worth a group of heads: all heads at once, or as many groups as there can be


def attend(seq, leaves, dout, **options):
    out, lse = distflash.attention(*leaves, seq, causal=True, deterministic=True, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, torch.sin(lse.detach())))]


def same(a, b):
    equal = torch.tensor([all(torch.equal(x, y) for x, y in zip(a, b, strict=True))], dtype=torch.int32, device="cuda")
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def tensors(seq, batch=1, heads=HEADS):
    shapes = (heads, heads * KV_HEADS // HEADS, heads * KV_HEADS // HEADS)
    leaves = [torch.randn(batch, seq.local_length, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in shapes]
    return leaves, torch.randn_like(leaves[0])


@contextmanager
def grouped(nbytes):
    """How many groups heads come in, of sequences that are first attended over in here."""
    usual, ulysses.PIECE = ulysses.PIECE, nbytes
    try:
        yield
    finally:
        ulysses.PIECE = usual


def the_wires_agree(scheme):
    seqs = [distflash.SequenceParallel(wire=wire, **scheme).sequence(TOKENS) for wire in ("p2p", "symmetric")]
    leaves, dout = tensors(seqs[0], batch=2)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *(attend(seq, leaves, dout) for seq in seqs), strict=True):
        apart = ((a - b).float().norm() / a.float().norm()).item()
        assert apart < 1e-3, f"{scheme}, {name}: {apart}"


def no_bit_depends_on_groups_of_heads():
    """With messages and all heads at once, copies and all heads at once, copies and groups."""
    for batch, tokens in ((1, TOKENS), (2, 1030), (1, 1)):
        found = []
        for wire, nbytes, groups in (("p2p", ONE, 1), ("symmetric", ONE, 1), ("symmetric", ALL, KV_HEADS // dist.get_world_size())):
            with grouped(nbytes):
                seq = distflash.SequenceParallel(wire=wire, layout="contiguous", ulysses=dist.get_world_size()).sequence(tokens)
                if not found:
                    leaves, dout = tensors(seq, batch)
                found.append(attend(seq, leaves, dout))
                (scheme,) = seq._schemes.values()
                assert scheme.ulysses.groups == groups, f"{scheme.ulysses.groups} groups over {wire}, not {groups}"
        assert same(found[0], found[1]), f"copies gave other bits than messages: {tokens} tokens"
        assert same(found[1], found[2]), f"groups of heads gave other bits: {tokens} tokens"


def a_delay_anywhere_changes_nothing(scheme):
    seq = distflash.SequenceParallel(wire="symmetric", **scheme).sequence(TOKENS)
    leaves, dout = tensors(seq)
    expected, beside, take = attend(seq, leaves, dout), SymmetricWire.beside, CudaWindow.take
    rng = random.Random(dist.get_rank())

    def late():
        if rng.random() < 0.5:
            torch.cuda._sleep(rng.randint(10**5, 3 * 10**6))  # clocks

    @contextmanager
    def slow(wire, lane):
        late()
        with beside(wire, lane):
            late()
            yield
            late()

    def slow_take(window, rank):
        late()
        take(window, rank)
        late()

    SymmetricWire.beside, CudaWindow.take = slow, slow_take
    try:
        for n in range(10):
            assert same(attend(seq, leaves, dout), expected), f"{scheme}: run {n} with delays gave other bits"
    finally:
        SymmetricWire.beside, CudaWindow.take = beside, take


def layers_of_other_sizes_share_the_windows(scheme):
    sp = distflash.SequenceParallel(wire="symmetric", **scheme)
    made = []
    for tokens, batch, heads in ((515, 1, HEADS), (TOKENS, 1, HEADS // 2), (70, 3, HEADS), (2 * TOKENS, 1, HEADS)):
        seq = sp.sequence(tokens)
        made.append((seq, *tensors(seq, batch, heads)))
    expected = [attend(*one) for one in made]
    again = [attend(*one) for one in reversed(made)][::-1]
    assert all(same(a, b) for a, b in zip(expected, again, strict=True)), f"{scheme}: the order of calls changed a result"


def a_step_is_captured_and_replayed(scheme):
    seq = distflash.SequenceParallel(**scheme).sequence(TOKENS)
    leaves, dout = tensors(seq)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # tables, windows and compiled kernels are there before the capture
        for _ in range(2):
            attend(seq, leaves, dout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(seq, leaves, dout)
    for seed in (1, 2, 3):
        with torch.no_grad():
            for x in (*leaves, dout):
                x.normal_(generator=torch.Generator("cuda").manual_seed(seed + 10 * dist.get_rank()))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert same(replayed, attend(seq, leaves, dout)), f"{scheme}: replay {seed} is not what a call gives"


def main():
    world = distflash.init()
    assert world.size > 1 and distflash.SequenceParallel().wire_name == "symmetric", "needs GPUs that reach each other's memory"
    ring, heads = {"ulysses": 1}, {"ulysses": world.size}
    both = [{"ulysses": 2}] if world.size % 2 == 0 and world.size > 2 else []
    agreeing = [ring, {"ulysses": 1, "order": "all_gather"}, heads, *both]
    checks = [partial(the_wires_agree, scheme) for scheme in agreeing]
    checks += [no_bit_depends_on_groups_of_heads] if KV_HEADS % world.size == 0 else []
    checks += [partial(check, how) for check in (a_delay_anywhere_changes_nothing, layers_of_other_sizes_share_the_windows)
               for how in (ring, heads, *both)]  # fmt: skip
    captured = [how | {"wire": "symmetric"} for how in (ring, heads, *both)]
    checks += [partial(a_step_is_captured_and_replayed, how) for how in (*captured, ring | {"wire": "p2p"})]
    with grouped(ALL):
        for check in checks:
            check()
            if world.is_main:
                print("passed", getattr(check, "func", check).__name__, *getattr(check, "args", ()), flush=True)
    dist.barrier()
    if world.is_main:
        print("OK", flush=True)


if __name__ == "__main__":
    main()
