"""Draws a run's curves as a PNG: one panel per metric over the steps.

Only panels with data are drawn, so the same function serves GRPO and supervised warm-up. For interactive plots use TensorBoard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.runtime.files import replacing

Records = Sequence[Mapping[str, Any]]

INK, FAINT, GRID = "#1f2430", "#8a93a3", "#e6e9ef"
COLOURS = ("#2463c9", "#d9480f", "#2b8a3e", "#7a3fb0", "#c2255c", "#0b7285", "#8f6200", "#495057")
SMOOTHED_FROM = 30
"""From this many steps on, a line is a moving mean over a tenth of them, with the raw values drawn faintly behind it."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Panel:
    """A panel of the picture.

    Attributes:
        title: the quantity and its unit.
        metrics: names that must all have values.
        draw: draws the records into axes.
    """

    title: str
    metrics: tuple[str, ...]
    draw: Callable[[Any, Records], None]


def draw_curves(path: str | Path, history: Records, evaluations: Records = (), title: str = "") -> Path | None:
    """Draws the curves of a run.

    Args:
        path: Of the PNG.
        history: One dict of metrics per step, with "step".
        evaluations: Dicts with "step" and "accuracy" (0 to 1).
        title: Above the panels, such as the run's folder.

    Returns:
        The path, or None where there is nothing to draw; then nothing is written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = chosen_panels(history, evaluations)
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    last = max(float(record["step"]) for record in (*history, *evaluations))
    # pyplot would change the user's backend and keep a reference to the figure.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * columns, 2.7 * rows + 0.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=True):
            panel.draw(axes, evaluations if panel.metrics == ("accuracy",) else history)
            axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.set_xlim(0, max(last, 1.0) * 1.02)
        for axes in grid[-columns:]:
            axes.set_xlabel("step")
        if title:
            figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=9, color=FAINT)
        with replacing(Path(path)) as unfinished:
            figure.savefig(unfinished, format="png")
    return Path(path)


def chosen_panels(history: Records, evaluations: Records) -> list[Panel]:
    """Chooses the panels that have data, in drawing order; at most 6, and never 5, so that rows are filled."""
    by_function = tuple(name for name in names_in(history) if name.startswith("rewards/") and name.endswith("/mean"))
    panels = [
        Panel("Reward (mean ± deviation)", ("reward/mean",), draw_reward),
        Panel("Loss (nats per token)", ("loss",), lambda axes, records: draw_line(axes, records, "loss")),
        Panel("Tokens predicted right (%)", ("token_accuracy",), lambda axes, records: draw_share(axes, records, "token_accuracy")),
        Panel("Held-out accuracy (%)", ("accuracy",), draw_accuracy),
        Panel("KL to the reference (nats per token)", ("kl_divergence",), draw_kl),
        Panel("Completion length (tokens)", ("completions/mean_length",), draw_length),
    ]
    if len(by_function) > 1:
        panels.append(Panel("Reward by function", by_function, lambda axes, records: draw_functions(axes, records, by_function)))
    panels += [
        Panel("Entropy (nats per token)", ("entropy",), lambda axes, records: draw_line(axes, records, "entropy", 3)),
        Panel("Seconds per step", ("update_seconds",), draw_seconds),
    ]
    present = names_in(history) | ({"accuracy": None} if names_in(evaluations).keys() >= {"accuracy"} else {})
    filled = [panel for panel in panels if all(name in present for name in panel.metrics)]
    return filled[: max((size for size in (1, 2, 3, 4, 6) if size <= len(filled)), default=0)]


def names_in(records: Records) -> dict[str, None]:
    """Returns the names of metrics with at least one finite value, in order of appearance."""
    return {name: None for record in records for name, value in record.items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a value can be drawn: a finite number."""
    return isinstance(value, int | float) and bool(np.isfinite(value))


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a metric where it is finite."""
    points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a centred moving mean over a tenth of the values, over fewer at both ends; short series are returned unchanged."""
    if len(values) < SMOOTHED_FROM:
        return values
    half = max(1, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def draw_line(axes: Any, records: Records, name: str, colour: int = 0, label: str | None = None) -> None:
    """Draws a metric as a line, in a long run smoothed over its raw values; a single step is drawn as a marker."""
    steps, values = series(records, name)
    mean = smoothed(values)
    if mean is not values:
        axes.plot(steps, values, color=COLOURS[colour], alpha=0.25, linewidth=0.8)
    axes.plot(steps, mean, color=COLOURS[colour], linewidth=1.7, label=label, marker="o" if len(steps) == 1 else "")


def draw_reward(axes: Any, records: Records) -> None:
    """Draws the mean reward with a band of one standard deviation to each side where that is known."""
    draw_line(axes, records, "reward/mean")
    both = [record for record in records if is_number(record.get("reward/mean")) and is_number(record.get("reward/std"))]
    if both:
        steps, mean = series(both, "reward/mean")
        deviation = smoothed(series(both, "reward/std")[1])
        axes.fill_between(steps, smoothed(mean) - deviation, smoothed(mean) + deviation, color=COLOURS[0], alpha=0.13, linewidth=0)


def draw_share(axes: Any, records: Records, name: str) -> None:
    """Draws a share (0 to 1) as a line in percent."""
    draw_line(axes, [{**record, name: 100 * record[name]} for record in records if is_number(record.get(name))], name, 2)


def draw_accuracy(axes: Any, records: Records) -> None:
    """Draws held-out accuracy as points labelled with their value."""
    steps, values = series(records, "accuracy")
    axes.plot(steps, 100 * values, color=COLOURS[2], linewidth=1, alpha=0.5)
    axes.plot(steps, 100 * values, "o", color=COLOURS[2], markersize=5, clip_on=False)
    shown = range(len(steps)) if len(steps) <= 6 else (0, len(steps) - 1)
    for index in shown:
        side = "left" if index == 0 else "right" if index == len(steps) - 1 else "center"
        offset = (4 if index == 0 else 0, -14 if values[index] > 0.85 else 8)
        text = f"{100 * values[index]:.1f}"
        axes.annotate(text, (steps[index], 100 * values[index]), offset, textcoords="offset points", ha=side)
    axes.set_ylim(0, 100)


def draw_kl(axes: Any, records: Records) -> None:
    """Draws the KL divergence from the reference on an axis that starts at 0."""
    draw_line(axes, records, "kl_divergence", 1)
    axes.set_ylim(bottom=min(0.0, float(series(records, "kl_divergence")[1].min())))


def draw_length(axes: Any, records: Records) -> None:
    """Draws the mean completion length, with a band from the shortest to the longest where they are known."""
    names = ("completions/mean_length", "completions/min_length", "completions/max_length")
    complete = [record for record in records if all(is_number(record.get(name)) for name in names)]
    if complete:
        (steps, shortest), (_, longest) = series(complete, names[1]), series(complete, names[2])
        axes.fill_between(steps, shortest, longest, color=COLOURS[5], alpha=0.13, linewidth=0, label="shortest to longest")
        axes.legend(loc="best")
    draw_line(axes, records, names[0], 5)
    axes.set_ylim(bottom=0)


def draw_functions(axes: Any, records: Records, names: Sequence[str]) -> None:
    """Draws the unweighted mean of each reward function."""
    for index, name in enumerate(names):
        label = name.removeprefix("rewards/").removesuffix("/mean").replace("$", r"\$")
        draw_line(axes, records, name, index % len(COLOURS), label)
    axes.legend(loc="best", ncols=1 if len(names) < 5 else 2)


def draw_seconds(axes: Any, records: Records) -> None:
    """Draws the seconds of each part of a step, without the first step if there are more, as it may include compiling."""
    parts = {"rollout_seconds": "rollout", "reward_seconds": "scoring", "update_seconds": "update"}
    later = records[1:] if "update_seconds" in names_in(records[1:]) else records
    for index, (name, label) in enumerate(parts.items()):
        if name in names_in(later):
            draw_line(axes, later, name, index, label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
