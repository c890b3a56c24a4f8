"""The Python blocks of pages, run as a reader would; `distflash run -n 2 -m tests.running PAGE ...` runs them on real ranks.

Each page is one script. What it ends with is compared with what one process computes (AFTER).
"""

import sys

import torch
import torch.nn.functional as F

import distflash
from tests.pages import ROOT, blocks

BEFORE = {  # what a page takes as given
    # the graphs are the same, and Inductor's compiler takes half a minute
    "docs/pytorch.md": "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend='aot_eager')",
    "docs/reliability.md": "import distflash, torch\nmodel, tokens = torch.nn.Linear(8, 1), torch.randn(8)",
}


def first_example(names):
    """README.md: `whole` and `loss` are those of plain attention over x."""
    x = names["x"]
    out = distflash.attention(x, x, x, causal=True)
    torch.testing.assert_close(names["whole"], out)
    torch.testing.assert_close(names["loss"], out.square().mean())


def training_step(names):
    """docs/pytorch.md: the loss of the last step is that of one process without FSDP2."""
    torch.manual_seed(0)
    sp, text = distflash.SequenceParallel.single(names["world"].device), names["text"]
    model = names["Model"]().to(text.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for borders in ([0, 100], [0, 30, 31, 100]):
        seq = sp.sequence(cu_seqlens=borders)
        per_token = F.cross_entropy(model(text[None, :-1], seq).transpose(1, 2), text[None, 1:], reduction="none")
        loss = distflash.token_mean(per_token, seq)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(names["loss"], loss)


AFTER = {"README.md": first_example, "docs/pytorch.md": training_step}  # docs/quickstart.md asserts its own


def run(page):
    """The page's Python blocks, one after the other, in one namespace; an error shows the page's own line."""
    names = {"__name__": page}
    exec(BEFORE.get(page, ""), names)
    for block in blocks("python"):
        if block.page == page and not block.not_run:
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), names)
    AFTER.get(page, lambda _: None)(names)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        torch.seed()  # as in a process of its own: every rank draws other numbers
        run(page)
        if distflash.init().is_main:
            print(f"{page} holds on {distflash.init().size} ranks", flush=True)
