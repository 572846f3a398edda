"""The calls of TRL's scripts with a command line: parser, LoRA by arguments, a mapped dataset, continuous batching, saving."""

import re

from datasets import load_dataset

from grpo_jax.trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

SYSTEM_PROMPT = "Add. The last line is #### and the number."


def last_number(text):
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def correctness_reward(completions, reference_answer, **kwargs):
    texts = [completion[-1]["content"] for completion in completions]
    return [float(last_number(text) == goal) for text, goal in zip(texts, reference_answer, strict=True)]


def length_reward(completion_ids, log_metric, **kwargs):
    log_metric("shortest", min(map(len, completion_ids)))
    return [-len(ids) / 8 for ids in completion_ids]


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }

    rows = load_dataset(script_args.dataset_name, data_files="rows.jsonl", split=script_args.dataset_train_split)

    def make_conversation(example):
        return {
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, *example["prompt"]],
            "reference_answer": example["solution"],
        }

    dataset = rows.map(make_conversation, remove_columns=rows.column_names)

    training_args.use_transformers_continuous_batching = True
    if training_args.transformers_continuous_batching_config is None:
        training_args.transformers_continuous_batching_config = {"use_cuda_graph": False}

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[correctness_reward, length_reward],
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
