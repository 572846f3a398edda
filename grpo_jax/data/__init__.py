"""Datasets to batches of prompts: shuffled by seed, resumable by step, with a held-out part.

`rows` reads, `encode` checks and tokenises one row, `order` says which rows a step visits, `source` joins them, and
`completions` does the same for rows with an answer to imitate.
"""

from grpo_jax.data.completions import CompletionBatch, CompletionSource, completion_pairs
from grpo_jax.data.rows import DataError, Table, load_rows
from grpo_jax.data.source import Examples, PromptSource

__all__ = ["CompletionBatch", "CompletionSource", "DataError", "Examples", "PromptSource", "Table", "completion_pairs", "load_rows"]
