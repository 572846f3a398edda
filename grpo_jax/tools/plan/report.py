"""Formats a plan as table rows and as plain data for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.fit.memory_use import phase_rows
from grpo_jax.fit.targets import GIB
from grpo_jax.tools.plan.advice import Advice, Changes
from grpo_jax.tools.plan.verdict import Verdict


@dataclass(frozen=True)
class Plan:
    """A verdict, and the settings to change.

    Attributes:
        required: changes without which the run cannot be split evenly over the devices; the verdict includes them.
    """

    verdict: Verdict
    advice: Advice
    required: Changes
    compile_seconds: float

    @property
    def changes(self) -> Changes:
        """All settings to change."""
        return self.required | self.advice.changes


def json_of(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain data; bytes are per device, `seconds_at_least` is the roofline's time."""
    verdict = plan.verdict
    prompts, completions = verdict.micro_batch
    cost = verdict.cost
    parts = (
        ("rollout", verdict.rollout.use, cost.rollout_flops, cost.rollout_bytes, verdict.rollout_seconds),
        ("update", verdict.update, cost.update_flops, None, verdict.update_seconds),
    )
    phases = {
        name: {
            "fits": verdict.fits(use),
            "peak_memory_bytes": use.peak_bytes,
            "memory": use.components,
            "operations": operations,
            "bytes": count,
            "seconds_at_least": seconds,
            "compile_seconds": use.compile_seconds,
            "refused": use.refused,
        }
        for name, use, operations, count, seconds in parts
    }
    return {
        "fits": verdict.all_fits,
        "target": verdict.machine.name,
        "devices": verdict.devices,
        "limit_bytes": verdict.machine.limit_bytes,
        "peak_memory_bytes": verdict.peak_bytes,
        "memory": verdict.largest.components,
        **phases,
        "slots": verdict.rollout.slots,
        "micro_batch_tokens": verdict.tokens,
        "micro_batch_prompts": prompts,
        "micro_batch_completions": completions,
        "remat": verdict.remat,
        "compile_seconds": plan.compile_seconds,
        "advice": plan.changes if plan.advice.fits else None,
        "advice_target": plan.advice.target,
        "tried": [
            {"changes": a.changes, "target": a.target, "fits": a.fits, "peak_memory_bytes": a.peak_bytes, "says": a.says}
            for a in plan.advice.attempts
        ],
    }


def rows_of(plan: Plan) -> list[tuple[str, str]]:
    """Formats the plan as (label, value) rows of a table."""
    verdict = plan.verdict
    limit = verdict.machine.limit_bytes
    of = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    rows = [
        ("target", f"{verdict.machine.name}, {verdict.devices} device{'s' * (verdict.devices > 1)} in use"),
        ("verdict", f"{'fits' if verdict.all_fits else 'does not fit'}: {verdict.peak_bytes / GIB:.2f}{of} on each device"),
        *phase_rows("rollout", verdict.rollout.use, verdict.rollout_seconds),
        ("slots", str(verdict.rollout.slots)),
        *phase_rows("update", verdict.update, verdict.update_seconds),
        ("micro-batch", f"{verdict.tokens} tokens: {verdict.micro_batch[0]} prompts, {verdict.micro_batch[1]} completions of each"),
        ("model.remat", verdict.remat),
        (
            "operations",
            f"rollout {verdict.cost.rollout_flops:.3g}, update {verdict.cost.update_flops:.3g} a step, at the longest lengths",
        ),
        ("bytes", f"rollout {verdict.cost.rollout_bytes:.3g} a step, if one device did it"),
        ("compiling", f"{plan.compile_seconds:.0f} s"),
    ]
    return rows + ([("limit", verdict.machine.note)] if verdict.machine.note else [])


def advice_lines(plan: Plan) -> list[str]:
    """Formats the advice as lines that can be pasted into the YAML file; none where nothing has to change."""
    if not plan.advice.fits and not plan.verdict.all_fits:
        return [
            "advice: nothing that was tried fits; use chips with more memory, shorter completions or prompts, or a smaller model"
        ]
    if not plan.changes and plan.advice.target is None:
        return []
    sections: dict[str, dict[str, Any]] = {}
    for name, value in plan.changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    lines = [
        f"{section}: {{{', '.join(f'{key}: {value if isinstance(value, str) else show(value)}' for key, value in values.items())}}}"
        for section, values in sections.items()
    ]
    where = f" on {plan.advice.target}" if plan.advice.target else ""
    return [f"advice{where}: with these settings it fits" + ("" if lines else " as it is"), *lines]
