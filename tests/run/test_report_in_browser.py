"""Report, watch and compare in a headless Chromium: what a reader sees and does. Skipped where there is no Chromium."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from made_runs import HOSTILE, append, completion_of, made_run, made_text, metrics_of

from grpo_jax.run.report import write_report
from grpo_jax.tools.compare import compare
from grpo_jax.tools.watch import server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]

READY = "document.body.dataset.ready"
CARDS = "[...document.querySelectorAll('#completions .card')]"
TEXTS = f"{CARDS}.map((card) => card.querySelector('.text').textContent)"
TITLES = "[...document.querySelectorAll('.chart:not([hidden]) strong')].map((title) => title.textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    finding = {"title": "reward hacking", "evidence": "<b>e</b>", "cause": "c", "setting": "objective.beta"}
    return write_report(made_run(tmp_path_factory.mktemp("runs") / "run", steps=40, findings=[finding])).as_uri()


def numbers(path: str) -> list[float]:
    """The coordinates of a path of straight lines, x and y by turns in one list."""
    return [float(word) for word in path.replace("M", " ").replace("L", " ").split()]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_loads_without_errors_or_network_and_fits(browser: Browser, report: str, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    browser.wait(READY)
    assert browser.problems == []
    assert [address for address in browser.requests if not address.startswith("data:")] in ([report], ["about:blank", report])
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    colour = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == dark
    assert browser.value("document.querySelector('h1').textContent").endswith("/run")
    assert (
        browser.value("document.querySelector('.finding').textContent")
        == "reward hackingevidence<b>e</b>causecchangeobjective.beta"
    )


def test_the_curves_are_those_of_the_run(browser: Browser, report: str) -> None:
    browser.open(report)
    browser.wait(f"{READY} && document.querySelector('.chart path.line')")
    assert browser.value(TITLES)[:6] == [
        "Reward",
        "Held-out accuracy",
        "Reward by function",
        "KL to the reference",
        "Entropy",
        "Completion length",
    ]
    path = numbers(browser.value("document.querySelectorAll('.chart')[0].querySelector('path.faint').getAttribute('d')"))
    xs, ys = path[::2], path[1::2]
    assert len(xs) == 40
    # The reward rises along a line: equal distances in both directions, to the tenth of a pixel that paths have.
    assert {round(later - earlier, 0) for earlier, later in itertools.pairwise(xs)} <= {7.0, 8.0}
    steps = [earlier - later for earlier, later in itertools.pairwise(ys)]
    assert max(steps) - min(steps) < 0.25
    assert min(steps) > 0
    points = "document.querySelectorAll('.chart')[1].querySelectorAll('circle').length"
    assert browser.value(points) == 5  # evaluations
    # Pointing at a chart tells the values of a step, and clicking shows its completions.
    edge = "document.querySelector('.chart svg').getBoundingClientRect()"
    box = browser.value(f"[{edge}.right - 12, {edge}.y + 80]")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        button = "none" if kind == "mouseMoved" else "left"
        browser.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button=button, clickCount=1)
        if kind == "mouseMoved":
            assert browser.value("document.querySelector('.tooltip').textContent") == "step 400.8 ± 0.2click: its completions"
    browser.wait("document.querySelector('.now').textContent === 'step 40'")


def test_completions_are_shown_and_filtered(browser: Browser, report: str) -> None:
    browser.open(f"{report}#step=7&prompt=2")
    browser.wait(READY)
    assert browser.value(TEXTS) == [made_text(7, row) for row in range(4, 8)]
    assert browser.value("document.querySelector('.prompt .text').textContent") == "prompt 1 of step 7"
    first = browser.value(f"{CARDS}[0].innerText").split()
    assert first == ["1.25", "stop", "8", "tokens", "advantage", "0", "right", "1", "form", "0.5", *made_text(7, 4).split()]

    browser.type("input[name=search]", "NEEDLE1203")
    browser.wait("document.querySelector('.said').textContent.startsWith('1 of the 320')")
    assert browser.value(TEXTS) == [made_text(12, 3)]
    assert browser.value("document.querySelector('.card mark').textContent") == "needle1203"
    browser.type("input[name=search]", "needle")
    browser.wait("document.querySelector('.said').textContent.startsWith('320 of the 320')")
    browser.type("input[name=least]", "1.1")
    # right + form / 2 is 1.25 in the rows 2, 4 and 6 of the 40 steps.
    browser.wait("document.querySelector('.said').textContent.startsWith('120 of the 320')")
    field = "document.querySelector('select[name=reason]')"
    browser.value(f"{field}.value = 'length', {field}.dispatchEvent(new Event('change'))")
    browser.wait("document.querySelector('.said').textContent.startsWith('0 of the 320')")
    browser.type("input[name=least]", "0.2")
    browser.wait("document.querySelector('.said').textContent.startsWith('80 of the 320')")  # rows 3 and 7
    address = browser.value("location.href")

    browser.open(address)  # the address has the filter
    browser.wait(f"{READY} && document.querySelector('.said').textContent.startsWith('80 of the 320')")
    browser.value("document.querySelector('.card .origin').click()")
    assert browser.value("document.querySelector('.now').textContent") == "step 1"
    assert browser.value(f"{CARDS}.length") == 4
    assert browser.problems == []


def choose(browser: Browser, shade: str) -> None:
    """Chooses what tokens are shaded by."""
    browser.value(
        "(() => { const box = document.querySelector('select[name=shade]'); "
        f"box.value = '{shade}'; box.dispatchEvent(new Event('change')); }})()"
    )


def test_tokens_are_shaded_by_probability_kl_or_entropy(browser: Browser, report: str) -> None:
    browser.open(f"{report}#step=3&prompt=1")
    browser.wait(READY)
    tokens = browser.value(
        f"[...{CARDS}[0].querySelectorAll('.text > span')].map((one) => [one.textContent, one.className, one.title])"
    )
    assert "".join(text for text, _, _ in tokens[:-1]) == made_text(3, 0)
    assert [kind for _, kind, _ in tokens] == [
        "t0",
        "t0",
        "t0",
        "t0",
        "t1",
        "t1",
        "t1",
        "tx",
    ]  # -0.1 nats a token more, 5 are 8 levels
    assert tokens[1][2] == "probability 90.5 %, log \u22120.1"
    for shade, levels, title in (("kl", (0, 2, 4, 6, 8, 8, 8), "KL 0.125 nats"), ("entropy", range(7), "entropy 0.375 nats")):
        choose(browser, shade)
        tokens = browser.value(f"[...{CARDS}[0].querySelectorAll('.text > span')].map((one) => [one.className, one.title])")
        assert [kind for kind, _ in tokens] == [*(f"t{level}" for level in levels), "tx"]
        assert tokens[1][1] == title
        assert tokens[-1][1] == "not computed: the update did not learn from it"
        assert browser.value("document.querySelector('.scale').textContent").endswith("and more")
    browser.open(f"{report}#step=3&prompt=2")  # whose tokens are not recorded
    browser.wait(READY)
    assert browser.value(TEXTS)[0] == made_text(3, 4)
    browser.open(f"{report}#step=3&prompt=1")
    browser.wait(READY)
    choose(browser, "")
    assert browser.value(f"{CARDS}[0].querySelectorAll('.text > span').length") == 0
    assert browser.value(TEXTS)[0] == made_text(3, 0)


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "<img src=x onerror=alert(1)>", steps=2, text=lambda step, row: f"{HOSTILE} {row}")
    settings = json.loads((folder / "settings.json").read_text())
    settings.append({"name": "data.system_prompt", "value": HOSTILE, "source": HOSTILE})
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps({"findings": [{"title": HOSTILE, "evidence": HOSTILE}]}))
    for prompt in (1, 2):  # with tokens, and without
        browser.open(f"{write_report(folder).as_uri()}#step=2&prompt={prompt}")
        browser.wait(READY)
        shown = browser.value(TEXTS)[0]
        escaped = (
            HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\ud800", "\\ud800").replace("\u200b", "\\u200b")
        )
        assert shown.startswith(escaped)
    assert browser.value("window.hacked") is None
    assert browser.value("document.images.length") == 0
    assert browser.value("document.scripts.length") == 2
    assert browser.problems == []


def test_a_script_that_gets_into_the_page_does_not_run(browser: Browser, report: str) -> None:
    browser.open(report)
    browser.wait(READY)
    inject = "const one = document.createElement('script'); one.textContent = 'window.hacked = 1'; document.body.append(one)"
    browser.value(f"(() => {{ {inject} }})()")
    assert browser.value("window.hacked") is None
    browser.until(lambda: any("Content Security Policy" in problem for problem in browser.problems))


def test_a_run_is_watched_while_it_goes_on(browser: Browser, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=5)
    with server(str(folder)) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            browser.open(f"http://127.0.0.1:{made.server_port}/")
            browser.wait("document.querySelector('.now')?.textContent === 'step 5'")
            append(folder / "completions.jsonl", *(completion_of(6, row, 4, f"later {row}", False) for row in range(8)))
            append(folder / "metrics.jsonl", metrics_of(6, 6))
            browser.wait("document.querySelector('.now').textContent === 'step 6'")
            assert browser.value(TEXTS) == [f"later {row}" for row in range(4)]
            assert "6 of 5 steps" in browser.value("document.querySelector('.header p').textContent")
            browser.value("document.querySelector('.where button').click()")  # one step back: it stays there
            append(folder / "completions.jsonl", *(completion_of(7, row, 4, f"last {row}", False) for row in range(8)))
            append(folder / "metrics.jsonl", metrics_of(7, 7))
            browser.wait("document.querySelector('#completions .about').textContent.includes('of 7 steps')")
            assert browser.value("document.querySelector('.now').textContent") == "step 5"
            assert browser.problems == []
        finally:
            made.shutdown()
            thread.join()


def test_runs_are_overlaid(browser: Browser, tmp_path: Path) -> None:
    runs = [str(made_run(tmp_path / name, steps=steps)) for name, steps in (("short", 10), ("long", 20))]
    compare(runs, str(tmp_path / "both.html"))
    browser.open((tmp_path / "both.html").as_uri())
    browser.wait(f"{READY} && document.querySelector('path.line')")
    lines: Any = "document.querySelector('.chart').querySelectorAll('path.line').length"
    assert browser.value(lines) == 2
    assert browser.value("[...document.querySelectorAll('table')][1].querySelector('tbody').innerText.split(/\\s+/)") == [
        "train.steps",
        "10",
        "20",
    ]
    browser.value("document.querySelector('.runs input').click()")
    assert browser.value(lines) == 1
    assert browser.problems == []
