"""Prompts to completions: the sampler, its schedule of slots, the KV cache, and the choice of a token."""
