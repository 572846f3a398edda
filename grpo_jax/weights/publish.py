"""Exports a policy in one of the formats, with its model card, and uploads it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.spec import ModelError
from grpo_jax.runtime import distributed
from grpo_jax.weights.hub import push_folder
from grpo_jax.weights.model_card import RunFacts, write_card
from grpo_jax.weights.usage import Kind, usage_lines


class Exportable(Protocol):
    """What a `Policy` gives to be exported."""

    @property
    def name(self) -> str:
        """Path or hub id of the model that training started from."""
        ...

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters' settings; None where every weight is trained."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """With the chat template."""
        ...

    def save_adapter(self, folder: str | Path) -> Path:
        """Writes a PEFT adapter."""
        ...

    def save_merged(self, folder: str | Path) -> Path:
        """Writes the whole model."""
        ...

    def save_gguf(
        self,
        folder: str | Path,
        gguf_type: str = "f16",
        *,
        temperature: float | None = None,
        template_arguments: dict[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Path:
        """Writes a GGUF file."""
        ...

    def save_gguf_adapter(self, folder: str | Path) -> Path:
        """Writes the adapter as a GGUF file."""
        ...


def write_export(
    policy: Exportable,
    out: str | Path,
    kind: Kind,
    *,
    facts: RunFacts | None = None,
    gguf_type: str | None = None,
    repo: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Writes an export with its model card.

    Args:
        facts: of the policy's run, for card and Modelfile.
        gguf_type: of `gguf` alone; None is f16.
        repo: hub id that it gets, for the card.
        note: called with what is different in other programs.

    Raises:
        ConfigError: a gguf_type with another format.
        ModelError: there is no adapter to write, or another program cannot read this model.
    """
    if gguf_type is not None and kind != "gguf":
        raise ConfigError(f"gguf_type is {gguf_type!r}: it is for the format gguf alone; leave it out")
    if kind in ("adapter", "gguf-lora") and policy.lora is None:
        raise ModelError("this policy trained every weight, so there is no adapter: use --format merged")
    folder = Path(out)
    if kind == "gguf":
        options: dict[str, Any] = {}
        if facts is not None:
            options = {
                "temperature": facts.config.rollout.temperature,
                "template_arguments": facts.config.data.template_arguments,
            }
        policy.save_gguf(folder, gguf_type or "f16", note=note, **options)
    else:
        {"adapter": policy.save_adapter, "merged": policy.save_merged, "gguf-lora": policy.save_gguf_adapter}[kind](folder)
    if distributed.is_main():
        write_card(folder, policy.name, policy.lora, kind, facts, repo)
    return folder


def usage_of(policy: Exportable, out: str | Path, kind: Kind, gguf_type: str | None = None) -> list[str]:
    """The lines that serve and load an export of a policy."""
    template = policy.tokenizer is not None and bool(policy.tokenizer.own_template)
    name = f"{Path(policy.name).name}-grpo"
    return usage_lines(
        kind, str(out), name=name, base=policy.name, lora=policy.lora, template=template, gguf_type=gguf_type or "f16"
    )


def push_policy(
    policy: Exportable,
    repo: str,
    kind: Kind | None = None,
    *,
    facts: RunFacts | None = None,
    gguf_type: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Writes an export into a temporary folder and uploads it; every process of a run makes this call, and the first one uploads.

    Args:
        repo: `owner/name`.
        kind: None is the adapter, and the whole model where there is none.
        facts: of the policy's run, for the card.
        private, token, revision, message: as for `push_folder`.

    Returns:
        The address of the commit; "" in other processes.

    Raises:
        HubError, ModelError, ConfigError: as `push_folder` and `write_export`.
    """
    kind = kind or ("merged" if policy.lora is None else "adapter")
    with tempfile.TemporaryDirectory() as folder:
        out = write_export(policy, Path(folder) / "export", kind, facts=facts, gguf_type=gguf_type, repo=repo)
        if not distributed.is_main():
            return ""
        said = message or f"Upload {kind} with grpo_jax"
        return push_folder(out, repo, private=private, token=token, revision=revision, message=said)
