import sys, gc
from tests.planning._t5 import *
from tests.planning import cases as C
def one(comm,cs,mode):
    if mode=='aggr': gc.set_threshold(50,2,2)
    if mode=='off': gc.disable()
    if comm.rank==0:
        from tests.planning._t8 import trace
        C.peak_bytes=trace
    return [measured(c,comm) for c in cs]
if __name__=='__main__':
    w=[CASES[2][3],CASES[2][7],CASES[2][9]]
    for mode in ('aggr','off'):
        print(mode,flush=True)
        for c,m in zip(w,spawn(one,2,w,mode,timeout_s=200)[0]): show(c,2,m)
