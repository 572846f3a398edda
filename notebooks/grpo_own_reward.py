# ---
# jupyter:
#   colab:
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A reward of your own, and how it goes wrong
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/grpo-jax/grpo_jax/blob/main/notebooks/grpo_own_reward.ipynb)
#
# A reward is a Python function that scores answers. Training finds every hole in it: here a reward looks right, the curve rises,
# and the model gets worse. The doctor says so, and one line repairs it.
#
# Nothing is downloaded but the package: the model is tiny, and all of it takes a few minutes on a CPU.

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
# ## 2. A model that hedges
#
# The task is to add a number below 10. The answers to imitate are often wrong, and four in ten name *two* numbers, the right one
# and a wrong one: `47+8=55+45`. A tiny random model learns this with supervised training.

# %%
import random

import grpo_jax as gx
from grpo_jax.tools.quickstart import make_model

WARMUP_STEPS, STEPS, PROMPTS, HELD_OUT = 250, 40, 24, 200

random.seed(0)
rows = []
for a in range(100):
    for b in range(10):
        right = a + b
        wrong = right - 10 if a % 10 + b >= 10 else right + 10
        first, second = random.sample([right, wrong], 2)
        written = f"{first}+{second}" if random.random() < 0.4 else str(first)
        rows.append({"prompt": f"{a:02d}+{b}=", "answer": str(right), "completion": written})
random.shuffle(rows)
held_out, training = rows[:HELD_OUT], rows[HELD_OUT:]

folder = Path("runs/own_reward")
number = 1
while folder.exists():  # each execution of this cell starts anew
    number += 1
    folder = Path(f"runs/own_reward-{number}")
make_model(folder / "model")

LENGTHS = {"max_prompt_length": 8, "max_completion_length": 8}
warm_up = gx.Config(
    model=gx.ModelConfig(path=str(folder / "model"), dtype="float32", remat="none"),
    lora=gx.LoraConfig(rank=0),  # a model this small is trained whole
    rollout=gx.RolloutConfig(**LENGTHS),
    optim=gx.OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20),
    train=gx.TrainConfig(
        steps=WARMUP_STEPS, prompts_per_step=128, save_every=0, show_every=0, quiet=True, run_dir=str(folder / "warmup")
    ),
)
gx.sft(warm_up, dataset=training).policy.save_merged(folder / "warm")

# %% [markdown]
# ## 3. Two rewards
#
# A reward gets the completions of a step and, by their names, the columns of the dataset; it returns one number each.
# `contains_answer` is generous: a model may write a sentence around its answer. `correct` is strict. Try rewards on answers of your
# own first.


# %%
def contains_answer(completions, answer, **columns):
    return [float(goal in text) for text, goal in zip(completions, answer, strict=True)]


def correct(completions, answer, **columns):
    return [float(text == goal) for text, goal in zip(completions, answer, strict=True)]


for text in ("55", "45", "55+45"):
    print(f"47+8={text:6} contains_answer {contains_answer([text], ['55'])[0]}  correct {correct([text], ['55'])[0]}")

# %% [markdown]
# The last line is the hole: whoever names every number is always paid.
#
# ## 4. Train with the hole
#
# `contains_answer` alone has a weight. `correct` has weight 0: it is recorded, it decides held-out accuracy, it teaches nothing.


# %%
def train(name, functions, weights):
    """One GRPO run from the warmed-up model."""
    config = gx.Config(
        model=gx.ModelConfig(path=str(folder / "warm"), dtype="float32", remat="none"),
        lora=gx.LoraConfig(rank=16, alpha=32),
        rollout=gx.RolloutConfig(num_generations=8, **LENGTHS),
        rewards=gx.RewardsConfig(weights=weights, accuracy="correct"),
        objective=gx.ObjectiveConfig(beta=0.01),
        optim=gx.OptimConfig(learning_rate=5e-4, schedule="constant"),
        train=gx.TrainConfig(
            steps=STEPS, prompts_per_step=PROMPTS, save_every=0, eval_every=10, show_every=0, quiet=True, run_dir=str(folder / name)
        ),
    )
    return gx.train(config, dataset=training, eval_dataset=held_out, reward_funcs=functions)


hacked = train("hacked", [contains_answer, correct], [1.0, 0.0])

# %% [markdown]
# ## 5. What the doctor says
#
# The reward rose and accuracy fell: *reward hacking*. `grpo-jax doctor --run DIR` prints the same.

# %%
from grpo_jax.run.doctor.report import diagnose_folder

print("\n".join(diagnose_folder(hacked.run_dir).lines()))

# %% [markdown]
# Always read what was rewarded. The last completions of the run:

# %%
import json

for line in (hacked.run_dir / "completions.jsonl").read_text().splitlines()[-8:]:
    record = json.loads(line)
    print(record["prompt"], record["completion"], record["rewards"])

# %% [markdown]
# `report.html` in the run's folder has curves, completions and findings on one page that needs no network.

# %%
import html

from IPython.display import HTML, display

page = html.escape((hacked.run_dir / "report.html").read_text())
display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700" sandbox="allow-scripts"></iframe></div>'))

# %% [markdown]
# ## 6. The fix
#
# Pay for what you want: an answer that is right and nothing else. The model, the data and the settings are the same.

# %%
fixed = train("fixed", [correct], [1.0])
for name, run in (("hacked", hacked), ("fixed", fixed)):
    summary = run.summary
    print(
        f"{name}: reward {summary['reward_first']:.2f} -> {summary['reward_last']:.2f}, "
        f"held-out accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}"
    )

# %% [markdown]
# ## What to remember
#
# - Try a reward on answers of your own, bad ones first.
# - Hold problems out, and let `rewards.accuracy` name a strict function. A reward of weight 0 watches for free.
# - `train.stop_on: [reward_hacking]` ends such a run, and the checkpoint with the best held-out accuracy is kept.
