"""Every feature under every scheme and by every kernel: equal to the fp64 oracle, or refused. `python -m tests.features` writes the page.

A cell of the first table is a run: out, lse and every gradient of fp64 attention by P threads, beside the oracle. A cell of the second is
what the kernel says of an H100 with every package installed; tests elsewhere compare what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import headline
from distflash.kernels import adapters
from distflash.kernels.adapters import flash
from distflash.kernels.base import Problem
from distflash.kernels.select import KERNELS, _load
from distflash.parallel.slices import Slices
from distflash.testing import errors, spmd
from tests.schemes import Call, inputs, run_rank, truth_of, whole

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
S = 29
DOCUMENTS = (0, 7, 8, 8, 22, S)
H100 = Problem(torch.device("cuda:0"), torch.bfloat16, 4, 2, 128, 128)


class Feature(NamedTuple):
    """What is asked for: of `tests.schemes.Call` and `inputs` in a run, of Problem by name."""

    call: Mapping[str, Any] = MappingProxyType({})
    inputs: Mapping[str, Any] = MappingProxyType({})
    problem: Mapping[str, Any] = MappingProxyType({})


FEATURES = {
    "causal": Feature({"causal": True}),
    "no mask": Feature(),
    "sliding window (left, right)": Feature({"window_size": (5, 2)}),
    "packed documents": Feature({"causal": True, "documents": DOCUMENTS}),
    "window inside documents": Feature({"causal": True, "window_size": (3, 0), "documents": DOCUMENTS}),
    "Slices: prefix-LM": Feature({"mask": Slices.prefix_lm(S, 9)}),
    "Slices: sinks and a window": Feature({"mask": Slices.sinks_and_window(S, 2, 5)}),
    "custom softmax_scale": Feature({"causal": True, "scale": 0.7}),
    "softcap": Feature({"causal": True, "softcap": 1.5}, problem={"variants": ("softcap",)}),
    "ALiBi": Feature({"causal": True, "slopes": torch.tensor([0.5, 0.25, 0.7, 0.1])}, problem={"variants": ("alibi_slopes",)}),
    "dropout": Feature({"causal": True, "dropout_p": 0.3}, problem={"variants": ("dropout_p",)}),
    "grouped heads": Feature({"causal": True}, {"kv_heads": 1}, {"kv_heads": 1}),
    "value head dim differs": Feature({"causal": True}, {"dim": 12, "v_dim": 8}, {"head_dim": 192}),
    "head dim 256": Feature({"causal": True}, {"dim": 256}, {"head_dim": 256, "v_head_dim": 256}),
    "head dim 59": Feature({"causal": True}, {"dim": 59}, {"head_dim": 59, "v_head_dim": 59}),
    "deterministic": Feature({"causal": True, "deterministic": True}, problem={"deterministic": True}),
    "fp32": Feature({"causal": True}, {"dtype": torch.float32}, {"dtype": torch.float32}),
    "fp64": Feature({"causal": True}, {"dtype": torch.float64}, {"dtype": torch.float64}),
}
SCHEMES = {
    "one device": (1, {}),
    "contiguous": (3, {"layout": "contiguous"}),
    "zigzag": (3, {"layout": "zigzag"}),
    "striped": (3, {"layout": "striped"}),
    "balanced": (3, {"layout": "balanced"}),
    "all-gather": (3, {"order": "all_gather"}),
    "double ring": (4, {"order": "double_ring"}),
    "Ulysses": (2, {"ulysses": 2}),
    "Ulysses in a ring": (4, {"ulysses": 2}),
}


def run(feature: str, scheme: str) -> str:
    """'yes' if the run equals the oracle, or the error that refused it; raises AssertionError on a wrong result."""
    ranks, options = SCHEMES[scheme]
    asked = FEATURES[feature]
    call, x = Call(**options, **asked.call), inputs(S, **asked.inputs)
    try:
        found = whole(spmd(ranks, lambda group: run_rank(call, x, group), per_node=2 if ranks == 4 else None))
    except (ValueError, TypeError) as error:
        return str(error)
    dtype = x.q.dtype
    broken = errors(found, truth_of(call, x), truth_of(call, x, dtype), dtype)
    assert not broken, f"{feature}, {scheme}: {broken}"
    return "yes"


def claim(feature: str, kernel: str) -> str:
    """'yes', or the reason with which the kernel refuses."""
    loaded = _load(kernel)
    if isinstance(loaded, str):
        return loaded
    return loaded.supports(replace(H100, **FEATURES[feature].problem)) or "yes"


def page() -> str:
    """docs/features.md: both tables, the reasons below."""
    runs = {(feature, scheme): run(feature, scheme) for feature in FEATURES for scheme in SCHEMES}
    with ExitStack() as pretence:
        pretence.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        for kind in (adapters.Fa2Kernel, adapters.Fa3Kernel, adapters.Fa4Kernel):
            pretence.enter_context(mock.patch.object(kind, "_missing", lambda self: None))
        claims = {(feature, kernel): claim(feature, kernel) for feature in FEATURES for kernel in KERNELS}
    reasons: list[str] = []
    text = [
        "# What works where\n",
        "Written by `python -m tests.features`; a test runs it again and compares. Numbers refer to the refusals at the end of the page.\n",
        "## Where it has run\n",
        f"<!-- figures: status -->\n{headline.status()}<!-- end -->\n",
        "What was timed is in the [benchmarks](benchmarks.md).\n",
        "## By scheme\n",
        f"Each cell is a run on CPU threads: {S} tokens, the tiled PyTorch kernel. out, lse and every gradient equal fp64 dense attention"
        " within the error budget. Schemes do not depend on the kernel, and kernels are tested on their own.\n",
        *_table("feature", SCHEMES, runs, reasons),
        "\n## By kernel\n",
        "Each cell is the kernel's answer when asked whether it supports this on an H100, in bf16 if not said otherwise, with every package"
        ' installed; it is not a run. "auto" takes the first of hopper, triton and eager that says yes; the others run by name only.\n',
        f"<!-- figures: fallback -->\n{headline.fallback()}<!-- end -->\n",
        "The column fa3 assumes a build of FlashAttention-3 with a backward. The wheel used for the benchmarks has none, and the adapter"
        f' refuses it: "{_without_backward()}".\n',
        *_table("feature", KERNELS, claims, reasons),
    ]
    if reasons:
        text += ["\n## Refusals\n", *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))]
    return "\n".join(text) + "\n"


def _without_backward() -> str:
    """What the adapter says of a build of FlashAttention-3 like the one that the benchmarks used."""
    config = SimpleNamespace(CONFIG={"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": True}})
    with mock.patch.object(flash, "_installed", lambda name: True), mock.patch.object(flash, "import_module", lambda name: config):
        return str(adapters.Fa3Kernel()._missing())


def _table(corner: str, columns: Any, cells: dict[tuple[str, str], str], reasons: list[str]) -> list[str]:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for feature in FEATURES:
        shown = []
        for column in columns:
            cell = cells[feature, column]
            if cell != "yes" and cell not in reasons:
                reasons.append(cell)
            shown.append("yes" if cell == "yes" else f"no ({reasons.index(cell) + 1})")
        lines.append(f"| {feature} | {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
