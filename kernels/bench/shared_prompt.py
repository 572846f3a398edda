"""Time of an update whose completions share their prompt, next to one in which each has its own copy, interleaved.

    python kernels/bench/shared_prompt.py --model runs/random_qwen3 --prompt_length 512

Prints medians and their ratio. An update here is the reference's log-probabilities, the policy's, and the adapters' gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax as gx
from grpo_jax.config import LoraConfig
from grpo_jax.learner.logprobs import completion_logprobs


def arguments() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder of a Hugging Face model")
    for name, default in (
        ("prompts", 4),
        ("num_generations", 8),
        ("prompt_length", 512),
        ("completion_length", 128),
        ("rounds", 5),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    return options.parse_args()


def update_of(policy: gx.Policy, beta: float = 0.04) -> Any:
    """Compiled gradient of a loss of both log-probabilities, a micro-batch of one prompt or row after the other."""

    def loss(adapters: Any, texts: tuple[Any, Any, Any], weights: Any) -> Any:
        reference = jax.lax.stop_gradient(completion_logprobs(policy.model, {"params": policy.params}, *texts)[0])
        own = completion_logprobs(policy.model, {"params": policy.params, "lora": adapters}, *texts)[0]
        return jnp.sum(weights * own + beta * (jnp.exp(reference - own) - (reference - own) - 1))

    def update(adapters: Any, parts: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(adapters, *part)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapters), parts)[0]

    return jax.jit(update)


def main() -> None:
    """Measures and prints."""
    given = arguments()
    policy = gx.Policy.from_pretrained(given.model, lora=LoraConfig(rank=16))
    b, g, p, c = given.prompts, given.num_generations, given.prompt_length, given.completion_length
    rng = np.random.default_rng(0)
    prompts, completions = rng.integers(0, policy.spec.vocab, (b, p)), rng.integers(0, policy.spec.vocab, (b, g, c))
    weights = rng.normal(size=(b, g, c)).astype(np.float32)

    def parts(count: int) -> Any:
        """`count` micro-batches of as many tokens of completions each; b shares a prompt, b·g gives every row its own."""
        rows = b * g // count
        copied = np.repeat(prompts, count // b, axis=0)[:, None] if count >= b else prompts[:, None]
        texts = (copied, np.full((count, 1), p), completions.reshape(count, rows, c))
        return jax.device_put((tuple(x.astype(np.int32) for x in texts), weights.reshape(count, rows, c)))

    # Rows with prompts of their own go as many at once as share a prompt, so that arrays are of like size.
    alone = jax.tree.map(lambda x: x.reshape(b, g, *x.shape[2:]), parts(b * g))
    update = update_of(policy)
    runs = {"shared": parts(b), "alone": alone}
    results = {name: jax.block_until_ready(update(policy.adapters, own)) for name, own in runs.items()}
    norms = [float(np.sqrt(sum(np.square(np.asarray(x)).sum() for x in jax.tree.leaves(tree)))) for tree in results.values()]
    difference = jax.tree.map(lambda x, y: np.asarray(x - y), *results.values())
    apart = float(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(difference)))) / norms[0]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.rounds):
        for name, own in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(update(policy.adapters, own))
            seconds[name].append(time.perf_counter() - start)
    shared, own = (statistics.median(seconds[name]) for name in runs)
    print(
        f"update, P {p}, C {c}, G {g}: shared {shared:.2f} s, each its own prompt {own:.2f} s: "
        f"{own / shared:.2f} times; gradients {apart:.1e} apart"
    )


if __name__ == "__main__":
    main()
