"""Other configurations of the Hopper kernels beside the shipped ones: where those of hopper/configs.py come from.

    python -m benchmarks.tune --part d128 --only forward --variants named named_ahead      some variants, S = 2048 and 8192
    python -m benchmarks.tune --part d64 d128 d256 --turns 1                               all of them, a first look

One process times all variants of a cell, 40 ms each, in turns there and back: a drift of the card's clocks meets all alike, and what is
said of a variant, the shipped one's time over its own, is the median over the turns, with the least and the largest. That repeats within
1 % in a process, and differs by 2 % between cards. Wrong ones are not timed, nor are those that hang or crash; the reason is printed.
Options are those of bench_kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bench_kernel import arguments, measure
from benchmarks.kernel_table import cells, troubles
from benchmarks.peers import OURS
from benchmarks.record import write

Rows = list[dict[str, Any]]


def against_shipped(rows: Rows) -> Iterator[dict[str, Any]]:
    """Each variant's speed over that of the shipped configuration in its cell and direction, turn by turn: median, least, largest."""
    for (part, direction, S, causal), cell in cells(rows).items():
        shipped = cell.pop(OURS)
        for name, row in cell.items():
            if "ms_of_turns" in row and "ms_of_turns" in shipped:
                ratios = [ours / its for ours, its in zip(shipped["ms_of_turns"], row["ms_of_turns"], strict=True)]
                where = {"part": part, "pass": direction, "S": S, "causal": causal, "variant": name}
                yield {**where, "speed": median(ratios), "least": min(ratios), "largest": max(ratios)}


def main() -> None:
    args = arguments(
        __doc__, part=["d64", "d128", "d256"], lengths=[2048, 8192], variants=["all"], peers=[], turns=3, out=Path("tune.json")
    )
    args.variants.append(OURS)
    rows = measure(args, args.out.with_suffix(".log"))
    compared = list(against_shipped(rows))
    write(args.out.stem, rows, args.out.parent, compared=compared)
    table = Table("part", "pass", "S", "mask", "variant", "of the shipped one's speed")
    for line in compared:
        mask = "causal" if line["causal"] else "full"
        speed = f"{line['speed']:.3f} ({line['least']:.3f} to {line['largest']:.3f})"
        table.add_row(line["part"], line["pass"], str(line["S"]), mask, line["variant"], speed)
    console = Console(width=120)
    console.print(table)
    for line in troubles(rows):
        console.print(line, style="red", markup=False)


if __name__ == "__main__":
    main()
