"use strict";

// The page of one run: from its data in this file, or live from the server that this page came from.

const POLL_MILLISECONDS = 2000;

class RunPage {
  constructor(live) {
    this.live = live;
    this.completions = new Completions(live);
    const pick = (step) => {
      this.completions.go(step, this.completions.state.group, true);
      this.completions.element.scrollIntoView();
    };
    const onpick = (step) => (this.completions.element.hidden ? null : pick(step));
    this.charts = PANELS.map((panel) => [panel, new Chart({ ...panel, onpick })]);
    this.time = new Chart({ title: "Time of a step", unit: "seconds, without compiling", stacked: true, format: duration, onpick });
    this.any = new Chart({ title: "Any metric", onpick });
    this.anySelect = h("select", { "aria-label": "metric", onchange: () => this.showAny() });
    this.parts = Object.fromEntries(["header", "tiles", "findings", "curvesNote", "split", "settings", "again"].map((name) => [name, h(`div.${name}`)]));
    const { header, tiles, findings, curvesNote, split, settings, again } = this.parts;
    this.onlyChanged = h("input", { type: "checkbox", checked: true, onchange: () => this.showSettings() });
    this.settingSearch = h("input", { type: "search", placeholder: "name or value", "aria-label": "search settings", oninput: () => this.showSettings() });
    const wanted = h("div.controls.row", {}, h("label.check", {}, this.onlyChanged, "only those that are no default"), this.settingSearch);
    document.getElementById("page").replaceChildren(
      h("nav", {}, ["Curves", "Time", "Completions", "Settings"].map((name) => h("a", { href: `#${name.toLowerCase()}`, onclick: jump }, name))),
      h("main", {}, header, tiles, findings,
        h("section", { id: "curves" }, h("h2", {}, "Curves"), curvesNote, h("div.charts", {}, this.charts.map(([, chart]) => chart.element), h("div.any", {}, this.anySelect, this.any.element))),
        h("section", { id: "time" }, h("h2", {}, "Time"), split, this.time.element),
        this.completions.element,
        h("section", { id: "settings" }, h("h2", {}, "Settings"), wanted, settings),
        h("section", {}, h("h2", {}, "Make this run again"), again),
      ),
      tooltip,
    );
  }

  /** Shows a run, or what has become of it since. */
  show(run) {
    this.run = run;
    this.showHeader();
    this.showTiles();
    this.showFindings();
    for (const [panel, chart] of this.charts) chart.set(panelSeries(panel, run));
    this.time.set(timeSeries(run.curves));
    this.parts.curvesNote.textContent = run.curves.every > 1 ? `Each point is the mean of ${run.curves.every} steps.` : "";
    this.showSplit();
    this.showChoices();
    this.showSettings();
    this.showAgain();
  }

  showHeader() {
    const { name, kind, state, steps, planned_steps: planned } = this.run.head;
    const of = planned && planned !== steps ? ` of ${number(planned)}` : "";
    const kindOf = state === "running" ? "live" : state === "finished" ? "good" : "poor";
    replace(this.parts.header, h("h1", {}, ...visible(name)), h("p", {}, h(`span.state.${kindOf}`, {}, state), `${kind}, ${number(steps)}${of} steps`, (this.trouble = h("span.trouble"))));
    document.title = `${name} · grpo-jax`;
  }

  showTiles() {
    const { summary, seconds } = this.run.head, { curves, evaluations } = this.run;
    const tiles = [];
    const tile = (title, value, note) => tiles.push(h("div.tile", {}, h("span", {}, title), h("b", {}, value), h("small", {}, note || "\u00a0")));
    const checked = evaluations.filter((one) => "accuracy" in one);
    if (checked.length) {
      const first = checked[0], last = checked[checked.length - 1];
      const from = checked.length > 1 ? `${share(first.accuracy)} at step ${number(first.step)}` : "";
      tile("held-out accuracy", share(last.accuracy), `${from}${from && last.problems ? ", " : ""}${last.problems ? `${number(last.problems)} problems` : ""}`);
    }
    const ends = (name, title, form, said) => {
      const known = (curves.values[name] || []).filter((value) => value !== null);
      if (known.length) tile(title, form(mean(known.slice(-10))), said(mean(known.slice(0, 10))));
    };
    ends("reward/mean", "reward", number, (first) => `${number(first)} in the first steps`);
    if (!("reward/mean" in curves.values)) ends("loss", "loss", number, (first) => `${number(first)} in the first steps`);
    ends("kl_divergence", "KL to the reference", (value) => number(value, 3), () => "nats a token");
    ends("completions/mean_length", "completion length", (value) => number(value, 3), (first) => `tokens; ${number(first, 3)} at first`);
    const all = summary.seconds ?? Object.values(seconds).reduce((sum, value) => sum + value, 0);
    tile("time", duration(all), summary.devices ? `on ${[...new Set(summary.devices)].join(", ")}` : "in steps");
    if (summary.skipped_steps) tile("skipped steps", number(summary.skipped_steps), "loss or gradient not finite");
    replace(this.parts.tiles, tiles);
  }

  showFindings() {
    const { findings } = this.run.head;
    if (!findings) return this.parts.findings.replaceChildren();
    const cards = findings.map(({ title, evidence, cause, setting }) => {
      const line = (name, value) => (value ? [h("dt", {}, name), h("dd", {}, ...visible(spelled(value)))] : []);
      return h("div.finding", {}, h("h3", {}, ...visible(String(title))), h("dl", {}, line("evidence", Array.isArray(evidence) ? evidence.join("; ") : evidence), line("cause", cause), line("change", setting)));
    });
    replace(this.parts.findings, h("h2", {}, "Findings"), cards.length ? cards : h("p.none", {}, "No findings."));
  }

  showSplit() {
    const { seconds } = this.run.head;
    const parts = PARTS.map(([name, label], colour) => ({ label, colour: colour < 3 ? colour : colour + 2, value: seconds[name] || 0 }));
    const whole = parts.reduce((sum, part) => sum + part.value, 0);
    if (!whole) return this.parts.split.replaceChildren();
    const shown = parts.filter((part) => part.value / whole > 0.0005);
    let from = 0;
    const bars = shown.map((part) => {
      const bar = svg(`rect.c${part.colour}`, { x: (1000 * from) / whole, width: (1000 * part.value) / whole, y: 0, height: 10 });
      from += part.value;
      return bar;
    });
    const keys = shown.map((part) => h(`span.key.c${part.colour}`, {}, h("i", {}), part.label, h("b", {}, share(part.value / whole)), h("span.unit", {}, duration(part.value))));
    replace(this.parts.split, svg("svg.bar", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": "time by part" }, bars), h("div.legend", {}, keys));
  }

  showChoices() {
    const names = Object.keys(this.run.curves.values).sort();
    if (this.anySelect.options.length !== names.length) {
      const before = this.anySelect.value;
      replace(this.anySelect, names.map((name) => h("option", { value: name }, name)));
      this.anySelect.value = names.includes(before) ? before : names.find((name) => !this.known(name)) || names[0];
    }
    this.showAny();
  }

  /** Whether a chart of its own shows a metric. */
  known(name) {
    return PANELS.some((panel) => panelMetrics(panel, { [name]: [] }).length > 0);
  }

  showAny() {
    const { steps, values } = this.run.curves, name = this.anySelect.value;
    this.any.set(name in values ? [{ label: name, colour: 3, steps, values: values[name] }] : []);
  }

  showSettings() {
    const word = this.settingSearch.value.toLowerCase();
    const rows = this.run.head.settings
      .filter((entry) => !this.onlyChanged.checked || entry.source !== "default")
      .filter((entry) => `${entry.name} ${spelled(entry.value)} ${entry.source}`.toLowerCase().includes(word))
      .map(({ name, value, source }) => h("tr", {}, h("td", {}, name), h("td.value", {}, ...visible(spelled(value))), h("td.source", {}, ...visible(String(source)))));
    const table = h("table", {}, h("thead", {}, h("tr", {}, ["setting", "value", "from"].map((title) => h("th", {}, title)))), h("tbody", {}, rows));
    replace(this.parts.settings, rows.length ? table : h("p.none", {}, "None."));
  }

  showAgain() {
    const { reproduce, summary } = this.run.head;
    const command = (title, text) => h("div.command", {}, h("div.title", {}, title, copyButton(text)), h("pre", {}, ...visible(text)));
    const facts = { seed: reproduce.seed, ...(summary.versions || {}), devices: summary.devices && summary.devices.join(", ") };
    const said = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const python = reproduce.in_python.length
      ? h("p", {}, `Set in Python: ${reproduce.in_python.join(", ")}. Objects that were passed to gx.train (a policy, rows, reward functions) are not part of a command.`)
      : null;
    replace(
      this.parts.again,
      command("with the run folder", reproduce.from_folder),
      command("without it: every setting that is no default", reproduce.alone),
      python,
      h("dl.facts", {}, said.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, ...visible(String(value)))))),
    );
  }
}


/** Scrolls to a section; the address has the completions' state and stays. */
function jump(event) {
  event.preventDefault();
  document.querySelector(event.target.getAttribute("href"))?.scrollIntoView();
}

async function ask(path, words) {
  const answer = await fetch(`${path}?${new URLSearchParams(words)}`, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

/** Follows a run: asks for the points and completions that are new, again and again. */
class Live {
  constructor(page) {
    this.page = page;
    this.generation = this.version = -1;
  }

  async poll() {
    const from = this.run ? Math.max(0, this.run.curves.steps.length - 1) : 0;
    const news = await ask("data", { generation: this.generation, version: this.version, every: this.run ? this.run.curves.every : 1, from });
    if (!news.changed) return;
    const anew = news.from === 0;
    if (news.generation !== this.generation) this.page.completions.steps.clear();
    this.generation = news.generation;
    this.version = news.version;
    this.run = { ...news, curves: anew ? news.curves : joined(this.run.curves, news.curves, news.from) };
    this.page.show(this.run);
    const chosen = new Set(news.chosen), parts = [];
    for (const step of chosen) if (!this.page.completions.steps.has(step)) parts.push(await ask("completions", { step }));
    if (parts.length) this.page.completions.take(parts.filter((part) => part.groups.length), chosen, news.counts);
  }

  async follow() {
    for (;;) {
      try {
        await this.poll();
        this.page.trouble?.replaceChildren();
      } catch (error) {
        this.page.trouble?.replaceChildren("no answer from grpo-jax watch; what was read stays");
        if (!(error instanceof TypeError)) console.error(error);
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
    }
  }
}

/** Columns up to a point, and new columns from there on. */
function joined(old, fresh, from) {
  const values = {}, count = fresh.steps.length;
  for (const name of new Set([...Object.keys(old.values), ...Object.keys(fresh.values)])) {
    const before = old.values[name] ? old.values[name].slice(0, from) : new Array(from).fill(null);
    values[name] = [...before, ...(fresh.values[name] || new Array(count).fill(null))];
  }
  return { every: fresh.every, steps: [...old.steps.slice(0, from), ...fresh.steps], values };
}

async function begin() {
  const data = await readData();
  const page = new RunPage(data.live === true);
  if (data.live) return new Live(page).follow();
  page.show(data);
  page.completions.take(data.completions, new Set(data.completions.map((part) => part.step)), data.counts);
  document.body.dataset.ready = "yes";
}

begin().catch(failed);
