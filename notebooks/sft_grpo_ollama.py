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
# # From SFT to GRPO to Ollama
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grpo-jax/grpo_jax/blob/main/notebooks/sft_grpo_ollama.ipynb)
#
# Supervised training (SFT) shows a model the form of an answer, GRPO makes the answers right, and Ollama runs the result on a
# laptop. Here `Qwen2.5-0.5B-Instruct` learns to count letters: it spells a word first, then counts.
#
# **In Colab, choose the accelerator first:** *Runtime → Change runtime type →* **v5e-1 TPU** (or a GPU).

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
    package = "grpo-jax[gguf]" if kind == "cpu" else f"grpo-jax[gguf,{kind}]"
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
# ## 2. Sizes

# %%
import jax

import grpo_jax as gx

ON_CPU = jax.default_backend() == "cpu"


def setting(name, default):
    """The default, or the environment variable GRPO_NOTEBOOK_<name> where there is one."""
    return type(default)(os.environ.get(f"GRPO_NOTEBOOK_{name}", default))


MODEL = setting("MODEL", "Qwen/Qwen2.5-0.5B-Instruct")  # a hub id or a folder
SFT_STEPS = setting("SFT_STEPS", 3 if ON_CPU else 30)
STEPS = setting("STEPS", 3 if ON_CPU else 60)
PROMPTS = setting("PROMPTS", 2 if ON_CPU else 8)
GENERATIONS = setting("GENERATIONS", 4 if ON_CPU else 8)
TOKENS = setting("TOKENS", 64)
DTYPE = setting("DTYPE", "float32" if ON_CPU else "bfloat16")

# %% [markdown]
# ## 3. Data
#
# A third of the questions have a written answer for SFT. GRPO sees the others, with the number alone; eight are held out.

# %%
TEXT = """
strawberry banana letter coffee bottle window garden summer winter yellow pepper tomato potato cherry orange
carrot butter cheese dinner kitten rabbit parrot turtle beetle spider monkey donkey camera mirror carpet
pillow ladder hammer button ribbon pocket saddle bridge harbor island meadow valley forest desert tunnel
castle temple market
"""
WORDS = TEXT.split()
SYSTEM_PROMPT = "Spell the word, then give the count after ####."


def row(word, letter):
    count = word.count(letter)
    question = f"How many {letter} are in {word}?"
    return {"prompt": question, "answer": str(count), "completion": f"{' '.join(word)} #### {count}"}


rows = [row(word, letter) for word in WORDS for letter in sorted(set(word))]
third = len(rows) // 3
shown, practised, held_out = rows[:third], rows[third : 3 * third - 8], rows[3 * third - 8 :]
print(shown[0])

# %% [markdown]
# ## 4. SFT: the form
#
# The loss falls as the model learns to spell first. The answers' numbers are learnt much less well than the form.

# %%
import time

STARTED = time.strftime("%Y%m%d-%H%M%S")
DATA = gx.DataConfig(system_prompt=SYSTEM_PROMPT)
policy = gx.Policy.from_pretrained(MODEL, lora=gx.LoraConfig(rank=16, alpha=32), dtype=DTYPE)
warm_up = gx.Config(
    data=DATA,
    rollout=gx.RolloutConfig(max_completion_length=TOKENS),
    optim=gx.OptimConfig(learning_rate=1e-4),
    train=gx.TrainConfig(
        steps=SFT_STEPS, prompts_per_step=PROMPTS, save_every=0, show_every=0, run_dir=f"runs/letters-sft-{STARTED}"
    ),
)
warm = gx.sft(warm_up, policy=policy, dataset=shown)

# %% [markdown]
# ## 5. GRPO: the content
#
# It starts from the adapter of SFT, which is also the reference of the KL term. The reward is a plain function.


# %%
def counted(completions, answer, **columns):
    texts = [completion[-1]["content"] for completion in completions]
    return [float("####" in text and text.rpartition("####")[2].strip() == goal) for text, goal in zip(texts, answer, strict=True)]


config = gx.Config(
    data=DATA,
    rollout=gx.RolloutConfig(num_generations=GENERATIONS, max_completion_length=TOKENS),
    rewards=gx.RewardsConfig(accuracy="counted"),
    optim=gx.OptimConfig(learning_rate=2e-5),
    train=gx.TrainConfig(steps=STEPS, prompts_per_step=PROMPTS, save_every=0, show_every=0, run_dir=f"runs/letters-grpo-{STARTED}"),
)
result = gx.train(config, policy=warm.policy, dataset=practised, eval_dataset=held_out, reward_funcs=counted)

# %% [markdown]
# ## 6. A file for Ollama
#
# One GGUF file has the model with the adapter multiplied in, and the `Modelfile` next to it has the chat template and what ends an
# answer. `q8_0` takes about one byte a weight; `f16`, `bf16` and `q4_1` are the others. The command line does the same:
# `grpo-jax export --run DIR --out export/ollama --format gguf --gguf_type q8_0`.

# %%
folder = result.policy.save_gguf("export/ollama", "q8_0", temperature=0.0, note=print)
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size / 1e6:10.2f} MB  {file}")
print((folder / "Modelfile").read_text())

# %% [markdown]
# Download the folder. On a computer with [Ollama](https://ollama.com):
#
# ```
# ollama create letters -f export/ollama/Modelfile
# ollama run letters "How many r are in strawberry?"
# ```
#
# Ask with the system prompt of training: write `/set system Spell the word, then give the count after ####.` in Ollama first.
