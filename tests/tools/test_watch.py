"""The server of `grpo-jax watch`: what it tells of a run that grows, and whom it answers; and the page of `grpo-jax compare`."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import append, completion_of, made_run, metrics_of

from grpo_jax.config import ConfigError
from grpo_jax.run.resume import RunFolderError
from grpo_jax.tools.compare import compare, differing_settings
from grpo_jax.tools.watch import WatchServer, server


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchServer]:
    made_run(tmp_path / "run", steps=4)
    with server(str(tmp_path / "run")) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def answer(watched: WatchServer, path: str, method: str = "GET", host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", watched.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{watched.server_port}")
    connection.endheaders()
    got = connection.getresponse()
    content = got.read()
    connection.close()
    return got.status, content, dict(got.getheaders())


def news(watched: WatchServer, *, generation: int = -1, version: int = -1, every: int = 1, start: int = 0) -> Any:
    status, content, _ = answer(watched, f"/data?generation={generation}&version={version}&every={every}&from={start}")
    assert status == 200
    return json.loads(content)


def test_a_page_gets_only_what_is_new(watched: WatchServer) -> None:
    folder = watched.watched.reader.path
    first = news(watched)
    assert (first["from"], first["curves"]["steps"], first["chosen"]) == (0, [1, 2, 3, 4], [1, 2, 3, 4])
    known = {"generation": first["generation"], "version": first["version"]}
    assert news(watched, **known, start=3) == {"changed": False}

    read_before = watched.watched.reader._files["metrics"].position
    assert read_before == (folder / "metrics.jsonl").stat().st_size
    append(folder / "completions.jsonl", *(completion_of(5, row, 4, f"new {row}", False) for row in range(8)))
    append(folder / "metrics.jsonl", metrics_of(5, 5))
    second = news(watched, **known, start=3)
    assert (second["from"], second["curves"]["steps"]) == (3, [4, 5])
    assert second["curves"]["values"]["reward/mean"] == pytest.approx([0.2 + 0.6, 0.8])  # of 4 steps, then of 5
    assert second["chosen"] == [1, 2, 3, 4, 5]
    status, content, _ = answer(watched, "/completions?step=5")
    groups = json.loads(content)["groups"]
    assert status == 200
    assert [row["text"] for group in groups for row in group["rows"]] == [f"new {row}" for row in range(8)]

    (folder / "metrics.jsonl").write_text("")  # a resumed run
    append(folder / "metrics.jsonl", metrics_of(1, 5))
    third = news(watched, generation=second["generation"], version=second["version"], start=4)
    assert (third["generation"], third["from"], third["curves"]["steps"]) == (1, 0, [1])
    assert third["chosen"] == [1]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "[::1]"])
def test_another_host_is_refused(watched: WatchServer, host: str) -> None:
    for path in ("/", "/data?generation=-1&version=-1&every=1&from=0"):
        status, content, _ = answer(watched, path, host=host)
        assert status == 403
        assert b"reward" not in content
    assert answer(watched, "/", host=f"localhost:{watched.server_port}")[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/metrics.jsonl", 404),
        ("/../run/metrics.jsonl", 404),
        ("/%2e%2e/settings.json", 404),
        ("//etc/passwd", 404),
        ("/completions?step=99", 404),
        ("/completions?step=../1", 400),
        ("/completions", 400),
        ("/data?generation=1&version=1&every=1", 400),
        (f"/data?generation=1&version=1&every=1&from={'9' * 5000}", 400),
    ],
)
def test_no_address_names_a_file(watched: WatchServer, path: str, status: int) -> None:
    assert answer(watched, path)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_reads(watched: WatchServer, method: str) -> None:
    before = {path: path.read_bytes() for path in watched.watched.reader.path.iterdir()}
    assert answer(watched, "/", method)[0] == 501
    status, content, headers = answer(watched, "/", "HEAD")
    assert (status, content) == (200, b"")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert {path: path.read_bytes() for path in watched.watched.reader.path.iterdir()} == before


def test_it_is_bound_to_this_machine_and_a_taken_port_is_an_error(watched: WatchServer) -> None:
    assert watched.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"--port is {watched.server_port}: Address already in use; use another one"):
        server(str(watched.watched.reader.path), watched.server_port)
    with pytest.raises(RunFolderError, match="is not a folder"):
        server("/no/such/run")


def test_runs_are_compared(tmp_path: Path) -> None:
    one, other = made_run(tmp_path / "one", steps=3), made_run(tmp_path / "other", steps=5)
    *lines, last = compare([str(one), str(other)], str(tmp_path / "both.html"))
    assert lines == ["train.steps: 3 | 5"]
    assert last == f"wrote {tmp_path / 'both.html'}"
    assert (tmp_path / "both.html").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="give two or more"):
        compare([str(one)], str(tmp_path / "one.html"))


def test_a_setting_that_only_one_run_has_differs() -> None:
    settings = [
        [{"name": "a.b", "value": None}, {"name": "train.run_dir", "value": "x"}],
        [{"name": "train.run_dir", "value": "y"}],
    ]
    assert differing_settings(settings) == [{"name": "a.b", "values": [None, "not a setting"]}]
    assert differing_settings([settings[0], settings[0]]) == []
