"""The network: a spec read from config.json, and the decoder that it describes. `grpo_jax.weights` reads and writes its weights."""
