"""The calls of TRL's quick start: a model, a ready reward and a dataset, all else by default."""

from datasets import load_dataset

from grpo_jax.trl import GRPOTrainer
from grpo_jax.trl.rewards import accuracy_reward

dataset = load_dataset("json", data_files="rows.jsonl", split="train")

trainer = GRPOTrainer(model="model", reward_funcs=accuracy_reward, train_dataset=dataset)
trainer.train()
