"""Makes the folder of a run of 2,000 steps with 64 completions each, writes its report and opens it in Chromium; by hand.

PYTHONPATH=.:kernels:tests/support python tests/tools/report_size.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser
from made_runs import completion_of, made_run

from grpo_jax.run.report import write_report

STEPS, ROWS, WORDS = 2000, 64, 200


def long_run(folder: Path) -> Path:
    """Writes the run: every completion has 200 words of five random letters, of some steps the same words."""
    words = random.Random(0)
    texts = [" ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(WORDS)) for _ in range(4 * ROWS)]
    made_run(folder, steps=STEPS, prompts=0, group=8)
    lines = [
        json.dumps(completion_of(1, row % ROWS, 8, text, row % ROWS < 8)).removeprefix('{"step": 1')
        for row, text in enumerate(texts)
    ]
    with (folder / "completions.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            start = ROWS * (step % 4)
            file.write("".join(f'{{"step": {step}{line}\n' for line in lines[start : start + ROWS]))
    return folder


def main() -> None:
    """Prints size and seconds."""
    folder = long_run(Path(sys.argv[1]))
    size = (folder / "completions.jsonl").stat().st_size
    started = time.perf_counter()
    path = write_report(folder)
    seconds = time.perf_counter() - started
    print(f"completions.jsonl {size / 1e6:.0f} MB; report.html {path.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            for _ in range(3):
                started = time.perf_counter()
                browser.open(path.as_uri())
                browser.wait("document.body.dataset.ready && document.querySelector('path.line')")
                ready = time.perf_counter() - started
                browser.picture(folder / "report.png", whole=False)
                about = browser.value("document.querySelector('.about').textContent")
                print(f"shown after {ready:.2f} s; {about}")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
