"""Datasets to batches of prompts: shuffled by seed, resumable by step, with a held-out part.

`rows` loads a `table` from `files` or the hub, `prompts` checks and tokenises one row, `examples` tokenises all rows and holds some
out, `order` chooses the rows of a step, `source` makes batches of prompts, `completions` batches with answers to imitate.
"""

from grpo_jax.data.completions import CompletionBatch, CompletionSource, completion_pairs
from grpo_jax.data.examples import Examples
from grpo_jax.data.rows import load_rows
from grpo_jax.data.source import PromptSource
from grpo_jax.data.table import DataError, Table

__all__ = ["CompletionBatch", "CompletionSource", "DataError", "Examples", "PromptSource", "Table", "completion_pairs", "load_rows"]
