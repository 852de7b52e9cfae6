"""A LightningModule that takes steps without gradients: manual optimisation, and mezo_dist.Optimizer in it.

    pip install pytorch-lightning
    python examples/lightning.py

The model learns whether a drawn point lies outside of a circle.
"""

import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from mezo_dist import MeZO, Optimizer


class Circle(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # no backward pass, so Lightning has nothing to do for it
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def configure_optimizers(self):
        self.steps = Optimizer(self.model, MeZO(lr=0.2, directions=16), trajectory=Path(folder, "steps.jsonl"))

    def training_step(self, batch, _):
        self.log("loss", self.steps.step(self.loss, batch), on_step=False, on_epoch=True, prog_bar=True)

    def on_train_end(self):
        self.steps.close()

    @staticmethod
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


folder = sys.argv[1] if sys.argv[1:] else "runs/lightning"
torch.manual_seed(0)
points = torch.randn(512, 2)
loader = DataLoader(TensorDataset(points, (points.norm(dim=1) > 1).long()), batch_size=32, shuffle=True)
trainer = lightning.Trainer(max_epochs=12, default_root_dir=folder, logger=False, accelerator="auto")
module = Circle()
trainer.fit(module, loader)
print("loss", float(trainer.callback_metrics["loss"]), "after", module.steps.num_steps_done, "steps")
