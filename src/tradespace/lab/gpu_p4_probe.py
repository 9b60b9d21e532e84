import sys, time, gc
from tradespace.lab.gpu_speed_probe import *
def fresh():
    gc.collect(); torch.cuda.empty_cache(); torch.cuda.set_per_process_memory_fraction(1.0)
def replay(b, rows, n=30):
    g=b.engine.runner.graphs[rows]
    for _ in range(3): g.replay()
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(n): g.replay()
    torch.cuda.synchronize(); return (time.perf_counter()-t)/n*1000
def mixes(b, tag, which=((256,64,512,128),(512,128,128,128),(1024,64,1024,256))):
    go(b, reqs(64,64,512), 16)
    for n,lo,hi,out in which:
        dt,k,_=go(b,reqs(n,lo,hi),out); row(tag=f"{tag} mix {n}",tok_s=round(k/dt),s=round(dt,2))
for what in sys.argv[1:]:
    t0=time.perf_counter()
    if what.startswith("step"):
        b=build(B=256,ctx=1536,step=int(what[4:])); row(tag=what,start=time.perf_counter()-t0)
        decode(b,1,128,"warm"); decode(b,1,128,"decode"); decode(b,32,128,"decode")
        row(tag="replay", ms={r: round(replay(b,r),3) for r in (1,32,64,128,256)})
        mixes(b, what)
    elif what=="fp8-a8":
        b=build("fp8-a8","fp8",B=256,ctx=4352,step=8192); row(tag=what,start=time.perf_counter()-t0)
        decode(b,1,128,"warm"); decode(b,1,128,what); decode(b,32,128,what)
        row(tag="replay", ms={r: round(replay(b,r),3) for r in (1,32,64,128,256)})
        mixes(b, what)
        for _ in range(2): dt,k,_=go(b,reqs(8,4096,4096),1); row(tag="prefill 8x4096",tok_s=8*4096/dt)
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as prof: go(b, reqs(2,4096,4096), 1)
        for e in sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:10]: print("  PROF", e.key[:70], e.count, round(e.self_device_time_total/1000,2), flush=True)
    else:
        b=build(what,"bf16",B=32,ctx=1536,step=512); row(tag=what,start=time.perf_counter()-t0)
        decode(b,1,128,"warm"); decode(b,1,128,what); decode(b,32,128,what)
        row(tag=what+" replay", ms={r: round(replay(b,r),3) for r in (1,8,32)})
    del b; fresh()
