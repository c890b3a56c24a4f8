"""ZeRO-3 with sequence parallelism: each rank holds a piece of the parameters and a piece of every sequence.

It trains a small Llama to write this very file, on GPUs or on the CPU. The same file runs under every launcher:

deepspeed --num_gpus 2 examples/deepspeed_zero3.py
torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero3.py
distflash run -n 2 examples/deepspeed_zero3.py
mpirun -n 2 python examples/deepspeed_zero3.py

On 4 ranks, --sequence-parallel 2 is two sequences at a time with two ranks each.
"""

import argparse
import os
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.nn.functional as F

import distflash
from distflash.integrations.deepspeed import create_mpu
from distflash.train.model import Llama, ModelConfig

parser = argparse.ArgumentParser()
parser.add_argument("--sequence-parallel", type=int, default=None, help="ranks that share a sequence; all unless given")
parser.add_argument("--length", type=int, default=500, help="tokens of a sequence")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; distflash.init() knows it already")
args = parser.parse_args()

world = distflash.init()
os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed reads it; mpirun and srun do not set it
if world.device.type == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # two minutes of compilation; gloo needs none of it

sequences = world.size // (args.sequence_parallel or world.size)  # at a time
config = {
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": sequences,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "bf16": {"enabled": world.device.type == "cuda"},
    "communication_data_type": "fp32",  # gradients are summed in fp32
    "zero_optimization": {"stage": 3},
    "distflash": {"sequence_parallel_size": args.sequence_parallel, "layout": "zigzag"},
}
mpu = create_mpu(config)

torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config, mpu=mpu):  # no rank ever holds the whole model
    model = Llama(ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, hidden=128, tied=False))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)

text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long().to(world.device)
seq = mpu.sp.sequence(length=args.length)  # any length, nothing is padded
for step in range(args.steps):
    first = (step * sequences + mpu.get_data_parallel_rank()) * 97 % (len(text) - args.length)
    window = text[first : first + args.length + 1]  # the same on all ranks of a group
    tokens, labels = seq.shard(window[:-1], dim=0)[None], seq.shard(window[1:], dim=0)[None]  # labels are shifted before sharding: (1, T)
    logits = engine(tokens, seq)  # (1, T, vocabulary)
    per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = distflash.token_mean(per_token, seq, group=mpu.group)  # over the tokens of all ranks
    engine.backward(loss)
    engine.step()
    if world.is_main:
        print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
