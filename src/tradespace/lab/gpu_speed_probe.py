"""Temporary probe."""
from __future__ import annotations
import json, os, random, sys, time
import torch
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.weights import WeightPlan
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Plan
from tradespace.build_cuda import build_on_device
from tradespace.engine.request import SamplingParams
from tradespace.units import GiB

L8B = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=40960, rope_theta=500000.0, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False)

def build(fmt="bf16", store="bf16", B=256, ctx=1536, step=8192, mem=76, block=32, head=None, cfg=L8B):
    spec = model_spec_from_config(cfg, "llama-3-8b-shape")
    exc = {} if head is None else {"lm_head": head}
    if fmt != "bf16": exc["embed"] = "bf16"
    plan = Plan(model=spec.name, weights=WeightPlan(default=fmt, exceptions=exc, layout="cuda"), kv=KVPlan(store=store, block_size=block), attention="paged", linear="cuda",
                max_sequences=B, max_context=ctx, step_tokens=step, kv_tokens=B * ctx // block * block, device="h100-80gb", memory_bytes=int(mem * GiB))
    return build_on_device(spec, None, plan, tokenizer=None)

rnd = random.Random(0)
def reqs(n, lo, hi): return [[rnd.randrange(10, 128000) for _ in range(rnd.randint(lo, hi))] for _ in range(n)]
def go(b, prompts, n):
    p = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
    torch.cuda.synchronize(); t = time.perf_counter()
    out = b.engine.generate(prompts, p)
    torch.cuda.synchronize(); dt = time.perf_counter() - t
    return dt, sum(len(o.output_ids) for o in out), out

def row(**kw): print("ROW", json.dumps(kw), flush=True)

def report(b, tag):
    row(tag=tag, seconds={k: round(v, 2) for k, v in b.seconds.items()}, mib={k: round(v / 2**20) for k, v in b.measured_bytes.items()}, used=round(b.meter.used_bytes() / 2**20), method=b.meter.described, kv_tokens=b.plan.kv_tokens, notes=b.notes)

def profile_decode(b, rows):
    from torch.profiler import profile, ProfilerActivity
    g = b.engine.runner.graphs[rows]
    for _ in range(3): g.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(5): g.replay()
        torch.cuda.synchronize()
    ev = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:12]
    for e in ev: print("  PROF", rows, e.key[:60], e.count, round(e.self_device_time_total / 5 / 1000, 3), "ms/step", flush=True)
    t = time.perf_counter()
    for _ in range(20): g.replay()
    torch.cuda.synchronize()
    row(tag=f"graph replay {rows}", ms=(time.perf_counter() - t) / 20 * 1000)

def decode(b, B, prompt, tag):
    a, _, _ = go(b, reqs(B, prompt, prompt), 8); c, _, _ = go(b, reqs(B, prompt, prompt), 136)
    row(tag=tag, B=B, tok_s=B * 128 / (c - a))

if __name__ == "__main__":
    what = sys.argv[1:]
    t0 = time.perf_counter()
    if "bf16" in what:
        b = build()
        row(tag="start-up bf16 random", s=time.perf_counter() - t0)
        report(b, "bf16")
        go(b, reqs(4, 64, 64), 8)
        decode(b, 1, 128, "bf16 decode")
        decode(b, 32, 128, "bf16 decode")
        profile_decode(b, 1); profile_decode(b, 32); profile_decode(b, 256)
        for name, n, lo, hi, out in (("256", 256, 64, 512, 128), ("512x128", 512, 128, 128, 128)):
            for _ in range(2):
                dt, k, _ = go(b, reqs(n, lo, hi), out); row(tag=name, tok_s=k / dt, s=dt)
        dt, k, _ = go(b, reqs(8, 1024, 1024), 1); row(tag="prefill 8x1024", tok_s=8 * 1024 / dt)
        report(b, "bf16 after")
