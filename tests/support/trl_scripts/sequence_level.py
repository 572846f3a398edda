"""The calls of TRL's GSPO script: sequence-level ratios, a format reward with another one, an evaluation set, resuming."""

from datasets import load_dataset

from grpo_jax.trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from grpo_jax.trl.rewards import get_soft_overlong_punishment, think_format_reward


def exact_reward(completions, solution: list[str], **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [None if goal == "" else float(goal in text) for text, goal in zip(contents, solution, strict=True)]


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    quantization_config = get_quantization_config(model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "device_map": get_kbit_device_map() if quantization_config is not None else None,
        "quantization_config": quantization_config,
    }
    dataset, eval_dataset = load_dataset("json", data_files="rows.jsonl", split=["train[:75%]", "train[75%:]"])

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[think_format_reward, exact_reward, get_soft_overlong_punishment(8, 4)],
        train_dataset=dataset,
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("training completed")
    trainer.save_model(training_args.output_dir)
    trainer.end()
