import time, torch, itertools, json
import tradespace.kernels.attention.paged as pg
from tradespace.spec.mixers import Attention
mixer = Attention(N=32, K=8, H=128)
dev = "cuda"
# read bandwidth
x = torch.empty(2**31, dtype=torch.int8, device=dev).view(torch.int64)
def timed(f, n=5):
    s = torch.cuda.Stream()
    with torch.cuda.stream(s): f(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g, stream=s): f()
    g.replay(); torch.cuda.synchronize(); ts = []
    for _ in range(n):
        t = time.perf_counter(); g.replay(); torch.cuda.synchronize(); ts.append(time.perf_counter() - t)
    return sorted(ts)[n // 2]
t = timed(lambda: x.sum())
print("read GB/s", 2**31 / t / 1e9)
del x
for B, n, store in ((1, 32768, "int8"), (1, 32768, "bf16"), (32, 4096, "bf16"), (256, 512, "bf16"), (256, 512, "fp8")):
    P = 32
    sets = 8 if B * n < 10**6 else 4
    slots = B * n * sets
    dt = torch.bfloat16 if store == "bf16" else torch.int8 if store == "int8" else torch.uint8
    keys = torch.zeros(slots, 8, 128, dtype=dt, device=dev); vals = torch.zeros_like(keys)
    sc = [torch.ones(slots, 8, dtype=torch.float16, device=dev) for _ in range(2)] if store == "int8" else [None, None]
    planes = pg.Planes(keys=keys, values=vals, key_scales=sc[0], value_scales=sc[1], store=store, block_size=P)
    tables = torch.randperm(slots // P, device=dev).int().view(sets, B, n // P)
    lengths = torch.full((B,), n, dtype=torch.int32, device=dev)
    q = torch.randn(B, 32, 128, dtype=torch.bfloat16, device=dev); out = torch.empty_like(q)
    scratch = pg.DecodeScratch(dev, max(B * 4, 200), 32, 128, 1)
    nbytes = sets * B * n * 2 * 8 * (256 if store == "bf16" else 130 if store == "int8" else 128)
    best = []
    tiles = [(32,1,4),(32,2,4),(64,1,4),(64,2,3),(64,2,7),(64,4,3),(128,4,3),(128,4,2),(32,1,8),(32,4,6)]
    for (N, w, st), sp in itertools.product(tiles, (16, 33, 66, 128) if B == 1 else (1, 2, 4) if B == 32 else (1,)):
        if B * sp > max(B * 4, 200): continue
        def f():
            for k in range(sets): pg.paged_decode(q, planes, tables[k], lengths, mixer, scratch, out, splits=sp, tiles=pg.PagedTiles(N=N, warps=w, stages=st), pdl=False)
        try: t = timed(f, 3)
        except Exception as e: print("ERR", N, w, st, sp, str(e)[:80]); continue
        best.append((nbytes / t / 1e9, (N, w, st), sp))
    best.sort(reverse=True)
    print("ATT", B, n, store, [(round(a), b, c) for a, b, c in best[:6]], "worst", round(best[-1][0]), flush=True)
    del keys, vals, planes, sc
