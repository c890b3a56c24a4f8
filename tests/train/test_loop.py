"""The job as a whole: resume to the bit, any mesh against one process, and the files a run leaves."""

from __future__ import annotations

import errno
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.testing import spmd_processes
from distflash.train.checkpoint import CheckpointError
from distflash.train.loop import Trainer, run
from distflash.train.optimize import learning_rate, make_optimizer
from distflash.train.placement import Replicas, local, whole
from distflash.train.report import read_metrics

METRICS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "ms", "attention_tflops", "peak_memory_gb", "windows"}


def losses(config) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(Path(config.out) / "metrics.jsonl")]


def files_of(out: str, step: int) -> dict[str, bytes]:
    folder = Path(out) / f"step-{step:08d}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(small_run, world, tmp_path):
    straight = small_run(out=str(tmp_path / "straight"), accumulate=2)
    assert run(straight, world) == 0
    broken = small_run(out=str(tmp_path / "broken"), accumulate=2)
    shutil.copytree(straight.out, broken.out)
    shutil.rmtree(Path(broken.out) / "step-00000006")  # as if killed after step 3's checkpoint
    with (Path(broken.out) / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "lo')  # and while a row was written
    torch.manual_seed(123)  # another process has another state
    assert run(small_run(out=broken.out, accumulate=2, resume=True), world) == 0
    assert losses(broken) == losses(straight) and len(losses(straight)) == 6
    assert files_of(broken.out, 6) == files_of(straight.out, 6)


def test_rows_behind_one_that_cannot_be_read_are_kept(small_run, world):
    config = small_run()
    run(config, world)
    before = losses(config)
    path = Path(config.out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\0\n", b"7\n", *lines[1:]]))
    run(small_run(resume=True), world)
    assert losses(config) == before


def test_a_comparison_that_is_asked_of_a_resumed_run_is_said_not_to_be(small_run, world, capsys):
    run(small_run(), world)
    for asked, said in ((2, True), (0, False), (None, False)):
        capsys.readouterr()
        run(small_run(resume=True, compare_steps=asked), world)
        assert ("--compare-steps 2 is of the first steps of a run, and this one goes on after step 6" in capsys.readouterr().out) == said


def test_a_run_resumes_past_a_damaged_checkpoint(small_run, world, capsys):
    config = small_run()
    run(config, world)
    before = losses(config)
    path = Path(config.out) / "step-00000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run(small_run(resume=True), world)
    said = capsys.readouterr().out
    assert "step-00000006 is damaged" in said and "resuming after step 3" in said
    assert losses(config) == before


def test_resuming_another_run_or_other_data_is_refused(small_run, world, tmp_path):
    run(small_run(steps=1, validate=0, sample=0), world)
    with pytest.raises(ValueError, match=r"of another run: seq_len 48 there and 64 here"):
        run(small_run(resume=True, seq_len=64), world)
    (tmp_path / "other.txt").write_text("other text " * 50)
    with pytest.raises(ValueError, match=r"data \(SHA-256\)"):
        run(small_run(resume=True, data=(str(tmp_path / "other.txt"),)), world)


def test_resume_without_a_checkpoint_starts_and_a_new_run_moves_the_old_one_aside(small_run, world, capsys):
    config = small_run(steps=1, validate=0, sample=0, resume=True)
    run(config, world)
    assert "starting from step 0" in capsys.readouterr().out
    run(small_run(steps=1, validate=0, sample=0), world)
    assert "it is now" in capsys.readouterr().out
    assert Path(config.out + ".1", "latest").exists() and Path(config.out, "latest").exists()


def test_a_run_leaves_metrics_curve_sample_and_checkpoints(small_run, world):
    config = small_run()
    assert run(config, world) == 0
    out = Path(config.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["windows"] for row in rows] == [2 * n for n in range(1, 7)]
    for row in rows:
        assert row.keys() == METRICS
        assert row["tokens_per_s"] > 0 and row["peak_memory_gb"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) == 5
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["validation_loss"] < 6 and summary["final_loss"] > 0
    assert sorted(p.name for p in out.glob("step-*")) == ["step-00000003", "step-00000006"]


def one_step(config, world) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(loss, validation loss, tokens, FLOPs, gradients) and the parameters after the update, all whole."""
    trainer = Trainer(config, world, print)
    validation = trainer.validation_loss()
    loss, tokens, flops = trainer.backward()
    model = trainer.placement.model
    gradients = [whole(p.grad).clone() for p in model.parameters() if p.grad is not None]
    norm, _ = trainer.update()
    facts = torch.tensor([loss, validation, tokens, flops, norm], dtype=torch.float64)
    return [facts, *gradients], [whole(p) for p in model.parameters()]


@pytest.mark.parametrize(("dp", "cp", "shard"), [(1, 2, False), (2, 1, False), (2, 2, False), (1, 2, True), (2, 1, True)])
def test_every_mesh_makes_the_step_of_one_process(small_run, world, world_of, dp, cp, shard):
    # The same four windows a step: dp x accumulate x batch.
    exact, updated = one_step(small_run(batch=2, accumulate=2), world)
    config = small_run(batch=2, accumulate=2 // dp, cp=cp, shard=shard, recompute=shard)
    for found, found_updated in spmd_processes(dp * cp, lambda: one_step(config, world_of())):
        for a, b in zip(found, exact, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        for a, b in zip(found_updated, updated, strict=True):
            # Adam divides a gradient by its size: where it is near zero, rounding shows; lr is 1.5e-3, a wrong step is larger
            assert (a - b).abs().max() <= 1e-4
            assert (a - b).abs().mean() <= 1e-7


def test_a_rank_without_a_single_label_counts_nothing_and_breaks_nothing(small_run, world, world_of):
    config = small_run(batch=1, cp=1, steps=1)

    def gradients(world, keep_first: bool):
        trainer = Trainer(config, world, print)
        if world.size == 1:
            trainer.position = 1  # the window that dp rank 1 reads
        elif world.rank == 0 and not keep_first:
            real = trainer.batches
            trainer.batches = lambda rank: [b.without_labels() for b in real(rank)]  # type: ignore[method-assign]
        loss, *_ = trainer.backward()
        return [torch.tensor(loss, dtype=torch.float64), *(p.grad for p in trainer.placement.model.parameters())]

    expected = gradients(world, True)
    for rank in spmd_processes(2, lambda: gradients(world_of(), False)):
        for found, true in zip(rank, expected, strict=True):
            assert torch.isfinite(found).all()
            torch.testing.assert_close(found, true.double(), rtol=1e-5, atol=1e-7)


def test_ranks_of_a_cp_group_read_one_sequence_and_dp_ranks_different_ones(small_run, world_of):
    config = small_run(batch=1, accumulate=1, cp=2)

    def views():
        trainer = Trainer(config, world_of(), print)
        (batch,) = trainer.batches(trainer.mesh.dp_rank)
        seq = trainer.parallel.sequence(cu_seqlens=batch.cu_seqlens)
        return [torch.tensor(trainer.mesh.dp_rank), batch.tokens, seq.indices]

    ranks = spmd_processes(4, views)
    assert [int(r[0]) for r in ranks] == [0, 0, 1, 1]
    assert torch.equal(ranks[0][1], ranks[1][1]) and torch.equal(ranks[2][1], ranks[3][1])
    assert not torch.equal(ranks[0][1], ranks[2][1])
    for pair in (ranks[:2], ranks[2:]):
        assert sorted(torch.cat([pair[0][2], pair[1][2]]).tolist()) == list(range(len(pair[0][1])))


def test_a_checkpoint_of_two_sharded_ranks_continues_on_one(small_run, world, world_of):
    config = small_run(steps=4, checkpoint_every=2, cp=2, shard=True, validate=0, sample=2, compare_steps=0)
    assert spmd_processes(2, lambda: run(config, world_of())) == [0, 0]
    together = losses(config)
    shutil.rmtree(Path(config.out) / "step-00000004")
    run(small_run(steps=4, checkpoint_every=2, validate=0, sample=2, resume=True), world)
    alone = losses(config)
    assert alone[:2] == together[:2]
    for a, b in zip(alone[2:], together[2:], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_sharded_ranks_resume_to_the_bit(small_run, world_of):
    settings = {"steps": 4, "checkpoint_every": 2, "cp": 2, "shard": True, "validate": 0, "sample": 0}
    config = small_run(**settings)
    spmd_processes(2, lambda: run(config, world_of()))
    before, files = losses(config), files_of(config.out, 4)
    shutil.rmtree(Path(config.out) / "step-00000004")
    spmd_processes(2, lambda: run(small_run(**settings, resume=True), world_of()))
    assert losses(config) == before and files_of(config.out, 4) == files


def test_all_ranks_resume_if_one_was_started_again(small_run, world_of, monkeypatch):
    class Asked(Exception):
        pass

    def trainer(config, world, say):
        raise Asked(config.resume)

    def start(who: int) -> torch.Tensor:
        with pytest.raises(Asked) as caught:
            run(small_run(resume=dist.get_rank() == who), world_of())
        return torch.tensor(caught.value.args[0])

    monkeypatch.setattr("distflash.train.loop.Trainer", trainer)
    assert all(map(torch.all, spmd_processes(2, lambda: start(1))))
    assert not any(map(torch.any, spmd_processes(2, lambda: start(2))))


@pytest.mark.parametrize("settings", [{"cp": 2}, {"cp": 1, "accumulate": 2}, {"cp": 2, "shard": True, "recompute": True}])
def test_two_ranks_compare_equal_with_one_process(small_run, world_of, settings):
    config = small_run(steps=3, compare_steps=3, checkpoint_every=0, validate=0, sample=0, **settings)
    assert spmd_processes(2, lambda: run(config, world_of())) == [0, 0]
    facts = json.loads((Path(config.out) / "compare.json").read_text())
    assert facts["small"] and 0 < facts["value"] <= 1e-5 and facts["steps"] == 3


def test_a_run_whose_gradients_are_wrong_fails(small_run, world_of, monkeypatch):
    config = small_run(steps=3, compare_steps=1, cp=2)
    monkeypatch.setattr(Replicas, "average_gradients", lambda self: None)
    assert spmd_processes(2, lambda: run(config, world_of())) == [1, 1]
    facts = json.loads((Path(config.out) / "compare.json").read_text())
    assert not facts["small"] and facts["value"] > 1e-2 and "gradient of" in facts["where"]


def test_a_figure_that_json_has_no_number_for_is_null(small_run, world_of, world, monkeypatch):
    def strict(config, name):
        return json.loads((Path(config.out) / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    config = small_run(steps=1, checkpoint_every=0, sample=0)
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: math.nan)
    assert run(config, world) == 0
    assert strict(config, "summary.json")["validation_loss"] is None
    config = small_run(steps=3, compare_steps=1, cp=2)
    monkeypatch.setattr(Replicas, "average_gradients", lambda self: next(self.model.parameters()).grad.fill_(math.nan))
    assert spmd_processes(2, lambda: run(config, world_of())) == [1, 1]
    facts = strict(config, "compare.json")
    assert facts["value"] is None and not facts["small"] and "gradient of" in facts["where"]


def test_ranks_with_different_data_are_stopped(small_run, world_of, tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_text(f"rank {rank} " * 50)

    def start():
        with pytest.raises(ValueError, match="ranks have read different data"):
            Trainer(small_run(data=(str(tmp_path / f"{dist.get_rank()}.txt"),)), world_of(), print)

    spmd_processes(2, start)


def test_all_ranks_stop_when_the_main_rank_cannot_save(small_run, world_of, tmp_path):
    config = small_run(steps=2, checkpoint_every=1, cp=2)

    def start():
        trainer = Trainer(config, world_of(), print)
        trainer.backward()
        trainer.update()
        blocked = tmp_path / "blocked"
        if dist.get_rank() == 0:
            blocked.write_text("a file where a folder should be")
        dist.barrier()
        with pytest.raises(CheckpointError, match="could not be written" if dist.get_rank() == 0 else "main rank could not write"):
            trainer.save(blocked)

    spmd_processes(2, start)


def test_a_loss_that_is_not_a_number_stops_the_run(small_run, world, monkeypatch):
    monkeypatch.setattr(Trainer, "backward", lambda self: (float("nan"), 1, 1))
    with pytest.raises(RuntimeError, match="loss is nan at step 1: lower --lr"):
        run(small_run(), world)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate(s, steps=100, warmup=10, peak=1.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, steps=1, warmup=0, peak=1.0) == 1.0


def test_only_matrices_decay(small_run, world):
    model = Trainer(small_run(), world, print).placement.model
    decay, rest = make_optimizer(model, 1e-3, 0.1).param_groups
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decay["params"])
    assert any(p is model.embed.weight for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_library_is_called_with_the_schemes_asked_for(small_run, world_of):
    config = small_run(cp=2, layout="contiguous", order="all_gather", ulysses=2, staging="1MiB")

    def start():
        sp = Trainer(config, world_of(), print).parallel
        assert isinstance(sp, distflash.SequenceParallel)
        assert (sp.layout, sp.order, sp.ulysses, sp.staging) == ("contiguous", "all_gather", 2, 1 << 20)

    spmd_processes(2, start)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_no_parameter(small_run, world, monkeypatch, bad):
    trainer = Trainer(small_run(), world, print)
    trainer.backward()
    parameters = list(trainer.placement.model.parameters())
    before = [p.detach().clone() for p in parameters]
    assert parameters[3].grad is not None
    parameters[3].grad.view(-1)[0] = bad
    with pytest.raises(RuntimeError, match=r"norm of the gradient is (inf|nan) at step 1: lower --lr"):
        trainer.update()
    assert all(map(torch.equal, before, parameters))


def test_an_infinite_loss_stops_the_run(small_run, world, monkeypatch):
    monkeypatch.setattr(Trainer, "backward", lambda self: (float("inf"), 1, 1))
    with pytest.raises(RuntimeError, match="loss is inf at step 1"):
        run(small_run(), world)


@pytest.mark.parametrize("shard", [False, True])
def test_parameters_that_are_not_finite_are_no_checkpoint_on_any_rank(small_run, world_of, shard):
    config = small_run(cp=2, shard=shard)

    def start():
        trainer = Trainer(config, world_of(), print)
        trainer.backward()
        trainer.update()
        trainer.save(Path(config.out))
        trainer.backward()
        trainer.update()
        parameter = local(next(iter(trainer.placement.model.parameters()))).detach()
        if dist.get_rank() == 1:
            parameter.view(-1)[-1] = float("nan")
        with pytest.raises(RuntimeError, match="value of a parameter or a moment is nan at step 2"):
            trainer.save(Path(config.out))

    spmd_processes(2, start)
    assert [p.name for p in Path(config.out).glob("*step-*")] == ["step-00000001"]


def test_what_an_error_advises_is_possible_another_learning_rate_resumes_the_run(small_run, world, capsys):
    run(small_run(steps=3, validate=0, sample=0), world)
    lower = small_run(steps=4, validate=0, sample=0, resume=True, lr=1e-3, warmup=3, clip=0.5, weight_decay=0.2)
    assert run(lower, world) == 0
    said = capsys.readouterr().out
    assert "--lr was 0.003 until step 3, and is 0.001 from here on" in said and "--weight-decay was 0.1 until step 3" in said


def test_a_finished_run_whose_metrics_are_gone_is_resumed_all_the_same(small_run, world, capsys):
    config = small_run(steps=2, checkpoint_every=1, sample=0)
    run(config, world)
    (Path(config.out) / "metrics.jsonl").unlink()
    assert run(small_run(steps=2, checkpoint_every=1, sample=0, resume=True), world) == 0
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary["final_loss"] is None and summary["validation_loss"] > 0


@pytest.mark.parametrize("file", ["metrics.jsonl", "loss.png"])
def test_a_report_on_a_full_disk_is_an_error_with_a_cure(small_run, world, monkeypatch, file):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == "loss.png":
        monkeypatch.setattr("distflash.train.report.plot_losses", full)
    else:
        monkeypatch.setattr("distflash.train.report.json.dumps", full)
    with pytest.raises(RuntimeError, match=r"report of the run could not be written to .* \(No space left on device\): free space"):
        run(small_run(steps=1, validate=0, sample=0), world)


def test_a_run_goes_on_where_its_data_and_its_folder_are_in_one_folder(small_run, world, tmp_path):
    (tmp_path / "text.txt").write_text("all work and no play " * 50)
    config = {"steps": 2, "checkpoint_every": 1, "validate": 0, "sample": 0, "data": (str(tmp_path),)}
    run(small_run(**config), world)
    run(small_run(**config), world)  # the first is moved aside, into the data's folder too
    assert run(small_run(**config | {"steps": 3, "resume": True}), world) == 0
