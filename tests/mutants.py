"""Seeded bugs: each must be caught by the test that is named with it. `make mutants` runs all, `python tests/mutants.py NAME ...` some.

`--record FILE` writes what came of it as JSON.

A mutant replaces one piece of text, which must occur exactly once in its file, in a copy of the package, and runs the named tests
there. It is killed if they fail; tests that cannot be collected or are not found are an error of the record, not a kill. First the
same tests must pass without any mutant.

To add one: a line in MUTANTS, with a test of a second or less that you saw pass; make the bug one that somebody could write, and
one that a test answers at once (a rank that waits for a message that never comes costs two minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 60.0  # seconds a mutant's tests may take; a hang is a kill, but a slow one
PASSED, FAILED = 0, 1  # pytest's exit codes


class Mutant(NamedTuple):
    """`old` becomes `new` in distflash/`file`, and `test` must fail."""

    file: str
    old: str
    new: str
    test: str


SCHEME = "parallel/test_ring.py::test_every_scheme_gives_the_gradients_of_dense_attention"
RING = f"{SCHEME}[zigzag-ring-3]"
COVERAGE = "parallel/test_plan.py::test_every_allowed_pair_is_in_exactly_one_tile_whatever_the_order_and_the_mask"
ULYSSES = "parallel/test_ulysses.py::test_uneven_and_shared_heads_give_the_gradients_of_dense_attention"
FP32 = "parallel/test_ring.py::test_partial_results_are_kept_in_fp32_until_the_last_hop"
MERGE = "parallel/test_merge.py"
HEADS = "kernels/test_eager.py::test_grouped_heads"
BAD_CALL = "test_api.py::test_a_bad_call_on_one_device_says_what_is_wrong_and_what_to_do"
AGREE = "parallel/test_agreement.py::test_a_rank_that_is_about_to_do_otherwise_raises_on_every_rank_and_is_named_with_both_values"
VARIANTS = "test_variants.py::test_every_scheme_gives_the_gradients_of_dense_attention"
VARIANT = "test_variants.py::test_each_variant_alone_with_grouped_heads_and_other_value_dims"
CLOSED_FORMS = "cost/test_traffic.py::test_the_closed_forms_of_the_field_are_what_the_plan_counts"
FLASH = "integrations/test_flash_attn.py"
CAUSE = "launch/test_run.py::test_the_cause_is_told_from_its_consequences"
LEAVES_OUT = (
    "launch/test_heartbeat.py::test_a_rank_that_leaves_one_backward_out_of_many_is_named_and_over_gloo_nothing_is_taken_for_gradients"
)
LETS_GO = "launch/test_heartbeat.py::test_whoever_has_lost_a_rank_of_its_host_lets_it_end_first_and_its_own_verdict_is_no_news_to_it"
LOSS = "parallel/test_loss.py::test_averaged_gradients_of_all_ranks_are_those_of_one_process"

AUTOCAST = "parallel/test_autograd.py::test_autocast_outside_of_attention_reaches_nothing_inside"
DIRECT = "parallel/test_direct.py::test_every_scheme_gives_the_gradients_of_dense_attention"
STAGING = "parallel/test_staging.py"
AT_ONCE = f"{STAGING}::test_several_blocks_at_once_give_the_gradients_of_dense_attention"
GROUPS = "parallel/test_all_to_all.py::test_no_bit_depends_on_the_number_of_groups"
HALVES = "parallel/test_direct.py::test_halves_of_the_own_block_keep_what_the_block_keeps"
MUTANTS = {
    # copies between memories
    "a block is published over one that is being read": Mutant(
        "parallel/direct.py", "window.writable(*self.others())  # who", "pass  # who", f"{DIRECT}[zigzag-ring-2]"),
    "of three parts of a gradient the middle one is forgotten": Mutant(
        "parallel/direct.py", "first.add_(part)", "pass", f"{DIRECT}[zigzag-ring-3]"),
    "the last half of the own block has no keys": Mutant(
        "parallel/plan.py", "(Part(own.owner, last),), more", "(Part(own.owner, range(0)),), more", HALVES),
    "a reader is taken to have a gradient of every token": Mutant(
        "parallel/plan.py", "found[reader] = meet(cut(layout[reader], mask.pieces), layout[rank], lengths(layout)[reader]).keys",
        "found[reader] = range(lengths(layout)[rank])",
        "parallel/test_direct.py::test_readers_and_visits_say_the_same_of_every_pair_of_ranks"),
    "the band of a tile's part is not moved": Mutant(
        "tile.py", "Band(self.band.lo - ahead, self.band.hi - ahead)).cropped() if start",
        "Band(self.band.lo, self.band.hi)).cropped() if start", HALVES),
    "two ranks have one place in a third one's window": Mutant(
        "parallel/wire/symmetric.py", "nbytes * (other - (other > owner))", "nbytes * (other > owner)", f"{DIRECT}[zigzag-ring-3]"),
    "every group of heads has the slopes of the first": Mutant(
        "parallel/autograd.py", "self.ulysses.mine(group)", "self.ulysses.mine(0)", f"{GROUPS}[dtype0-6-6-3]"),
    "heads come home by group and not by rank": Mutant(
        "parallel/all_to_all.py",
        "for source in range(self.wire.size)\n            for done, places in zip(self.done, self.brought, strict=True)\n",
        "for done, places in zip(self.done, self.brought, strict=True)\n            for source in range(self.wire.size)\n",
        f"{GROUPS}[dtype0-6-6-3]"),
    "attention does not wait for its heads": Mutant(
        "parallel/all_to_all.py", "self.wire.after(self.coming[group])", "pass",
        "parallel/test_all_to_all.py::test_a_group_comes_while_the_one_before_it_is_worked_on_and_goes_home_while_the_next_is"),
    "a group of heads sets out when it is needed": Mutant(
        "parallel/all_to_all.py",
        "if group + 1 < len(self.laid):\n            self._pull(group + 1)\n", "if group:\n            self._pull(group)\n",
        "parallel/test_all_to_all.py::test_a_group_comes_while_the_one_before_it_is_worked_on_and_goes_home_while_the_next_is"),
    "a visit's part of a block has the positions of the whole": Mutant(
        "parallel/positions.py", "self._keys[part.owner], device)[part.keys.start : part.keys.stop]", "self._keys[part.owner], device)",
        "parallel/test_direct.py::test_variants_know_the_positions_of_the_part_of_a_block_that_came"),
    # staging
    "a block of several is copied over the first": Mutant(
        "parallel/plan.py", "slice(at, at := at + len(part.keys))", "slice(0, at := len(part.keys))", f"{AT_ONCE}[zigzag-3]"),
    "the tiles of the second of two blocks are those of the first's keys": Mutant(
        "parallel/plan.py", "kv=slice(t.kv.start + at, t.kv.stop + at)", "kv=t.kv", f"{AT_ONCE}[contiguous-3]"),
    "the gradients of all blocks of a visit go to the first's owner": Mutant(
        "parallel/direct.py", "self._of(part.owner, self.wire.rank), grads", "self._of(visit.owner, self.wire.rank), grads",
        f"{AT_ONCE}[contiguous-3]"),
    "blocks come as early as the order says, whatever the limit": Mutant(
        "parallel/staging.py", "found = order.within(limit // block)", "found = order",
        f"{STAGING}::test_messages_are_no_more_than_the_limit_allows[2-2]"),
    "copies take one block more than the limit allows": Mutant(
        "parallel/plan.py", "here + waiting[0].tiles.kv_len <= room", "here <= room",
        f"{STAGING}::test_visits_of_several_blocks_keep_what_the_blocks_keep_and_fit_into_the_limit[zigzag]"),
    "a deterministic call sums what memory lets it sum at once": Mutant(
        "parallel/staging.py", "None if one_each else PACE", "PACE", f"{STAGING}::test_no_bit_depends_on_the_limit[4-symmetric]"),
    "hosts of unequal size count as one": Mutant(
        "parallel/wire/p2p.py", "    return 1, f", "    return len(hosts), f",
        "parallel/test_direct.py::test_ranks_of_hosts_that_hold_unequal_or_scattered_runs_of_them_are_not_taken_to_share_one[aaab-1]"),
    "borders of documents need not begin at 0": Mutant(
        "parallel/slices.py", "len(cu) < 2 or cu[0] != 0", "len(cu) < 2",
        "parallel/test_slices.py::test_borders_that_would_be_taken_for_others_are_refused"),
    "ranks without work are left out of the efficiency": Mutant(
        "cost/simulate.py", "Timeline(busy=dict.fromkeys(range(len(ranks)), 0.0))", "Timeline(busy=dict.fromkeys(range(1), 0.0))",
        "cost/test_simulate.py::test_ranks_without_work_count_among_those_that_could_compute[1]"),
    "the formula of memory forgets the gradient on its way": Mutant(
        "cost/memory.py", "moving = mine", "moving = 0",
        f"{STAGING}::test_the_formula_of_peak_memory_counts_every_byte[copies-4-all_gather-3-zigzag]"),
    "lines of statistics are counted without their padding": Mutant(
        "kernels/hopper/gradients.py", "(2 * _padded(tokens) +", "(2 * tokens +",
        "cost/test_memory.py::test_every_byte_that_a_kernel_allocates_is_counted[1-250-64-one pass]"),
    "the model forgets what flags take of the host": Mutant(
        "cost/copied.py", "max(total, rounds * link.host)", "total",
        "cost/test_copied.py::test_a_call_is_no_shorter_than_what_its_rounds_of_flags_take_of_the_host"),
    "plans of every mask are kept": Mutant(
        "parallel/planning.py", "lru_cache(KEPT)(partial(plan,", "lru_cache(None)(partial(plan,",
        f"{STAGING}::test_plans_of_masks_that_are_over_are_forgotten[p2p]"),
    "copies keep pace with all heads and not with a rank's": Mutant(
        "parallel/planning.py", "self._copied(visits, space, kv_heads, heads,", "self._copied(visits, space, shape.kv_heads, shape.heads,",
        f"{STAGING}::test_the_model_looks_at_the_visits_that_are_carried_out[8-2-16-1-8192]"),
    # the Hopper kernels' work list
    "of Q's columns that are not in registers, all meet the first of K's": Mutant(
        "kernels/hopper/products.py", "b.slice(at, COLUMNS, 1)", "b.slice(0, COLUMNS, 1)",
        "kernels/test_hopper_forward.py::test_variants_with_many_items_a_program[128-held64]"),
    "rows skip a tile that the lower ones of them reach": Mutant(
        "kernels/hopper/schedule.py", "> upper + 63 + hi", "> upper + hi",
        "kernels/test_hopper_schedule.py::test_who_is_spared_a_tile_or_its_mask_does_not_need_it"),
    "rows need no mask left of the tile that they need it in": Mutant(
        "kernels/hopper/schedule.py", "(inner + 1) * width <=", "inner * width <=",
        "kernels/test_hopper_schedule.py::test_on_the_diagonal_a_consumer_skips_what_is_right_of_it_and_masks_nothing_left_of_it"),
    "the running maximum never moves": Mutant(
        "kernels/hopper/forward.py", "top = gl.maximum(m, gl.max(s, 1) * qs)", "top = m",
        "kernels/test_hopper_forward.py::test_a_maximum_that_every_tile_raises[leaps]"),
    "slots that were given back last are not taken back": Mutant(
        "kernels/hopper/feed.py", "gl.maximum(it, NB), it + NB", "it, it + gl.minimum(it, NB)",
        "kernels/test_hopper_forward.py::test_every_kind_of_mask[64-named-one pair]"),
    "a thread sums every second of its weights": Mutant(
        "kernels/hopper/products.py", "gl.sum(gl.sum(x.reshape([64, columns // 8, 4, 2]), 3), 1)",
        "gl.sum(x.reshape([64, columns // 8, 4, 2])[:, :, :, 0], 1)",
        "kernels/test_hopper_forward.py::test_every_kind_of_mask[128-None-causal]"),
    "the last tile of queries reads statistics of the next head": Mutant(
        "kernels/hopper/gradients.py", "(tokens + _TILE - 1)", "tokens",
        "kernels/test_hopper_emulated.py::test_a_nan_stays_in_its_batch_element[64-False]"),
    "of a last round's pieces only the first counts": Mutant(
        "kernels/hopper/gradients.py", "part.sum(0)", "part[0]",
        "kernels/test_hopper_emulated.py::test_the_last_round_of_a_rectangle_is_split_by_queries[inside]"),
    "a last round's queries are those of other heads": Mutant(
        "kernels/hopper/last_round.py", "x[-1, self.rows, self.heads.start * group :", "x[-1, self.rows, 0 :",
        "kernels/test_hopper_emulated.py::test_the_last_round_of_a_rectangle_is_split_by_queries[inside]"),
    "a row that met a NaN says that it saw nothing": Mutant(
        "kernels/hopper/forward.py", 'gl.where(l == 0.0, float("-inf"), (m', 'gl.where((l == 0.0) | (l != l), float("-inf"), (m',
        "kernels/test_hopper_forward.py::test_a_row_that_meets_a_nan_says_so_in_its_lse[64]"),
    "an item's line comes where the one before it stands": Mutant(
        "kernels/hopper/feed.py", "dealt.index(2 * (r % 2)))", "dealt.index(0))",
        "kernels/test_hopper_forward.py::test_variants_with_many_items_a_program[128-one_q]"),
    "a tile that rows are spared is no turn": Mutant(
        "kernels/hopper/forward.py", "                take_turn(cid, TURNS)\n                pass_turn(cid, TURNS)\n", "",
        "kernels/test_hopper_forward.py::test_every_kind_of_mask[64-None-full]"),
    "a first tile that rows are spared is no turn": Mutant(
        "kernels/hopper/forward.py",
        "            take_turn(cid, TURNS)\n            pass_turn(cid, TURNS)\n        pidx", "            pass\n        pidx",
        "kernels/test_hopper_forward.py::test_every_kind_of_mask[64-None-causal]"),
    "a window's masks look at one bound": Mutant(
        "kernels/hopper/host.py", "1 if config.one_bound and not work.left else 2", "1",
        "kernels/test_hopper_forward.py::test_every_kind_of_mask[64-None-window]"),
    "the left bound counts where a segment is one tile": Mutant(
        "kernels/hopper/schedule.py", "bool(table[:, 4].any())", "bool((table[:, 4] > 1).any())",
        "kernels/test_hopper_schedule.py::test_each_kept_pair_is_computed_once"),
    "dQ is stored as it was computed, transposed": Mutant(
        "kernels/hopper/backward.py", "dq_s.permute([1, 0]).store(dqt)", "dq_s.store(dqt)",
        "kernels/test_hopper_emulated.py::test_every_kind_of_mask[64-False-causal]"),
    "a part of out overwrites the one that is leaving": Mutant(
        "kernels/hopper/out.py", "        if OWN:\n            tma.store_wait(0)\n", "",
        "kernels/test_hopper_forward.py::test_rows_that_share_a_box_of_out_with_another_document_are_left_alone"),
    "kernels read the queries that see nothing": Mutant(
        "parallel/autograd.py", "if self.blind:", "if not self.scale:", "parallel/test_unseen.py"),
    "kernels read keys that nobody sees": Mutant(
        "parallel/autograd.py", "if not self.unseen:", "if self.scale:", "parallel/test_unseen.py"),
    # layout, mask, plan
    "zigzag gives early chunks only": Mutant(
        "parallel/layout.py", "for c in (r, 2 * ranks - 1 - r))", "for c in (r, ranks + r))",
        "parallel/test_plan.py::test_zigzag_gives_every_rank_the_same_causal_work_where_chunks_divide"),
    "a Ulysses group is gathered backwards": Mutant(
        "parallel/layout.py", "for spans in group for span in spans", "for spans in group[::-1] for span in spans",
        "parallel/test_layout.py::test_gathered_is_the_inverse_of_split_and_spans_are_joined_again"),
    "document borders are off by one": Mutant(
        "parallel/mask.py", "for token in (start, stop))", "for token in (start, stop + 1))", f"{COVERAGE}[zigzag-2]"),
    "documents are forgotten": Mutant(
        "validate.py", "Mask(*window(causal, window_size), cu_q)", "Mask(*window(causal, window_size))", RING),
    "the window is one token too wide": Mutant(
        "parallel/mask.py", "(shift + hi) // step", "(shift + hi + 1) // step", f"{COVERAGE}[contiguous-1]"),
    "the left side of the window is dropped": Mutant(
        "parallel/mask.py", "max(-((-shift - lo) // step), -far)", "-far",
        f"{COVERAGE}[contiguous-1]"),
    "a band of stripes is rounded down on both sides": Mutant(
        "parallel/mask.py", "-((-shift - lo) // step)", "(shift + lo) // step", f"{COVERAGE}[striped-2]"),
    "causal is top-left aligned": Mutant(
        "parallel/mask.py", "shift = (k1 - k0) - (q1 - q0)", "shift = 0",
        "parallel/test_mask.py::test_causal_is_bottom_right_aligned"),
    "a tile's band is not moved when it is cropped": Mutant(
        "tile.py", "Band(lo - j0 + i0, hi - j0 + i0)", "self.band", f"{COVERAGE}[contiguous-3]"),
    "a hop's tiles are dropped from the plan": Mutant(
        "parallel/plan.py", "if ways.needed(rank, owner) else", "if ways.needed(rank, owner) and now != 1 else", f"{COVERAGE}[zigzag-2]"),
    "the hop between hosts sets out too late": Mutant(
        "parallel/plan.py", "t - (per_node if t % per_node == 0 else 1)", "t",
        "parallel/test_plan.py::test_owner_tables_are_permutations_that_start_at_home"),
    "a gradient goes where its block came from": Mutant(
        "parallel/plan.py", "else self.order.holder(block, now + 1)", "else self.order.holder(block, now - 1)",
        "parallel/test_plan.py::test_a_gradient_comes_home_with_one_part_of_every_rank_that_keeps_something[3]"),
    "a block is passed on by a rank that skipped it": Mutant(
        "parallel/plan.py", "return holder if self.needed(holder, block) else block", "return holder",
        "parallel/test_plan.py::test_a_block_comes_once_to_whoever_keeps_something_of_it_and_to_nobody_else[4]"),
    "a block is sent to a rank that skips it": Mutant(
        "parallel/plan.py", "giver(block) == self.rank and self.needed(after, block) else", "giver(block) == self.rank else",
        "parallel/test_plan.py::test_what_a_rank_sends_is_what_its_receiver_expects_and_nobody_waits_in_a_circle[4]"),
    "a rank that needs one block is taken to need no other": Mutant(
        "parallel/mask.py", "if found[rank] == everyone:", "if found[rank]:",
        "parallel/test_plan.py::test_who_needs_whom_is_what_the_tiles_say"),
    "causal slices are top-left aligned": Mutant(
        "parallel/slices.py", "hi = n - m", "hi = 0", "parallel/test_slices.py::test_each_kind_is_aligned_as_documented"),
    "the sweep over slices forgets those that began before": Mutant(
        "parallel/slices.py", "(kv.start - widest, 0)", "(kv.start, 0)",
        "parallel/test_slices.py::test_slices_are_refused_if_and_only_if_two_of_them_keep_one_pair"),
    "the mask of a call is dropped": Mutant(
        "validate.py", "    _check_slices(mask, cu_q, cu_k)\n    return mask",
        "    return Mask(*window(causal, window_size), cu_q)",
        "parallel/test_slices.py::test_documents_and_slices_inside_them_go_together"),
    "balanced counts tokens for work": Mutant(
        "parallel/layout.py", "+= kept(run)", "+= len(run.span)",
        "parallel/test_sequence.py::test_balanced_shares_out_the_work_of_the_mask_it_is_given"),
    "indices that are kept were made in inference mode": Mutant(
        "parallel/shards.py", "@torch.inference_mode(False)  # kept for later calls, also those that autograd sees\n", "",
        "parallel/test_sequence.py::test_what_a_sequence_keeps_serves_training_also_if_it_was_made_for_inference"),
    # merge, ring, autograd
    "autocast reaches the matmuls of a forward": Mutant(
        "parallel/autograd.py", "@in_its_own_dtypes\ndef _forward(", "def _forward(", f"{AUTOCAST}[forward-dtype0-eager]"),
    "autocast reaches the matmuls of a backward": Mutant(
        "parallel/autograd.py", "@in_its_own_dtypes\ndef _backward(", "def _backward(", f"{AUTOCAST}[backward-dtype0-eager]"),
    "what an empty part holds leaks through a product with 0": Mutant(
        "parallel/merge.py", "torch.where(seen, share * out, 0.0)", "share * out", MERGE),
    "a merge does not subtract the maximum": Mutant(
        "parallel/merge.py", 'torch.where(top > float("-inf"), top, 0.0)', "torch.zeros_like(top)", MERGE),
    "a sink joins lse and not the output": Mutant(
        "parallel/merge.py", "out.to(lse.dtype) * share", "out.to(lse.dtype) * torch.ones_like(share)",
        "test_sinks.py::test_large_sinks_neither_overflow_nor_lose_their_gradient"),
    "the gradient of a sink is what is left of 1 - share": Mutant(
        "parallel/merge.py", "torch.exp(torch.nn.functional.logsigmoid(finite - sink))", "torch.sigmoid(finite - sink)",
        "test_sinks.py::test_the_gradient_of_a_small_sink_keeps_its_digits"),
    "a row without a key forgets its sink": Mutant(
        "parallel/merge.py", "torch.logaddexp(finite, sink), sink)", "torch.logaddexp(finite, sink), lse)",
        "test_sinks.py::test_a_row_that_sees_no_key_sees_its_sink_alone"),
    "lse has the wrong sign in a merge": Mutant(
        "parallel/merge.py", "top + torch.log(total)", "top - torch.log(total)", MERGE),
    "a visit is skipped": Mutant(
        "parallel/ring.py", "if visit.tiles or visit.step == last:", "if visit.step in (0, last):", RING),
    "keys and values of a message are swapped": Mutant(
        "parallel/messages.py", "[(message, (k, v))] = ", "[(message, (v, k))] = ", RING),
    "backward reads the first hop's keys": Mutant(
        "parallel/ring.py", "dout, q, k_t, v_t, lse, delta", "dout, q, k, v, lse, delta", f"{SCHEME}[zigzag-ring-2]"),
    "a rank replaces the gradients that arrive by its own": Mutant(
        "parallel/messages.py", "x.add_(y)", "x.copy_(y)", RING),
    "a gradient that comes home replaces what stayed there": Mutant(
        "parallel/messages.py", "_added(arrived[home.ours][1], self.ours)", "arrived[home.ours][1]", f"{SCHEME}[contiguous-ring-4]"),
    "outputs are rounded at every hop": Mutant(
        "parallel/ring.py", "acc=acc, dtype=q.dtype if visit.step == last else None", "acc=acc, dtype=q.dtype", FP32),
    "dq is rounded at every hop": Mutant(
        "parallel/ring.py", "dq_dtype=q.dtype if visit.step == last else None", "dq_dtype=q.dtype", FP32),
    "gradients travel in 16 bits": Mutant(
        "parallel/ring.py", "dkv_dtype=gradients.taken", "dkv_dtype=dkv_dtype", FP32),
    "messages of every hop are kept": Mutant(
        "parallel/messages.py", "coming.pop(step).receive()", "(held := [*(held if step > 1 else ()), coming.pop(step)])[-1].receive()",
        "parallel/test_ring.py::test_a_ring_holds_two_messages_at_a_time_whatever_the_number_of_ranks[5]"),
    "delta is missing": Mutant(
        "parallel/autograd.py", "scheme.kernel.delta(out, dout)", "scheme.kernel.delta(out, dout) * 0", RING),
    "the gradient of lse has the wrong sign": Mutant("parallel/autograd.py", "delta - dlse", "delta + dlse", RING),
    "the gradient of lse is dropped": Mutant("parallel/autograd.py", "if dlse is not None:", "if False:", RING),
    # Ulysses, sequence, loss
    "heads are put together in the wrong order": Mutant(
        "parallel/all_to_all.py",
        "give[rank] for rank in range(self.wire.size)]", "give[rank] for rank in reversed(range(self.wire.size))]",
        f"{ULYSSES}[zigzag-6-6-4-4]"),
    "the ranks that share a key head are not summed": Mutant(
        "parallel/all_to_all.py", "heads.stop] += part", "heads.stop] = part", f"{ULYSSES}[zigzag-8-2-4-4]"),
    "shared key heads are summed in 16 bits": Mutant(
        "parallel/autograd.py", "accumulator(k.dtype) if ulysses.shared else k.dtype", "k.dtype",
        "parallel/test_ulysses.py::test_shared_key_heads_are_summed_in_fp32"),
    "positions are off by one": Mutant(
        "parallel/shards.py", "indices, right=True) - 1]", "indices, right=False) - 1]",
        "parallel/test_sequence.py::test_indices_are_a_partition_and_positions_count_from_the_documents_start"),
    "positions do not start anew with a document": Mutant(
        "parallel/shards.py", "= indices - borders[", "= indices - 0 * borders[",
        "parallel/test_sequence.py::test_indices_are_a_partition_and_positions_count_from_the_documents_start"),
    "the gradient of unshard forgets the other ranks": Mutant(
        "parallel/shards.py", "for part in parts[1:]), start=parts[0].to(wide))",
        "for part in parts[:0]), start=parts[wire.rank].to(wide))",
        "parallel/test_sequence.py::test_shard_and_unshard_are_each_others_exact_adjoint"),
    "the gradient of the loss is P times too large": Mutant(
        "parallel/loss.py", "_Sum.apply(grad, *ctx.how), None", "_Sum.apply(ctx.how[0](grad), *ctx.how), None", LOSS),
    "the gradient of the loss is P times too small": Mutant(
        "parallel/loss.py", "_Sum.apply(grad, *ctx.how), None", "grad, None", LOSS),
    "a second derivative of the loss knows one rank": Mutant(
        "parallel/loss.py", "_Sum.apply(grad, *ctx.how), None", "ctx.how[0](grad), None",
        "parallel/test_loss.py::test_a_second_derivative_is_that_of_one_process_on_every_rank[2]"),
    "the loss is a mean of means": Mutant(
        "parallel/loss.py", "torch.stack([kept.sum(dtype=torch.float64), count])",
        "torch.stack([kept.sum(dtype=torch.float64) / count, torch.ones_like(count)])",
        "parallel/test_loss.py::test_it_is_the_mean_of_the_valid_tokens_and_not_of_the_ranks_means"),
    "ignored tokens are multiplied by 0": Mutant(
        "parallel/loss.py", "torch.where(ignore, 0.0, per_token_loss)", "per_token_loss * ~ignore",
        "parallel/test_loss.py::test_what_an_ignored_token_holds_is_not_read_not_even_nan"),
    # agreement
    "ranks do not compare whether gradients will follow": Mutant(
        "preparation.py", "gradients=needs_gradients(q, k, v) if gradients is None else gradients", "gradients=True",
        f"{AGREE}[gradients]"),
    "a rank compares its note with one other only": Mutant(
        "parallel/agreement.py", "said.get(name) for said in notes})", "said.get(name) for said in notes[:2]})",
        "parallel/test_agreement.py::test_what_differs_is_named_and_nothing_else"),
    "ranks compare notes after the first message": Mutant(
        "parallel/sequence.py",
        'self.agree("unshard", dim=dim, other_dims=kept, dtype=x_local.dtype, gradients=needs_gradients(x_local))\n'
        "        return Unshard.apply(x_local, self.sp.wire, self._tokens, dim, begin)",
        "whole = Unshard.apply(x_local, self.sp.wire, self._tokens, dim, begin)\n"
        '        self.agree("unshard", dim=dim, other_dims=kept, dtype=x_local.dtype)\n'
        "        return whole",
        "parallel/test_agreement.py::test_shards_to_be_gathered_must_fit_together"),
    "kinds of calls are told apart by the names of their fields": Mutant(
        "parallel/agreement.py", "(call, *fields.items())", "(call, *fields)",
        "parallel/test_agreement.py::test_each_kind_is_compared_once_or_always_or_never"),
    "long values are compared by their beginning": Mutant(
        "parallel/agreement.py", "{blake2b(text.encode(), digest_size=8).hexdigest()}", "unknown",
        "parallel/test_agreement.py::test_long_values_are_shortened_and_still_told_apart"),
    "what a rank refuses is not told": Mutant(
        "parallel/agreement.py", "if _REFUSED in said]", "if _REFUSED in notes]",
        "parallel/test_agreement.py::test_what_one_rank_refuses_is_raised_on_every_rank_and_they_can_go_on_together[attention-first]"),
    "a message over gloo may be taken for one of another call": Mutant(
        "parallel/wire/p2p.py", "group_peer=rank, tag=tag)", "group_peer=rank)", f"{LEAVES_OUT}[attention-True]"),
    "a sum over gloo may be one of another call": Mutant(
        "parallel/wire/p2p.py", 'if x.device.type == "cpu":  # gloo', "if False:  # gloo", f"{LEAVES_OUT}[token_mean-True]"),
    "calls are counted and not told apart": Mutant(
        "parallel/wire/journal.py", "* _FACTOR + kind + 1)", "* _FACTOR + 1)",
        "parallel/wire/test_journal.py::test_whatever_was_left_out_added_or_swapped_shows_in_every_later_call"),
    "a call that was refused is taken for one that was made": Mutant(
        "parallel/wire/journal.py", "if ours.call == theirs.call else Made()", "if ours.call == theirs.call else None",
        "parallel/wire/test_journal.py::test_a_call_that_one_rank_refused_is_none_of_its_own"),
    # eager kernel
    "lse is in base 2": Mutant(
        "kernels/eager.py", "lse = (top + torch.log(total))", "lse = (top + torch.log2(total))", HEADS),
    "lse is the maximum alone": Mutant(
        "kernels/eager.py", "acc.lse[:, :, rows] = top + torch.log(total)", "acc.lse[:, :, rows] = top", RING),
    "the weights of a merge do not add up to 1": Mutant(
        "kernels/eager.py", "/ torch.where(total > 0, total, 1.0)).transpose", "/ torch.exp(torch.log(total + 1e-3))).transpose",
        "parallel/test_ring.py::test_the_weights_of_hops_add_up_to_one_whatever_the_size_of_the_scores"),
    "the scale is forgotten in the backward": Mutant(
        "kernels/eager.py", ".mul_(p).mul_(scale)", ".mul_(p)", HEADS),
    "query head h reads key head h modulo their number": Mutant(
        "kernels/eager.py", "x.unflatten(2, (kv_heads, -1))", "x.unflatten(2, (-1, kv_heads)).transpose(2, 3)",
        HEADS),
    "a tile is unmasked in the backward": Mutant(
        "kernels/eager.py", "p.unflatten(2, (-1, keep.shape[0])).masked_fill_(~keep.to(p.device), 0.0)", "pass", HEADS),
    "a block is cut on the right only": Mutant("kernels/eager.py", "keep = (offset >= lo) & (offset <= hi)", "keep = offset <= hi", HEADS),
    "the running dq is overwritten": Mutant(
        "kernels/eager.py", "contiguous_format) if dq is None else dq", "contiguous_format)",
        "kernels/test_eager.py::test_running_results_are_merged_and_running_gradients_added"),
    "rows with gaps between their elements are read as if they had none": Mutant(
        "kernels/eager.py", "x if x.stride(-1) == 1 else x.contiguous()", "x",
        "kernels/test_eager.py::test_rows_with_gaps_between_their_elements_are_read_as_they_are[full-dtype0]"),
    # other people's kernels
    "single keys are forgotten where one piece covers every row": Mutant(
        "kernels/adapters/adapter.py", "len(cut) == 1 and not len(single) and", "len(cut) == 1 and",
        "kernels/test_adapters.py::test_a_single_key_beside_one_piece_that_covers_every_row_is_not_forgotten[fa2]"),
    "fp16 has no number as small as what stands in for a gradient of lse": Mutant(
        "kernels/adapters/adapter.py", ".clamp(min=least)", "",
        "kernels/test_adapters.py::test_stand_ins_multiply_to_delta_and_leave_dout_alone_where_they_can[dtype1]"),
    "out' of a faint row passes the largest number of fp16": Mutant(
        "kernels/adapters/adapter.py", "faint = (size < raised) &", "faint = (top == 0) &",
        "kernels/test_adapters.py::test_gradients_of_lse_far_larger_and_smaller_than_those_of_out[fa2-dtype1-1.0-6e-08]"),
    # softcap, ALiBi, dropout
    "keys are taken to be where our own are": Mutant(
        "parallel/autograd.py", "positions.keys(visit.parts, device)", "positions.keys(self.visits[0].parts, device)",
        f"{VARIANTS}[zigzag-ring-2]"),
    "positions count from the shard's start": Mutant(
        "parallel/planning.py", "return Positions(self.spans[self.wire.rank], self.spans)",
        "return Positions(*[[range(n) for n in lengths(self.spans)][self.wire.rank : self.wire.rank + 1], self.spans])",
        f"{VARIANTS}[zigzag-ring-2]"),
    "queries are not aligned with the last keys": Mutant(
        "parallel/positions.py", "range(k1 - (q1 - q0), k1)", "range(q0, q1)",
        "test_variants.py::test_queries_and_keys_of_different_number_are_aligned_at_the_last"),
    "every Ulysses rank takes the slopes of the first heads": Mutant(
        "parallel/autograd.py", "slopes[:, mine.start : mine.stop]", "slopes[:, : mine.stop - mine.start]",
        "test_variants.py::test_uneven_heads_take_their_own_slopes_and_masks[3]"),
    "every Ulysses rank drops what the first heads drop": Mutant(
        "parallel/autograd.py", "0 if mine is None else mine.start)", "0)",
        "test_variants.py::test_uneven_heads_take_their_own_slopes_and_masks[3]"),
    "what is kept does not grow by 1 / (1 - p)": Mutant(
        "kernels/scores.py", ".to(s.dtype) / (1 - dropout.p)", ".to(s.dtype)", f"{VARIANT}[dropout-eager]"),
    "a p next to 1 drops nothing": Mutant(
        "kernels/scores.py", "return min(round(dropout.p * (_WORD + 1)), _WORD)", "return round(dropout.p * (_WORD + 1)) & _WORD",
        "kernels/test_scores.py::test_the_largest_threshold_is_a_word_so_that_nearly_all_is_dropped_and_not_nothing"),
    "all elements of a batch drop alike": Mutant(
        "kernels/scores.py", "(head, element, 0, 0)", "(head, 0 * element, 0, 0)", f"{VARIANT}[dropout-eager]"),
    "the backward drops others than the forward": Mutant(
        "parallel/autograd.py", "ctx.kv_heads, slopes, seed, after)",
        "ctx.kv_heads, slopes, None if seed is None else seed + 1, after)",
        f"{VARIANT}[dropout-eager]"),
    "the derivative of softcap is missing": Mutant(
        "kernels/eager.py", "ds.mul_(derivative)", "pass", f"{VARIANT}[softcap-eager]"),
    "dropout in the denominator too": Mutant(
        "kernels/eager.py", "total = p.sum(-1, keepdim=True)", "total = (p if dropped is None else p * dropped).sum(-1, keepdim=True)",
        f"{VARIANT}[dropout-eager]"),
    "delta is taken before dropout": Mutant(
        "kernels/eager.py", "torch.matmul(do_b, v_b.mT).mul_(dropped)", "torch.matmul(do_b, v_b.mT)", f"{VARIANT}[dropout-eager]"),
    "the distance of ALiBi has a sign": Mutant(
        "kernels/scores.py", "scores.k_positions[columns]).abs()", "scores.k_positions[columns])",
        "test_variants.py::test_documents_count_for_themselves[eager]"),
    "a checkpointed layer draws another seed": Mutant(
        "parallel/seeds.py", "            return self._again(token)\n", "            pass\n",
        "test_variants.py::test_a_checkpointed_layer_drops_the_same_again[True-reentrant]"),
    "of two calls in one state the second's seed is taken for both": Mutant(
        "parallel/seeds.py", "None if token in self._drawn and token not in self._over else seed", "seed",
        "test_variants.py::test_a_checkpoint_that_cannot_tell_two_calls_apart_is_refused"),
    # the call
    "the window is dropped at the door": Mutant(
        "validate.py", "Mask(*window(causal, window_size), cu_q)", "Mask(*window(causal, (-1, -1)), cu_q)",
        "test_api.py::test_a_window_is_never_dropped_by_any_scheme"),
    "softcap is accepted and ignored": Mutant(
        "preparation.py", "(float(softcap), float(dropout_p)) if", "(0.0, float(dropout_p)) if", f"{VARIANT}[softcap-eager]"),
    "the user's scale is ignored": Mutant(
        "preparation.py", "scale = scale_of(softmax_scale, ", "scale_of(None, ",
        "parallel/test_ring.py::test_a_scale_of_ones_own_reaches_forward_and_backward"),
    "rows past the last border are let through": Mutant(
        "validate.py", "if cu[-1] != length:", "if cu[-1] > length:",
        BAD_CALL),
    "ALiBi counts keys as if there were as many as queries": Mutant(
        "preparation.py", "aligned(cu_q, cu_k)", "aligned(cu_q, cu_q)",
        "test_variants.py::test_queries_and_keys_of_different_number_are_aligned_at_the_last"),
    # the model of costs
    "the first of ranks that share heads stands for all": Mutant(
        "cost/choose.py", "scheme.spans(cu, mask), scheme.fullest_head_rank(shape)", "scheme.spans(cu, mask), 0",
        "cost/test_choose.py::test_the_rank_with_the_most_heads_is_the_one_that_counts[9-3-p2p]"),
    "borders of hosts are not looked at": Mutant(
        "cost/choose.py", "(host * node, host * node + node // 2, host * node + node - 1)", "(host * node + node // 2,)",
        "cost/test_choose.py::test_the_ranks_that_are_looked_at_are_few_and_hold_every_border_of_a_host"),
    "explain names messages where blocks are copied": Mutant(
        "explanation.py", "_carried(mine, plans.copies)", "_carried(mine, None)",
        "test_explanation.py::test_where_blocks_are_copied_it_names_the_bytes_that_a_rank_copies[1-window1-zigzag]"),
    "what has come home of a gradient is not held": Mutant(
        "cost/memory.py", "arrived = s.message(own, wide) if coming else kept", "arrived = kept",
        "cost/test_memory.py::test_every_byte_is_counted_for_windows_and_documents_over_messages[contiguous-ring]"),
    "a message sets out before its receiver is as far": Mutant(
        "cost/simulate.py", "theirs.turn == there.turn == mine.turn", "theirs.turn",
        "cost/test_simulate.py::test_two_messages_over_one_nic_take_twice_as_long"),
    "the first hosts stand for all": Mutant(
        "cost/simulate.py", "[*range(some), *range(ring - some, ring)]", "[*range(2 * some)]",
        "cost/test_simulate.py::test_the_first_and_the_last_hosts_stand_for_all[zigzag-mask0-ring-1]"),
    "scores take no room on chip": Mutant(
        "cost/hbm.py", "// (2 * head_dim + keys + 2)", "// (2 * head_dim + 2)",
        "cost/test_hbm.py::test_what_is_on_chip_fits_with_its_scores_and_statistics_and_one_query_more_does_not"),
    "messages are counted without their padding": Mutant(
        "cost/traffic.py", "return -(-nbytes // ALIGN) * ALIGN", "return nbytes",
        "cost/test_traffic.py::test_bytes_between_every_two_ranks_are_those_of_a_real_run[ring-contiguous]"),
    "gradients are counted as narrow as keys": Mutant(
        "cost/traffic.py", "message(home.dest, now, shape.wide, now + 1)", "message(home.dest, now, shape.itemsize, now + 1)",
        CLOSED_FORMS),
    "the lse of an all-to-all is forgotten": Mutant(
        "cost/traffic.py", "narrow = [(self.heads, s.v_head_dim * e), (self.heads, s.wide)]", "narrow = [(self.heads, s.v_head_dim * e)]",
        CLOSED_FORMS),
    # Transformers
    "queries are dropped where an encoder's keys are padding": Mutant(
        "integrations/transformers_masks.py", "(self.causal is False or self.queries == 1)", "False",
        "integrations/test_transformers.py::test_decoders_attend_to_a_padded_encoder_of_any_length[Bart-10]"),
    "a single query is dropped where its encoder's last key is padding": Mutant(
        "integrations/transformers_masks.py", "(self.causal is False or self.queries == 1)", "self.causal is False",
        "integrations/test_transformers.py::test_a_single_query_sees_an_encoder_whose_last_key_is_padding"),
    "a mask without two tokens of a document is called causal": Mutant(
        "integrations/transformers_masks.py", "if later.any() else None", "if True else None",
        "integrations/test_transformers.py::test_a_mask_without_two_tokens_of_a_document_is_of_either_direction"),
    "a layer's keys may be more than its mask's": Mutant(
        "integrations/transformers.py", "if seen.lengths != (query.shape[2], key.shape[2]):", "if False:",
        "integrations/test_transformers.py::test_a_layer_that_contradicts_its_mask_is_refused"),
    "positions that a model numbers itself are let through": Mutant(
        "integrations/transformers.py", 'return of_padding or hasattr(module, "create_position_ids_from_input_ids")', "return of_padding",
        "integrations/test_transformers.py::test_models_that_number_positions_themselves_are_refused[Roberta]"),
    "a loader is dealt out to groups once only": Mutant(
        "integrations/accelerate.py", "not in ((size, rank), groups)", "!= (size, rank)",
        "integrations/test_accelerate.py::test_persistent_workers_serve_a_second_evaluation"),
    # drop-ins
    "the longest documents of queries and keys change places": Mutant(
        "integrations/flash_attn.py", "index(max_seqlen_q), index(max_seqlen_k), q.shape[0]",
        "index(max_seqlen_k), index(max_seqlen_q), q.shape[0]", f"{FLASH}::test_what_cannot_be_served_is_refused_with_its_cure"),
    "a softcap of less than 0 is passed on": Mutant(
        "integrations/flash_attn.py", "0.0 if softcap <= 0 else softcap", "softcap",
        f"{FLASH}::test_scale_softcap_and_slopes_mean_what_they_mean_there"),
    "whoever asks for probabilities gets other ones dropped": Mutant(
        "integrations/flash_attn.py", "torch.random.fork_rng(devices=[])", "torch.random.fork_rng(devices=[], enabled=False)",
        f"{FLASH}::test_s_dmask_is_the_softmax_up_to_a_factor_a_row_and_its_signs_are_what_was_dropped"),
    "ring functions drop the window of packed documents": Mutant(
        "integrations/ring_flash_attn.py",
        "shared(cu, scheme, group), dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,\n"
        "            window_size=window_of(window_size),",
        "shared(cu, scheme, group), dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,",
        "integrations/test_ring_flash_attn.py::test_varlen_functions_on_their_layout_equal_the_oracle[asked2-zigzag_ring_flash_attn_varlen-2]"),
    # launch, train
    "the last exception is taken for the first": Mutant("launch/run.py", "return 2, when, rank", "return 2, -when, rank", CAUSE),
    "survivors that have lost a peer are blamed": Mutant(
        "launch/run.py", "if code > 0 and code != EXIT_PEER_LOST and not when:", "if code > 0 and not when:", CAUSE),
    "what a rank that is gone has asked is an answer": Mutant(
        "launch/rendezvous.py", 'missing -= {r for r in asking if store.check([f"here/{own}/{r}"])}', "missing -= {*asking}",
        "launch/test_rendezvous.py::test_ranks_that_do_not_come_to_an_attempt_are_named"),
    "a checkpoint is written where it is read": Mutant(
        "train/checkpoint.py", 'self.tmp = root / f".tmp-{self.final.name}"', "self.tmp = self.final",
        "train/test_checkpoint.py::test_a_kill_at_any_fsync_or_rename_leaves_a_whole_checkpoint"),
    "a rank that has lost another one ends before it": Mutant(
        "launch/heartbeat.py", "            self._let_go_first()\n", "", f"{LETS_GO}[error1]"),
    "a heartbeat may be about a rank that there is not": Mutant(
        "launch/heartbeat.py", ' and 0 <= note["about"] < size', "",
        "launch/test_heartbeat.py::test_a_note_of_another_form_is_a_verdict_that_names_who_sent_it"),
    "a rank that has failed heeds the verdict of it": Mutant(
        "launch/heartbeat.py", "if self.state != RUNS:  # it ends", "if False:  # it ends", f"{LETS_GO}[error1]"),
    "a job that is started again resumes whatever run is there": Mutant(
        "train/folder.py", ' and file.read_text(errors="replace") == self.job', "",
        "train/test_folder.py::test_a_job_that_is_started_again_goes_on_with_its_own_run_only"),
    "a gradient that is not finite is stepped with": Mutant(
        "train/loop.py", '        self.require_finite("norm of the gradient", norm, self.step_done + 1)\n', "",
        "train/test_loop.py::test_a_gradient_that_is_not_finite_changes_no_parameter[nan]"),
    "whatever a rank starts is tied to the launcher": Mutant(
        "launch/parent.py", "if os.environ.get(LAUNCHER) == str(os.getppid()):", "if LAUNCHER in os.environ:",
        "launch/test_parent.py::test_only_ranks_themselves_are_tied"),
    "a checkpoint is believed to be of the step that its folder says": Mutant(
        "train/checkpoint.py", "if folder_name(found.step) == path.name:", "if found:",
        "train/test_checkpoint.py::"
        "test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used[damage_of_another_step-it is of step 1]"),
    "what earlier runs have left is data": Mutant(
        "train/data.py", '(\\.[0-9]+)?"', '"', "train/test_data.py::test_what_runs_have_left_in_the_folder_of_the_data_is_no_data"),
    "a run that was moved aside takes the lock along": Mutant(
        "train/folder.py", "            self._lock = self._locked()\n            if older:", "            if older:",
        "train/test_folder.py::test_the_lock_is_that_of_the_new_folder_after_an_older_run_was_moved_aside"),
    "an old checkpoint is deleted where it is read": Mutant(
        "train/checkpoint.py", "old.rename(hidden)\n", "hidden = old\n",
        "train/test_checkpoint.py::test_a_kill_while_an_old_one_is_deleted_leaves_whole_checkpoints_only"),
    # numerics
    "an operator that only passes an infinity on is blamed": Mutant(
        "numerics.py", "and (held or any(", "and (any(", "test_numerics.py::test_infinities_that_were_asked_for_pass"),
    "what is overwritten is not looked at": Mutant(
        "numerics.py", "results = {} if spoilt else", "results = {} if True else",
        "test_numerics.py::test_what_is_overwritten_is_looked_at_too"),
    "a layer is blamed for what came in": Mutant(
        "numerics.py", "node is not None and node not in seen:", "node is not None:",
        "test_numerics.py::test_a_gradient_is_named_with_the_layer_whose_backward_made_it"),
}  # fmt: skip


def copy(source: Path, folder: Path) -> None:
    """The package and its tests; what was compiled for the source stays valid but for the file that a mutant changes."""
    for name in ("distflash", "tests"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(".*"))


def apply(mutant: Mutant, folder: Path) -> None:
    """Write the bug into a copy of the package."""
    file = folder / "distflash" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once: bring the record up to date")
    file.write_text(text.replace(mutant.old, mutant.new))


def run(tests: list[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """(pytest's exit code or None past the deadline, its output), in a fork that imports distflash afresh."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            import pytest

            code = int(pytest.main(["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", *(f"tests/{t}" for t in tests)]))
        finally:
            os._exit(code)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text()
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None, log.read_text()


def trials(chosen: dict[str, Mutant], folder: Path) -> Iterator[dict[str, Any]]:
    """Each mutant's verdict; RuntimeError if the tests fail without any."""
    sound = folder / "sound"
    copy(ROOT, sound)
    code, output = run(sorted({mutant.test for mutant in chosen.values()}), sound, DEADLINE * len(chosen))
    if code != PASSED:
        raise RuntimeError(f"without any mutant the tests do not pass (exit code {code}):\n{output}")
    for n, (name, mutant) in enumerate(chosen.items()):
        broken = folder / str(n)
        copy(sound, broken)
        apply(mutant, broken)
        start = time.monotonic()
        code, output = run([mutant.test], broken, DEADLINE)
        verdict = {FAILED: "killed", None: "killed by the deadline", PASSED: "SURVIVED"}.get(code, f"NOT TESTED, exit code {code}")
        seconds = round(time.monotonic() - start, 1)
        shutil.rmtree(broken)
        print(f"{verdict:<10} {seconds:4.1f} s  {name}", flush=True)
        if not verdict.startswith("killed"):
            print(output)
        yield {"name": name, "file": f"distflash/{mutant.file}", "test": f"tests/{mutant.test}", "verdict": verdict, "seconds": seconds}


def main(names: list[str], record: Path | None) -> int:
    """0 if every mutant is killed."""
    import hypothesis  # noqa: F401  what every fork would import again
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.distributed.device_mesh
    import torch.utils.checkpoint

    assert "distflash" not in sys.modules, "a fork would test this copy, not its own"
    torch.set_num_threads(1)
    torch.library.custom_op("mutants::first", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")(torch.ones(1))
    chosen, start = {name: MUTANTS[name] for name in names or MUTANTS}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(trials(chosen, Path(folder)))
    killed = sum(row["verdict"].startswith("killed") for row in rows)
    print(f"{killed} of {len(rows)} mutants killed")
    if record:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        text = {"killed": killed, "of": len(rows), "seconds": round(time.monotonic() - start), "versions": versions, "rows": rows}
        record.write_text(json.dumps(text, indent=1) + "\n")
    return int(killed < len(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--record", type=Path, metavar="FILE")
    asked = parser.parse_args()
    sys.exit(main(asked.names, asked.record))
