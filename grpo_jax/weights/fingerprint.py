"""Fingerprints of a model's files, so that a resumed run notices another base model.

A file of up to 64 MiB is hashed whole. Of a larger safetensors file the header and three blocks of each tensor are, at its start,
middle and end: a model that was trained further, scaled or converted differs in nearly every tensor, and reading 16 GB more at each
start would take minutes on shared storage. This is no check against damage, for which `grpo-jax verify` reads whole files.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.weights.hf import weight_map

WHOLE_BYTES = 2**26
BLOCK_BYTES = 2**12
SAMPLED_TENSORS = 256
"""Tensors of one file that blocks are read of; of more, these many are chosen at equal distances."""
OTHER_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
REVISION = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})$")


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    match = REVISION.search(str(folder.absolute()))
    return match[1] if match else None


def model_fingerprints(folder: Path) -> dict[str, str]:
    """Returns a fingerprint of each file that a policy is read from: weights, config, tokenizer and template; {} without a folder.

    Raises:
        ModelError, OSError: the folder cannot be read as a model's.
    """
    if not folder.is_dir():
        return {}
    names = [*sorted(set(weight_map(folder).values())), *(name for name in OTHER_FILES if (folder / name).is_file())]
    with ThreadPoolExecutor(4, "fingerprints") as threads:
        return dict(zip(names, threads.map(lambda name: fingerprint(folder / name), names), strict=True))


def fingerprint(path: Path) -> str:
    """Returns `sha256:` and the digest of a file; `sampled:` and that of header and blocks of a large safetensors file."""
    if path.stat().st_size <= WHOLE_BYTES or path.suffix != ".safetensors":
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        start = file.tell()
        spans = sorted(tuple(tensor["data_offsets"]) for name, tensor in json.loads(header).items() if name != "__metadata__")
        for begin, end in spans[:: -(-len(spans) // SAMPLED_TENSORS)]:
            for offset in sorted({begin, max(begin, (begin + end - BLOCK_BYTES) // 2), max(begin, end - BLOCK_BYTES)}):
                file.seek(start + offset)
                digest.update(file.read(min(BLOCK_BYTES, end - offset)))
    return f"sampled:{digest.hexdigest()}"
