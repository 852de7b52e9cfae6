"""A training loop of one's own, on as many processes as it is started on.

    python examples/own_loop.py
    torchrun --nproc-per-node 2 examples/own_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/own_loop.py

The model learns to tell where a drawn point lies. accelerate deals the batches to the processes, and puts no wrapper
around the model, whose weights are the same everywhere. Everything that follows from a step is a few numbers.
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from mezo_dist import MeZO, Optimizer

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
points = torch.randn(512, 2)
labels = (points.norm(dim=1) > 1).long()
model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).to(accelerator.device)
loader = accelerator.prepare(DataLoader(TensorDataset(points, labels), batch_size=32, shuffle=True))


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


with Optimizer(model, MeZO(lr=0.2, directions=16), trajectory=sys.argv[1] if sys.argv[1:] else None) as optimizer:
    for epoch in range(12):
        losses = [optimizer.step(loss, batch) for batch in loader]
        accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
    print(f"rank {accelerator.process_index} of {accelerator.num_processes}: weights {optimizer.fingerprint()}")
