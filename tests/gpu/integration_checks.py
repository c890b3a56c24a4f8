"""What integrations.py runs on each of two ranks: a step through an integration, and what one process makes of it.

Every check takes the device, "cuda" or "cpu", and raises where they differ. Optional libraries are imported where they are used.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import distflash
from distflash.parallel.wire.p2p import P2PWire
from distflash.parallel.wire.symmetric import CudaWindow
from distflash.testing import Attention, errors
from distflash.train.model import Llama, ModelConfig
from tests.integrations import data_parallel
from tests.integrations.data_parallel import LENGTH, MODEL, Setting
from tests.parallel.test_compile_graph import compiled, counted, graphs
from tests.schemes import Call, Inputs, inputs, truth_of

RANKS = 2
LAUNCHERS = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")  # what tells a process that it is a rank
HOPPER = ModelConfig(dim=256, layers=2, heads=4, kv_heads=2, hidden=256, vocab=MODEL.vocab)  # head dim 64
DOCUMENTS = (0, 128, 128, 200, 512)  # parts divisible by twice the ranks
LOOSE = 5e-5  # of fp32 after two layers: sums in another order, and exponentials that are good to some units of the last place


# PyTorch


def kernels(device: str) -> None:
    """What the other checks run on."""
    if device != "cuda":
        return
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for config, dtype, kernel in ((MODEL, torch.float32, "triton"), (HOPPER, torch.bfloat16, "hopper" if hopper else "triton")):
        q, k = ((1, LENGTH, heads, config.head_dim) for heads in (config.heads, config.kv_heads))
        assert distflash.explain(q, k, causal=True, dtype=dtype, device=device).kernel == kernel


def parallel(
    device: str,
    wrap: data_parallel.Wrap,
    dp: int,
    sp: int,
    ulysses: int = 1,
    dtype: torch.dtype = torch.float32,
    model: ModelConfig = MODEL,
) -> None:
    on = Setting(device, dtype, model)
    data_parallel.assert_same([data_parallel.step(dp, sp, wrap, ulysses, on)], on)


def replicated(model: Any, mesh: Any) -> Any:
    return DistributedDataParallel(model)


def sharded(model: Any, mesh: Any) -> Any:
    from tests.integrations.test_fsdp2 import sharded

    return sharded(model, mesh)


def sharded_graphs(model: Any, mesh: Any) -> Any:
    from tests.integrations.test_fsdp2 import compiled

    return compiled(model, mesh, "inductor" if mesh.device_type == "cuda" else "aot_eager")


def gradients(f: Callable[..., Tensor], model: Llama, seq: distflash.ShardedSequence, device: str) -> Tensor:
    """All of them, of a function of this rank's logits."""
    loss, parameters = f(model, data_parallel.batch()[0].to(device), seq), list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def function(model: Llama, tokens: Tensor, seq: Any) -> Tensor:
    return model(seq.shard(tokens), seq).square().mean()


def inductor(device: str) -> None:
    """One graph for all sequences, and what eager mode gives."""
    counters.clear()
    model, f = data_parallel.make_model(Setting(device, torch.float32)), compiled(function, "inductor")
    sp = distflash.SequenceParallel(layout="zigzag", ulysses=1)  # as many local tokens of each sequence
    for cu in ((0, LENGTH), (0, 5, LENGTH)):
        seq = sp.sequence(cu_seqlens=cu)
        found, expected = (gradients(g, model, seq, device) for g in (f, function))
        assert (found - expected).norm() < LOOSE * expected.norm(), f"off by {(found - expected).norm() / expected.norm():.1e}"
    assert graphs() == 1 and not counters["graph_break"], counters["graph_break"]


def checkpoints(device: str, backend: str | None, **scheme: Any) -> None:
    """Layers that are computed again send nothing again."""
    found, counts = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Llama(MODEL, recompute=recompute).to(device)
        seq = distflash.SequenceParallel(check="never", **scheme).sequence(LENGTH)
        f = compiled(function, backend) if backend else function
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch, (P2PWire, "exchange"), (CudaWindow, "give"))
            found.append(gradients(f, model, seq, device))
        counts.append(dict(calls))
    assert counts[0] == counts[1], counts
    assert counts[0]["forward"] == counts[0]["backward"] == MODEL.layers and counts[0]["exchange"] + counts[0]["give"] > 0, counts
    assert (found[0] - found[1]).norm() <= LOOSE * found[0].norm()


def module(device: str) -> None:
    """distflash.nn.Attention with sinks that are learned."""
    x = on_device(inputs(LENGTH, dtype=torch.float32), device)
    seq = distflash.SequenceParallel().sequence(LENGTH)

    def run(*qkv: Tensor, **given: Any) -> list[Tensor]:
        attention = distflash.nn.Attention(causal=True, sinks=4).to(device)
        attention.load_state_dict({"sinks": torch.linspace(0.1, 1.0, 4)})
        leaves = [t.detach().requires_grad_() for t in qkv]
        out = attention(*leaves, **given)
        assert attention.sinks is not None
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, attention.sinks])]

    *expected, sinks = run(*x[:3])
    *found, mine = run(*(seq.shard(t) for t in x[:3]), seq=seq)
    dist.all_reduce(mine)
    for a, b in zip([*found, mine], [*(seq.shard(t) for t in expected), sinks], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Drop-ins


def on_device(x: Inputs, device: str) -> Inputs:
    return Inputs._make(t.to(device) for t in x)


def drop_in(device: str, family: str) -> None:
    """The functions of a family in bf16, and what the dense formula makes of all tokens."""
    from tests.integrations.test_ring_flash_attn import PACKINGS, part

    varlen = family.endswith("varlen")
    call = Call(causal=True, documents=DOCUMENTS if varlen else None)
    for packing in PACKINGS:
        kv_heads = 4 if packing == "qkvpacked_func" else 2
        sizes = {"batch": 1 if varlen else 2, "kv_heads": kv_heads, "dim": 64, "dtype": torch.bfloat16}
        x = on_device(inputs(DOCUMENTS[-1], **sizes), device)
        index, found = part(family, call, x, dist.group.WORLD, dist.get_rank(), RANKS, packing)
        results = (truth_of(call, x, dtype)._asdict() for dtype in (torch.float64, torch.bfloat16))
        truth, low = (Attention(**{name: t[:, :, index] if name == "lse" else t[:, index] for name, t in r.items()}) for r in results)
        broken = errors(found, truth, low, torch.bfloat16)
        assert not broken, f"{packing}: {broken}"


def adapter(device: str) -> None:
    from tests.integrations.test_ring_flash_attn import on_half, tiny

    on_half(*tiny(device, torch.float32), atol=LOOSE)  # of logits and gradients around 1


# Transformers, Accelerate


def architecture(device: str, name: str) -> None:
    """Loss and gradients of a model, alone and by two ranks, are those of its eager attention."""
    from distflash.integrations.transformers import enable, shard
    from tests.integrations.test_transformers import CU, agree, batch_of, step, tiny, truth

    sp = distflash.SequenceParallel()
    for kind in ("plain", "padded", "packed"):
        model, batch = tiny(name).to(device), {key: x.to(device) for key, x in batch_of(kind).items()}
        expected = truth(model, batch)
        alone, shared = copy.deepcopy(model), copy.deepcopy(model)
        enable(alone)
        borders = {"cu_seq_lens_q": torch.tensor(CU, device=device)} if (name, kind) == ("GptOss", "packed") else {}
        agree(step(alone, batch | borders | {"use_cache": False}), expected, LOOSE)
        enable(shared, sp)
        loss, grads = step(shared, shard(batch, sp))
        for x in (loss, *grads.values()):
            dist.all_reduce(x.div_(RANKS))
        agree((loss, grads), expected, LOOSE)


def epochs(device: str, sp: distflash.SequenceParallel | None) -> Iterator[tuple[str, list[Tensor]]]:
    """What Trainer and Accelerate make of some samples: (name, tensors), of all ranks of `sp` or of one process."""
    import accelerate
    import transformers

    from tests.integrations import test_accelerate as trial

    kind, more = (trial.Ordered, {}) if sp is None else (trial.Shared, {"sp": sp})
    for name, collator in (("packed", transformers.DataCollatorWithFlattening()), ("padded", trial.padding)):
        with tempfile.TemporaryDirectory() as folder:
            losses, evaluated, parameters = trial.trained(kind, folder, collator, 2, 7, use_cpu=device == "cpu", **more)
        yield name, [torch.tensor(losses), torch.tensor(evaluated), *parameters]
    yield "accelerate", trial.accelerated(accelerate.Accelerator(cpu=device == "cpu"), sp)


def trainer(device: str) -> None:
    """Against a process that was never a rank, with this rank's GPU."""
    from safetensors.torch import load_file

    from tests.integrations.test_accelerate import assert_same_epoch, assert_same_parameters

    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    if device == "cuda":
        visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.current_device()
        environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "alone.safetensors")
        command = [sys.executable, "-m", "tests.gpu.integrations", "--device", device, "--alone", str(path)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        alone = load_file(path)
    for name, found in epochs(device, distflash.SequenceParallel()):
        mine = [x.detach().cpu() for x in found]
        theirs = [alone[f"{name} {n}"] for n in range(len(mine))]
        if name == "accelerate":
            assert_same_parameters(mine, theirs)
        else:
            epoch, expected = ((x[0].tolist(), float(x[1]), x[2:]) for x in (mine, theirs))
            assert_same_epoch(epoch, expected)


def write_alone(device: str, path: str) -> None:
    from safetensors.torch import save_file

    save_file({f"{name} {n}": x.detach().cpu() for name, found in epochs(device, None) for n, x in enumerate(found)}, path)


# DeepSpeed


def zero(device: str, stage: int, sp: int, **changes: Any) -> None:
    from tests.integrations import zero

    zero.assert_same(zero.step(stage, sp, **changes), zero.alone(RANKS // sp))


def local_attention(device: str, *case: Any) -> None:
    """`distributed_attention`: DeepSpeed exchanges heads, ours is its local_attn."""
    from tests.integrations import zero  # noqa: F401  tells whether there is a DeepSpeed
    from tests.integrations.test_deepspeed import assert_dense, attended

    assert_dense(attended(*case), *case[2:4])


def beneath_ulysses(device: str, name: str, sp: int, ulysses: int, stage: int) -> None:
    """`enable_ulysses`: a Transformers model under ZeRO."""
    from tests.integrations import zero  # noqa: F401
    from tests.integrations.test_deepspeed_transformers import alone, assert_same, step

    assert_same(step(name, sp, ulysses, stage), alone(name, RANKS // sp, ulysses))
