"""Every rank prints where it runs, and an all-reduce sums the ranks. The same file works under every launcher:

python examples/hello.py
distflash run -n 2 examples/hello.py
torchrun --standalone --nproc-per-node 2 examples/hello.py
mpirun -n 2 python examples/hello.py
srun -n 2 python examples/hello.py
"""

import torch
import torch.distributed as dist

import distflash

world = distflash.init()
total = torch.tensor([world.rank], device=world.device)
if world.size > 1:
    dist.all_reduce(total)
print(f"rank {world.rank} of {world.size} on {world.device}, started by {world.launcher}: the ranks add up to {total.item()}")
