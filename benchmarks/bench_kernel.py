"""One device's attention kernels: is each variant right, and how fast beside cuDNN and FA2 in the same run?

    PYTHONPATH=. python3 benchmarks/bench_kernel.py --cells quick --only fwd --d 128,64,256 --variants all --out $OUT/fwd.json

First every variant's correctness (several processes at once, which also fills Triton's cache), then timings one at a time. Each
job runs in a child process under a time limit: a kernel that hangs loses its own numbers and nobody else's.
Legend: B * S = 32768 tokens, H * D = 2048; FLOPs 4 B H S² D, half if causal, 2.5 times that backward; medians of do_bench.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback

TOKENS, WIDTH = 32768, 2048
CURRENT = [0]  # the job that this child works on


# ------------------------------------------------------------------ the cases of the correctness check


def cases(torch):
    """name -> (B, Tq, Tk, H, Hk, tiles); every mask, odd sizes, rows that see nothing, several entries a row."""
    from distflash.tile import Band, Tile, Tiles

    far = 1 << 20

    def one(tq, tk, lo=-far, hi=far):
        return Tiles((Tile(slice(0, tq), slice(0, tk), Band(lo, hi)),), tq, tk)

    docs, at = [], 0
    for n in (1, 130, 0, 77, 300, 5):
        docs.append(Tile(slice(at, at + n), slice(at, at + n), Band(-far, 0)))
        at += n
    return {
        "full": (1, 256, 256, 2, 2, one(256, 256)),
        "causal": (2, 384, 384, 2, 2, one(384, 384, hi=0)),
        "causal_odd": (1, 257, 257, 3, 3, one(257, 257, hi=0)),
        "short": (1, 1, 5, 2, 2, one(1, 5)),
        "cross": (1, 100, 333, 2, 2, one(100, 333, hi=233)),
        "window": (1, 515, 515, 2, 2, one(515, 515, lo=-100, hi=17)),
        "gqa": (2, 300, 300, 6, 2, one(300, 300, hi=0)),
        "empty_rows": (1, 300, 280, 2, 2, one(300, 280, hi=-150)),
        "idle_rows": (1, 400, 300, 2, 2, Tiles((Tile(slice(130, 290), slice(7, 222), Band(-far, far)),), 400, 300)),
        "many": (2, 1500, 1500, 16, 4, one(1500, 1500, hi=0)),  # programs that stay take several items, of different lengths
        "documents": (1, at, at, 2, 2, Tiles(tuple(docs), at, at)),
        "two_entries": (
            1, 320, 512, 2, 1,
            Tiles((Tile(slice(0, 320), slice(0, 190), Band(-far, far)), Tile(slice(64, 320), slice(250, 500), Band(-far, 20))), 320, 512),
        ),
    }  # fmt: skip


def keep_mask(torch, tiles, device):
    keep = torch.zeros(tiles.q_len, tiles.kv_len, dtype=torch.bool, device=device)
    for t in tiles:
        i = torch.arange(t.rows, device=device)[:, None]
        j = torch.arange(t.columns, device=device)[None, :]
        keep[t.q, t.kv] |= (j - i >= t.band.lo) & (j - i <= t.band.hi)
    return keep


def dense(torch, q, k, v, keep, scale, dout=None):
    """out, lse (and dq, dk, dv, delta) by the formula, in the tensors' own dtype; statistics at least fp32."""
    g = q.shape[2] // k.shape[2]
    k2, v2 = k.repeat_interleave(g, 2), v.repeat_interleave(g, 2)
    up = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = torch.einsum("bihd,bjhd->bhij", q, k2).to(up) * scale
    s = s.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", p.to(q.dtype), v2)
    if dout is None:
        return out, lse
    dp = torch.einsum("bihd,bjhd->bhij", dout, v2).to(up)
    delta = (out.to(up) * dout.to(up)).sum(-1).transpose(1, 2)
    ds = (p * (dp - delta[..., None])).to(q.dtype)
    fold = lambda x: x.unflatten(2, (k.shape[2], g)).sum(3)  # noqa: E731
    dq = torch.einsum("bhij,bjhd->bihd", ds, k2) * scale
    dk = fold(torch.einsum("bhij,bihd->bjhd", ds, q) * scale)
    dv = fold(torch.einsum("bhij,bihd->bjhd", p.to(q.dtype), dout))
    return out, lse, dq, dk, dv


def verdict(torch, got, low, ref, what):
    """Error within twice that of the dense formula in the same dtype (hazards.md, 2), or a sentence."""
    if not torch.equal(torch.isneginf(got), torch.isneginf(ref)):
        return f"{what}: -inf in other places"
    got, low, ref = (torch.nan_to_num(x.double(), nan=1e9, neginf=0.0) for x in (got, low, ref))
    unit = 2 * ((ref + 0.3).to(torch.bfloat16).double() - 0.3 - ref).abs().max().item() if ref.numel() else 0.0
    err, budget = (got - ref).abs().max().item(), (low - ref).abs().max().item()
    return None if err <= 2 * budget + unit else f"{what}: error {err:.2e}, dense in the same dtype {budget:.2e}"


def check(job):
    """Run every case of one variant; returns the sentences of those which failed."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    kernel, d, bad, worst = make_kernel(job), job["d"], [], 0.0
    plain = job["variant"] != "shipped"
    for name, (B, Tq, Tk, H, Hk, tiles) in cases(torch).items():
        modes = [("bf16", "bf16", False)]
        if not plain and name in ("causal_odd", "idle_rows", "empty_rows", "two_entries", "gqa", "many"):
            modes += [("bf16", "fp32", False), ("bf16", "bf16", True), ("bf16", "fp32", True)]
        if not plain and name in ("causal", "gqa"):
            modes += [("fp16", "fp16", False)]
        for dtype, out_dtype, running in modes:
            label = f"{name}/{dtype}/{out_dtype}{'/acc' if running else ''}"
            say(f"  {job['dir']} d{d} {job['variant']} {label}")
            try:
                bad += [
                    f"{label} {line}" for line in one_case(torch, kernel, job["dir"], B, Tq, Tk, H, Hk, d, tiles, dtype, out_dtype, running)
                ]
            except Exception as error:  # the next case is still worth having, unless the device is gone
                bad.append(f"{label} {type(error).__name__}: {str(error)[:300]}")
                if "CUDA" in str(error):
                    return {"bad": bad, "fatal": True}
    return {"bad": bad, "worst": worst}


def one_case(torch, kernel, direction, B, Tq, Tk, H, Hk, d, tiles, dtype, out_dtype, running):
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, out_dtype = kinds[dtype], kinds[out_dtype]
    generator = torch.Generator(device="cuda").manual_seed(B * 7 + Tq)
    draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.float32, generator=generator).to(dtype)  # noqa: E731
    q, k, v = draw(B, Tq, H, d), draw(B, Tk, Hk, d), draw(B, Tk, Hk, d)
    if Hk == H and Tq == Tk:  # a packed projection: strided views, read without a copy
        q, k, v = draw(B, Tq, 3, H, d).unbind(2)
    dout, keep, scale = draw(B, Tq, H, d), keep_mask(torch, tiles, "cuda"), d**-0.5
    ref = dense(torch, q.double(), k.double(), v.double(), keep, scale, dout.double())
    low = dense(torch, q, k, v, keep, scale, dout)
    acc_ref, lse_ref, lse_low = ref[0], ref[1], low[1]
    if direction == "fwd":
        acc, want, small = None, acc_ref, low[0].double()
        if running:  # an earlier visit: some rows seen, some not
            from distflash.kernels.base import Partial

            old, old_lse = draw(B, Tq, H, d).float(), draw(B, H, Tq).float()
            old_lse[..., ::3] = float("-inf")
            old[:, ::3] = 0.0
            top = torch.logaddexp(lse_ref, old_lse.double())
            share = lambda part: torch.nan_to_num(torch.exp(part - top), nan=0.0).transpose(1, 2)[..., None]  # noqa: E731
            want = acc_ref * share(lse_ref) + old.double() * share(old_lse.double())
            small = (low[0].double() * share(lse_ref) + old.double() * share(old_lse.double())).to(out_dtype).double()
            lse_ref, lse_low, acc = top, top.float(), Partial(old.clone(), old_lse.clone())
        out, lse = kernel.forward(q, k, v, tiles, scale, acc=acc, dtype=out_dtype)
        assert out.dtype == out_dtype and lse.dtype == torch.float32
        lines = [verdict(torch, out, small, want, "out"), verdict(torch, lse, lse_low, lse_ref, "lse")]
    else:
        before = draw(B, Tq, H, d).float() if running else None
        lse, delta = lse_ref.float(), kernel.delta(low[0], dout)
        dq, dk, dv = kernel.backward(
            dout, q, k, v, lse, delta, tiles, scale, dq=None if before is None else before.clone(), dq_dtype=out_dtype, dkv_dtype=out_dtype
        )
        extra = 0.0 if before is None else before.double()
        lines = [
            verdict(torch, dq, (low[2].double() + extra).to(out_dtype), ref[2] + extra, "dq"),
            verdict(torch, dk, low[3], ref[3], "dk"),
            verdict(torch, dv, low[4], ref[4], "dv"),
        ]
    return [line for line in lines if line]


# ------------------------------------------------------------------ timing


def make_kernel(job):
    from distflash.kernels.hopper import configs
    from distflash.kernels.hopper.host import HopperKernel

    d, variant = job["d"], job["variant"]
    forward, backward = dict(configs.FORWARD), dict(configs.BACKWARD)
    if variant != "shipped":
        (forward if job["dir"] == "fwd" else backward)[d] = (
            configs.FORWARD_VARIANTS if job["dir"] == "fwd" else configs.BACKWARD_VARIANTS
        )[d][variant]
    return HopperKernel(forward, backward)


def timing(job):
    """TFLOP/s of one variant or peer at one cell; ours is compared with cuDNN's result first."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    from distflash.tile import Band, Tile, Tiles

    d, s, causal, direction = job["d"], job["s"], job["causal"], job["dir"]
    B, H, scale = TOKENS // s, WIDTH // d, d**-0.5
    torch.manual_seed(1)
    q, k, v, dout = (torch.randn(B, s, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    flops = 4 * B * H * s * s * d * (0.5 if causal else 1) * (2.5 if direction == "bwd" else 1)

    def sdpa(backend):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)

    note = {}
    if job["variant"] in ("cudnn", "fa2"):
        backend = SDPBackend.CUDNN_ATTENTION if job["variant"] == "cudnn" else SDPBackend.FLASH_ATTENTION
        if direction == "fwd":
            run = lambda: sdpa(backend)  # noqa: E731
        else:
            for x in (q, k, v):
                x.requires_grad_(True)
            out, grad = sdpa(backend), dout.transpose(1, 2)
            run = lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
    else:
        kernel = make_kernel(job)
        tiles = Tiles((Tile(slice(0, s), slice(0, s), Band(-s, 0 if causal else s)),), s, s)
        if direction == "fwd":
            run = lambda: kernel.forward(q, k, v, tiles, scale, dtype=torch.bfloat16)  # noqa: E731
            note["diff"] = (run().out.float() - sdpa(SDPBackend.CUDNN_ATTENTION).transpose(1, 2).float()).abs().max().item()
        else:
            x = [t.detach().clone().requires_grad_(True) for t in (q, k, v)]
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                peer = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x), is_causal=causal)
            want = torch.autograd.grad(peer, x, dout.transpose(1, 2))
            del peer
            out, lse = kernel.forward(q, k, v, tiles, scale, dtype=torch.bfloat16)

            def run():
                delta = kernel.delta(out, dout)
                return kernel.backward(dout, q, k, v, lse, delta, tiles, scale, dq_dtype=torch.bfloat16, dkv_dtype=torch.bfloat16)

            note["diff"] = max((a.float() - b.float()).abs().max().item() for a, b in zip(run(), want, strict=True))
            del want, x
    run()
    torch.cuda.synchronize()
    low, mid, high = do_bench(run, warmup=job["warmup"], rep=job["rep"], quantiles=[0.2, 0.5, 0.8])
    begin = time.perf_counter()
    run()
    cpu = time.perf_counter() - begin
    torch.cuda.synchronize()
    return {"ms": mid, "tflops": flops / mid / 1e9, "spread": (high - low) / mid, "cpu_us": cpu * 1e6, **note}


# ------------------------------------------------------------------ children under a time limit


def say(text):
    """Into the log; and a sign of life, so that the time limit counts from here."""
    print(text, file=sys.stderr, flush=True)
    print(json.dumps(["tick", CURRENT[0]]), flush=True)


def child(path):
    """Run the jobs of a file one after another; a line a job on stdout."""
    with open(path) as f:
        jobs = json.load(f)
    for n, job in jobs:
        CURRENT[0] = n
        print(json.dumps(["start", n]), flush=True)
        try:
            result = check(job) if job["kind"] == "check" else timing(job)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error)[:400]}", "fatal": "CUDA" in str(error)}
        print(json.dumps(["done", n, result]), flush=True)
        if result.get("fatal"):
            os._exit(3)  # the context is lost: a new process takes the rest
    os._exit(0)


def run_jobs(jobs, limit, deadline, log):
    """Run (n, job) pairs in one child, a new one after a hang or a crash; n -> result."""
    results, rest = {}, list(jobs)
    while rest and time.time() < deadline:
        path = f"{tempfile.gettempdir()}/bench_jobs_{os.getpid()}_{rest[0][0]}.json"
        with open(path, "w") as f:
            json.dump(rest, f)
        process = subprocess.Popen([sys.executable, __file__, "--child", path], stdout=subprocess.PIPE, stderr=log, text=True)
        lines: queue.Queue = queue.Queue()

        def pump(stream, into):
            for line in stream:
                into.put(line)
            into.put(None)

        threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
        current = rest[0][0]
        while True:
            try:
                line = lines.get(timeout=max(1.0, min(limit, deadline - time.time())))
            except queue.Empty:
                results[current] = {"error": f"hung, or past the time limit of {limit} s"}
                break
            if line is None:
                if current not in results:
                    results[current] = {"error": f"the process ended with {process.wait()}"}
                break
            if not line.startswith("["):
                continue
            word, n, *result = json.loads(line)
            current = n
            if word == "done":
                results[n] = result[0]
        process.kill()
        process.wait()
        rest = [(n, job) for n, job in rest if n not in results]
    return results | {n: {"error": "no time left"} for n, _ in rest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child")
    parser.add_argument("--cells", choices=["quick", "grid"], default="quick", help="S = 8192, or 2048, 8192 and 32768")
    parser.add_argument("--only", choices=["fwd", "bwd", "both"], default="both")
    parser.add_argument("--d", default="128,64,256")
    parser.add_argument("--variants", default="shipped", help="names, comma separated, or all")
    parser.add_argument("--peers", default="cudnn,fa2")
    parser.add_argument("--check", choices=["yes", "no", "only"], default="yes")
    parser.add_argument("--force", action="store_true", help="time variants that failed their check too")
    parser.add_argument("--limit", type=float, default=90, help="seconds a job may take before it counts as hung")
    parser.add_argument("--budget", type=float, default=510, help="seconds for everything")
    parser.add_argument("--parallel", type=int, default=8, help="processes while checking")
    parser.add_argument("--warmup", type=int, default=25)
    parser.add_argument("--rep", type=int, default=150)
    parser.add_argument("--out", default="bench_kernel.json")
    parser.add_argument("--log", default=None, help="what the children write; default OUT.log")
    args = parser.parse_args()
    if args.child:
        child(args.child)
    deadline = time.time() + args.budget
    from distflash.kernels.hopper import configs

    log = open(args.log or args.out + ".log", "w")  # noqa: SIM115
    ours = []  # (dir, d, variant)
    for direction in ("fwd", "bwd") if args.only == "both" else (args.only,):
        for d in map(int, args.d.split(",")):
            shipped, extra = (
                (configs.FORWARD, configs.FORWARD_VARIANTS) if direction == "fwd" else (configs.BACKWARD, configs.BACKWARD_VARIANTS)
            )
            known = (["shipped"] if d in shipped else []) + list(extra.get(d, {}))
            ours += [(direction, d, name) for name in known if args.variants == "all" or name in args.variants.split(",")]
    passed, report = set(ours), {}
    if args.check != "no":
        work = [(n, {"kind": "check", "dir": a, "d": b, "variant": c}) for n, (a, b, c) in enumerate(ours)]
        lots = [work[i :: args.parallel] for i in range(args.parallel)]
        results: dict = {}
        threads = [
            threading.Thread(target=lambda lot=lot: results.update(run_jobs(lot, args.limit, deadline - 100, log))) for lot in lots if lot
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print("== correctness")
        for n, job in work:
            result = results[n]
            bad = result.get("bad", []) + ([result["error"]] if "error" in result else [])
            report[f"check {job['dir']} d{job['d']} {job['variant']}"] = bad or "right"
            print(f"{job['dir']} d{job['d']:<4} {job['variant']:<10} {'right' if not bad else f'{len(bad)} WRONG'}")
            [print(f"      {line[:180]}") for line in bad[:6]]
            if bad and not args.force:
                passed.discard((job["dir"], job["d"], job["variant"]))
    rows = []
    if args.check != "only":
        lengths = [8192] if args.cells == "quick" else [2048, 8192, 32768]
        work = []
        for s in lengths:
            for direction in ("fwd", "bwd"):
                for d in map(int, args.d.split(",")):
                    names = [c for a, b, c in ours if (a, b) == (direction, d) and (a, b, c) in passed]
                    for causal in (True, False):
                        for name in names + (args.peers.split(",") if any(o[0] == direction for o in ours) and args.peers else []):
                            work.append({"kind": "time", "dir": direction, "d": d, "s": s, "causal": causal, "variant": name,
                                         "warmup": args.warmup, "rep": args.rep})  # fmt: skip
        timed = run_jobs(list(enumerate(work)), args.limit, deadline, log)
        rows = [{**job, **timed[n]} for n, job in enumerate(work)]
    meta = {"tokens": TOKENS, "width": WIDTH, "dtype": "bf16", "argv": sys.argv[1:]}
    try:
        import torch
        import triton

        meta |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    except Exception as error:
        meta["device"] = str(error)
    with open(args.out, "w") as f:
        json.dump({"meta": meta, "check": report, "rows": rows}, f, indent=1)
    table(rows)
    print(meta)


def table(rows):
    """causal / full TFLOP/s of each variant, a line each."""
    print("== TFLOP/s  causal / full   (spread; CPU time of a call; difference to cuDNN)")
    seen = {}
    for row in rows:
        seen.setdefault((row["s"], row["dir"], row["d"], row["variant"]), {})[row["causal"]] = row
    for (s, direction, d, variant), pair in seen.items():
        shown = " / ".join(f"{pair[c]['tflops']:6.1f}" if "tflops" in pair.get(c, {}) else "   -  " for c in (True, False))
        first = next((p for p in pair.values() if "tflops" in p), {})
        tail = f"±{first.get('spread', 0) * 50:.1f}% {first.get('cpu_us', 0):.0f} us {max(p.get('diff', 0) for p in pair.values()):.1e}"
        error = next((p["error"] for p in pair.values() if "error" in p), "")
        print(f"S {s:<6} {direction} d{d:<4} {variant:<10} {shown}   {tail} {error[:120]}")


if __name__ == "__main__":
    main()
