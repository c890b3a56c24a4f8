"""`distflash plan`: which scheme would be fastest for a model's attention on a cluster, before there is one.

plan        options -> a ranking by `distflash.cost.choose`, as a table or JSON, and a picture of the best one's schedule
size        "128k", "1M" -> tokens
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distflash.launch.early import check_file

if TYPE_CHECKING:
    from distflash.cost.choose import Candidate
    from distflash.cost.models import Model
    from distflash.cost.time import Cluster
    from distflash.parallel.mask import Mask

MATMUL_SHARE = 0.7  # of the peak that a model's matmuls reach; an 8192³ product in bf16 measured 776 of 989 TFLOP/s on an H100
VALIDATED = "H200", 2  # the device, and how many of one host, whose measured times stand beside predicted ones in docs/benchmarks.md
PICTURES = (".png", ".pdf", ".svg")
DRAWN = 64  # ranks of the largest ring that is drawn whole
RECOMPUTED = 4 / 3  # checkpointed layers run their matmuls' forward again, attention's results are kept


def size(text: str) -> int:
    """Tokens: 4096, 128k, 1M; k is 1024. Raises typer.BadParameter."""
    if not (found := re.fullmatch(r"(\d+)([kKmM]?)", text.strip())):
        raise typer.BadParameter(f"{text!r} is no number of tokens: write it as 131072, 128k or 1M")
    return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()]


def gigabits(text: str) -> float:
    """The rate of a NIC: 400Gb, 400. Raises typer.BadParameter."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb|gbit|gbps|gb/s|gbit/s)?", text.strip().lower())) or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no rate of a NIC: write it as 400Gb (bits a second)")
    return float(found[1])


def borders(text: str | None, length: int) -> tuple[int, ...]:
    """Document borders: None is one; "64" is as many of equal length; "8k,8k,16k" are lengths. Raises typer.BadParameter."""
    if text is None:
        return 0, length
    if "," not in text:
        count = size(text)
        if not 1 <= count <= length:
            raise typer.BadParameter(f"{count} documents do not fit into {length} tokens")
        return tuple(n * length // count for n in range(count + 1))
    cu = (0, *accumulate(size(word) for word in text.split(",")))
    if cu[-1] != length:
        raise typer.BadParameter(f"the documents {text!r} hold {cu[-1]} tokens, --seq {length}: they must be equal")
    return cu


def plan(
    model: Annotated[str, typer.Option(help="Its heads and layers: llama-3-8b, gpt-2, ... (an unknown one lists all).")] = "llama-3-8b",
    seq: Annotated[str, typer.Option(help="Tokens of a sequence: 131072, 128k, 1M.")] = "128k",
    gpus: Annotated[int, typer.Option(min=1, help="Ranks that share a sequence.")] = 8,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a host.")] = 8,
    nic: Annotated[str, typer.Option(help="Rate of each GPU's NIC.")] = "400Gb",
    device: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x, cpu, or a file of `distflash doctor --measure`.")] = "h200",
    causal: Annotated[bool, typer.Option("--causal/--full", help="What a query sees.")] = True,
    window: Annotated[int | None, typer.Option(min=0, help="Keys before its own that a query sees.", show_default=False)] = None,
    documents: Annotated[str | None, typer.Option(help="How many of equal length, or lengths: 8k,8k,16k.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    layout: Annotated[str, typer.Option(help="This layout alone.")] = "auto",
    order: Annotated[str, typer.Option(help="This order alone.")] = "auto",
    ulysses: Annotated[str, typer.Option(help="This degree alone.")] = "auto",
    wire: Annotated[str, typer.Option(help="p2p, symmetric, or auto for both: symmetric, as a run takes it, where it can be.")] = "auto",
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 10,
    picture: Annotated[Path | None, typer.Option(help="Write the best one's schedule, rank x time, as PNG.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all candidates as JSON.")] = False,
) -> None:
    """Rank every layout, order, Ulysses degree and wire by predicted time. Nothing runs: figures come from docs/io-model.md's model."""
    from distflash.cost.choose import WIRES, choose
    from distflash.cost.devices import find, network
    from distflash.cost.models import MODELS
    from distflash.cost.time import Cluster
    from distflash.parallel.layout import LAYOUTS
    from distflash.parallel.mask import Mask
    from distflash.parallel.plan import ORDERS

    for name, value, known in (("--model", model, MODELS), ("--layout", layout, ("auto", *LAYOUTS)), ("--order", order, ("auto", *ORDERS))):
        if value not in known:
            raise typer.BadParameter(f"{name} {value!r} is not known: use one of {', '.join(known)}")
    if wire not in ("auto", *WIRES) or not (ulysses == "auto" or ulysses.isdecimal()):
        raise typer.BadParameter(f"--wire is one of auto, {', '.join(WIRES)}, --ulysses auto or a number, got {wire!r} and {ulysses!r}")
    if size(seq) < 1:
        raise typer.BadParameter(f"--seq must be at least 1 token, got {seq!r}")
    if picture is not None and picture.suffix not in PICTURES:
        raise typer.BadParameter(f"--picture {picture} must end in {', '.join(PICTURES)}: that says what is drawn")
    cu = borders(documents, size(seq))
    mask = Mask(window, 0 if causal else window, cu)
    fixed: dict[str, str | int] = {k: v for k, v in (("layout", layout), ("order", order)) if v != "auto"}
    fixed |= {} if ulysses == "auto" else {"ulysses": int(ulysses)}
    try:
        if picture is not None:
            check_file("--picture", picture)
        found_device = find(device)
        cluster, chosen = Cluster(found_device, gpus, min(per_node, gpus), network(gigabits(nic))), MODELS[model]
        shape = chosen.shape(batch, found_device.itemsize)
        ranked = choose(cu, mask, shape, cluster, WIRES if wire == "auto" else (wire,), **fixed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = [_row(candidate, chosen, cluster, cu[-1] * batch) for candidate in ranked if candidate.refused is None]
    refused = Counter(candidate.refused for candidate in ranked if candidate.refused)
    title, known = _title(model, cu, causal, window, cluster), found_device.name == VALIDATED[0] and gpus <= VALIDATED[1]
    if as_json:
        about = {"device": found_device.name, "basis": found_device.basis, "validated": known}
        print(json.dumps({**about, "ranking": rows, "refused": refused}, indent=1))
    else:
        _show(_merged(rows)[:top], refused, title, found_device.basis)
        if not known:
            print("not validated: predicted times stand beside measured ones of up to {1} {0} of a host only".format(*VALIDATED))
    if picture is not None:
        fits = next((n for n, row in enumerate(rows) if row["fits"]), 0)
        _draw(ranked[fits], title + ("" if rows[fits]["fits"] else ": does not fit"), cu, mask, cluster, shape, picture)


def _title(model: str, cu: tuple[int, ...], causal: bool, window: int | None, cluster: Cluster) -> str:
    count = len(cu) - 1
    packed = f" in {count} documents" if count > 1 else ""
    seen = ("causal" if causal else "full") + (f", window {window:,}" if window is not None else "")
    return f"{model}, {cu[-1]:,} tokens{packed}, {seen}, {cluster.ranks} x {cluster.device.name}, {cluster.per_node} a host"


def _row(candidate: Candidate, model: Model, cluster: Cluster, tokens: int) -> dict[str, Any]:
    """One candidate: seconds of a layer's attention and of a step of the model, bytes a GPU, and why."""
    local = -(-tokens // cluster.ranks)
    matmuls = RECOMPUTED * model.matmul_flops(tokens) / cluster.ranks / (MATMUL_SHARE * cluster.device.matmul)
    held = candidate.memory + model.state(cluster.ranks) + model.activations(local)
    room = held <= cluster.device.memory
    full = f"; {held / 1e9:.0f} GB do not fit into {cluster.device.memory / 1e9:.0f}"
    return {
        "layout": candidate.scheme.layout, "order": candidate.scheme.order, "ulysses": candidate.scheme.ulysses, "wire": candidate.wire,
        "forward": candidate.passes["forward"].seconds, "backward": candidate.passes["backward"].seconds, "exposed": candidate.exposed,
        "step": model.layers * candidate.seconds + matmuls, "attention_bytes": candidate.memory, "bytes": held, "fits": room,
        "reason": candidate.reason + ("" if room else full),
    }  # fmt: skip


HEADS = ("layout", "order", "ulysses", "wire", "forward ms", "backward ms", "exposed ms", "step s", "GB per GPU", "why")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    times = {f"{name} ms": f"{1e3 * row[name]:.2f}" for name in ("forward", "backward", "exposed")}
    rest = {"step s": f"{row['step']:.2f}", "GB per GPU": f"{row['bytes'] / 1e9:.1f}", "why": row["reason"]}
    return {name: str(row[name]) for name in HEADS[:4]} | times | rest


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The cells of all rows; those that differ in nothing but the order, or then the layout, are one."""
    found = [_cells(row) for row in rows]
    for name in ("order", "layout"):
        alike: dict[tuple[str, ...], dict[str, str]] = {}
        for cells in found:
            first = alike.setdefault(tuple(text for head, text in cells.items() if head != name), cells)
            first[name] += "" if first is cells else f", {cells[name]}"
        found = list(alike.values())
    return found


def _show(rows: list[dict[str, str]], refused: Counter[str], title: str, basis: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title=title, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("layout", "order", "wire", "why") else "right")
    for cells in rows:
        table.add_row(*cells.values(), style="dim" if "do not fit" in cells["why"] else None)
    console.print(table)
    console.print(
        "forward, backward, exposed: attention of one layer; step: both passes of the model, without the traffic of its parameters"
    )
    console.print(Text(f"basis: {basis}"))
    for reason, count in refused.most_common():
        console.print(Text(f"left out: {count} x {reason}"))


def _draw(best: Candidate, title: str, cu: tuple[int, ...], mask: Mask, cluster: Cluster, shape: Any, path: Path) -> None:
    """The schedule of a row, forward above backward: what each rank of a ring computes and sends when. Of a large ring, four hosts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter("--picture needs matplotlib: pip install 'distflash[train]'") from None
    from distflash.cost.choose import rank_of
    from distflash.cost.simulate import KINDS, simulate, standing
    from distflash.cost.traffic import PASSES

    scheme, cluster = best.scheme, replace(cluster, wire=best.wire)
    spans, head = scheme.spans(cu, mask), scheme.fullest_head_rank(shape)
    drawn = list(range(scheme.ring)) if scheme.ring <= DRAWN else standing(scheme)
    ranks = [rank_of(scheme, spans, mask, shape, cluster, n * scheme.ulysses + head) for n in drawn]
    figure = Figure(figsize=(12, 3.5 + 0.35 * len(drawn)), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, pass_ in zip(panels, PASSES, strict=True):
        found = simulate(ranks, pass_)
        for kind, colour, low in zip(KINDS, ("tab:blue", "tab:orange", "tab:green"), (0.0, -0.4, -0.4), strict=True):
            for rank in range(len(drawn)):
                bars = [(1e3 * start, 1e3 * (end - start)) for who, what, start, end in found.events if (who, what) == (rank, kind)]
                label = kind if rank == 0 else None
                axes.broken_barh(bars, (rank + low, 0.38), color=colour, edgecolor="white", linewidth=0.3, label=label)
        axes.set(title=f"{pass_}: {1e3 * found.seconds:.2f} ms, kernels run {found.efficiency:.0%} of it", xlabel="ms")
        axes.set(xlim=(0, 1e3 * found.seconds), ylim=(-0.6, len(drawn) - 0.4), ylabel="rank of the ring")
        axes.set_yticks(range(0, len(drawn), max(1, len(drawn) // 16)), drawn[:: max(1, len(drawn) // 16)])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    figure.suptitle(f"{title}\n{scheme.layout}, {scheme.order}, ulysses {scheme.ulysses}, {best.wire}: simulated")
    figure.savefig(path, dpi=120)
    typer.echo(f"wrote {path}", err=True)
