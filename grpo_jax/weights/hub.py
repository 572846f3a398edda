"""Uploads a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.models.spec import ModelError

IGNORED = ("*.tmp", "run.lock", ".git/*", ".cache/*")


class HubError(ModelError):
    """An upload that failed; the message says what to do."""


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload with grpo_jax",
    subfolder: str | None = None,
) -> str:
    """Uploads every file of a folder, and makes the repository where it does not exist.

    Args:
        repo: `owner/name`, or a name in the account of the token.
        private: of a new repository; None is the account's own default.
        token: None takes the one of `hf auth login` or HF_TOKEN.
        revision: branch, made where it does not exist; None is the default branch.
        message: of the commit.
        subfolder: of the repository, to upload into; None is its top.

    Returns:
        The address of the commit.

    Raises:
        HubError: no token, one that may not write, a name that the hub does not take, or a hub that does not answer.
    """
    from huggingface_hub import HfApi, errors, get_token

    if token is None and get_token() is None:
        raise HubError(f"push_to_hub: {repo}: there is no token; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(token=token)
    options: dict[str, Any] = {} if subfolder is None else {"path_in_repo": subfolder}
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message=message,
            revision=revision,
            ignore_patterns=list(IGNORED),
            **options,
        )
    except errors.HFValidationError as error:
        raise HubError(f"push_to_hub: {repo!r} is no name of a repository; use owner/name ({first_line(error)})") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"push_to_hub: {repo}: {advice(error)}") from error
    except Exception as error:  # what carries the requests has exceptions of its own
        raise HubError(f"push_to_hub: {repo}: the upload failed: {first_line(error)}; try again") from error
    return str(done.commit_url)


def advice(error: Any) -> str:
    """What the hub answered, in one line, with what to do."""
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept the token (401); run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return "the token may not write there (403); make one with write access, or use a name in your own account"
    return f"the hub refused ({status}): {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of a message, or the error's kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
