"""How far this process's anonymous memory grows in an update, against what its plan said: run as a script, prints one line of JSON.

Enters: nothing. Leaves: the plan's bytes, and the growth from after compiling to the peak while the update runs, on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_policy, longest_batch, placement_of
from grpo_jax.fit.micro_batch import micro_batch_of, tokens_of
from grpo_jax.fit.phases import Subject, update_needs
from grpo_jax.fit.targets import machine_of
from grpo_jax.policy import trained_model
from grpo_jax.runtime.memory import proc_bytes
from grpo_jax.runtime.programs import Program, silently
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
    """Of this process."""
    held = proc_bytes("/proc/self/status", "RssAnon:")
    assert held is not None
    return held


def filled(tree: Any) -> Any:
    """Arrays of a tree's shapes, written, so that the system has given their memory."""
    return jax.tree.map(lambda x: jnp.full(x.shape, 1, x.dtype), tree)


class Peak:
    """The most anonymous memory while something runs, looked at every millisecond."""

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
    """Compiles from shapes, then makes the arrays and runs."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(MODEL))
        config = Config.from_dict(
            {
                "model": {"path": place, "remat": "none"},
                "rollout": {"num_generations": 4, "max_prompt_length": 64, "max_completion_length": 96},
                "train": {"prompts_per_step": 8, "micro_batch_prompts": 4},
            }
        )
        spec, machine = read_folder_spec(Path(place)), machine_of("cpu")
        placement = placement_of(config, spec, machine)
        policy = abstract_policy(config, Path(place), spec, placement)
    micro_batch = micro_batch_of(config, policy)
    model, _ = trained_model(policy, config.model.remat, tokens_of(config, micro_batch))
    subject = Subject.of(config, policy, placement, model, micro_batch, silently)
    program = Program("update", subject.learner.train_step, donate=(0,))
    needs = update_needs(subject, program)
    before = anonymous_bytes()
    with Peak() as peak:
        own = filled(policy.adapters)
        arguments = filled((subject.state, longest_batch(config, placement), subject.frozen))
        jax.block_until_ready((own, arguments))
        arrays = anonymous_bytes() - before
        jax.block_until_ready(program(*arguments))
    print(json.dumps({"planned": needs.peak_bytes, "grown": peak.bytes - before, "arrays": arrays, "memory": needs.memory}))


if __name__ == "__main__":
    main()
