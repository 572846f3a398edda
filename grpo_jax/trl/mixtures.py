"""Mixtures of datasets, as TRL's scripts read them from a command line or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_jax.trl.arguments import allow
from grpo_jax.trl.scripts import said


@dataclass
class DatasetConfig:
    """One dataset of a mixture; all but the last two are arguments of `datasets.load_dataset`.

    Attributes:
        path, name, data_dir, data_files, split: which rows.
        columns: the columns that stay; None are all.
        fraction: of the rows of the mixture that are this dataset's; given for all datasets of it or for none.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """The arguments of a script that concern a mixture of datasets; `get_dataset` reads it.

    Example:
        DatasetMixtureConfig(datasets=[DatasetConfig("org/easy", fraction=1), DatasetConfig("org/hard", fraction=3)])
    """

    datasets: list[DatasetConfig] = said([], "datasets of the mixture, each with path, name, split, columns, fraction, ...")
    streaming: bool = said(False, "stream the datasets")
    test_split_size: float | None = said(None, "share or number of rows of the test split; None makes no such split")

    def __post_init__(self) -> None:
        self.datasets = [DatasetConfig(**one) if isinstance(one, dict) else one for one in self.datasets]


def get_dataset(mixture_config: DatasetMixtureConfig) -> Any:
    """Loads a mixture of datasets, one after the other.

    With fractions the mixture is as large as it can be while no dataset has to be repeated; the first rows of each are taken.

    Returns:
        A `datasets.DatasetDict` with `train`, and with `test` where `test_split_size` is given.

    Raises:
        ConfigError: there are no datasets, or fractions that cannot be honoured.
    """
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    chosen, streaming = mixture_config.datasets, mixture_config.streaming
    allow(bool(chosen), "datasets", [], "give at least one dataset with its path")
    fractions = [one.fraction for one in chosen if one.fraction is not None]
    allow(len(fractions) in (0, len(chosen)), "fraction", fractions, "give it for all datasets of a mixture, or for none")
    allow(not (fractions and streaming), "fraction", fractions, "leave it out with streaming: the numbers of rows are not known")
    allow(all(share > 0 for share in fractions), "fraction", fractions, "use positive numbers")
    parts: list[Any] = []
    for one in chosen:
        options: dict[str, Any] = {"data_dir": one.data_dir, "data_files": one.data_files, "split": one.split}
        loaded: Any = load_dataset(one.path, one.name, streaming=streaming, **options)
        parts.append(loaded if one.columns is None else loaded.select_columns(one.columns))
    if fractions:
        weights = [share / sum(fractions) for share in fractions]
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        parts = [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]
    joined: Any = concatenate_datasets(parts)
    size = mixture_config.test_split_size
    allow(size is None or not streaming, "test_split_size", size, "leave it out with streaming: the number of rows is not known")
    return DatasetDict({"train": joined}) if size is None else joined.train_test_split(test_size=size)
