import collections, sys
from tests.planning._t5 import *
from tests.planning import cases as C
def trace(work):
    with profile(use_cpu=True, profile_memory=True) as rec: work()
    ev=sorted([e for e in rec.kineto_results.events() if e.name()=='[memory]'],key=lambda e:e.start_ns())
    now=peak=0; at=0
    for i,e in enumerate(ev):
        now+=e.nbytes()
        if now>peak: peak=now; at=i
    live=[]
    for e in ev[:at+1]:
        n=e.nbytes()
        if n>0: live.append(n)
        elif -n in live: 
            live.reverse(); live.remove(-n); live.reverse()
    print('PEAK',peak,'at',at,'of',len(ev),[n for n in live if n>200000], 'near',[e.nbytes() for e in ev[at-12:at+6]],flush=True)
    return peak
def one(comm,cs):
    if comm.rank==0: C.peak_bytes=trace
    return [measured(c,comm) for c in cs]
if __name__=='__main__':
    w=[CASES[2][i] for i in map(int,sys.argv[1:])]
    for c in w: print(c.model,c.setting.layout,c.setting.weights)
    spawn(one,2,w,timeout_s=200)
