"""A hub that writes down what is uploaded, in the place of huggingface_hub's API."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest


def fake_hub(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[dict[str, Any]]:
    """Replaces `HfApi` until the test's end.

    Args:
        fails_at: index of the upload that raises OSError; None is none.

    Returns:
        The arguments of each upload so far, with `private`, `token` and `files`: each file's text, "" of bytes.
    """
    uploads: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.given: dict[str, Any] = {"token": token}

        def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            self.given["private"] = private
            return SimpleNamespace(repo_id=repo if "/" in repo else f"me/{repo}")

        def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
            assert exist_ok
            self.given["branch"] = branch

        def upload_folder(self, *, folder_path: str, **given: Any) -> Any:
            paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            binary = (".safetensors", ".gguf", ".png")
            files = {path.name: "" if path.name.endswith(binary) else path.read_text() for path in paths}
            uploads.append({**self.given, **given, "files": files})
            if len(uploads) - 1 == fails_at:
                raise OSError("no route")
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stored")
    return uploads
