"""The report of a run: report.html, one file that a browser opens without a network.

`reading` follows the files of a run folder, `sampling` chooses what fits on a page, `content` collects what is shown, `page` builds
the HTML from the files in `assets`. Nothing here imports JAX.
"""

from __future__ import annotations

import os
from pathlib import Path

from grpo_jax.run.report.content import page_data
from grpo_jax.run.report.page import RUN_SCRIPTS, page
from grpo_jax.run.report.reading import RunReader
from grpo_jax.runtime.files import replacing

REPORT = "report.html"


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        run_dir: the run folder.
        out: path of the page; None is report.html in the folder.

    Returns:
        The path of the page.

    Raises:
        RunFolderError: the folder holds no run.
        OSError: the page cannot be written.
    """
    reader = RunReader.open(run_dir)
    reader.refresh()
    path = reader.path / REPORT if out is None else Path(out).expanduser()
    made = page(f"{reader.path} · grpo-jax", RUN_SCRIPTS, page_data(reader))
    with replacing(path) as unfinished:
        unfinished.write_text(made, encoding="utf-8")
    return path
