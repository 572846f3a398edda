"""Per-token log-probabilities against stored results of transformers and PEFT (`goldens/`); against torch: `make test-peers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from plain_oracles import quick_compiling

from goldens.folders import ADAPTERS, FAMILIES, build_adapter_folder, build_model_folder, read_golden

TOLERANCE_NATS = 1e-4  # float32 sums in another order; the model feature with the smallest effect changes them by 6e-4


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def assert_matches(folder: Path, golden: str, adapter: Path | None = None) -> None:
    """Compares rows split into prompts and completions of unequal length, so that there is padding; two calls cover every token."""
    from grpo_jax.policy import Policy

    policy = Policy.from_pretrained(str(folder), dtype="float32", adapter=None if adapter is None else str(adapter))
    ids, expected = read_golden(golden)
    for splits, ends in (((1, 9), (20, ids.shape[1])), ((9, 1), (ids.shape[1], 20))):
        prompts = [[int(token) for token in row[:split]] for row, split in zip(ids, splits, strict=True)]
        completions = [[int(token) for token in row[split:end]] for row, split, end in zip(ids, splits, ends, strict=True)]
        got = policy.logprobs(prompts, completions)
        for row, (split, end) in enumerate(zip(splits, ends, strict=True)):
            assert got[row].dtype == np.float32
            assert got[row].shape == (end - split,)
            np.testing.assert_allclose(got[row], expected[row, split - 1 : end - 1], rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["new", "hub"])
def test_log_probabilities_match_transformers(tmp_path: Path, family: str, spelling: Literal["new", "hub"]) -> None:
    assert_matches(build_model_folder(tmp_path, family, spelling), family)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_log_probabilities_with_a_peft_adapter_match_peft(tmp_path: Path, adapter: str) -> None:
    folder = build_model_folder(tmp_path, ADAPTERS[adapter])
    assert_matches(folder, f"adapters/{adapter}", build_adapter_folder(tmp_path, adapter))


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    assert_matches(build_model_folder(tmp_path, "qwen3", shards=3), "qwen3")
