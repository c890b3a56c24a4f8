"""A program for two or more GPUs of one host, a process each: what copies between their memories must not change. Prints OK at the end."""

import random
from contextlib import contextmanager

import torch
import torch.distributed as dist

import distflash
from distflash.parallel.wire.symmetric import CudaWindow, SymmetricWire

TOKENS, HEADS, KV_HEADS, D = 4099, 8, 4, 128  # shards of several lengths


def attend(seq, leaves, dout, **options):
    out = distflash.attention(*leaves, seq, causal=True, deterministic=True, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def same(a, b):
    equal = torch.tensor([all(torch.equal(x, y) for x, y in zip(a, b, strict=True))], dtype=torch.int32, device="cuda")
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def tensors(seq):
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    leaves = [torch.randn(1, seq.local_length, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in shapes]
    return leaves, torch.randn_like(leaves[0])


def the_wires_agree(order):
    seqs = [distflash.SequenceParallel(wire=wire, order=order).sequence(TOKENS) for wire in ("p2p", "symmetric")]
    leaves, dout = tensors(seqs[0])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *(attend(seq, leaves, dout) for seq in seqs), strict=True):
        apart = ((a - b).float().norm() / a.float().norm()).item()
        assert apart < 1e-3, f"{order}, {name}: {apart}"


def a_delay_anywhere_changes_nothing():
    seq = distflash.SequenceParallel(wire="symmetric").sequence(TOKENS)
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
            assert same(attend(seq, leaves, dout), expected), f"run {n} with delays gave other bits"
    finally:
        SymmetricWire.beside, CudaWindow.take = beside, take


def layers_of_other_sizes_share_the_windows():
    sp = distflash.SequenceParallel(wire="symmetric")
    made = []
    for tokens in (515, TOKENS, 70, 2 * TOKENS):
        seq = sp.sequence(tokens)
        made.append((seq, *tensors(seq)))
    expected = [attend(*one) for one in made]
    again = [attend(*one) for one in reversed(made)][::-1]
    assert all(same(a, b) for a, b in zip(expected, again, strict=True)), "the order of calls changed a result"


def a_step_is_captured_and_replayed(wire):
    seq = distflash.SequenceParallel(wire=wire).sequence(TOKENS)
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
        assert same(replayed, attend(seq, leaves, dout)), f"{wire}: replay {seed} is not what a call gives"


def main():
    world = distflash.init()
    assert world.size > 1 and distflash.SequenceParallel().wire_name == "symmetric", "needs GPUs that reach each other's memory"
    checks = [lambda order=order: the_wires_agree(order) for order in ("ring", "all_gather")]
    checks += [a_delay_anywhere_changes_nothing, layers_of_other_sizes_share_the_windows]
    checks += [lambda wire=wire: a_step_is_captured_and_replayed(wire) for wire in ("symmetric", "p2p")]
    for n, check in enumerate(checks):
        check()
        if world.is_main:
            print("passed", n, flush=True)
    dist.barrier()
    if world.is_main:
        print("OK", flush=True)


if __name__ == "__main__":
    main()
