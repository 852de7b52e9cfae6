import sys
sys.path.insert(0,'/work/wt/plan')
from tests.planning.cases import *
from tests.planning import cases as C
from mezo_dist.testing import spawn
from mezo_dist.algorithms import MeZO, MeZOSVRG
base=dict(batch_size=8,full_size=16,micro_batch=4,tokens=96,width=2,weights='float32')
def S(**k): return Setting(**{**base,**k})
CASES={
 1:[Case('opt',S()),Case('llama',S(weights='bfloat16')),Case('qwen3',S(algorithm=MeZOSVRG(),width=4)),Case('mixtral',S(algorithm=MeZO(directions=3,one_sided=True))),
    Case('llama-tied',S(weights='bfloat16',algorithm=MeZOSVRG())),Case('opt',S(compute='bfloat16')),Case('llama',S(reads='tokens',targets=80,micro_batch=4)),
    Case('opt',S(algorithm=MeZO(per_sample=True),law='lowrank')),Case('llama',S(),('*norm*',)),Case('opt',S(algorithm=MeZO(directions=4))), Case('llama',S(weights='bfloat16',reads='tokens',targets=80))],
 2:[Case('opt',S(layout='fsdp')),Case('llama',S(layout='fsdp',weights='bfloat16')),Case('qwen3',S(layout='fsdp',compute='bfloat16',algorithm=MeZOSVRG())),Case('mixtral',S(layout='fsdp')),Case('llama',S(layout='fsdp',prefetch=True)),
    Case('opt',S(layout='zero')),Case('llama-tied',S(layout='zero',weights='bfloat16',algorithm=MeZOSVRG())),Case('mixtral',S(layout='zero',algorithm=MeZOSVRG(anchor='stored'))),Case('opt',S(layout='zero',prefetch=True)),
    Case('llama',S(layout='fsdp',reads='tokens',targets=80)),Case('llama',S(layout='zero',reads='tokens',targets=80)),Case('llama',S(layout='fsdp',micro_batch=1,tokens=32)),Case('llama',S(layout='zero',micro_batch=1,tokens=32)),Case('opt',S(layout='fsdp',micro_batch=1,tokens=32)),Case('opt',S(layout='zero',micro_batch=1,tokens=32)),
    Case('mixtral',S(layout='fsdp',micro_batch=1,tokens=32)),Case('mixtral',S(layout='zero',micro_batch=1,tokens=32)),Case('llama',S(layout='fsdp',prefetch=True,micro_batch=1,tokens=32))],
 4:[Case('llama',S(layout='fsdp',replicate=2,batch_size=16)),Case('opt',S(layout='fsdp',weights='bfloat16',batch_size=16,replicate=1))],
}
def run(comm,cs): return [measured(c,comm) for c in cs]
def show(c,ranks,m):
    p=planned(c,ranks); mem=memory_of(c.shape(),c.setting,Machine(ranks_per_host=ranks,runtime=0))
    s=c.setting
    d=lambda a,b: f"{100*(a/b-1):+.1f}%" if b else str(a)
    print(ranks,c.model,s.layout,s.weights,s.compute,s.algorithm.name,s.reads,'x%d'%s.micro_batch,s.prefetch,'| weights',d(p.weights,m.weights),'peak',m.peak,d(p.peak,m.peak),'beyond',d(p.peak-p.weights,m.peak-m.weights),'gathered',m.gathered,d(p.gathered,m.gathered),mem.when,{k:v for k,v in mem.parts.items() if v})
if __name__=='__main__':
    import torch; torch.set_num_threads(1)
    which=[int(x) for x in sys.argv[1:]] or [1,2,4]
    for r in which:
        ms=run(Communicator(),CASES[1]) if r==1 else spawn(run,r,CASES[r],timeout_s=300)[0]
        for c,m in zip(CASES[r],ms): show(c,r,m)
