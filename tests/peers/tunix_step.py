"""Times a GRPO step of Tunix with a Qwix LoRA and Tunix's own ("vanilla") sampler on the CPU.

Takes the model's folder and the shape of a step (`step_task.py`) and prints one line of JSON, last on standard output. Needs
google-tunix; nothing of grpo_jax is imported. Settings that do not change the algorithm are chosen for speed; the options in
addition to the shape are the choices that were tried.

    python tests/peers/tunix_step.py --model runs/random_qwen3 --prompt_length 64
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from random_qwen3 import SPECIAL
from step_task import ALPHA, BETA, LEARNING_RATE, RANK, Watch, calls, made_up_prompts, parser, report, timed
from tokenizers import Tokenizer
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import reshard
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.hooks import TrainingHooks

LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
PACKAGES = ("google-tunix", "qwix", "jax", "jaxlib", "flax", "optax")


class Words:
    """Tokenizer with Tunix's interface. The id of padding is outside the vocabulary, and so is that of the end unless `ends`."""

    def __init__(self, folder: Path, vocabulary: int, ends: bool):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocabulary = vocabulary
        self.end = SPECIAL["<eos>"] if ends else vocabulary

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(str(text)).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def bos_id(self) -> int:
        return 0  # none: Tunix leaves out the id 0

    def eos_id(self) -> int:
        return self.end

    def pad_id(self) -> int:
        return self.vocabulary + 1


class Losses(TrainingHooks):
    """Records the loss of every update; Tunix reports it one update later."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_start(self, train_ctx: Any) -> None:
        """Nothing to record."""

    def on_train_end(self, train_ctx: Any) -> None:
        """Nothing to record."""

    def on_train_step_start(self, train_ctx: Any) -> None:
        """Nothing to record."""

    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None:
        self.losses.append(float(train_loss))

    def on_eval_step_start(self, train_ctx: Any) -> None:
        """Nothing to record."""

    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None:
        """Nothing to record."""


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    options = parser("time of a GRPO step in Tunix")
    options.add_argument("--train_prompts", type=int, default=None, help="prompts of a forward and backward pass")
    options.add_argument("--score_prompts", type=int, default=None, help="prompts that the reference scores at once")
    options.add_argument("--rollout_prompts", type=int, default=None, help="prompts that are sampled at once")
    options.add_argument("--remat", choices=["NONE", "BLOCK", "DECODER"], default="NONE")
    return options.parse_args()


def models(given: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Returns the frozen model, and the one with adapters over the same weights."""
    config = json.loads((Path(given.model) / "config.json").read_text(encoding="utf-8"))
    sizes = qwen3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        use_tied_embedding=config["tie_word_embeddings"],
        remat_config=qwen3.RematConfig[given.remat],
    )
    reference = qwen3_params.create_model_from_safe_tensors(given.model, sizes, mesh, dtype=jnp.dtype(jnp.float32))
    provider = qwix.LoraProvider(module_path=LINEAR, rank=RANK, alpha=ALPHA)
    actor: Any = qwix.apply_lora_to_model(reference, provider, rngs=nnx.Rngs(0), **reference.get_model_input())
    return reference, reshard.reshard_model_to_mesh(actor, mesh)


def cluster_config(given: argparse.Namespace, mesh: jax.sharding.Mesh) -> clusters.ClusterConfig:
    """Returns the step as settings of Tunix: one update over all its rows."""
    roles = (clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT)
    return clusters.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        training_config=clusters.RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0)),
            eval_every_n_steps=10**9,
            max_steps=calls(given),
            mini_batch_size=given.prompts,
            train_micro_batch_size=given.train_prompts or given.prompts,
            rollout_micro_batch_size=given.rollout_prompts or given.prompts,
            compute_logps_micro_batch_size=given.score_prompts or given.prompts,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=given.completion_length,
            max_prompt_length=given.prompt_length,
            kv_cache_size=given.prompt_length + given.completion_length,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
        ),
    )


def adapters_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the values of every adapter by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.LoRAParam))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def batches(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the prompts of every step."""
    prompts = made_up_prompts(given)
    for start in range(0, len(prompts), given.prompts):
        yield {"prompts": np.array(prompts[start : start + given.prompts])}


def run(given: argparse.Namespace) -> None:
    """Trains and prints the result."""
    watch = Watch(given)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return watch.reward(prompts, [text.split() for text in completions])

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    reference, actor = models(given, mesh)
    vocabulary = reference.config.vocab_size
    cluster = clusters.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Words(Path(given.model), vocabulary, given.ragged),
        cluster_config=cluster_config(given, mesh),
    )
    before = adapters_of(cluster.actor_trainer.model)
    rollout: list[float] = []
    cluster.generate = timed(cluster.generate, rollout)
    losses = Losses()
    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=reward,
        algo_config=GRPOConfig(num_generations=given.num_generations, num_iterations=1, beta=BETA, kl_loss_mode="low_var_kl"),
    )
    cluster.actor_trainer.with_training_hooks(losses)
    learner.train(batches(given))
    after, sampled = adapters_of(cluster.actor_trainer.model), adapters_of(cluster.rollout.model())
    assert all(np.array_equal(after[path], sampled[path]) for path in after), "the sampler has other adapters than the trainer"
    report(
        watch,
        rollout_seconds=rollout,
        losses=losses.losses,
        trained=sum(value.size for value in after.values()),
        change=sum(float(np.square(after[path] - before[path]).sum()) for path in after) ** 0.5,
        packages=PACKAGES,
    )


if __name__ == "__main__":
    run(arguments())
