"""Runs three recipes with three seeds and compares what two checkouts compute, bit for bit.

    python tests/tools/same_behaviour.py run OUT --shared FOLDER       in each checkout, in its own environment
    python tests/tools/same_behaviour.py compare OUT_OLD OUT_NEW       exits with 1 where anything differs

The recipes are the quickstart (supervised warm-up in full, then GRPO with adapters, float32), the story recipe (float32) and a
GSM8K recipe with the 260K-parameter story model (bfloat16, two micro-batches, several prompt lengths). Recorded are token ids,
every metric that is not a time, and the trained arrays. FOLDER holds `stories260k` and `gsm8k`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 2)
CLOCKS = ("seconds", "per_second")


def recorded(reward: Any, tokens: list[Any]) -> Any:
    """The reward, which also keeps the token ids that it was given."""

    def wrapped(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        tokens.append([list(map(int, ids)) for ids in completion_ids])
        return reward(completions, completion_ids, **columns)

    return wrapped


def digest_reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A score that depends on every token and differs inside a group."""
    return [float(sum(ids) % 7) + 0.01 * len(ids) for ids in completion_ids]


def exact_reward(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion is the answer."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def arrays_of(policy: Any) -> dict[str, np.ndarray]:
    """Trained arrays by path."""
    import jax

    tree = policy.params if policy.adapters is None else policy.adapters
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def record(out: Path, name: str, result: Any, tokens: list[Any]) -> None:
    """Writes one run's tokens, metrics and arrays."""
    metrics = [{key: value for key, value in step.items() if not key.endswith(CLOCKS)} for step in result.history]
    arrays = arrays_of(result.policy)
    digest = hashlib.sha256(b"".join(key.encode() + arrays[key].tobytes() for key in sorted(arrays))).hexdigest()
    content = {"tokens": tokens, "metrics": metrics, "arrays": digest}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1))
    np.savez(out / f"{name}.npz", **arrays)
    print(name, digest[:12], flush=True)


def run(out: Path, shared: Path, seeds: tuple[int, ...]) -> None:
    """All recipes with all seeds."""
    import importlib

    import grpo_jax as gx
    from grpo_jax.config import load

    def first(*homes: str) -> Any:
        """A module of either checkout."""
        for home in homes:
            try:
                return importlib.import_module(home)
            except ModuleNotFoundError:
                continue
        raise ModuleNotFoundError(homes[0])

    quickstart = first("grpo_jax.tools.quickstart", "grpo_jax.quickstart")
    sft = gx.sft if "sft" in gx.__all__ else first("grpo_jax.sft").sft
    rows = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]]
    stories = str(shared / "stories260k")
    for seed in seeds:
        work = out / f"work{seed}"
        quickstart.make_task(work / "task", seed)
        quickstart.make_model(work / "model", seed)
        common = {"train.seed": str(seed), "train.quiet": "true", "train.save_every": "0", "train.eval_every": "0"}
        paths = {"model.path": str(work / "model"), "data.path": str(work / "task" / "warmup.jsonl"), "data.eval_size": "0"}
        warm = load(
            "configs/quickstart_sft.yaml", paths | common | {"train.steps": "60", "train.run_dir": str(work / "sft")}
        ).config
        result = sft(warm)
        record(out, f"quickstart_sft-{seed}", result, [])
        result.policy.save_merged(work / "warm")
        tokens: list[Any] = []
        paths = {"model.path": str(work / "warm"), "data.path": str(work / "task" / "train.jsonl"), "data.eval_size": "0"}
        grpo = load("configs/quickstart.yaml", paths | common | {"train.steps": "10", "train.run_dir": str(work / "grpo")}).config
        record(out, f"quickstart-{seed}", gx.train(grpo, reward_funcs=[recorded(exact_reward, tokens)]), tokens)
        tokens = []
        given = {"model.path": stories, "train.steps": "6", "train.run_dir": str(work / "stories")}
        story = load("configs/stories.yaml", given | common).config
        record(out, f"stories-{seed}", gx.train(story, reward_funcs=[recorded(digest_reward, tokens)]), tokens)
        tokens = []
        given = {
            "model.path": stories,
            "data.path": "null",
            "data.eval_split": "null",
            "data.system_prompt": "null",
            "data.overlong": "shorten",
            "rollout.max_prompt_length": "96",
            "rollout.max_completion_length": "48",
            "rollout.top_p": "0.95",
            "rollout.slots": "12",
            "rewards.functions": "[]",
            "rewards.weights": "null",
            "rewards.accuracy": "null",
            "optim.warmup_steps": "1",
            "train.steps": "4",
            "train.prompts_per_step": "4",
            "train.micro_batch_prompts": "2",
            "train.run_dir": str(work / "gsm8k"),
        }
        gsm8k = load("configs/gsm8k_qwen2.5_0.5b.yaml", given | common | {"data.eval_size": "0"}).config
        result = gx.train(gsm8k, dataset=rows, reward_funcs=[recorded(digest_reward, tokens)])
        record(out, f"gsm8k-{seed}", result, tokens)


def compare(old: Path, new: Path) -> int:
    """Names every difference; the number of runs that differ."""
    different = 0
    for file in sorted(old.glob("*.json")):
        if not (new / file.name).is_file():
            print(f"{file.stem}: missing")
            different += 1
            continue
        one, other = json.loads(file.read_text()), json.loads((new / file.name).read_text())
        parts = [part for part in ("tokens", "arrays") if one[part] != other[part]]
        for step, (left, right) in enumerate(zip(one["metrics"], other["metrics"], strict=True), 1):
            keys = [key for key in {**left, **right} if repr(left.get(key)) != repr(right.get(key))]
            parts += [f"step {step}: {key} {left.get(key)} -> {right.get(key)}" for key in keys]
        if "arrays" in parts:
            a, b = np.load(file.with_suffix(".npz")), np.load((new / file.name).with_suffix(".npz"))
            parts.append("largest difference of arrays " + str(max(float(np.max(np.abs(a[k] - b[k]))) for k in a.files)))
        print(f"{file.stem}: {'the same' if not parts else '; '.join(parts[:6])}")
        different += bool(parts)
    return different


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("run")
    made.add_argument("out", type=Path)
    made.add_argument("--shared", type=Path, required=True)
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    made = commands.add_parser("compare")
    made.add_argument("old", type=Path)
    made.add_argument("new", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        arguments.out.mkdir(parents=True)
        run(arguments.out, arguments.shared, tuple(arguments.seeds))
    else:
        sys.exit(int(compare(arguments.old, arguments.new) > 0))


if __name__ == "__main__":
    main()
