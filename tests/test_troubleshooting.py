"""docs/troubleshooting.md against the code: every text there is raised here, and every error that a user can meet is there."""

import ast
import re
from functools import cache

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import distflash
from distflash.parallel import handles
from distflash.parallel.agreement import Disagreement
from distflash.testing import spmd, spmd_processes
from tests.pages import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
NO_USER = {  # files whose errors no user of the library meets, or that are told elsewhere: command lines, training, cost, kernels' settings
    *("cost", "train", "kernels/hopper", "kernels/triton", "launch/doctor.py", "launch/plan.py", "launch/run.py", "launch/verify.py"),
    *("launch/bench.py", "launch/fuzz.py", "launch/trial.py", "launch/measure.py", "testing.py"),
}
OURS = {"ValueError", "TypeError", "RuntimeError", "Disagreement", "DistFlashPeerLost"}
INTERNAL = (  # of the files that count: what only another version, or another rank's error, brings about
    "a note of ? bytes", "waited for notes of other ranks", "waited for a message of rank", "has no gradients that are bit-equal",
)  # fmt: skip

x = torch.randn(1, 8, 4, 16)
one = torch.ones(4)
single = distflash.SequenceParallel.single
seq = single().sequence(length=8)
Slices, Ragged = distflash.Slices, distflash.Ragged


def attend(q=x, k=x, v=x, *args, **options):
    return distflash.attention(q, k, v, *args, **options)


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


def on_two(fn):
    return spmd(2, lambda group: fn(group, distflash.SequenceParallel(group, layout="contiguous")))


def two_orders(group, sp):
    shared = sp.sequence(length=8)
    distflash.attention(*[shared.shard(x)] * 3, shared, causal=group.rank == 0)


def forgotten():
    handles.find(handles.new(Slices([])), Slices)


def dropped_again():
    q = x.clone().requires_grad_()
    sp = single()
    shared = sp.sequence(length=8)
    out = checkpoint(lambda q: attend(q, x, x, shared, dropout_p=0.5), q, use_reentrant=False, preserve_rng_state=False)
    torch.rand(1)
    out.sum().backward()


RAISED = {  # what raises each text of the page's first tables
    # tensors and options
    "... must be a tensor, got ...": lambda: attend([1]),
    "q, k, v must be (batch, tokens, heads, head_dim)": lambda: attend(x[0, 0]),
    "q, k, v must share one dtype": lambda: attend(x.double()),
    "q, k or v carries a tangent, but attention has no forward-mode derivative": lambda: torch.func.jvp(attend, (x,), (x,)),
    "q, k or v is inside a transform of torch.func": lambda: torch.vmap(lambda q: attend(q, q, q))(x),
    "... must be a dense tensor, got ...": lambda: attend(x.to_sparse()),
    "...=... must be True or False": lambda: attend(causal="false"),
    "q, k, v must be on one device": lambda: attend(x, x.to("meta"), x),
    "k and v must agree in all but the last dimension": lambda: attend(x, x, x[:, 1:]),
    "q and k must agree in batch and head_dim": lambda: attend(x[..., 1:]),
    "batch, heads and head_dim must not be 0": lambda: attend(*[x[:0]] * 3),
    "query heads must be a multiple of key/value heads": lambda: attend(x[:, :, 1:], x[:, :, :2], x[:, :, :2]),
    "sinks must be a floating-point tensor": lambda: attend(sinks=one.long()),
    "sinks must hold one logit for each of the": lambda: attend(sinks=one[1:]),
    "softcap=... must be a finite number, 0 (off) or more": lambda: attend(softcap=None),
    "dropout_p=... must be a number, at least 0 (off) and less than 1": lambda: attend(dropout_p=1.0),
    "alibi_slopes must be a tensor of torch.float32": lambda: attend(alibi_slopes=one.half()),
    "alibi_slopes must be (...) or (..., ...), one for each query head": lambda: attend(alibi_slopes=one[1:]),
    "alibi_slopes get no gradient, but these require one": lambda: attend(alibi_slopes=one.clone().requires_grad_()),
    "window_size=... must be two integers (left, right), each -1 (unlimited) or more": lambda: attend(window_size=4),
    "softmax_scale=... must be None, a finite number, or a 0-d tensor of one": lambda: attend(softmax_scale=one),
    "softmax_scale gets no gradient, but this tensor requires one": lambda: attend(softmax_scale=torch.ones((), requires_grad=True)),
    "mask must be distflash.Slices, got ...: for blocks of 0 and 1": lambda: attend(mask=torch.ones(8, 8)),
    "mask=... says what each query sees, and so would causal=...": lambda: attend(mask=Slices.prefix_lm(8, 2), causal=True),
    "explain() takes shapes with a batch dimension": lambda: distflash.explain(x.shape[1:], x.shape[1:]),
    "per_token_loss must hold a loss for each token, got a scalar": lambda: distflash.token_mean(one.mean()),
    "ignore must be a bool tensor of the loss's shape": lambda: distflash.token_mean(one, ignore=one),
    # documents and shards
    "there must be at least one query and one key": lambda: attend(x[:, :0]),
    "length=... must be a positive integer": lambda: single().sequence(length=0),
    "cu_seqlens ends at 0": lambda: single().sequence(cu_seqlens=cu(0, 0)),
    "cu_seqlens must start at 0 and have one border more than documents": lambda: attend(cu_seqlens_q=cu(5, 8)),
    "cu_seqlens must never decrease": lambda: attend(cu_seqlens_q=cu(0, 5, 3)),
    "cu_seqlens must be a 1-D int32 or int64 tensor": lambda: attend(cu_seqlens_q=one),
    "cu_seqlens must hold integers": lambda: single().sequence(cu_seqlens=[0, 1.5]),
    "cu_seqlens_... must end at the number of tokens, ..., got ...": lambda: attend(cu_seqlens_q=cu(0, 5)),
    "cu_seqlens_q and cu_seqlens_k must hold as many documents": lambda: attend(cu_seqlens_q=cu(0, 8), cu_seqlens_k=cu(0, 3, 8)),
    "cu_seqlens_k was given without cu_seqlens_q": lambda: attend(cu_seqlens_k=cu(0, 8)),
    "cu_seqlens_q and cu_seqlens_k do not go with seq": lambda: attend(x, x, x, seq, cu_seqlens_q=cu(0, 8)),
    "sequence() takes either length or cu_seqlens": lambda: single().sequence(),
    "seq must come from SequenceParallel.sequence()": lambda: attend(x, x, x, single()),
    "shard() and unshard() need dim=..., got a tensor of shape": lambda: seq.shard(one),
    "... has ... tokens, but ...: use seq.shard()": lambda: on_two(lambda _, sp: attend(x, x, x, sp.sequence(length=8))),
    "shard() needs the ... tokens of the sequence along dim ...": lambda: seq.shard(x[0]),
    "unshard() needs this rank's ... tokens along dim ...": lambda: seq.unshard(x[0]),
    "heads=... must be (query heads, key/value heads, head dim)": lambda: single().sequence(8, heads=3),
    "the layout ... does not look at a mask": lambda: single().sequence(8, mask=Slices.prefix_lm(8, 2)),
    "mask must be distflash.Slices, got ...": lambda: single().sequence(8, mask=one),
    # SequenceParallel
    "...=... is not known: use one of ...": lambda: distflash.SequenceParallel(layout="zagzig"),
    "ulysses=... must divide the ... ranks of the group": lambda: distflash.SequenceParallel(ulysses=2),
    "ulysses=... must be an integer or 'auto'": lambda: distflash.SequenceParallel(ulysses=1.0),
    "ulysses=... needs at least as many query heads": lambda: on_two(
        lambda group, _: attend(*[x[:, :4, :1]] * 3, distflash.SequenceParallel(group, ulysses=2).sequence(length=8))
    ),
    "wire='symmetric' cannot serve this group: ...": lambda: spmd_processes(2, lambda: distflash.SequenceParallel(wire="symmetric")),
    "seed=... must be an integer, the same on every rank": lambda: single().seed_dropout(None),
    "double_ring needs as many consecutive ranks on each host": lambda: spmd(
        3, lambda group: distflash.SequenceParallel(group, order="double_ring"), per_node=2
    ),
    "staging=... is not a positive number of bytes": lambda: distflash.SequenceParallel(staging="2 gigs"),
    "staging=... must be None, bytes as an integer, or text": lambda: distflash.SequenceParallel(staging=0.5),
    "staging=... bytes hold less than this call needs, ...": lambda: on_two(
        lambda group, _: attend(*[x[:, :4]] * 3, distflash.SequenceParallel(group, staging=8).sequence(length=8))
    ),
    "group=... must be None, a ProcessGroup or a DeviceMesh that this rank belongs to": lambda: distflash.SequenceParallel("all"),
    # Slices and Ragged
    "slice ... must be (q, k), (q, k, kind) or (q, k, 'band', (left, right))": lambda: Slices([3]),
    "slice ... has kind=...: use one of ...": lambda: Slices([((0, 8), (0, 8), "anticausal")]),
    "slice ... is ... and has window_size=...": lambda: Slices([((0, 8), (0, 8), "causal", (4, 0))]),
    "...: window_size=... must be two integers": lambda: Slices([((0, 8), (0, 8), "band", 4)]),
    "slice ... has ...=...: positions must be consecutive": lambda: Slices([(range(0, 8, 2), (0, 8))]),
    "slice ... has ...=...: it must be two integers (start, stop), or a range": lambda: Slices([(8, (0, 8))]),
    "slice ... has ...=(..., ...): it must be 0 <= start <= stop": lambda: Slices([((8, 0), (0, 8))]),
    "slice ... is ..., but there are ... queries and ... keys": lambda: attend(mask=Slices.prefix_lm(9, 2)),
    "slice ... is ... and crosses a border of documents": lambda: attend(mask=Slices.prefix_lm(8, 2), cu_seqlens_q=cu(0, 5, 8)),
    "slices ... and ... both let query ... see key ...": lambda: Slices([((0, 8), (0, 8)), ((7, 9), (0, 3))]),
    "window=... must be an integer, 0 (only itself) or more": lambda: Slices.sinks_and_window(8, 2, -1),
    "a block mask must be a matrix of 0 and 1": lambda: Slices.from_block_mask([], 4),
    "a block mask must hold 0 and 1": lambda: Slices.from_block_mask([[2]], 4),
    "block_size=... must be a positive integer or a pair of them": lambda: Slices.from_block_mask([[1]], (4, 8, 16)),
    "... blocks of ... cover ... (queries, keys): lengths=... must end in the last blocks": lambda: Slices.from_block_mask(
        [[1]], 4, (9, 9)
    ),
    "mask must be a (batch, tokens) tensor of bool": lambda: Ragged(one),
    "mask must hold 0 and 1 only": lambda: Ragged(torch.full((1, 4), 2)),
    "row ... of mask has padding between its tokens": lambda: Ragged(torch.tensor([[1, 0, 1]])),
    "mask of shape ... holds no token": lambda: Ragged(torch.zeros(1, 4, dtype=torch.bool)),
    "pack() needs the mask's ... as first dimensions": lambda: Ragged(torch.ones(1, 4, dtype=torch.bool)).pack(one),
    "pad() needs the ... tokens of the mask as first dimension": lambda: Ragged(torch.ones(1, 4, dtype=torch.bool)).pad(one[1:]),
    # kernels, checkpointing
    "kernel=... is not known": lambda: attend(kernel="fast"),
    "kernel=... cannot serve this problem: ...": lambda: attend(kernel="hopper"),
    "attention with dropout runs inside a backward pass, but not in the state": dropped_again,
    "... is gone: keep what an attention call was given until its backward has run": forgotten,
    "... is gone: ... In a graph that was saved and loaded it is another process's": forgotten,
    "a trace of attention over ... tokens was given ...": lambda: make_fx(lambda q: attend(q, q, q))(x)(x[:, 1:]),
    "ranks disagree on ...; nothing was sent": lambda: on_two(two_orders),
}
P2P, AGREEMENT = "tests/parallel/wire/test_p2p.py", "tests/parallel/test_agreement.py"
VARIANTS = "tests/test_variants.py"
BY_OTHERS = {  # of the same tables what takes processes or mutes ranks: the test that has it raised, and the words that it awaits
    "a ...-D mesh with axes ... was given": (P2P, "axes 'ring' and 'ulysses'"),
    "the mesh's axes must be ('ring', 'ulysses')": (P2P, "Ulysses inner"),
    "ulysses=... disagrees with the mesh": (P2P, "ulysses=4 disagrees with the mesh"),
    "the mesh must list its ranks in ascending order": (P2P, "ascending order"),
    "attention with dropout runs inside a backward pass in the state of two calls": (VARIANTS, "in the state of two calls of the forward"),
    "... processes were started, but there is no process group": ("tests/test_api.py", "4 processes were started"),
    "ranks refuse ...; nothing was sent": (AGREEMENT, "ranks refuse {name}, seq 1; nothing was sent"),
    "ranks disagree on a call: ...; but ..., of a kind agreed on before": (AGREEMENT, "of a kind new to it"),
    "ranks disagree on calls: ...": (AGREEMENT, "ranks disagree on calls: rank"),
    "... sent a note of ... characters that is not one of ours": (AGREEMENT, "rank 3 sent a note of"),
    "ranks ... did not come to agree on a call within ... s": (AGREEMENT, "did not come to agree on a call within"),
}
FIRST = PAGE[: PAGE.index("\n## Starting")]


def pattern(text):
    """A text of the page as a regular expression: `...` is anything."""
    return ".*?".join(re.escape(piece) for piece in text.split("..."))


@cache
def texts(page=PAGE):
    """The texts of the tables' first columns, but of the last table, which has symptoms."""
    rows = re.findall(r"^\| (`.*?`) \|", page.partition("\n## No error")[0], re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


def message(node):
    """The text of an expression, `?` where it is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) if isinstance(part, ast.Constant) else "?" for part in node.values)
    if isinstance(node, ast.BinOp):
        return message(node.left) + message(node.right)
    return "?"


@cache
def errors():
    """What the package says: every text that is raised, with the words for lost ranks; and (place, text) of what users can meet."""
    every, met = [], []
    for path in sorted((ROOT / "distflash").rglob("*.py")):
        name = str(path.relative_to(ROOT / "distflash"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr) and name == "launch/heartbeat.py":
                every.append(message(node))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                every.append(message(node.exc.args[0]))
                if ast.unparse(node.exc.func) in OURS and not name.startswith(tuple(NO_USER)):
                    met.append((f"{name}:{node.lineno}", every[-1]))
    return every, [(place, text) for place, text in met if text != "?" and not any(part in text for part in INTERNAL)]


@pytest.mark.parametrize("text", RAISED)
def test_what_the_page_quotes_is_raised(text):
    with pytest.raises((ValueError, TypeError, RuntimeError, Disagreement), match=f"(?s){pattern(text)}"):
        RAISED[text]()


def test_the_first_tables_hold_what_is_raised_here_or_by_a_test_that_says_so():
    before, _, of_ranks = FIRST.partition("\n## Ranks that disagree")
    assert {*texts(before), *(text for text in texts(of_ranks) if text in RAISED | BY_OTHERS)} == {*RAISED, *BY_OTHERS}
    for text, (test, words) in BY_OTHERS.items():
        assert f'"{words}' in (ROOT / test).read_text() or words in (ROOT / test).read_text(), f"{test} has nobody raise {text!r}"


def test_every_text_of_the_page_is_one_of_the_code():
    every, _ = errors()
    missing = [text for text in texts() if not any(re.search(pattern(text), said, re.DOTALL) for said in every)]
    assert not missing, "the page quotes what no code says"


def test_every_error_that_a_user_can_meet_is_on_the_page():
    patterns = [re.compile(pattern(text), re.DOTALL) for text in texts()]
    missing = [f"{place} {said}" for place, said in errors()[1] if not any(p.search(said) for p in patterns)]
    assert not missing, "add them to docs/troubleshooting.md:\n" + "\n".join(missing)
