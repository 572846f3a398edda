"""Tasks that a run makes by itself: model, rows and a supervised warm-up, where `model.path` and `data.path` say `builtin:NAME`.

Nothing is downloaded. `calculator` and `number_guessing` say what there is to learn, `small_model` writes the random model, `task`
makes what is missing.
"""

from grpo_jax.steps.builtin.task import with_builtin_task

__all__ = ["with_builtin_task"]
