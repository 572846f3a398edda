"""Runs code of a model, or of a dataset, where it can harm nothing and cannot decide how it is judged.

`isolation` finds and checks what confines it: bubblewrap, a container runtime, or `monty`. `process` speaks with a sandbox,
`inside` is what runs there, `tests` reads a dataset's tests, and `judge` compares results, outside of every sandbox.
"""
