"""What a run writes and what a person sees.

`run_folder` holds the files of a run, `records` the append-only ones among them, `curves` draws its picture, `display` talks to the
terminal with the help of `tables`.
"""

from grpo_jax.run.curves import draw_curves
from grpo_jax.run.display import Display, step_values
from grpo_jax.run.folder import RunFolder, RunFolderError

__all__ = ["Display", "RunFolder", "RunFolderError", "draw_curves", "step_values"]
