# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # GRPO in JAX: teach a small model to solve word problems
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grpo-jax/grpo_jax/blob/main/notebooks/grpo_quickstart.ipynb)
#
# GRPO (Group Relative Policy Optimization) improves a language model with nothing but a score: the model answers each question
# several times, *your* functions score the answers, and the answers that beat the average of their group become more likely.
# No reward model and no worked solutions are needed.
#
# Here `Qwen2.5-0.5B-Instruct` is trained on GSM8K, grade-school word problems, with a small LoRA adapter. The settings fit
# the 16 GB of one TPU v5e or of a T4.
#
# **In Colab, choose the accelerator first:** *Runtime → Change runtime type →* **v5e-1 TPU** (or a GPU). Then run the cells from
# top to bottom. On a CPU everything runs too, with sizes that only show how it works.

# %% [markdown]
# ## 1. Install
#
# Colab brings an old JAX, which this cell replaces with the right one for your accelerator. It takes a few minutes. Its last line
# says whether Colab has to restart; that happens once at most, and running the cell again changes nothing.

# %%
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/grpo-jax/grpo_jax"


class RestartError(Exception):
    def _render_traceback_(self):  # the message alone; it stops "Run all" here
        return [str(self)]


def plain(name):
    return name.lower().replace("_", "-").replace(".", "-")


def packages():
    return {plain(package.name): package.version for package in importlib.metadata.distributions()}


def accelerator():
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists():
        return "cuda"
    if os.environ.get("COLAB_TPU_1VM") == "1" or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return "tpu"
    return "cpu"


if "restart_for" not in globals():
    restart_for = []  # packages that were replaced after Python had loaded them

if "grpo-jax" not in packages() and "GRPO_NOTEBOOK_NO_INSTALL" not in os.environ:
    kind, old = accelerator(), packages()
    package = "grpo-jax" if kind == "cpu" else f"grpo-jax[{kind}]"
    print(f"Installing {package} and what it needs ...", flush=True)
    pip = [sys.executable, "-m", "pip"]
    plugins = [name for name in old if name.startswith("jax-cuda")]  # those of the old JAX would complain at every import
    if plugins:
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", *plugins], capture_output=True)
    finished = subprocess.run([*pip, "install", "--quiet", f"{package} @ git+{REPOSITORY}"], capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"pip could not install {package}:\n{finished.stderr[-4000:]}")
    importlib.invalidate_caches()
    new, providers = packages(), importlib.metadata.packages_distributions()
    loaded = {plain(name) for module, names in providers.items() if module in sys.modules for name in names}
    restart_for = sorted(name for name in loaded if name in old and old[name] != new.get(name))

if restart_for:
    raise RestartError(
        f"RESTART NEEDED, once: {', '.join(restart_for)} changed while in use.\n"
        "Choose Runtime > Restart session, then run the notebook from the top; this cell will have nothing left to do."
    )
print("Ready: no restart needed.")

# %% [markdown]
# ## 2. Devices

# %%
import jax

import grpo_jax as gx

print(f"grpo_jax {gx.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}")
for device in jax.devices():
    print(f"{device.platform}: {device.device_kind}")
ON_CPU = jax.default_backend() == "cpu"
if ON_CPU:
    print("No TPU or GPU was found: what follows is small, and only shows how it works.")

# %% [markdown]
# ## 3. Sizes
#
# Everything you may want to change is here. In each step, `PROMPTS` questions get `GENERATIONS` answers each, of at most `TOKENS`
# tokens. More of each makes a steadier signal and a slower step. Out of memory? Halve `GENERATIONS` or `TOKENS`.


# %%
def setting(name, default):
    """The default, or the environment variable GRPO_NOTEBOOK_<name> where there is one."""
    return type(default)(os.environ.get(f"GRPO_NOTEBOOK_{name}", default))


MODEL = setting("MODEL", "Qwen/Qwen2.5-0.5B-Instruct")  # a hub id or a folder
DATASET = setting("DATASET", "openai/gsm8k")  # a hub id or a folder with train.jsonl and test.jsonl
DATASET_NAME = setting("DATASET_NAME", "main")
STEPS = setting("STEPS", 3 if ON_CPU else 100)
PROMPTS = setting("PROMPTS", 2 if ON_CPU else 8)
GENERATIONS = setting("GENERATIONS", 4 if ON_CPU else 8)
TOKENS = setting("TOKENS", 64 if ON_CPU else 256)
HELD_OUT = setting("HELD_OUT", 4 if ON_CPU else 64)  # problems that measure accuracy before and after
DTYPE = setting("DTYPE", "float32" if ON_CPU else "bfloat16")

# %% [markdown]
# ## 4. Questions
#
# Each row has a `question` and an `answer`; the answer ends in `####` and the number that counts. Any dataset will do: one column
# is the prompt, and every other column is passed to your reward functions under its own name. (Ignore a warning that there is no
# `HF_TOKEN`: these downloads are public.)

# %%
from datasets import load_dataset

dataset = load_dataset(DATASET, DATASET_NAME or None)
print(dataset)
print("\nQuestion:", dataset["train"][0]["question"])
print("\nAnswer:", dataset["train"][0]["answer"])

# %% [markdown]
# ## 5. Rewards
#
# A reward is a plain Python function: completions in, one number for each out. These two are enough:
#
# - `correctness`: is the number after `####` the right one?
# - `answer_format`: is there some reasoning, and then a last line that is `####` and a number alone?
#
# A system prompt makes each prompt a conversation, so a completion comes as a list of messages.

# %%
import re

SYSTEM_PROMPT = "Solve the problem step by step. On the last line write #### and then the final number alone."


def final_number(text):
    """The number right after the last ####, or None."""
    found = re.match(r"\s*(-?)\$?(\d[\d,]*(?:\.\d+)?)", text.rpartition("####")[2]) if "####" in text else None
    return float(found[1] + found[2].replace(",", "")) if found else None


def correctness(completions, answer, **columns):
    numbers = [final_number(completion[-1]["content"]) for completion in completions]
    return [float(number is not None and number == final_number(goal)) for number, goal in zip(numbers, answer, strict=True)]


def answer_format(completions, **columns):
    texts = [completion[-1]["content"].strip() for completion in completions]
    return [float(re.fullmatch(r"[^#]+\n#### -?\$?\d[\d,.]*", text) is not None) for text in texts]


# Always try rewards on answers of your own first: training finds every hole in them.
for text in ("6 times 7 is 42.\n#### 42", "#### 42", "6 times 7 is 41.\n#### 41", "It is 42."):
    completion = [[{"role": "assistant", "content": text}]]
    print(f"correct {correctness(completion, ['#### 42'])[0]}  format {answer_format(completion)[0]}  {text!r}")

# %% [markdown]
# ## 6. Model
#
# The weights do not change. Only a LoRA adapter of rank 16 on every linear layer is trained.

# %%
policy = gx.Policy.from_pretrained(MODEL, lora=gx.LoraConfig(rank=16, alpha=32), dtype=DTYPE)
print(f"{policy.name}: {sum(x.size for x in jax.tree.leaves(policy.params)) / 1e6:,.1f} million weights, frozen")
print(f"adapter: {sum(x.size for x in jax.tree.leaves(policy.adapters)) / 1e6:,.1f} million weights, trained")

# %% [markdown]
# How does it answer before training? These are greedy answers (temperature 0) to questions that training never sees. The first
# call compiles the sampler, so it takes longer than the next ones.

# %%
SHOWN = dataset["test"].select(range(2))


def show_answers(policy):
    """Prints the greedy answers to the shown questions, and returns them."""
    conversations = [
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}] for question in SHOWN["question"]
    ]
    answers = [group[0].text for group in policy.generate(conversations, max_completion_length=TOKENS, temperature=0.0)]
    for row, text in zip(SHOWN, answers, strict=True):
        print(f"{row['question']}\n\n{text}\n\n(the right number: {row['answer'].rpartition('####')[2].strip()})\n{'-' * 80}")
    return answers


answers = show_answers(policy)

# %% [markdown]
# ## 7. Train
#
# First a table of all settings is printed, then the metrics of each step, and every 25 steps a table of sampled answers with their
# rewards. Compiling takes a minute or more, once, and the output says so. Watch **reward** rise while **KL**, the distance from the
# original model, stays small. Before and after training, accuracy is measured on held-out problems: the share of greedy answers to
# which `correctness` gives a 1.
#
# Each execution of this cell starts a new run in a new folder. To continue an interrupted run, pass its `run_dir` and
# `resume=True`.

# %%
import time

config = gx.Config(
    model=gx.ModelConfig(remat="layer"),  # computes a layer's inside again in the backward pass, to save memory
    data=gx.DataConfig(prompt_column="question", system_prompt=SYSTEM_PROMPT, eval_size=HELD_OUT),
    rollout=gx.RolloutConfig(num_generations=GENERATIONS, max_completion_length=TOKENS, temperature=1.0),
    rewards=gx.RewardsConfig(weights=[1.0, 0.2], accuracy="correctness"),  # being right matters most
    objective=gx.ObjectiveConfig(loss="dapo", beta=0.04),  # beta: how hard KL pulls back to the original model
    optim=gx.OptimConfig(learning_rate=2e-5, warmup_steps=STEPS // 20),
    train=gx.TrainConfig(
        steps=STEPS,
        prompts_per_step=PROMPTS,
        micro_batch_prompts=1,  # gradients one question at a time: less memory, the same result
        save_every=25,
        show_every=25,
        run_dir=f"runs/gsm8k-{time.strftime('%Y%m%d-%H%M%S')}",
    ),
)
result = gx.train(
    config,
    policy=policy,
    dataset=dataset["train"],
    eval_dataset=dataset["test"],
    reward_funcs=[correctness, answer_format],
)

# %% [markdown]
# ## 8. Results
#
# The curves are also in the run's folder, with every completion and every metric. The format is usually learnt first, correctness
# more slowly. With 64 held-out problems an accuracy is uncertain by about six percentage points: raise `HELD_OUT` and
# `STEPS` for a reliable result.

# %%
from IPython.display import Image, display

display(Image(filename=str(result.run_dir / "curves.png"), width=1000))
summary = result.summary
print(f"mean reward of the first steps {summary['reward_first']:.3f}, of the last steps {summary['reward_last']:.3f}")
print(
    f"accuracy on {summary['held_out_problems']} held-out problems: "
    f"{summary['accuracy_before']:.1%} before, {summary['accuracy_after']:.1%} after"
)

# %% [markdown]
# `result.history` holds the metrics of each step, for plots of your own:

# %%
print(", ".join(result.history[-1]))
print([round(step["rewards/correctness/mean"], 2) for step in result.history])

# %% [markdown]
# The same two questions after training:

# %%
answers_after = show_answers(result.policy)

# %% [markdown]
# ## 9. Save the result
#
# - **The adapter** is small and in the format of PEFT.
# - **The merged model** is a complete model folder, with tokenizer and config, that transformers, vLLM and converters load.
#
# Colab deletes the files when the session ends: download them (the folder icon on the left), or upload a folder to the
# hub with `huggingface_hub.upload_folder`.

# %%
adapter_folder = result.policy.save_adapter("export/adapter")
merged_folder = result.policy.save_merged("export/merged")
for file in sorted(Path("export").rglob("*")):
    if file.is_file():
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file}")

# %% [markdown]
# The adapter, loaded again on top of the original model, gives the same answers as the trained policy:

# %%
loaded_policy = gx.Policy.from_pretrained(MODEL, adapter=adapter_folder, dtype=DTYPE)
print("the same answers:", show_answers(loaded_policy) == answers_after)

# %% [markdown]
# Other libraries use it like any other adapter. With **PEFT**:
#
# ```python
# from peft import PeftModel
# from transformers import AutoModelForCausalLM
#
# model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct"), "export/adapter")
# ```
#
# With **vLLM**, next to the original model (or serve the merged folder alone: `vllm serve export/merged`):
#
# ```
# vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora --lora-modules gsm8k=export/adapter
# ```
#
# ## What next
#
# - **Your own task:** change the dataset, its prompt column and the two functions. The model learns from rewards that
#   differ *within* a group; it learns nothing from a group whose answers all have the same score.
# - **Another model:** Llama, Mistral, Qwen and Gemma families; see the recipes in `configs/`.
# - **From the command line:** `grpo-jax train --config FILE.yaml` runs the same code with settings from a file.
