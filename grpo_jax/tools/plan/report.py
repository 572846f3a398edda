"""A plan for a person, and as one line of JSON.

Enters: a `Plan`. Leaves: rows of a table, and a dict of plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.fit.phases import COMPONENTS, Needs
from grpo_jax.tools.plan.advice import Advice, Changes
from grpo_jax.tools.plan.verdict import Verdict

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A verdict, and what to change.

    Attributes:
        required: changes without which the settings do not spread over the devices; the verdict is with them.
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
    """Plain data; bytes are those of each device, seconds what the roofline says at least."""
    verdict = plan.verdict
    prompts, completions = verdict.micro_batch
    work = verdict.work
    parts = (
        ("rollout", verdict.rollout.needs, work.rollout_flops, work.rollout_bytes, verdict.rollout_seconds),
        ("update", verdict.update, work.update_flops, None, verdict.update_seconds),
    )
    phases = {
        name: {
            "fits": verdict.fits(needs),
            "peak_memory_bytes": needs.peak_bytes,
            "memory": needs.memory,
            "operations": operations,
            "bytes": count,
            "seconds_at_least": seconds,
            "compile_seconds": needs.compile_seconds,
            "refused": needs.refused,
        }
        for name, needs, operations, count, seconds in parts
    }
    return {
        "fits": verdict.all_fits,
        "target": verdict.machine.name,
        "devices": verdict.devices,
        "limit_bytes": verdict.machine.limit_bytes,
        "peak_memory_bytes": verdict.peak_bytes,
        "memory": verdict.worst.memory,
        **phases,
        "slots": verdict.rollout.slots,
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
    """The plan for a person."""
    verdict = plan.verdict
    limit = verdict.machine.limit_bytes
    of = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    rows = [
        ("target", f"{verdict.machine.name}, {verdict.devices} device{'s' * (verdict.devices > 1)} in use"),
        ("verdict", f"{'fits' if verdict.all_fits else 'does not fit'}: {verdict.peak_bytes / GIB:.2f}{of} on each device"),
        *phase_rows("rollout", verdict.rollout.needs, verdict.rollout_seconds),
        ("slots", str(verdict.rollout.slots)),
        *phase_rows("update", verdict.update, verdict.update_seconds),
        ("micro-batch", f"{verdict.micro_batch[0]} prompts, {verdict.micro_batch[1]} completions of each"),
        ("model.remat", verdict.remat),
        (
            "operations",
            f"rollout {verdict.work.rollout_flops:.3g}, update {verdict.work.update_flops:.3g} a step, at the longest lengths",
        ),
        ("bytes", f"rollout {verdict.work.rollout_bytes:.3g} a step, if one device did it"),
        ("compiling", f"{plan.compile_seconds:.0f} s"),
    ]
    return rows + ([("limit", verdict.machine.note)] if verdict.machine.note else [])


def phase_rows(name: str, needs: Needs, seconds: float | None) -> list[tuple[str, str]]:
    """One phase's memory and time."""
    parts = ", ".join(f"{part} {needs.memory[part] / GIB:.2f}" for part in COMPONENTS if needs.memory[part] >= GIB / 200)
    time = "" if seconds is None else f"; at least {seconds:.3g} s by the roofline"
    refused = f"; the compiler: {needs.refused}" if needs.refused else ""
    return [(name, f"{needs.peak_bytes / GIB:.2f} GiB ({parts}){time}{refused}")]


def advice_lines(plan: Plan) -> list[str]:
    """Settings to paste into the YAML file, or what else there is to say."""
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
        f"{section}: {{{', '.join(f'{key}: {value if isinstance(value, str) else show(value)}' for key, value in held.items())}}}"
        for section, held in sections.items()
    ]
    where = f" on {plan.advice.target}" if plan.advice.target else ""
    return [f"advice{where}: with these settings it fits" + ("" if lines else " as it is"), *lines]
