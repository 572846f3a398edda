"use strict";

// Line charts as SVG, drawn at the size they have on the screen. All charts of a page show the same step.

const SMOOTHED_FROM = 30;
const CHARTS = new Set();
const CHART_HEIGHT = 190;
const EDGE = { left: 48, right: 12, top: 10, bottom: 24 };

const tooltip = h("div.tooltip", { role: "status", hidden: true });

/** A centred moving mean over a tenth of the values, null where there is none; short series are unchanged. */
function smoothed(values) {
  if (values.length < SMOOTHED_FROM) return values;
  const half = Math.max(1, Math.floor(values.length / 20));
  const sums = [0], counts = [0];
  values.forEach((value, index) => {
    sums.push(sums[index] + (value ?? 0));
    counts.push(counts[index] + (value === null ? 0 : 1));
  });
  return values.map((value, index) => {
    const first = Math.max(0, index - half), last = Math.min(values.length, index + half + 1);
    return value === null || counts[last] === counts[first] ? null : (sums[last] - sums[first]) / (counts[last] - counts[first]);
  });
}

/** Round numbers between two values, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return found;
}

/**
 * A chart.
 *
 * options: title, unit, format (of a value), zero (the axis begins at 0), stacked (series are parts of a sum), onpick(step).
 * Series: {label, colour, steps, values, low, high (a band), deviation, dots (points that are few), raw (never smoothed)}; values are numbers or
 * null.
 */
class Chart {
  constructor(options) {
    this.options = { format: number, ...options };
    this.series = [];
    this.plot = h("div.plot");
    this.legend = h("div.legend");
    const unit = options.unit ? h("span.unit", {}, options.unit) : null;
    this.element = h("figure.chart", {}, h("figcaption", {}, h("strong", {}, options.title), unit), this.plot, this.legend);
    CHARTS.add(this);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  set(series) {
    this.series = series.filter((one) => one.values.some((value) => value !== null));
    this.element.hidden = this.series.length === 0;
    if (this.series.length > 1) {
      replace(this.legend, this.series.map((one) => h(`span.key.c${one.colour}`, {}, h("i", {}), ...visible(one.label))));
    } else this.legend.replaceChildren();
    this.draw();
    return this;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || !this.series.length) return;
    this.width = width;
    this.lines = this.options.stacked ? stack(this.series) : this.series.map((one) => ({ ...one, shown: one.raw || one.dots ? one.values : smoothed(one.values) }));
    this.measure();
    const grid = svg("g.grid");
    for (const value of this.flat === null ? ticks(this.low, this.high, 5) : [this.flat]) {
      const y = this.y(value);
      grid.append(
        svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }),
        svg("text", { x: EDGE.left - 7, y: y + 3.5, "text-anchor": "end" }, this.options.format(Number(value.toPrecision(10)), 3)),
      );
    }
    const steps = ticks(this.first, this.last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
    for (const step of steps) {
      grid.append(svg("text", { x: this.x(step), y: CHART_HEIGHT - 6, "text-anchor": "middle" }, number(step)));
    }
    const clip = `clip${[...CHARTS].indexOf(this)}`;
    const area = { x: EDGE.left, y: EDGE.top - 4, width: Math.max(1, width - EDGE.left - EDGE.right + 4), height: CHART_HEIGHT - EDGE.top - EDGE.bottom + 6 };
    const drawn = svg("g", { "clip-path": `url(#${clip})` }, this.lines.map((line) => this.drawLine(line)));
    this.cross = svg("g.cross");
    const picture = svg(
      "svg",
      { width, height: CHART_HEIGHT, role: "img", tabindex: 0, "aria-label": this.summary() },
      svg("clipPath", { id: clip }, svg("rect", area)),
      grid,
      drawn,
      this.cross,
    );
    picture.addEventListener("pointermove", (event) => this.point(event));
    picture.addEventListener("pointerdown", (event) => this.point(event));
    picture.addEventListener("pointerleave", () => Chart.show(null));
    picture.addEventListener("click", () => this.pick());
    picture.addEventListener("keydown", (event) => this.key(event));
    picture.addEventListener("blur", () => Chart.show(null));
    this.plot.replaceChildren(picture);
  }

  measure() {
    const steps = this.lines.flatMap((line) => [line.steps[0], line.steps[line.steps.length - 1]]);
    this.first = Math.min(...steps);
    this.last = Math.max(...steps, this.first + 1);
    let low = Infinity, high = -Infinity;
    for (const line of this.lines) {
      for (const column of [line.shown, line.values, line.low, line.high]) {
        if (!column || (column === line.values && (line.faint === false || this.options.stacked))) continue;
        for (const value of column) {
          if (value === null) continue;
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
      }
    }
    if (this.options.zero || this.options.stacked) low = Math.min(low, 0);
    if (this.options.stacked) high = Math.min(high, this.cut());
    this.flat = low === high ? low : null;
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    this.low = low === 0 ? 0 : low - room;
    this.high = high + room;
  }

  /** Where a stack is cut off: a few steps that took much longer than the others would flatten them. */
  cut() {
    const tops = this.lines[this.lines.length - 1].shown.filter((value) => value !== null).sort((a, b) => a - b);
    return 2 * tops[Math.floor(0.95 * (tops.length - 1))];
  }

  x(step) {
    return EDGE.left + ((step - this.first) / (this.last - this.first)) * (this.width - EDGE.left - EDGE.right);
  }

  y(value) {
    return EDGE.top + ((this.high - value) / (this.high - this.low)) * (CHART_HEIGHT - EDGE.top - EDGE.bottom);
  }

  drawLine(line) {
    const group = svg(`g.c${line.colour}`);
    if (line.low && line.high) group.append(svg("path.band", { d: this.area(line.steps, line.low, line.high) }));
    if (this.options.stacked) {
      group.append(svg("path.part", { d: this.area(line.steps, line.base, line.shown) }));
      return group;
    }
    if (line.shown !== line.values) group.append(svg("path.faint", { d: this.path(line.steps, line.values) }));
    group.append(svg("path.line", { d: this.path(line.steps, line.shown) }));
    if (line.dots || line.values.length === 1) {
      line.values.forEach((value, index) => {
        if (value !== null) group.append(svg("circle", { cx: this.x(line.steps[index]), cy: this.y(value), r: line.values.length > 60 ? 1.6 : 3.2 }));
      });
    }
    return group;
  }

  path(steps, values) {
    let text = "", pen = "M";
    values.forEach((value, index) => {
      if (value === null) return void (pen = "M");
      text += `${pen}${this.x(steps[index]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    return text;
  }

  area(steps, low, high) {
    const known = steps.map((_, index) => index).filter((index) => low[index] !== null && high[index] !== null);
    if (!known.length) return "";
    const at = (index, value) => `${this.x(steps[index]).toFixed(1)} ${this.y(value).toFixed(1)}`;
    const there = known.map((index) => at(index, high[index])), back = known.reverse().map((index) => at(index, low[index]));
    return `M${there.join("L")}L${back.join("L")}Z`;
  }

  /** What the chart shows, for those who cannot see it. */
  summary() {
    const said = this.series.map((one) => {
      const known = one.values.filter((value) => value !== null);
      return `${one.label}: ${this.options.format(known[0])} at first, ${this.options.format(known[known.length - 1])} at last`;
    });
    return `${this.options.title}, steps ${this.first} to ${this.last}. ${said.join("; ")}`;
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const step = this.first + ((event.clientX - box.left - EDGE.left) / (this.width - EDGE.left - EDGE.right)) * (this.last - this.first);
    const column = this.lines.reduce((longest, line) => (line.steps.length > longest.length ? line.steps : longest), []);
    Chart.show(column[nearest(column, step)], this, event.clientY);
  }

  pick() {
    if (this.options.onpick && Chart.step !== null) this.options.onpick(Chart.step);
  }

  key(event) {
    if (event.key === "Enter") return this.pick();
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const { steps } = this.lines[0];
    const at = Chart.step === null ? (event.key === "ArrowLeft" ? steps.length : -1) : nearest(steps, Chart.step);
    Chart.show(steps[Math.min(steps.length - 1, Math.max(0, at + (event.key === "ArrowLeft" ? -1 : 1)))], this);
  }

  /** Shows a step in every chart, and its values next to one of them. */
  static show(step, chart = null, top = null) {
    Chart.step = step ?? null;
    for (const one of CHARTS) one.mark(Chart.step);
    tooltip.hidden = Chart.step === null || !chart;
    if (!tooltip.hidden) chart.tell(Chart.step, top);
  }

  mark(step) {
    if (!this.cross) return;
    this.cross.replaceChildren();
    if (step === null || step < this.first || step > this.last || !this.element.isConnected) return;
    const x = this.x(step);
    this.cross.append(svg("line", { x1: x, x2: x, y1: EDGE.top, y2: CHART_HEIGHT - EDGE.bottom }));
    for (const line of this.lines) {
      const at = nearest(line.steps, step), value = line.shown[at];
      if (value === null || value === undefined || value > this.high) continue;
      this.cross.append(svg("g", { class: `c${line.colour}` }, svg("circle", { cx: this.x(line.steps[at]), cy: this.y(value), r: 3.4 })));
    }
  }

  tell(step, top) {
    const rows = this.lines.map((line) => {
      const at = nearest(line.steps, step), value = line.values[at];
      const spread = line.deviation && line.deviation[at] !== null ? ` ± ${this.options.format(line.deviation[at], 3)}` : "";
      const name = this.lines.length > 1 ? h("span", {}, ...visible(line.label)) : null;
      return h(`div.key.c${line.colour}`, {}, h("i", {}), name, h("b", {}, `${this.options.format(value)}${spread}`));
    });
    const hint = this.options.onpick ? h("div.hint", {}, "click: its completions") : null;
    tooltip.replaceChildren(h("div.step", {}, `step ${number(step)}`), ...(this.options.stacked ? rows.reverse() : rows), ...(hint ? [hint] : []));
    const box = this.plot.getBoundingClientRect(), size = tooltip.getBoundingClientRect();
    const x = box.left + this.x(step), right = x + 14 + size.width < document.documentElement.clientWidth;
    tooltip.style.left = `${Math.max(4, right ? x + 14 : x - 14 - size.width)}px`;
    tooltip.style.top = `${Math.max(4, Math.min(innerHeight - size.height - 4, (top ?? box.top + 60) - size.height - 10))}px`;
  }
}
Chart.step = null;

/** The index of the value nearest to a number, in a rising list. */
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - list[low - 1] < list[low] - value ? low - 1 : low;
}

/** Series as parts of a sum: each gets `base` and `shown`, its lower and upper edge. All have the same steps. */
function stack(series) {
  let base = series[0].steps.map(() => 0);
  return series.map((one) => {
    const values = smoothed(one.values), low = base;
    base = values.map((value, index) => low[index] + (value ?? 0));
    return { ...one, base: low, shown: base };
  });
}
