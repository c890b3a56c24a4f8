"""One optimizer step with the real DeepSpeed, and what one process makes of it: for test_deepspeed*.py and tests/gpu.

On the CPU, unless DS_ACCELERATOR says something else before this is imported.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.stage3
import torch
import torch.distributed as dist
import torch.nn.functional as F

import distflash
from distflash.integrations.deepspeed import create_mpu
from distflash.train.model import Llama, ModelConfig

if os.environ["DS_ACCELERATOR"] == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for two minutes
deepspeed.utils.logger.setLevel("ERROR")
torch.compile(torch.nn.Identity())  # imports the compiler, which DeepSpeed asks for, once here instead of in every rank

MODEL = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=61)
LENGTH, LR = 37, 0.5  # no number of ranks divides the length
DEVICE = os.environ["DS_ACCELERATOR"]


def batches(passes=1):
    """(tokens, labels, ignore) of two sequences a pass, (passes, 2, S) each; most labels of the first do not count."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, MODEL.vocab, (2, passes, 2, LENGTH), generator=generator)
    ignore = torch.rand(passes, 2, LENGTH, generator=generator) < 0.3
    ignore[:, 0, 4:-4] = True
    return [x.to(DEVICE) for x in (tokens, labels, ignore)]


def make_model():
    torch.manual_seed(0)
    return Llama(MODEL).to(DEVICE)


def losses(model, tokens, labels, seq):
    """Per token, (1, T)."""
    return F.cross_entropy(model(tokens[None], seq).flatten(0, 1).float(), labels, reduction="none")[None]


def alone(sequences, passes=1, clip=0.0):
    """(loss of the last pass, parameters after one step of SGD, by name) of one process, which has all sequences."""
    model, seq = make_model(), distflash.SequenceParallel.single(DEVICE).sequence(length=LENGTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for tokens, labels, ignore in zip(*batches(passes), strict=True):
        per_token = torch.cat([losses(model, t, x, seq) for t, x in zip(tokens[:sequences], labels[:sequences], strict=True)])
        loss = distflash.token_mean(per_token, ignore=ignore[:sequences])
        (loss / passes).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item(), {name: p.detach() for name, p in model.named_parameters()}


def config(stage, sp, passes=1, clip=0.0, zero=None, **changes):
    """A DeepSpeed config for the ranks there are."""
    sequences = dist.get_world_size() // sp
    return {
        "train_batch_size": sequences * passes,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage} | (zero or {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "distflash": {"sequence_parallel_size": sp},
    } | changes


def engine_of(model, settings, **arguments):
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    mpu = create_mpu(settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu, **arguments)
    return engine, mpu


def parameters(engine):
    """The whole parameters, by name."""
    found = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(found.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().clone() for name, p in found.items()}


def step(stage, sp, passes=1, clip=0.0, **changes):
    """What `alone` returns, with this rank's share of the work."""
    engine, mpu = engine_of(make_model(), config(stage, sp, passes, clip, **changes))
    seq = mpu.sp.sequence(length=LENGTH)
    for batch in zip(*batches(passes), strict=True):
        tokens, labels, ignore = (seq.shard(x[mpu.get_data_parallel_rank()], dim=0) for x in batch)
        loss = distflash.token_mean(losses(engine, tokens, labels, seq), seq, ignore=ignore[None], group=mpu.group)
        engine.backward(loss)
        engine.step()
    return loss.item(), list(parameters(engine).values())


def assert_same(found, expected):
    """What `step` returned is what `alone` did: DeepSpeed and torch add up fp32 in other orders."""
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0]), f"loss {found[0]}, alone {expected[0]}"
    start = dict(make_model().named_parameters())
    for (name, truth), x in zip(expected[1].items(), found[1], strict=True):
        moved, told = (x - start[name]).detach(), (truth - start[name]).detach()  # the gradient, times the learning rate
        assert told.norm() > 0
        assert (moved - told).norm() <= 1e-5 * told.norm() + 1e-6, f"{name} is off by {((moved - told).norm() / told.norm()).item():.1e}"
