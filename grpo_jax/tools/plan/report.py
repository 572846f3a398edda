"""Formats a plan as table rows and as plain data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.fit.memory_use import phase_rows
from grpo_jax.runtime.memory import GIB
from grpo_jax.runtime.mesh import mesh_sizes
from grpo_jax.runtime.sharding import MESH_AXES
from grpo_jax.tools.plan.advice import Advice, Changes
from grpo_jax.tools.plan.verdict import Verdict


@dataclass(frozen=True)
class Plan:
    """A verdict, and the settings to change.

    Attributes:
        required: changes without which the run cannot be split evenly over the devices; the verdict includes them.
        faster: name of the roofline of a base that fits too, is as exact or more, and is faster; None where there is none.
    """

    verdict: Verdict
    advice: Advice
    required: Changes
    compile_seconds: float
    faster: str | None = None

    @property
    def changes(self) -> Changes:
        """All settings to change."""
        return self.required | self.advice.changes


def json_of(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain data; bytes are per device, `seconds_at_least` is the roofline's time."""
    verdict = plan.verdict
    prompts, completions = verdict.micro_batch
    line = verdict.roofline
    parts = (
        ("rollout", verdict.rollout.use, line.cost.rollout_flops, line.cost.rollout_bytes, line.rollout_seconds),
        ("update", verdict.update, line.cost.update_flops, None, line.update_seconds),
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
        "micro_batch_auto": verdict.auto,
        "micro_batch_prompts": prompts,
        "micro_batch_completions": completions,
        "remat": verdict.remat,
        "mesh": {name: value for name, value in asdict(verdict.mesh.mesh).items() if value is not None} | {"why": verdict.mesh.why},
        "attention": verdict.attention,
        "bytes_per_weight": line.weight_bytes,
        "step_seconds_at_least": {name: one.seconds for name, one in verdict.rooflines.items()},
        "faster": None if plan.faster is None else verdict.rooflines[plan.faster].changes,
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
    verdict, line = plan.verdict, plan.verdict.roofline
    limit = verdict.machine.limit_bytes
    prompts, completions = verdict.micro_batch
    auto = "; auto chose this by compiling, as the run will" if verdict.auto else ""
    of = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    rows = [
        ("target", f"{verdict.machine.name}, {verdict.devices} device{'s' * (verdict.devices > 1)} in use"),
        ("verdict", f"{'fits' if verdict.all_fits else 'does not fit'}: {verdict.peak_bytes / GIB:.2f}{of} on each device"),
        *([("mesh", mesh_text(verdict))] if verdict.devices > 1 else []),
        *phase_rows("rollout", verdict.rollout.use, line.rollout_seconds),
        ("slots", str(verdict.rollout.slots)),
        *phase_rows("update", verdict.update, line.update_seconds),
        ("micro-batch", f"{verdict.tokens} tokens: {prompts} prompts, {completions} completions of each{auto}"),
        ("model.remat", verdict.remat + (auto if verdict.config.model.remat == "auto" else "")),
        ("attention of the update", attention_text(verdict)),
        *([("model.quantization", format_text(verdict))] if verdict.config.model.quantization != "none" else []),
        (
            "operations",
            f"rollout {line.cost.rollout_flops:.3g}, update {line.cost.update_flops:.3g} a step, at the longest lengths",
        ),
        ("bytes", f"rollout {line.cost.rollout_bytes:.3g} a step, if one device did it"),
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
        return faster_lines(plan)
    lines = yaml_lines(plan.changes)
    where = f" on {plan.advice.target}" if plan.advice.target else ""
    return [f"advice{where}: with these settings it fits" + ("" if lines else " as it is"), *lines, *faster_lines(plan)]


def faster_lines(plan: Plan) -> list[str]:
    """Formats the advice to take a more exact format of the base that is faster; no lines where there is none."""
    if plan.faster is None:
        return []
    own, other = plan.verdict.roofline, plan.verdict.rooflines[plan.faster]
    reason = f"a step then takes at least {other.seconds:.3g} s by the roofline instead of {own.seconds:.3g}"
    return [f"advice: this fits too; {reason}", *yaml_lines(other.changes)]


def yaml_lines(changes: Changes) -> list[str]:
    """Formats changes as lines of a YAML file, one a section."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return [
        f"{section}: {{{', '.join(f'{key}: {value if isinstance(value, str) else show(value)}' for key, value in values.items())}}}"
        for section, values in sections.items()
    ]


def mesh_text(verdict: Verdict) -> str:
    """Says the sizes of the mesh, and why `auto` chose them."""
    mesh, why = verdict.mesh.mesh, verdict.mesh.why
    sizes = ", ".join(
        f"{name} {size}" for name, size in zip(MESH_AXES, mesh_sizes(mesh, len(verdict.machine.devices)), strict=True)
    )
    data, tensor = mesh.rollout_sizes
    sampling = f"; of the rollout: data {data}, tensor {tensor}" if data else ""
    return sizes + (f"; auto chose {why}" if why else "") + sampling


def attention_text(verdict: Verdict) -> str:
    """Says which implementation of attention the update is planned with, and what it needs where the run is."""
    if verdict.attention != "mosaic_gpu" or verdict.machine.target is None:
        return verdict.attention
    return "mosaic_gpu, which needs tokamax there (pip install 'grpo-jax[cuda]'); without it xla takes more memory and time"


def format_text(verdict: Verdict) -> str:
    """Says what the format of the base moves for a weight, and next to which formats it is slower by the roofline."""
    own, lines = verdict.config.model.quantization, verdict.rooflines
    moved = f"{own} moves {lines[own].weight_bytes:.2f} bytes a weight at each token, unquantised {lines['none'].weight_bytes:.2f}"
    seconds = [f"{name} {one.seconds:.3g}" for name, one in lines.items() if one.seconds is not None]
    if not seconds:
        return moved
    slower = f"; slower than {', '.join(verdict.faster)}" if verdict.faster else ""
    return f"{moved}; seconds of a step at least: {', '.join(seconds)}{slower}"
