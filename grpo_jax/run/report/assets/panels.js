"use strict";

// What the charts show. A panel is shown where the run has one of its metrics.

/**
 * metrics: [name, label] of each line, or a pattern whose first group is the label. evaluations: they are of evaluations. spread: the
 * standard deviation of the first line; range: metrics of the lowest and the highest value.
 */
const PANELS = [
  { title: "Reward", unit: "mean ± standard deviation", metrics: [["reward/mean", "reward"]], spread: "reward/std" },
  { title: "Held-out accuracy", unit: "greedy", metrics: /^((?:.*\/)?accuracy)$/, evaluations: true, format: share, zero: true },
  { title: "Reward by function", unit: "means", metrics: /^rewards\/(.+)\/mean$/, least: 2 },
  { title: "KL to the reference", unit: "nats a token", metrics: [["kl_divergence", "KL"]], zero: true },
  { title: "Entropy", unit: "nats a token", metrics: [["entropy", "entropy"]] },
  {
    title: "Completion length",
    unit: "tokens, mean and range",
    metrics: [["completions/mean_length", "all"], ["completions/mean_terminated_length", "those that stopped"]],
    range: ["completions/min_length", "completions/max_length"],
    zero: true,
  },
  { title: "Cut at the longest length", unit: "share of completions", metrics: [["completions/clipped_ratio", "cut"]], format: share, zero: true },
  { title: "Groups without spread", unit: "nothing to compare", metrics: [["reward/frac_zero_std", "groups"]], format: share, zero: true },
  { title: "Loss", unit: "", metrics: [["policy_loss", "policy loss"], ["loss", "loss"]] },
  { title: "Tokens predicted right", unit: "", metrics: [["token_accuracy", "tokens"]], format: share, zero: true },
  { title: "Gradient norm", unit: "before clipping", metrics: [["grad_norm", "norm"]], zero: true },
  { title: "Learning rate", unit: "", metrics: [["learning_rate", "rate"]], zero: true, raw: true },
  { title: "Ratio clipped", unit: "share of tokens", metrics: [["clip_ratio/low", "low"], ["clip_ratio/high", "high"]], format: share, zero: true },
  { title: "Sampler against trainer", unit: "nats a token", metrics: [["sampling/logp_difference/mean", "mean"], ["sampling/logp_difference/max", "largest"]], zero: true },
  { title: "Speed", unit: "tokens a second", metrics: [["rollout_tokens_per_second", "rollout"], ["update_tokens_per_second", "update"]], zero: true },
];

const PARTS = [
  ["rollout_seconds", "rollout"],
  ["reward_seconds", "reward"],
  ["update_seconds", "update"],
  ["compile_seconds", "compiling"],
  ["rest_seconds", "rest of the steps"],
  ["other_seconds", "outside of steps"],
];

/** The columns of the records of evaluations: {steps, values by name}. */
function columns(records) {
  const names = new Set(records.flatMap((record) => Object.keys(record)));
  names.delete("step");
  const values = {};
  for (const name of names) values[name] = records.map((record) => record[name] ?? null);
  return { steps: records.map((record) => record.step), values };
}

/** The names and labels of a panel's metrics that there are. */
function panelMetrics(panel, values) {
  if (Array.isArray(panel.metrics)) return panel.metrics.filter(([name]) => name in values);
  const found = Object.keys(values).filter((name) => panel.metrics.test(name)).map((name) => [name, name.match(panel.metrics)[1]]);
  return found.length >= (panel.least || 1) ? found : [];
}

const panelTable = (panel, run) => (panel.evaluations ? columns(run.evaluations) : run.curves);

/** The lines of a panel for one run. */
function panelSeries(panel, run) {
  const { steps, values } = panelTable(panel, run);
  return panelMetrics(panel, values).map(([name, label], index) => {
    const line = { label, colour: index % 8, steps, values: values[name], dots: panel.evaluations, raw: panel.raw };
    if (index || line.dots) return line;
    const spread = panel.spread && values[panel.spread];
    if (spread) {
      const middle = smoothed(line.values), wide = smoothed(spread);
      const known = (sign) => middle.map((value, at) => (value === null || wide[at] === null ? null : value + sign * wide[at]));
      return { ...line, low: known(-1), high: known(1), deviation: spread };
    }
    const [low, high] = (panel.range || []).map((one) => values[one]);
    return low && high ? { ...line, low, high } : line;
  });
}

/** The parts of a step's time as series; compiling is left out, as it would flatten everything else. */
function timeSeries(curves) {
  const { steps, values } = curves;
  const parts = PARTS.slice(0, 3).filter(([name]) => values[name]);
  const series = parts.map(([name, label], colour) => ({ label, colour, steps, values: values[name] }));
  const whole = values.step_seconds;
  if (!whole) return series;
  const rest = whole.map((value, at) => (value === null ? null : Math.max(0, value - series.reduce((sum, one) => sum + (one.values[at] ?? 0), 0))));
  const matters = rest.some((value, at) => value > 0.005 * (whole[at] ?? 0));
  return matters ? [...series, { label: series.length ? "rest" : "step", colour: 7, steps, values: rest }] : series;
}
