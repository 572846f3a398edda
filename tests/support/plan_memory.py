"""Compares a plan's memory of an update on a CPU with the growth of this process's anonymous memory while the update runs.

Run as a script; prints one line of JSON: the planned bytes, and the growth from after compiling to the peak.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_batch, abstract_policy, placement_of
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.micro_batch import longest_lengths, row_tokens, sizes_of_rows
from grpo_jax.fit.phases import RunShapes, update_memory
from grpo_jax.fit.targets import machine_of
from grpo_jax.learner.step import train_step
from grpo_jax.runtime.memory import proc_bytes
from grpo_jax.runtime.programs import Program, no_announcement
from grpo_jax.weights.hf import read_folder_spec

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def anonymous_bytes() -> int:
    """Returns the anonymous memory of this process."""
    rss = proc_bytes("/proc/self/status", "RssAnon:")
    assert rss is not None
    return rss


def filled(tree: Any) -> Any:
    """Makes arrays from a tree of shapes; they are written, so that the system has allocated their memory."""
    return jax.tree.map(lambda x: jnp.full(x.shape, 1, x.dtype), tree)


class Peak:
    """Records the peak of the anonymous memory while a block runs, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self.running = anonymous_bytes(), True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def main() -> None:
    """Compiles an update from shapes, then makes its arrays and runs it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        config = Config.from_dict(
            {
                "model": {"path": folder, "remat": "none"},
                "rollout": {"num_generations": 4, "max_prompt_length": 64, "max_completion_length": 96},
                "train": {"prompts_per_step": 8, "micro_batch_prompts": 4},
            }
        )
        spec, machine = read_folder_spec(Path(folder)), machine_of("cpu")
        placement = placement_of(config, spec, machine)
        policy = abstract_policy(config, Path(folder), spec, placement)
    lengths = longest_lengths(config)
    sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
    learner, _ = grpo_learner(config, policy, sizes[0].tokens)
    run = RunShapes.of(config, policy, placement, learner, sizes, no_announcement)
    program = Program("update", functools.partial(train_step, run.learner), donate=(0,))
    use = update_memory(run, program)
    before = anonymous_bytes()
    with Peak() as peak:
        own = filled(policy.adapters)
        arguments = filled((run.state, abstract_batch(config, spec, placement, sizes), run.frozen))
        jax.block_until_ready((own, arguments))
        arrays = anonymous_bytes() - before
        jax.block_until_ready(program(*arguments))
    print(json.dumps({"planned": use.peak_bytes, "grown": peak.bytes - before, "arrays": arrays, "memory": use.components}))


if __name__ == "__main__":
    main()
