"""`python -m grpo_jax` is `grpo-jax`."""

from grpo_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
