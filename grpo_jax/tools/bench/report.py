"""Formats the result of a benchmark as a table."""

from __future__ import annotations

from typing import Any


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Formats the result as (label, value) rows of a table."""
    peak = result["peak_memory_bytes"]
    return [
        ("step", f"{result['step_seconds']:.3f} s"),
        ("rollout", f"{result['rollout_seconds']:.3f} s, {result['rollout_tokens_per_second']:,.0f} completion tokens a second"),
        ("update", f"{result['update_seconds']:.3f} s, {result['update_tokens_per_second']:,.0f} tokens a second"),
        ("lengths", lengths_text(result["steps"])),
        ("padding", f"{result['padding']:.1%} of the tokens that the update computes"),
        ("host gaps", host_gaps_text(result)),
        ("kernels a token", kernels_text(result)),
        ("programs", programs_text(result)),
        ("compiling", f"{result['compile_seconds']:.1f} s"),
        ("peak memory", "not known" if peak is None else f"{peak / 1e9:.2f} GB"),
        ("update against matmuls", f"{result['mfu']:.0%} of {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"),
        ("rollout against memory", f"{result['mbu']:.0%} of {result['memory_bytes_per_second'] / 1e9:,.0f} GB/s"),
        (
            "sampler against trainer",
            f"at most {result['logp_difference_max']:.1e} nats; near-ties {result['near_ties']:.1e} of the tokens",
        ),
        ("device", result["device"]),
    ]


def lengths_text(steps: list[dict[str, Any]]) -> str:
    """Smallest, mean and largest lengths of the measured steps in tokens."""

    def text(name: str) -> str:
        lengths = [length for step in steps for length in step[name]]
        low, high = min(lengths), max(lengths)
        return str(low) if low == high else f"{low} to {high}, mean {sum(lengths) / len(lengths):.1f}"

    return f"prompts {text('prompt_lengths')}; completions {text('completion_lengths')} tokens"


def host_gaps_text(result: dict[str, Any]) -> str:
    """Seconds and share of the rollout in which the devices waited for the host, and how many programs it called."""
    gaps = f"{1e3 * result['host_gap_seconds']:.1f} ms, {result['host_gap_share']:.1%} of the rollout"
    return f"{gaps}; {result['rollout_calls']:.0f} programs called"


def kernels_text(result: dict[str, Any]) -> str:
    """Kernels of a token of all slots, or why they were not counted."""
    kernels = result["kernels"]
    if kernels is None:
        return f"not measured: {result['kernels_not_measured']}"
    layer = "" if kernels["layer"] is None else f", {kernels['layer']} a layer"
    return f"{kernels['token']}{layer}; {kernels['waits']} waits of the host; {kernels['device']}"


def programs_text(result: dict[str, Any]) -> str:
    """Programs compiled, as JAX reports them, and those that came after the warm-up."""
    compiled = f"{result['programs_compiled']} compiled in {result['programs_compile_seconds']:.1f} s"
    late = result["programs_after_warmup"]
    return f"{compiled}, {result['programs_from_cache']} read from the cache" + (f"; {late} after the warm-up" if late else "")
