"""MPI starts the ranks and moves the data; attention communicates over gloo between CPUs and NCCL between GPUs.

mpirun -n 4 python examples/mpi.py
srun --mpi=pmix -n 4 python examples/mpi.py
python examples/mpi.py

Rank 0 holds packed documents and broadcasts them. All ranks share them, forward and backward; each compares its tokens with what
it computes alone, and MPI sums the gradients. MPI moves numpy buffers, so it need not support GPUs, and nothing is pickled.
"""

import sys

import numpy as np
import torch
from mpi4py import MPI

import distflash

LENGTHS = (700, 1, 320, 83)  # of the documents
HEADS, HEAD_DIM = 4, 64

comm = MPI.COMM_WORLD
world = distflash.init()  # rank and size are MPI's; the address travels over MPI too
assert (world.rank, world.size) == (comm.rank, comm.size), "start with mpirun or srun, not with another launcher"

borders = np.zeros(len(LENGTHS) + 1, dtype=np.int32)
qkv = np.empty((sum(LENGTHS), 3, HEADS, HEAD_DIM), dtype=np.float32)  # (S, 3, H, D)
if world.is_main:
    borders[1:] = np.cumsum(LENGTHS)
    qkv[:] = np.random.default_rng(0).standard_normal(qkv.shape)
comm.Bcast(borders)
comm.Bcast(qkv)

cu_seqlens = torch.from_numpy(borders)
whole = torch.from_numpy(qkv).to(world.device).requires_grad_()
alone = whole.detach().clone().requires_grad_()

seq = distflash.SequenceParallel().sequence(cu_seqlens=cu_seqlens)
out = distflash.attention(*seq.shard(whole, dim=0).unbind(1), seq, causal=True)  # (T, H, D)
distflash.token_mean(out.square().mean((1, 2)), seq).backward()

expected = distflash.attention(*alone.unbind(1), cu_seqlens_q=cu_seqlens, causal=True)  # (S, H, D)
distflash.token_mean(expected.square().mean((1, 2))).backward()

# the loss is a mean over the tokens of all ranks, so the mean of the ranks' gradients is its gradient
gradient = np.empty_like(qkv)
comm.Allreduce(whole.grad.cpu().numpy() / world.size, gradient, op=MPI.SUM)
error = np.array([(out - seq.shard(expected, dim=0)).abs().max().item() if seq.local_length else 0.0])
worst = np.empty_like(error)
comm.Allreduce(error, worst, op=MPI.MAX)
relative = np.linalg.norm(gradient - alone.grad.cpu().numpy()) / np.linalg.norm(gradient)

print(f"rank {world.rank} of {world.size} on {world.device}: {seq.local_length} of {seq.length} tokens", flush=True)
if world.is_main:
    print(f"against one process: out within {worst[0]:.1e}, gradient within {relative:.1e}", flush=True)
if not (worst[0] < 1e-2 and relative < 1e-2):  # TF32 on a GPU; 1e-6 on a CPU
    sys.exit("the ranks disagree with one process")
