"""The real Trainer and Accelerator on forked processes of gloo: one update is that of one process with all the tokens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

import distflash
from distflash.integrations.accelerate import SequenceParallelTrainer, same_batches
from distflash.integrations.transformers import IGNORE, enable, shard
from distflash.launch.world import shutdown
from distflash.testing import spmd_processes
from tests.integrations.test_transformers import VOCABULARY, step, tiny
from tests.pages import ROOT, blocks_of

PAGE = ROOT / "docs/transformers.md"


class Ordered(transformers.Trainer):
    """Samples in their order, so that one process and several see the same ones."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Shared(SequenceParallelTrainer, Ordered):
    pass


def samples() -> list[dict[str, list[int]]]:
    """Conversations of which the answers count: some long, one without any label."""
    made = []
    for n, (length, prompt) in enumerate([(9, 3), (23, 20), (4, 1), (12, 1), (7, 7), (17, 2), (5, 1), (8, 8)]):
        ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(n)).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    return made


def padding(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(f["input_ids"]) for f in features)

    def filled(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    ids = [f["input_ids"] for f in features]
    mask = filled([[1] * len(row) for row in ids], 0)
    return {"input_ids": filled(ids, 0), "attention_mask": mask, "labels": filled([f["labels"] for f in features], IGNORE)}


def settings(folder: str, accumulate: int, use_cpu: bool = True, **more: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=accumulate,
        num_train_epochs=1, optim="sgd", learning_rate=0.2, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=use_cpu, disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


Epoch = tuple[list[float], float, list[Tensor]]


def trained(kind: type, folder: str, collator: Any, accumulate: int, count: int, use_cpu: bool = True, **more: Any) -> Epoch:
    """Losses of the updates, loss of an evaluation, and parameters, after one epoch."""
    torch.manual_seed(0)
    trainer = kind(
        tiny("Llama"), settings(folder, accumulate, use_cpu), train_dataset=samples()[:count], eval_dataset=samples()[:3],
        data_collator=collator, **more,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"], [p.detach().clone() for p in trainer.model.parameters()]


def in_world(size: int, fn: Any) -> list[Any]:
    """fn() on forked ranks whose environment is that of a launcher."""

    def rank() -> Any:
        me = str(torch.distributed.get_rank())
        os.environ.update(RANK=me, LOCAL_RANK=me, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process
        accelerate.state.GradientState._reset_state()
        return fn()

    return spmd_processes(size, rank)


@pytest.mark.parametrize(
    ("collate", "groups", "accumulate", "count"),
    [("packed", 1, 2, 7), ("padded", 1, 1, 7), ("packed", 2, 2, 8)],  # the last batch of 7 is not full
    ids=["packed, accumulated", "padded", "data x sequence"],
)
def test_an_epoch_of_the_trainer_is_that_of_one_process(tmp_path, collate, groups, accumulate, count):
    collator = transformers.DataCollatorWithFlattening() if collate == "packed" else padding

    def rank() -> Any:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (groups, 2), mesh_dim_names=("dp", "sp"))
        return trained(Shared, str(tmp_path), collator, accumulate // groups, count, sp=distflash.SequenceParallel(mesh["sp"]))

    expected = trained(Ordered, str(tmp_path), collator, accumulate, count)
    assert len(expected[0]) == 4 // accumulate
    for found in in_world(2 * groups, rank):
        assert_same_epoch(found, expected, evaluated=1e-4 if groups == 1 else 0.05)  # data parallel batches are weighed together


def assert_same_epoch(found: Epoch, expected: Epoch, evaluated: float = 1e-4) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1] == pytest.approx(expected[1], rel=evaluated)
    assert_same_parameters(found[2], expected[2])


def assert_same_parameters(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=1e-3, atol=1e-5)


def test_ranks_shuffle_alike_however_much_they_draw(tmp_path):
    class Plain(SequenceParallelTrainer, transformers.Trainer):
        pass

    def rank() -> list[float]:
        arguments = settings(str(tmp_path), 1, max_steps=6)
        trainer = Plain(tiny("Llama"), arguments, train_dataset=samples(), data_collator=padding)
        torch.rand(100 * torch.distributed.get_rank())  # as dropout does on shards of different length
        trainer.train()  # shard() would refuse batches that differ
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    first, second = in_world(2, rank)
    assert len(first) == 6
    assert first == second


def test_persistent_workers_serve_a_second_evaluation(tmp_path):
    def rank() -> bool:
        arguments = settings(str(tmp_path), 1, dataloader_num_workers=1, dataloader_persistent_workers=True)
        trainer = Shared(tiny("Llama"), arguments, eval_dataset=samples()[:4], data_collator=padding)
        return trainer.get_eval_dataloader() is trainer.get_eval_dataloader()  # with its workers, if it had run

    assert in_world(2, rank) == [True, True]


def accelerated(accelerator: Any, sp: Any) -> list[Tensor]:
    """Parameters after three steps, with Accelerate alone."""
    torch.manual_seed(0)
    model = tiny("Qwen3")
    if sp is not None:
        enable(model, sp)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.2))
    for n in (0, 2, 4):
        batch = {name: x.to(accelerator.device) for name, x in transformers.DataCollatorWithFlattening()(samples()[n : n + 2]).items()}
        batch = {**batch, "use_cache": False} if sp is None else shard(batch, sp)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in accelerator.unwrap_model(model).parameters()]


def test_accelerate_alone_needs_enable_and_shard():
    expected = accelerated(accelerate.Accelerator(cpu=True), None)
    for found in in_world(2, lambda: accelerated(accelerate.Accelerator(cpu=True), distflash.SequenceParallel())):
        assert_same_parameters(found, expected)


def test_labels_are_counted_over_data_and_sequence_parallel_ranks():
    torch.manual_seed(0)
    model = tiny("Llama")
    collate = transformers.DataCollatorWithFlattening()
    batches = [collate(samples()[:2]), collate(samples()[2:7])]  # few labels that count, and many

    def rank() -> tuple[Tensor, list[Tensor]]:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        sp = distflash.SequenceParallel(mesh["sp"])
        enable(model, sp)
        local = shard(batches[torch.distributed.get_rank() // 2], sp, group=torch.distributed.group.WORLD)
        loss, grads = step(model, local)
        for x in (loss, *grads.values()):
            torch.distributed.all_reduce(x.div_(4))
        return loss, list(grads.values())

    count = torch.tensor(sum(int((b["labels"] != IGNORE).sum()) for b in batches))
    found = [step(model, {**batch, "use_cache": False, "num_items_in_batch": count}) for batch in batches]
    loss, grads = (sum(x) for x in zip(*((x, torch.cat([g.flatten() for g in y.values()])) for x, y in found), strict=True))
    for mine, theirs in in_world(4, rank):
        torch.testing.assert_close(mine.float(), loss)
        torch.testing.assert_close(torch.cat([g.flatten() for g in theirs]).float(), grads, rtol=1e-4, atol=1e-5)


def test_the_recipe_for_several_batches_gives_the_gradients_of_one_process():
    (code,) = (block.code for block in blocks_of(PAGE.read_text()) if "num_items_in_batch" in block.code)
    recipe = code.replace("[batch, batch]", "batches")
    assert recipe != code
    torch.manual_seed(0)
    model = tiny("Llama")
    collate = transformers.DataCollatorWithFlattening()
    held = [[collate(samples()[n : n + 2]) for n in (first, first + 2)] for first in (0, 4)]  # by each data parallel rank

    def rank() -> Tensor:
        world = torch.distributed.group.WORLD
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        sp = distflash.SequenceParallel(mesh["sp"])
        enable(model, sp)
        batches = held[torch.distributed.get_rank(world) // 2]
        exec(recipe, {"torch": torch, "model": model, "sp": sp, "shard": shard, "world": world, "batches": batches})
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.distributed.all_reduce(grads)
        return grads / 4

    every = [batch for batches in held for batch in batches]
    count = torch.tensor(sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in every))
    grads = sum(
        torch.cat([g.flatten() for g in step(model, {**batch, "use_cache": False, "num_items_in_batch": count})[1].values()])
        for batch in every
    )
    model.zero_grad()
    for mine in in_world(4, rank):
        torch.testing.assert_close(mine.float(), grads, rtol=1e-4, atol=1e-5)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(8))


def test_groups_get_the_same_batches_and_others_are_refused():
    def rank() -> Any:
        world = torch.distributed.get_world_size()
        me = torch.distributed.get_rank()
        pairs = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        across = distflash.SequenceParallel(pairs["dp"])
        sp = distflash.SequenceParallel(pairs["sp"])
        prepare = accelerate.Accelerator(cpu=True).prepare_data_loader
        with pytest.raises(ValueError, match="must be neighbours"):
            same_batches(prepare(DataLoader(range(8))), across, rank=me, size=world)
        with pytest.raises(ValueError, match="does not deal out batches"):
            same_batches(DataLoader(range(8)), sp, rank=me, size=world)
        given = (DataLoader(range(8), batch_size=2), DataLoader(Stream(), batch_size=2))
        loaders = [same_batches(prepare(x, device_placement=n == 0), sp, rank=me, size=world) for n, x in enumerate(given)]
        loaders = [same_batches(loader, sp, rank=me, size=world) for loader in loaders]  # again, as a Trainer that keeps its loader
        return [[batch.tolist() for batch in loader] for loader in loaders]

    first, second = [[0, 1], [4, 5]], [[2, 3], [6, 7]]
    assert in_world(4, rank) == [[mine] * 2 for mine in (first, first, second, second)]


@pytest.mark.parametrize(
    ("words", "more", "arguments"),
    [
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}, {}),
        ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}, {}),
        ("average_tokens_across_devices=False", {"average_tokens_across_devices": False}, {}),
        ("compute_loss_func", {}, {"compute_loss_func": lambda *_, **__: None}),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(tmp_path, words, more, arguments):
    with pytest.raises(ValueError, match=words):
        Shared(tiny("Llama"), settings(str(tmp_path), 1, **more), train_dataset=samples(), **arguments)


def test_predictions_are_refused_and_one_process_needs_no_launcher(tmp_path):
    model = tiny("Llama")
    trainer = Shared(model, settings(str(tmp_path), 1), train_dataset=samples(), data_collator=padding, attention={"kernel": "reference"})
    assert model.config._attn_implementation == "exact_sharded_reference"
    trainer.train()
    with pytest.raises(ValueError, match="evaluate the loss"):
        trainer.predict(samples()[:2])


def test_the_page_runs():
    names: dict[str, Any] = {}
    try:
        for block in blocks_of(PAGE.read_text()):
            exec(block.code, names)
        assert names["logits"].shape == (1, 24, 256)
        assert names["trainer"].state.global_step == 2
    finally:
        shutdown()


def run_on_two_ranks(script: Path) -> str:
    """What a program prints as two processes of their own: forked ones would draw the same random numbers."""
    command = [sys.executable, "-m", "distflash", "run", "-n", "2", str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("page", ["docs/transformers.md", "docs/migrating.md"])
def test_a_page_runs_on_two_ranks(tmp_path, page):
    script = tmp_path / "page.py"
    code = [block.code for block in blocks_of((ROOT / page).read_text()) if block.language == "python" and not block.not_run]
    script.write_text("\n".join([*code, "if distflash.init().is_main: print(distflash.init().size, 'ranks')\n"]))
    assert "2 ranks" in run_on_two_ranks(script)


def test_the_example_learns_on_two_ranks():
    said = run_on_two_ranks(ROOT / "examples/hf_sft.py")
    before, after = map(float, re.search(r"2 ranks, cpu: .* (\d\.\d+), after training (\d\.\d+)", said).groups())
    assert after < before - 1.5
