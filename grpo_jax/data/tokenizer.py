"""Converts text to token ids and back, renders the chat template, and finds every id that ends a completion.

`Tokenizer` wraps the tokenizer that transformers reads, so that the ids are the same as in other tools; code from a model's folder
never runs. Left out on purpose: fetching a model from the hub and padding. A plain text never gets an end-of-sequence token
appended, whatever the tokenizer's own template says: a prompt that has ended cannot be continued.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.data.tokenizer_files import (
    MORE_TEMPLATES,
    OTHER_FILES,
    VOCABULARY_FILES,
    TokenizerError,
    copy_tokenizer_files,
    read_model_stop_ids,
    read_vocabulary,
    write_template,
)
from grpo_jax.types import Prompt

SURROGATE = re.compile("[\ud800-\udfff]")

MOST_PROBES = 1000
"""Tokens that are tried as a text to find the special tokens around one."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages have the model's reasoning; templates read the first, gpt-oss's the second."""

NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@dataclass(eq=False)
class Tokenizer:
    """A tokenizer and the ids that end a completion. `chat_template` may be set; nothing else changes.

    Attributes:
        hf: The tokenizer of transformers.
        stop_ids: Every id that ends a completion, sorted; may be empty.
        prefix_ids: Special tokens before a plain text.
        suffix_ids: Special tokens after a plain text, without end-of-sequence tokens.
        folder: Folder that it was read from; None where it was made in memory.
        vocabulary: Number of ids that the model has, from its config.json; None where that is not known. An id beyond it would read
            past the end of the embedding.
        read_template: The chat template in the folder's files; None where there is none, or no folder.

    Example:
        tokenizer = Tokenizer.from_folder("model"); tokenizer.encode_prompt("Once", chat=False)  # [1, 403]
    """

    hf: Any
    stop_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    folder: Path | None = None
    vocabulary: int | None = None
    read_template: Any = None

    @staticmethod
    def from_folder(path: str | os.PathLike[str]) -> Tokenizer | None:
        """Reads the tokenizer of a model's folder; None where there is none.

        Raises:
            TokenizerError: The folder is missing, a file in it cannot be read, or the tokenizer belongs to a larger model.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a folder")
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            return None
        model_stop_ids = read_model_stop_ids(folder)
        auto_tokenizer = import_auto_tokenizer()
        with own_errors(f"the tokenizer in {folder} cannot be read"):
            hf = auto_tokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            return replace(Tokenizer.wrap(hf, model_stop_ids, folder, read_vocabulary(folder)), read_template=hf.chat_template)

    @staticmethod
    def wrap(hf: Any, model_stop_ids: Sequence[int] = (), folder: Path | None = None, vocabulary: int | None = None) -> Tokenizer:
        """Makes a `Tokenizer` from a tokenizer of transformers in memory.

        Args:
            hf: A tokenizer of transformers.
            model_stop_ids: End-of-sequence ids in the model's own files; the tokenizer's is added.
            folder: Folder that it was read from, if any.
            vocabulary: Number of ids that the model has, if known.

        Raises:
            TokenizerError: An id that every text needs, or one of the vocabulary's own, is beyond the model's ids.
        """
        own = () if hf.eos_token_id is None else (int(hf.eos_token_id),)
        stop_ids = tuple(sorted({*model_stop_ids, *own}))
        prefix, suffix = special_tokens_around(hf)
        made = Tokenizer(hf, stop_ids, prefix, tuple(i for i in suffix if i not in stop_ids), folder, vocabulary)
        if vocabulary is not None:
            # An added token beyond the vocabulary does no harm until a text has it, as Gemma 3's <image_soft_token>.
            added = hf.get_added_vocab()
            made.check_ids([*stop_ids, *prefix, *suffix, *(i for token, i in hf.get_vocab().items() if token not in added)])
        return made

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end-of-sequence id, else the smallest stop id, else None."""
        if self.hf.eos_token_id is not None:
            return int(self.hf.eos_token_id)
        return self.stop_ids[0] if self.stop_ids else None

    @property
    def pad_id(self) -> int:
        """The padding id: the tokenizer's, else the end-of-sequence id, else 0. No mask of this package depends on it."""
        if self.hf.pad_token_id is not None:
            return int(self.hf.pad_token_id)
        return self.eos_id or 0

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.hf.chat_template)

    @property
    def chat_template(self) -> Any:
        """The Jinja text that renders conversations; several by name where the model has several; None where it has none."""
        return self.hf.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        """Changes the template: for prompts, and in every folder and file that is written.

        Raises:
            TokenizerError: It is no text.
        """
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"chat_template is {show(template)}: use the text of a Jinja template, or None")
        self.hf.chat_template = template or None

    @property
    def own_template(self) -> str | None:
        """The template where it differs from the folder's, "" where it was removed, None where it is the folder's."""
        if self.chat_template == self.read_template and self.folder is not None:
            return None
        if isinstance(self.chat_template, Mapping):
            return self.chat_template.get("default", "")
        return self.chat_template or ""

    def with_chat_template(self, template: str | None) -> Tokenizer:
        """The same tokenizer with another chat template; this one stays as it is. Raises as setting `chat_template` does."""
        other = replace(self, hf=copy.copy(self.hf))
        other.chat_template = template
        return other

    def encode_prompt(self, prompt: Prompt, *, chat: bool, template_arguments: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the token ids of a prompt.

        Args:
            prompt: A plain text, or a conversation.
            chat: Render a plain text as a conversation of one user message; a conversation is always rendered.
            template_arguments: Passed to the chat template.

        Raises:
            TokenizerError: There is no chat template, or it refuses the conversation.
        """
        if isinstance(prompt, str) and not chat:
            return [*self.prefix_ids, *self.encode_text(prompt), *self.suffix_ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode_text(self.render(messages, generation=True, template_arguments=template_arguments))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generation: bool, template_arguments: Mapping[str, Any] | None = None
    ) -> str:
        """Renders a conversation with the chat template.

        Args:
            messages: {"role", "content"} messages; keys whose value is None are left out.
            generation: Open the assistant's turn at the end.
            template_arguments: Passed to the chat template.

        Raises:
            TokenizerError: There is no chat template, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise TokenizerError("the prompt is a conversation, but the tokenizer has no chat template")
        from grpo_jax.data.templates import SHARED, TemplateFailedError

        given = dict(template_arguments or {})
        tools = given.pop("tools", None)
        try:
            template = self.template_for(tools)
            variables = {**self.hf.special_tokens_map, "documents": None, **given}
            variables |= {"messages": present_fields(messages), "tools": tool_schemas(tools), "add_generation_prompt": generation}
            if tools and "xml_tools" in template and not given.keys() & {"xml_tools", "python_tools"}:
                variables["xml_tools"] = variables["tools"]  # SmolLM3 has two ways to show tools, and reads neither from `tools`
            return SHARED.render(template, variables)
        except (TemplateFailedError, TypeError, ValueError, KeyError) as error:
            raise TokenizerError(f"the chat template refuses the conversation: {error}") from error

    def template_for(self, tools: Any) -> str:
        """The text of the template; of several by name the one for tools, where there are tools, else the default."""
        return self.hf.get_chat_template(None, tools)

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, without adding special tokens; a special token spelled in the text becomes its id.

        Raises:
            TokenizerError: the text has half a surrogate pair, which is no character; an id is beyond the model's; or the tokenizer
                fails, such as by a pattern in tokenizer.json that needs too many attempts.
        """
        if (found := SURROGATE.search(text)) is not None:
            raise TokenizerError(
                f"the text has {found[0]!a} at character {found.start()}, half of a surrogate pair and no character; remove it"
            )
        with own_errors(f"the tokenizer in {self.folder or 'memory'} fails on a text of {len(text)} characters"):
            ids = list(self.hf.encode(text, add_special_tokens=False, verbose=False))
        return self.check_ids(ids)

    def check_ids(self, ids: list[int]) -> list[int]:
        """Returns the ids; raises TokenizerError where the model has no such id."""
        if self.vocabulary is not None:
            for beyond in (max(ids, default=0), min(ids, default=0)):
                if not 0 <= beyond < self.vocabulary:
                    token = self.hf.convert_ids_to_tokens(beyond) if 0 <= beyond < 2**31 else None
                    raise TokenizerError(
                        f"token id {beyond}{f' ({token!r})' if token else ''} is beyond the model's vocabulary, which has "
                        f"{self.vocabulary} ids by its config.json; {self.folder or 'this'} has the tokenizer of another model"
                    )
        return ids

    def token_starts(self, text: str) -> list[int]:
        """Returns the character offsets where tokens of `encode_text(text)` begin; every offset where that is not known."""
        if not self.hf.is_fast:
            return list(range(len(text)))
        spans = self.hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return sorted({start for start, end in spans if end > start})

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids without special tokens; ids beyond the vocabulary (of a padded embedding) give no text."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes the tokenizer, with its chat template, into a folder.

        Returns:
            The paths of the files, relative to the folder: the unchanged ones that it was read from, or transformers' where it was
            made in memory, or that folder is gone.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self.folder is None or not self.folder.is_dir():
            self.hf.save_pretrained(str(target))
        else:
            copy_tokenizer_files(self.folder, target)
            if self.own_template is not None:
                write_template(target, self.own_template)
        files = [target / name for name in (*VOCABULARY_FILES, *OTHER_FILES)] + sorted((target / MORE_TEMPLATES).glob("*"))
        return [path.relative_to(target).as_posix() for path in files if path.is_file()]


def present_fields(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers gives them: without keys whose value is None, and with reasoning under the names in use."""
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for position, message in enumerate(present):
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            present[position] = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    return present


def tool_schemas(tools: Any) -> list[Any] | None:
    """Tools as a template gets them: JSON schemas; a function becomes the one of its signature and docstring."""
    if tools is None:
        return None
    from transformers.utils.chat_template_utils import get_json_schema

    return [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]


def read_stop_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns every id that ends a completion: the model's, and its tokenizer's where there is one. Sorted; may be empty.

    Raises:
        TokenizerError: The folder is missing, or a file in it cannot be read.
    """
    tokenizer = Tokenizer.from_folder(folder)
    return read_model_stop_ids(Path(folder).expanduser()) if tokenizer is None else tokenizer.stop_ids


@contextlib.contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Turns whatever transformers and tokenizers raise into a TokenizerError that begins with `what`."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:  # the Rust code raises bare Exception, and PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {type(error).__name__}: {error}") from error


def special_tokens_around(hf: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Finds the special tokens that a tokenizer of transformers puts before and after a text, by encoding a known text."""
    for probe in ("a", "A", "0", "1", ".", " ", *itertools.islice(hf.get_vocab(), MOST_PROBES)):
        bare = list(hf.encode(probe, add_special_tokens=False))
        full = list(hf.encode(probe, add_special_tokens=True))
        if not bare or len(set(bare) & set(hf.all_special_ids)) > 0:
            continue  # a text that is itself a special token does not show where the text begins
        starts = [start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare]
        if len(starts) == 1:  # several where the text is also one of the tokens around it
            return tuple(full[: starts[0]]), tuple(full[starts[0] + len(bare) :])
    return (), ()


def import_auto_tokenizer() -> Any:
    """Imports AutoTokenizer of transformers, without its advice that PyTorch is missing: none of its models is used."""
    if "transformers" in sys.modules:
        from transformers import AutoTokenizer

        return AutoTokenizer
    before = os.environ.get(NO_ADVICE)
    os.environ[NO_ADVICE] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[NO_ADVICE]
        else:
            os.environ[NO_ADVICE] = before
    return AutoTokenizer
