"""The doctor: finds out what goes wrong in a run, from its metrics, evaluations and completions. Nothing here uses JAX.

`rules.py` is the list; `four.py` and `faults.py` have the conditions, `history.py` what they read. The same rules serve
`grpo-jax doctor` (`report.py`), the live display and `train.stop_on` (`callback.py`), and the summary at the end of a run.
"""
