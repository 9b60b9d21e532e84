from __future__ import annotations
import sys, time, torch
from tradespace.lab.gpu_speed_probe import build, go, reqs, row
import tradespace.model.cuda_step as cs
b = build()
r = b.engine.runner; m = r.model
def cap(rows, tag):
    inp = lambda: r._decode(rows)
    with torch.inference_mode():
        arrays = r.decode_inbox.next_arrays()
        for a in arrays.values(): a.fill(0)
        arrays["slots"][:rows] = range(1000, 1000 + rows); arrays["positions"].fill(130); arrays["lengths"].fill(131); arrays["sources"].fill(-1)
        arrays["tables"][:] = 1 + (torch.arange(arrays["tables"].size).reshape(arrays["tables"].shape) % 10000).numpy()
        r.decode_inbox.send()
        s = torch.cuda.Stream()
        with torch.cuda.stream(s): inp(); torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, stream=s): inp()
        for _ in range(3): g.replay()
        torch.cuda.synchronize(); ts = []
        for _ in range(5):
            t = time.perf_counter()
            for _ in range(10): g.replay()
            torch.cuda.synchronize(); ts.append((time.perf_counter() - t) / 10)
        row(tag=tag, rows=rows, ms=sorted(ts)[2] * 1000)
orig = (cs.paged_decode, cs.rope_write)
sp = dict(m.splits)
import tradespace.kernels.attention.paged as pg
PT = pg.PagedTiles
dt0 = pg._decode_tiles
for rows in (1, 32, 128, 256):
    for pdl in (True, False):
        m.pdl = pdl
        cap(rows, f"pdl={pdl}")
    m.pdl = True
    cs.paged_decode = lambda *a, **k: None
    cap(rows, f"no attention")
    cs.rope_write = lambda *a, **k: None
    cap(rows, f"no attention no rope")
    cs.paged_decode, cs.rope_write = orig
    for tile in ((64,4,2),(64,2,2),(64,2,3),(32,2,3),(32,1,4),(128,4,2),(128,8,2),(32,4,3),(16,1,4)):
        pg._decode_tiles = lambda *a: PT(N=tile[0], warps=tile[1], stages=tile[2])
        for k in ((8, 4) if rows == 1 else (1, 2) if rows == 32 else (1,)):
            if rows * k > m.attention.sums.numel() // 32: continue
            m.splits[rows] = k; cap(rows, f"tile={tile} splits={k}")
    pg._decode_tiles = dt0
    m.splits.update(sp)
m.pdl = True
# prefill profile
from torch.profiler import profile, ProfilerActivity
go(b, reqs(8, 1024, 1024), 1)
ts = []
for _ in range(5):
    dt, k, _ = go(b, reqs(8, 1024, 1024), 1); ts.append(dt)
row(tag="prefill 8x1024", tok_s=8192 / sorted(ts)[2])
ps = reqs(8, 1024, 1024)
with profile(activities=[ProfilerActivity.CUDA]) as prof:
    go(b, ps, 1)
for e in sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:14]: print("  PROF prefill", e.key[:70], e.count, round(e.self_device_time_total / 1000, 2), "ms", flush=True)
# host time
import collections
acc = collections.Counter()
def timed(obj, name, tag):
    f = getattr(obj, name)
    def g(*a, **k):
        t = time.perf_counter()
        try: return f(*a, **k)
        finally: acc[tag] += time.perf_counter() - t
    setattr(obj, name, g)
e = b.engine
timed(e.scheduler, "schedule", "schedule"); timed(r, "launch", "launch"); timed(e.scheduler, "commit", "commit")
import tradespace.engine.device_runner as dr
f = dr.InFlight.tokens
def g(self):
    t = time.perf_counter()
    try: return f(self)
    finally: acc["wait"] += time.perf_counter() - t
dr.InFlight.tokens = g
timed(e, "_land", "land (with wait)")
steps = []
e.on_step = lambda s, dt: steps.append((len(s.sequences), s.num_tokens, dt))
for n, lo, hi, out in ((256, 64, 512, 128), (512, 128, 128, 128)):
    ps = reqs(n, lo, hi); acc.clear(); steps.clear()
    t = time.perf_counter()
    dt, k, _ = go(b, ps, out)
    row(tag=f"mix {n}", tok_s=k / dt, s=dt, host={k: round(v, 2) for k, v in acc.items()}, steps=len(steps))
    mixed = [s for s in steps if s[1] > s[0]]; dec = [s for s in steps if s[1] == s[0]]
    row(tag="  mixed steps", n=len(mixed), s=sum(x[2] for x in mixed), tokens=sum(x[1] for x in mixed), few=mixed[:6])
    row(tag="  decode steps", n=len(dec), s=sum(x[2] for x in dec), tokens=sum(x[1] for x in dec), sizes=[x[0] for x in dec][::16], ms=[round(x[2] * 1000, 1) for x in dec][::16])
