"use strict";

// The page of several runs: every run has a colour, and each metric a chart.

class ComparePage {
  constructor({ runs, differing }) {
    this.runs = runs.map((run, index) => ({ ...run, colour: index % 8, shown: true, name: run.head.name }));
    this.charts = [];
    for (const panel of PANELS) {
      const names = new Map(this.runs.flatMap((run) => panelMetrics({ ...panel, least: 1 }, panelTable(panel, run).values)));
      for (const [name, label] of names) {
        const title = names.size > 1 ? `${panel.title}: ${label}` : panel.title;
        this.charts.push([panel, name, new Chart({ ...panel, title, unit: panel.unit.replace(/ ± .*|, mean and range/, "") })]);
      }
    }
    const keys = this.runs.map((run) => {
      const choose = (event) => ((run.shown = event.target.checked), this.draw());
      return h(`label.key.c${run.colour}`, {}, h("input", { type: "checkbox", checked: true, onchange: choose }), h("i", {}), ...visible(run.name));
    });
    const charts = h("div.charts", {}, this.charts.map(([, , chart]) => chart.element));
    document.getElementById("page").replaceChildren(
      h("main", {},
        h("div.header", {}, h("h1", {}, `${runs.length} runs`)),
        h("div.controls.row.runs", {}, keys),
        h("section", {}, h("h2", {}, "Results"), h("div.wide", {}, this.results())),
        h("section", {}, h("h2", {}, "Settings that differ"), this.differing(differing)),
        h("section", {}, h("h2", {}, "Curves"), charts)),
      tooltip,
    );
    this.draw();
    document.title = `${runs.length} runs · grpo-jax`;
  }

  draw() {
    const shown = this.runs.filter((run) => run.shown);
    for (const [panel, name, chart] of this.charts) {
      chart.set(shown.map((run) => [run, panelTable(panel, run)]).filter(([, table]) => name in table.values).map(([run, table]) => (
        { label: run.name, colour: run.colour, steps: table.steps, values: table.values[name], dots: panel.evaluations, raw: panel.raw })));
      chart.legend.replaceChildren();
    }
  }

  name(run) {
    return h("td", {}, h(`span.key.c${run.colour}`, {}, h("i", {}), ...visible(run.name)));
  }

  results() {
    const last = (run, name, form) => {
      const known = (run.curves.values[name] || []).filter((value) => value !== null);
      return known.length ? `${form(mean(known.slice(0, 10)))} → ${form(mean(known.slice(-10)))}` : "–";
    };
    const accuracy = ({ evaluations }) => {
      const known = evaluations.filter((one) => "accuracy" in one);
      return known.length ? `${share(known[0].accuracy)} → ${share(known[known.length - 1].accuracy)}` : "–";
    };
    const three = (value) => number(value, 3);
    const facts = [
      ["steps", (run) => number(run.head.steps)],
      ["held-out accuracy", accuracy],
      ["reward", (run) => last(run, "reward/mean", three)],
      ["KL", (run) => last(run, "kl_divergence", three)],
      ["length", (run) => last(run, "completions/mean_length", three)],
      ["time", (run) => duration(run.head.summary.seconds)],
      ["state", (run) => run.head.state],
    ];
    const rows = this.runs.map((run) => h("tr", {}, this.name(run), facts.map(([, value]) => h("td", {}, value(run)))));
    return h("table", {}, h("thead", {}, h("tr", {}, ["run", ...facts.map(([title]) => title)].map((title) => h("th", {}, title)))), h("tbody", {}, rows));
  }

  differing(settings) {
    if (!settings.length) return h("p.none", {}, "None.");
    const titles = [h("th", {}, "setting"), ...this.runs.map((run) => h("th", {}, h(`span.key.c${run.colour}`, {}, h("i", {}), ...visible(run.name))))];
    const rows = settings.map(({ name, values }) => h("tr", {}, h("td", {}, name), values.map((value) => h("td.value", {}, ...visible(spelled(value))))));
    return h("div.wide", {}, h("table", {}, h("thead", {}, h("tr", {}, titles)), h("tbody", {}, rows)));
  }
}

async function begin() {
  new ComparePage(await readData());
  document.body.dataset.ready = "yes";
}

begin().catch(failed);
