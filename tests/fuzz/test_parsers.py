"""Every parser of what strangers wrote, fuzzed: an error of ours or a right result, never another exception, never a hang.

`make fuzz` runs 10,000 examples a parser, `make test` 20 and `make test-slow` 150. FUZZ_EXAMPLES sets another number.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hostile_values import as_json, changed_bytes, changed_json, json_files, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_oracles import golden_config
from tiny_runs import CONFIG, build_model, tensors, tiny_model
from tiny_tokenizers import CHATML, byte_tokenizer

from grpo_jax import cli
from grpo_jax.config import Config, DataConfig, LoraConfig, config_to_dict, load
from grpo_jax.config.load import setting_types
from grpo_jax.config.yaml_files import dump_yaml
from grpo_jax.data import rows as data_rows
from grpo_jax.data import templates
from grpo_jax.data.prompts import encode_within_limit, read_prompt
from grpo_jax.data.tokenizer import Tokenizer, read_stop_ids
from grpo_jax.models.parameters import count_parameters, param_specs
from grpo_jax.rewards.answers import final_number, reference_number
from grpo_jax.weights.hf import TensorFiles, check_tensors, read_folder_spec, read_slice, tensor_names, weight_map
from grpo_jax.weights.lora import init_lora, load_adapter, save_adapter

HANG_SECONDS = 120
"""One example; none takes a second on an idle machine."""


class HungError(BaseException):
    """An example that took `HANG_SECONDS`."""


@contextlib.contextmanager
def only_errors_of_ours() -> Iterator[None]:
    """Swallows errors of this package; fails on others and on a hang."""

    def hung(*_: Any) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    except Exception as error:
        if not cli.is_users(error):
            raise
        if not str(error) or not printed_safely(cli.error_block(error)):
            raise AssertionError(f"a message that cannot be shown: {str(error)!a}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def printed_safely(text: str) -> bool:
    """Whether a text has no control character, half a surrogate pair or mark that turns the direction of reading."""
    turning = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return not any((unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or ord(c) in turning for c in text)


@functools.cache
def base() -> Path:
    """A folder with what examples are made of: `model`, `adapter`."""
    folder = Path(tempfile.mkdtemp())
    model = build_model(folder / "model")
    spec = read_folder_spec(model)
    lora = LoraConfig(rank=2, targets=["q_proj", "v_proj"])
    save_adapter(folder / "adapter", spec, init_lora(spec, lora, jax.random.key(0)), lora, "base")
    return folder


@functools.cache
def changed_copy(name: str) -> Path:
    """A copy of a folder of `base`, of which each example changes one file."""
    target = base() / f"changed {name}"
    shutil.copytree(base() / name, target)
    return target


@contextlib.contextmanager
def changed(folder: str, file: str, content: bytes) -> Iterator[Path]:
    """A folder of `base` with another content in one of its files while the block runs."""
    path = changed_copy(folder) / file
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield path.parent
    finally:
        path.unlink() if before is None else path.write_bytes(before)


FAMILY_CONFIGS = [
    golden_config(family) for family in ("llama3_scaled", "mistral", "qwen2", "qwen3_moe", "mixtral", "gemma2", "gemma3")
]


def model_config(content: bytes) -> None:
    """config.json: sizes within their ranges, finite frequencies, a table of parameters."""
    with changed("model", "config.json", content) as folder, only_errors_of_ours():
        spec = read_folder_spec(folder)
        hash(spec)
        assert len(spec.windows) == len(spec.rope_of_layer) == spec.layers
        assert spec.heads % spec.kv_heads == 0
        assert 0 < spec.norm_eps <= 1
        assert all(np.isfinite(frequency) for rope in spec.ropes for frequency in rope.frequencies(spec.head_dim))
        assert all(window is None or window >= 1 for window in spec.windows)
        assert count_parameters(spec) > 0
        assert all(size >= 1 for p in param_specs(spec).values() for size in p.shape)


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """Files of an index."""
    names = list(tensors())
    mapping: Any = dict.fromkeys(names, "model.safetensors")
    document = draw(st.one_of(changed_json({"weight_map": mapping, "metadata": {}}), values))
    return draw(st.one_of(st.just(as_json(document)), changed_bytes(as_json(document))))


def weight_index(content: bytes) -> None:
    """The index: every file is one of the folder's own."""
    with changed("model", "model.safetensors.index.json", content) as folder, only_errors_of_ours():
        found = weight_map(folder)
        assert all((folder / name).parent == folder and (folder / name).is_file() for name in found.values())


@st.composite
def safetensors_files(draw: st.DrawFn, path: Path) -> bytes:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(changed_bytes(raw))
    if kind == 1:  # a header that lies about its own length
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
    names = [name for name in header if name != "__metadata__"]
    if kind == 2:  # tensors that overlap, or lie outside
        one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        header[one]["data_offsets"] = draw(st.sampled_from([header[other]["data_offsets"], [0, 2**63], [8, 0], [-4, 4]]))
        made = as_json(header)
    else:
        made = as_json(draw(changed_json(header)))
    return len(made).to_bytes(8, "little") + made + rest


def weights_file(content: bytes) -> None:
    """model.safetensors: what is read has the shapes of config.json and is finite."""
    with changed("model", "model.safetensors", content) as folder, only_errors_of_ours():
        spec = read_folder_spec(folder)
        with TensorFiles(folder) as files:
            check_tensors(folder, spec, files)
            for path, source in tensor_names(spec).items():
                shape = param_specs(spec)[path].shape
                read = read_slice(files, source, tuple(slice(None) for _ in shape), np.float32)
                assert read.shape == shape
                assert np.isfinite(read).all()


def adapter_folder(content: bytes, file: str) -> None:
    """PEFT's two files: finite matrices of the right shapes, a finite scale."""
    spec = read_folder_spec(base() / "model")
    with changed("adapter", file, content) as folder, only_errors_of_ours():
        adapters, lora = load_adapter(folder, spec)
        assert 0 < lora.scale < 1e7
        for leaf in jax.tree.leaves(adapters):
            assert np.isfinite(np.asarray(leaf)).all()
            assert lora.rank in leaf.shape[-2:]


def tokenizer_folder(content: bytes, file: str) -> None:
    """A tokenizer's files: ids within the vocabulary."""
    with changed("model", file, content) as folder, only_errors_of_ours():
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer is not None
        read_stop_ids(folder)
        size = tokenizer.vocabulary or 2**31
        ids = tokenizer.encode_prompt("One day, é\x00", chat=tokenizer.has_chat_template)
        assert all(0 <= i < size for i in (*ids, *tokenizer.stop_ids))
        assert isinstance(tokenizer.decode(ids), str)


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{% for i in range(99999) %}", "{% if add_generation_prompt %}", "{% endif %}",
    "{{ m }}", "{{ m.content }}", "{{ 'x' * (10**10) }}", "{{ 9**9**9 }}", "{{ messages[0] }}", "{{ ''.__class__ }}",
    "{{ cycler.__init__.__globals__ }}", "{% set ns = namespace(x='a') %}", "{% set ns.x = ns.x ~ ns.x %}", "{{ ns.x }}",
    "{% macro f(n) %}", "{% endmacro %}", "{{ f(f(1)) }}", "{{ raise_exception('no') }}", "{{ messages|tojson }}",
    "{{ '%1000000000d'|format(1) }}", "{{ 'a'.center(10**10) }}", "{% include 'x' %}", "{{ messages|batch(10**9, 1)|list }}",
    "{{ lipsum(10**6) }}", "{{ strftime_now('%Y') }}", "{% generation %}", "{% endgeneration %}", "{{ eos_token }}",
    "{{ undefined.x }}", "{% break %}", "{{", "}}", "{%", "text", "\x00", "{{ range(10**9)|list }}", "{{ dict(a=1).a }}",
]  # fmt: skip
template_texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=7).map("".join),
    st.text(max_size=20),
    changed_bytes(CHATML.encode()).map(lambda raw: raw.decode(errors="replace")),
)


def chat_template(template: str) -> None:
    """A chat template: a text, or a refusal within its limits."""
    if not template:
        return
    tokenizer = Tokenizer.wrap(byte_tokenizer(template))
    with only_errors_of_ours():
        rendered = tokenizer.render([{"role": "user", "content": "hello"}], generation=True)
        assert len(rendered) <= templates.MOST_CHARACTERS


row_values = st.one_of(
    values, st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": values}), max_size=2)
)
row_lists = st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "self", ""]), row_values, max_size=3), max_size=4)


@st.composite
def text_datasets(draw: st.DrawFn) -> tuple[str, bytes]:
    rows = draw(row_lists)
    if draw(st.booleans()):
        suffix, content = ".jsonl", b"".join(as_json(row) + b"\n" for row in rows)
    else:
        suffix, content = ".json", as_json(rows)
    if draw(st.integers(0, 9)) == 0:
        content += b'[{"prompt": ' + b"9" * 5000 + b"}]"
    return suffix, draw(st.one_of(st.just(content), changed_bytes(content)))


@st.composite
def csv_datasets(draw: st.DrawFn) -> tuple[str, bytes]:
    cells = st.one_of(st.sampled_from(['"', ",", "\n", "\r", "prompt", "answer", "\x00", "é"]), st.text(max_size=5))
    text = "prompt,answer\n" + "".join(draw(st.lists(cells, max_size=12)))
    return ".csv", draw(changed_bytes(text.encode("utf-8", "surrogatepass")))


@functools.cache
def parquet_file() -> bytes:
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "é"}]]
    table = pyarrow.table({"prompt": ["one", "two"], "messages": prompts, "time": pyarrow.array([1, 2], pyarrow.timestamp("s"))})
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


def dataset(file: tuple[str, bytes]) -> None:
    """A dataset's file: rows that are prompts of at most 8 ids, or the error names the file."""
    suffix, content = file
    path = base() / f"rows{suffix}"
    path.write_bytes(content)
    tokenizer, data = Tokenizer.from_folder(tiny_model()), DataConfig(overlong="shorten")
    assert tokenizer is not None
    with only_errors_of_ours():
        table = data_rows.read_rows(str(path), None, "train", "data.path", "data.split")
        for number in range(len(table)):
            with only_errors_of_ours():
                row = table[number]
                assert tuple(row) == table.columns
                prompt = read_prompt(row.get("prompt"), data, table.where(number))
                encoded = encode_within_limit(prompt, tokenizer, data, 40, table.where(number))
                assert encoded is not None
                assert 0 < len(encoded.prompt_ids) <= 40


YAML_PIECES = [
    "train:", "train: ", "steps", ": ", "\n  ", "\n", "steps: 5", "steps: 0x" + "f" * 5000, "seed: -1",
    "optim: {learning_rate: 1e-6}", "&a ", "*a", "- ", "[", "]", "{", "}", "!!int ''", "!!bool maybe", "!!timestamp x",
    "!!set {a, b}", "!!binary '?'", "<<: ", "? ", "1e999", ".nan", "~", "'", '"', "\t", "\x00", "\x85", "é", "#",
    "rollout: {num_generations: 8}", "[" * 3000, "rewards: {functions: [exact_match]}", ",",
]  # fmt: skip
yaml_texts = st.one_of(st.lists(st.sampled_from(YAML_PIECES), max_size=10).map("".join), st.text(max_size=20))


def yaml_config(text: str) -> None:
    """A YAML file: a config that is written and read back unchanged."""
    path = base() / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with only_errors_of_ours():
        config = Config.from_yaml(path)
        (base() / "again.yaml").write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")
        assert Config.from_yaml(base() / "again.yaml") == config


override_lists = st.dictionaries(
    st.one_of(st.sampled_from(list(setting_types())), st.text(max_size=8)),
    st.one_of(st.sampled_from(YAML_PIECES), values.map(str), st.text(max_size=10)),
    min_size=1,
    max_size=3,
)


def overrides(given_settings: dict[str, str]) -> None:
    """Options of the command line: a config, whose settings have their types."""
    with only_errors_of_ours():
        config = load(None, given_settings).config
        assert Config.from_dict(config_to_dict(config)) == config


ANSWER_PIECES = [
    "####", "\\boxed{", "}", "{", "$", "1,080", ".5", "-", "/", " 1/2", "3", "0", "9" * 5000, ",", "%", "\n", "{,}", "\\!", "−",
    "٣", "e9",
]  # fmt: skip
answers = st.one_of(st.lists(st.sampled_from(ANSWER_PIECES), max_size=40).map("".join), st.text(max_size=40), values)


def answer(value: Any) -> None:
    """A completion's or reference's answer: an exact number or none; a reference without one is a ValueError."""
    text = value if isinstance(value, str) else None
    if text is not None:
        found = final_number(text)
        assert found is None or isinstance(found, Fraction)
    with contextlib.suppress(ValueError):
        assert isinstance(reference_number(value), Fraction)


Parser = tuple[st.SearchStrategy[Any], Callable[..., None]]


def parsers() -> dict[str, Callable[[], Parser]]:
    """By name: what makes the strategy of examples, and the check of one."""
    made: dict[str, Callable[[], Parser]] = {
        "config.json": lambda: (st.sampled_from([CONFIG, *FAMILY_CONFIGS]).flatmap(json_files), model_config),
        "safetensors index": lambda: (indices(), weight_index),
        "safetensors": lambda: (safetensors_files(base() / "model/model.safetensors"), weights_file),
        "chat template": lambda: (template_texts, chat_template),
        "jsonl and json": lambda: (text_datasets(), dataset),
        "csv": lambda: (csv_datasets(), dataset),
        "parquet": lambda: (changed_bytes(parquet_file()).map(lambda raw: (".parquet", raw)), dataset),
        "yaml": lambda: (yaml_texts, yaml_config),
        "command line": lambda: (override_lists, overrides),
        "answers": lambda: (answers, answer),
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        made[name] = functools.partial(of_json, "model", name, tokenizer_folder)
    made["adapter_config.json"] = functools.partial(of_json, "adapter", "adapter_config.json", adapter_folder)
    weights = "adapter_model.safetensors"
    made["adapter safetensors"] = lambda: (
        safetensors_files(base() / "adapter" / weights),
        functools.partial(adapter_folder, file=weights),
    )
    return made


def of_json(folder: str, name: str, check: Callable[..., None]) -> Parser:
    """Examples made of a JSON file of `base`."""
    return json_files(json.loads((base() / folder / name).read_text())), functools.partial(check, file=name)


PARSERS = parsers()
QUICK, SLOW = (int(os.environ.get("FUZZ_EXAMPLES", count)) for count in ("20", "150"))


def fuzz(name: str, examples: int) -> None:
    """Runs a parser on that many examples, the same at every run unless FUZZ_EXAMPLES is set."""
    strategy, check = PARSERS[name]()
    quiet = settings(
        max_examples=examples, deadline=None, database=None, derandomize="FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quiet
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


@pytest.fixture(autouse=True)
def _short_renderings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A rendering may take 0.2 s of processor time instead of 5."""
    templates.SHARED.close()
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(templates, "MEMORY_BYTES", 500 * 10**6)
    yield
    templates.SHARED.close()


@pytest.mark.parametrize("name", PARSERS)
def test_an_error_of_ours_or_a_right_result(name: str) -> None:
    fuzz(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_an_error_of_ours_or_a_right_result_in_many_examples(name: str) -> None:
    fuzz(name, SLOW)
