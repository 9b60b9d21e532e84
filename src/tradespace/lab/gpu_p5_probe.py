import time, collections
from tradespace.lab.gpu_speed_probe import *
import tradespace.engine.device_runner as dr
b=build(B=256,ctx=1536,step=8192); e=b.engine; r=e.runner
go(b, reqs(256,64,512), 16); go(b, reqs(64,64,1024), 16)
for _ in range(3):
    dt,k,_=go(b,reqs(256,64,512),128); row(tag="mix 256",tok_s=round(k/dt),s=round(dt,2))
acc=collections.Counter(); f=dr.InFlight.tokens
def g(self):
    t=time.perf_counter()
    try: return f(self)
    finally: acc["wait"]+=time.perf_counter()-t
dr.InFlight.tokens=g
l=r.launch
def g2(*a,**k):
    t=time.perf_counter()
    try: return l(*a,**k)
    finally: acc["launch"]+=time.perf_counter()-t
r.launch=g2
steps=[]; e.on_step=lambda s,dt: steps.append((len(s.sequences),s.num_tokens,dt))
for n,lo,hi,out in ((256,64,512,128),(1024,64,1024,256)):
    ps=reqs(n,lo,hi); acc.clear(); steps.clear()
    dt,k,_=go(b,ps,out); row(tag=f"mix {n}",tok_s=round(k/dt),s=round(dt,2),host={a:round(v,2) for a,v in acc.items()},pre=b.engine.counters.preemptions)
    mixed=[s for s in steps if s[1]>s[0]]; dec=[s for s in steps if s[1]==s[0]]
    row(tag="mixed",n=len(mixed),s=sum(x[2] for x in mixed),tokens=sum(x[1] for x in mixed),hist=[(x[0],x[1],round(x[2]*1000)) for x in mixed[::max(1,len(mixed)//25)]])
    row(tag="decode",n=len(dec),s=sum(x[2] for x in dec),tokens=sum(x[1] for x in dec),hist=[(x[0],round(x[2]*1000,1)) for x in dec[::max(1,len(dec)//25)]])
