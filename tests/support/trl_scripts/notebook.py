"""The calls of notebooks in TRL's and Unsloth's words: every argument written out, own rewards, a callback, greedy answers."""

from datasets import load_dataset
from transformers import TrainerCallback

from grpo_jax.trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("json", data_files="rows.jsonl", split="train")
seen = []


class Watch(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        seen.append((state.global_step, logs.get("reward")))


async def judge(prompts, completions, solution, **kwargs):
    return [float(len(completion[0]["content"]) > 2) for completion in completions]


def digits(completions, trainer_state=None, **kwargs):
    assert trainer_state.max_steps == 2
    return [sum(character.isdigit() for character in completion[0]["content"]) / 8 for completion in completions]


training_args = GRPOConfig(
    learning_rate=5e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    optim="adamw_torch",
    logging_steps=1,
    bf16=False,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    num_generations=4,
    max_prompt_length=64,
    max_completion_length=8,
    max_steps=2,
    save_steps=1,
    save_total_limit=1,
    max_grad_norm=0.1,
    loss_type="dr_grpo",
    scale_rewards=False,
    reward_weights=[1.0, 0.5],
    temperature=0.9,
    report_to="none",
    output_dir="outputs",
)
trainer = GRPOTrainer(
    model="model",
    reward_funcs=[judge, digits],
    args=training_args,
    train_dataset=dataset,
    peft_config={"r": 4, "lora_alpha": 4, "lora_dropout": 0, "bias": "none", "target_modules": ["q_proj", "o_proj", "down_proj"]},
    callbacks=[Watch()],
)
trainer.train()
trainer.save_model("grpo_saved_lora")
answers = trainer.model.generate([row["prompt"] for row in dataset.select(range(2))], temperature=0.0, max_completion_length=4)
