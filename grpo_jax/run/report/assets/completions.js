"use strict";

// The completions of a run: one group at a time, side by side, or all that a filter finds.

const SHOWN_AT_ONCE = 24;
/** What tokens can be shaded by: the value that gives the strongest background, its label there, and the title of a token. */
const SHADES = {
  logprobs: { name: "log-probability", strongest: -5, ends: ["certain", "e\u22125 and less"], title: (value) => `probability ${number(100 * Math.exp(value), 3)} %, log ${number(value, 3)}` },
  kl: { name: "KL to the reference", strongest: 0.5, ends: ["0", "0.5 and more"], title: (value) => `KL ${number(value, 3)} nats` },
  entropy: { name: "entropy", strongest: 3, ends: ["0", "3 nats and more"], title: (value) => `entropy ${number(value, 3)} nats` },
};

const groupKey = (step, index) => `${step}/${index}`;

/** The column of completions with its controls; `steps` is a map from step to what the run recorded of it. */
class Completions {
  constructor(live) {
    this.steps = new Map();
    this.state = { step: null, group: 0, search: "", reward: "total", least: "", most: "", reason: "", shade: "logprobs", order: "recorded" };
    this.follow = live;
    this.shown = SHOWN_AT_ONCE;
    this.body = h("div.found");
    this.said = h("p.said", { role: "status" });
    this.element = h("section", { id: "completions", hidden: true }, h("h2", {}, "Completions"), (this.about = h("p.about")), this.controls(), this.said, this.body);
    this.readAddress();
  }

  controls() {
    const set = (name) => (event) => this.change({ [name]: event.target.value });
    const field = (label, control) => h("label.field", {}, h("span", {}, label), control);
    const input = (name, kind, more) => (this[`${name}Input`] = h("input", { type: kind, name, oninput: set(name), ...more }));
    const select = (name, ...choices) => (this[`${name}Input`] = h("select", { name, onchange: set(name) }, choices.map(([value, label]) => h("option", { value }, label))));
    this.slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "step", oninput: () => this.go(this.stepAt(this.slider.value), this.state.group, true) });
    this.stepLabel = h("output.now");
    this.groupSelect = h("select", { name: "group", "aria-label": "prompt", onchange: () => this.go(this.state.step, Number(this.groupSelect.value), true) });
    const move = (by) => () => this.go(this.stepAt(Number(this.slider.value) + by), this.state.group, true);
    this.where = h(
      "div.where",
      {},
      h("button", { type: "button", "aria-label": "step before", onclick: move(-1) }, "‹"),
      this.slider,
      h("button", { type: "button", "aria-label": "next step", onclick: move(1) }, "›"),
      this.stepLabel,
      this.groupSelect,
    );
    this.clear = h("button.quiet", { type: "button", onclick: () => this.change({ search: "", least: "", most: "", reason: "" }, true) }, "Clear");
    const filter = h(
      "div.filter",
      {},
      field("Text", input("search", "search", { placeholder: "in prompts and completions", autocomplete: "off", spellcheck: "false" })),
      field("Reward", select("reward", ["total", "weighted sum"])),
      field("from", input("least", "number", { step: "any" })),
      field("to", input("most", "number", { step: "any" })),
      field("Ended by", select("reason", ["", "anything"])),
      field("Order", select("order", ["recorded", "as sampled"], ["best", "best first"], ["worst", "worst first"])),
      field("Shade by", select("shade", ...Object.entries(SHADES).map(([key, shade]) => [key, shade.name]), ["", "nothing"])),
      (this.scale = h("span.scale")),
      this.clear,
    );
    return h("div.controls", {}, this.where, filter);
  }

  /** Takes what a run has recorded of some steps; `chosen` are those that stay. */
  take(parts, chosen, counts) {
    for (const part of parts) this.steps.set(part.step, part);
    for (const step of this.steps.keys()) if (!chosen.has(step)) this.steps.delete(step);
    this.numbers = [...this.steps.keys()].sort((a, b) => a - b);
    this.element.hidden = this.numbers.length === 0;
    if (this.element.hidden) return;
    const all = counts.shown_rows === counts.rows;
    this.about.textContent = all
      ? `All ${number(counts.rows)} completions of ${number(counts.steps)} steps.`
      : `${number(counts.shown_rows)} of ${number(counts.rows)} completions, of ${number(counts.shown_steps)} of ${number(counts.steps)} steps, evenly spread, the first and the last among them. completions.jsonl has all.`;
    this.slider.max = this.numbers.length - 1;
    const parted = [...this.steps.values()];
    this.options(this.rewardInput, ["total", "weighted sum"], [...new Set(parted.flatMap((part) => part.functions))].map((name) => [name, name]), "reward");
    const reasons = new Set(parted.flatMap((part) => part.groups.flatMap((group) => group.rows.map((row) => row.reason))));
    this.options(this.reasonInput, ["", "anything"], [...reasons].map((reason) => [reason, reason]), "reason");
    for (const name of ["search", "least", "most", "order", "shade"]) this[`${name}Input`].value = this.state[name];
    const step = this.follow || this.state.step === null ? this.numbers[this.numbers.length - 1] : this.state.step;
    this.go(step, this.state.group, false);
  }

  options(select, first, rest, name) {
    if (select.options.length === rest.length + 1) return;
    replace(select, [first, ...rest].map(([value, label]) => h("option", { value }, ...visible(label))));
    select.value = this.state[name];
  }

  stepAt(index) {
    return this.numbers[Math.max(0, Math.min(this.numbers.length - 1, Number(index)))];
  }

  /** Shows a group of the recorded step that is nearest to a step. */
  go(step, group, byHand) {
    if (!this.numbers.length) return;
    const at = nearest(this.numbers, step);
    this.follow = byHand ? this.follow && at === this.numbers.length - 1 : this.follow;
    const part = this.steps.get(this.numbers[at]);
    const known = part.groups.map((one) => one.index);
    this.state = { ...this.state, step: part.step, group: known[nearest(known, group)] ?? 0 };
    this.slider.value = at;
    this.stepLabel.textContent = `step ${number(part.step)}`;
    replace(this.groupSelect, part.groups.map((one) => h("option", { value: one.index }, `prompt ${one.index + 1} of ${part.of}`)));
    this.groupSelect.value = this.state.group;
    this.show(byHand);
  }

  change(changes, clear = false) {
    this.state = { ...this.state, ...changes };
    this.shown = SHOWN_AT_ONCE;
    if (clear) for (const name of Object.keys(changes)) this[`${name}Input`].value = changes[name];
    this.show(true);
  }

  filtering() {
    const { search, least, most, reason } = this.state;
    return search !== "" || least !== "" || most !== "" || reason !== "";
  }

  show(remember) {
    if (remember) this.writeAddress();
    const filtering = this.filtering();
    this.where.classList.toggle("off", filtering);
    this.clear.hidden = !filtering;
    const shade = SHADES[this.state.shade];
    replace(this.scale, shade ? [shade.ends[0], ...[0, 2, 4, 6, 8].map((level) => h(`i.t${level}`)), shade.ends[1]] : []);
    if (filtering) return this.showFound();
    this.said.textContent = "";
    const part = this.steps.get(this.state.step);
    const group = part.groups.find((one) => one.index === this.state.group);
    replace(this.body, ...(group ? [this.prompt(group), this.cards(group.rows.map((row) => ({ row, part })))] : []));
  }

  showFound() {
    const found = this.find();
    const total = [...this.steps.values()].reduce((sum, part) => sum + part.groups.reduce((rows, group) => rows + group.rows.length, 0), 0);
    this.said.textContent = `${number(found.length)} of the ${number(total)} completions on this page`;
    const more = found.length - this.shown;
    const button = h("button", { type: "button", onclick: () => ((this.shown += 2 * SHOWN_AT_ONCE), this.showFound()) }, `Show more (${number(more)})`);
    replace(this.body, this.cards(found.slice(0, this.shown), true), more > 0 ? button : null);
  }

  find() {
    const { search, reward, reason } = this.state;
    const word = search.toLowerCase(), least = bound(this.state.least, -Infinity), most = bound(this.state.most, Infinity);
    const limited = least !== -Infinity || most !== Infinity;
    const found = [];
    for (const step of this.numbers) {
      const part = this.steps.get(step), at = part.functions.indexOf(reward);
      for (const group of part.groups) {
        const inPrompt = word && group.prompt.some((message) => message.text.toLowerCase().includes(word));
        for (const row of group.rows) {
          const value = reward === "total" ? row.total : row.rewards[at];
          if (reason && row.reason !== reason) continue;
          if (limited && !(value !== null && value !== undefined && value >= least && value <= most)) continue;
          if (word && !inPrompt && !textOf(row).toLowerCase().includes(word)) continue;
          found.push({ row, part, group });
        }
      }
    }
    return this.ordered(found);
  }

  ordered(found) {
    if (this.state.order === "recorded") return found;
    const sign = this.state.order === "best" ? -1 : 1;
    const value = ({ row, part }) => (this.state.reward === "total" ? row.total : row.rewards[part.functions.indexOf(this.state.reward)]) ?? -Infinity;
    return [...found].sort((one, other) => sign * (value(one) - value(other)) || 0);
  }

  prompt(group) {
    const messages = group.prompt.map(({ role, text }) => h("div.message", {}, role ? h("span.role", {}, ...visible(role)) : null, h("div.text", { dir: "auto" }, ...visible(text))));
    return h("div.prompt", {}, h("span.title", {}, "Prompt"), ...messages);
  }

  cards(found, apart = false) {
    const most = Math.max(1e-9, ...found.map(({ row }) => Math.abs(row.advantage ?? 0)));
    return h("div.cards", {}, (apart ? found : this.ordered(found)).map((one) => this.card(one, most, apart)));
  }

  card({ row, part, group }, most, apart) {
    const origin = apart
      ? h("button.origin", { type: "button", onclick: () => this.open(part.step, group.index) }, `step ${number(part.step)} · prompt ${group.index + 1}`)
      : null;
    const top = h(
      "header",
      {},
      h("b.total", { title: "weighted sum of the rewards" }, number(row.total)),
      h(`span.reason.${row.reason === "stop" ? "stop" : "cut"}`, { title: row.reason === "stop" ? "a stop token or text ended it" : "it was cut, or ended otherwise" }, ...visible(row.reason)),
      h("span.length", {}, `${number(row.length)} tokens`),
      origin,
    );
    const rewards = part.functions.map((name, index) => h("div", {}, h("span", {}, ...visible(name)), h("b", {}, number(row.rewards[index]))));
    const word = this.filtering() ? this.state.search.toLowerCase() : "";
    const shaded = row.tokens && this.state.shade && !word;
    const text = h("div.text", { dir: "auto" }, ...(shaded ? tokens(row, this.state.shade) : marked(textOf(row), word)));
    const context = apart ? h("div.context", { dir: "auto" }, ...marked(group.prompt[group.prompt.length - 1]?.text ?? "", word)) : null;
    return h("article.card", {}, top, advantage(row.advantage, most), h("div.rewards", {}, rewards), context, textOf(row) ? text : h("div.text.empty", {}, "no text"));
  }

  /** Leaves the filter and shows a group. */
  open(step, group) {
    this.change({ search: "", least: "", most: "", reason: "" }, true);
    this.go(step, group, true);
    this.element.scrollIntoView();
  }

  /** The state is in the page's address, so that a link can name a completion. */
  writeAddress() {
    const { step, group, search, reward, least, most, reason } = this.state;
    const words = new URLSearchParams({ step, prompt: group + 1 });
    for (const [name, value] of Object.entries({ search, least, most, reason })) if (value !== "") words.set(name, value);
    if (reward !== "total") words.set("reward", reward);
    history.replaceState(null, "", `#${words}`);
  }

  readAddress() {
    const words = new URLSearchParams(location.hash.slice(1));
    const step = Number(words.get("step")), prompt = Number(words.get("prompt"));
    if (step) {
      this.state.step = step;
      this.follow = false;
    }
    if (prompt) this.state.group = prompt - 1;
    for (const name of ["search", "least", "most", "reason", "reward"]) this.state[name] = words.get(name) ?? this.state[name];
  }
}

const textOf = (row) => row.text ?? row.tokens.join("");

const bound = (text, otherwise) => (text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));

/** A bar from the middle: to the right where the completion is better than its group, to the left where it is worse. */
function advantage(value, most) {
  const width = 50 * Math.min(1, Math.abs(value ?? 0) / most);
  const bar = svg("rect", { x: value < 0 ? 50 - width : 50, y: 0, width, height: 4 });
  const picture = svg("svg", { viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": true }, bar, svg("line", { x1: 50, x2: 50, y1: 0, y2: 4 }));
  const text = value === null ? "–" : `${value > 0 ? "+" : ""}${number(value, 3)}`;
  return h(`div.advantage.${value < 0 ? "worse" : "better"}`, { title: "advantage" }, h("span", {}, "advantage"), picture, h("b", {}, text));
}

/** Tokens with a background that is the stronger the less probable a token was, or the larger its KL or entropy. */
function tokens(row, by) {
  const shade = SHADES[by];
  return row.tokens.map((text, index) => {
    const value = row[by]?.[index] ?? null;
    const level = value === null ? "x" : Math.round(Math.max(0, Math.min(1, value / shade.strongest)) * 8);
    const missing = by === "logprobs" ? "not sampled: it came from outside" : "not computed: the update did not learn from it";
    return h(`span.t${level}`, { title: value === null ? missing : shade.title(value) }, ...(text ? visible(text) : [h("span.unseen", {}, "∎")]));
  });
}
