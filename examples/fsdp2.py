"""Pretraining with FSDP2 on dp x sp ranks: each of the dp groups reads its own text, and its sp ranks share every sequence.

A tiny decoder learns the bytes of sympy's source, which comes with torch. Parameters, gradients and optimizer state are sharded over
all ranks. Gradients are averaged over all ranks, which with `token_mean` gives the gradient of the mean over all tokens. The same file
runs on CPUs and GPUs, with any number of ranks:

python examples/fsdp2.py
distflash run -n 2 examples/fsdp2.py
torchrun --standalone --nproc-per-node 4 examples/fsdp2.py --sp 2 --compile
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import distflash
from distflash.train.data import IGNORE, Windows, load_corpus
from distflash.train.model import MODELS, Llama, initial_value

parser = argparse.ArgumentParser()
parser.add_argument("--sp", type=int, default=0, help="ranks that share one sequence; 0: all")
parser.add_argument("--model", default="tiny", choices=MODELS)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=1024, help="bytes of a sequence")
parser.add_argument("--compile", action="store_true", help="compile every block as one graph")
asked = parser.parse_args()

world = distflash.init()
sp_size = asked.sp or world.size
model = Llama(MODELS[asked.model]).to(world.device)
for name, parameter in model.named_parameters():  # the same on every rank
    parameter.data.copy_(initial_value(name, parameter.shape, model.config, 0, world.device))
if asked.compile:
    for block in model.blocks:
        block.compile(fullgraph=True)
group = sp_mesh = None
dp, dp_rank = world.size // sp_size, world.rank // sp_size
if world.size > 1:
    mesh = init_device_mesh(world.device.type, (dp, sp_size), mesh_dim_names=("dp", "sp"))
    sp_mesh, group = mesh["sp"], dist.group.WORLD
    everyone = init_device_mesh(world.device.type, (world.size,))
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=everyone, mp_policy=policy)
    fully_shard(model, mesh=everyone, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
sp = distflash.SequenceParallel(sp_mesh) if world.size > 1 else distflash.SequenceParallel.single(world.device)
windows = Windows(load_corpus(()), asked.length, seed=0)

for step in range(asked.steps):
    batch = windows.batch(step * dp + dp_rank, 1)  # documents packed one after the other, labels shifted
    seq = sp.sequence(cu_seqlens=batch.cu_seqlens)
    tokens, labels = (seq.shard(x.to(world.device)[None]) for x in (batch.tokens, batch.labels))  # (1, T)
    logits = model(tokens, seq)  # (1, T, V)
    per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    loss = distflash.token_mean(per_token, seq, ignore=labels == IGNORE, group=group)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if world.is_main:
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
