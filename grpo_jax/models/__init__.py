"""The network: a spec read from config.json and the decoder that it describes. Weights are read and written by `grpo_jax.weights`."""
