"""The calls of TRL's documentation on reward models and large datasets: a model as a reward, its tokenizer, rows that stream."""

from datasets import load_dataset
from transformers import AutoTokenizer

from grpo_jax.trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("json", data_files="rows.jsonl", split="train", streaming=True)


async def has_digits(completions, **kwargs):
    return [float(any(character.isdigit() for character in completion[0]["content"])) for completion in completions]


trainer = GRPOTrainer(
    model="model",
    reward_funcs=["judge", has_digits],
    reward_processing_classes=[AutoTokenizer.from_pretrained("judge"), None],
    args=GRPOConfig(
        output_dir="judged",
        max_steps=2,
        max_prompt_length=64,
        max_completion_length=8,
        num_generations=4,
        per_device_train_batch_size=4,
        reward_weights=[0.5, 1.0],
        logging_steps=1,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset,
    peft_config={"r": 4, "target_modules": "all-linear"},
)
trainer.train()
