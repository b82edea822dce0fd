"""Which data a recipe reads, and how."""

from __future__ import annotations

import glob
import gzip
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_sparse_moe.checkpoints.config import usable_positions


# The reader of `datasets` by the end of a file's name. All but parquet, which is compressed itself, may end with .gz.
READERS = {
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
FILE = "file"  # what rows are grouped by, where not by a column of theirs


@dataclass
class DataArguments:
    """The data: local files, or a data set of the Hub."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files or quoted globs: .txt, .csv, .tsv, .json or .jsonl, also with .gz, or .parquet."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "As --train_file."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which part of the data set."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to evaluate on."})
    validation_percentage: int = field(
        default=5, metadata={"help": "Where there is no validation data: the share of the training data held out."}
    )
    column_names: list[str] | None = field(
        default=None, metadata={"help": "The columns of a .csv or .tsv file that has no header line."}
    )
    delimiter: str | None = field(
        default=None, metadata={"help": "Between the columns of a .csv (default: comma) or .tsv (default: tab)."}
    )
    no_quotes: bool = field(default=False, metadata={"help": "Quotation marks in a .csv or .tsv are ordinary text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence; the model's limit, at most 512, if not given."}
    )
    num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    # What `load_data` made the validation data of: a part of the training data, or all of a data set's split.
    held_out: bool = field(default=False, init=False)
    whole_split: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.train_file, self.validation_file = _as_list(self.train_file), _as_list(self.validation_file)
        self.column_names = _as_list(self.column_names)
        files = self.train_file or self.validation_file
        if bool(files) == bool(self.dataset_name):
            raise ValueError("Pass either `--train_file` and/or `--validation_file`, or `--dataset_name`.")
        if not 0 <= self.validation_percentage < 100:
            raise ValueError(f"`--validation_percentage={self.validation_percentage}` must be from 0 to 99.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`--max_length={self.max_length}` must be at least 1.")


def load_data(args: DataArguments, unnest: Callable[[Dataset], Dataset] | None = None) -> DatasetDict:
    """
    The splits `train` and `validation`, as far as there are any. `unnest` makes rows of what a row holds, after data
    were held out and before the first rows are taken.
    """
    if args.dataset_name is not None:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
        if args.train_split not in splits:
            raise ValueError(f"`--train_split={args.train_split}` is none of {sorted(splits)}.")
        # The default may be missing: then rows are held out. A name that somebody typed may not.
        if args.validation_split not in (*splits, DataArguments.validation_split):
            raise ValueError(f"`--validation_split={args.validation_split}` is none of {sorted(splits)}.")
        named = {"train": args.train_split, "validation": args.validation_split}
        data = DatasetDict({name: splits[split] for name, split in named.items() if split in splits})
        args.whole_split = "validation" in data and args.max_eval_samples is None
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        data = DatasetDict({split: _load_files(names, split, args) for split, names in files.items() if names})
    if "validation" not in data and args.validation_percentage > 0:
        rows, share = len(data["train"]), args.validation_percentage
        if math.ceil(rows * share / 100) >= rows:
            raise ValueError(
                f"`--validation_percentage={share}` leaves none of the rows of {_named(args, 'train')} ({rows}) to "
                "train on. Pass validation data, or `--validation_percentage 0`."
            )
        args.held_out = True
        parts = data["train"].train_test_split(share / 100, seed=0)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    if unnest is not None:
        data = DatasetDict({split: unnest(rows) for split, rows in data.items()})
    for split, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if split in data and limit is not None:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    for split, rows in data.items():
        if len(rows) == 0:
            raise ValueError(f"The {split} data has no rows: {_named(args, split)}.")
    return data


def _named(args: DataArguments, split: str) -> str:
    files = (args.validation_file if split == "validation" else None) or args.train_file
    return f"`{' '.join(files)}`" if files else f"`{args.dataset_name}`"


def is_text(args: DataArguments) -> bool:
    """Whether the data are plain text files, whose lines are a running text."""
    files = args.train_file or args.validation_file
    return files is not None and _reader(files[0]) == "text"


def data_names(args: DataArguments) -> tuple[list[str], list[str]]:
    """
    What the model card calls the training and the validation data: a data set of the Hub, or folder and file. A whole
    split is named as `.eval_results/` takes it.
    """
    held_out = f"{args.validation_percentage}% held out of the training data"
    if args.dataset_name is not None:
        is_folder = Path(args.dataset_name).exists()
        name = Path(args.dataset_name).resolve().name if is_folder else f"hf://datasets/{args.dataset_name}"
        part = held_out if args.held_out else f"split {args.validation_split}"
        train, validation = [name], [name if args.whole_split else f"{name}, {part}"]
    else:
        train, validation = _named_files(args.train_file), _named_files(args.validation_file) or [held_out]
    limits = ((train, args.max_train_samples), (validation, args.max_eval_samples))
    for names, limit in limits:
        if limit is not None:
            names.append(f"of these the first {limit} rows")
    return train, validation


def _named_files(names: list[str] | None) -> list[str]:
    paths = [Path(path).resolve() for name in names or () for path in sorted(glob.glob(name, recursive=True))]
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _load_files(names: list[str], split: str, args: DataArguments) -> Dataset:
    argument = f"--{split}_file"
    paths = [path for name in names for path in sorted(glob.glob(name, recursive=True))]
    for name in names:
        if not glob.glob(name, recursive=True):
            raise ValueError(f"`{argument}={name}` matches no file. Check the path.")
    readers = {_reader(path) for path in paths}
    if len(readers) > 1 or None in readers:
        raise ValueError(
            f"`{argument}` must name files of one kind: {', '.join(READERS)}, all but .parquet also with .gz."
        )
    reader = readers.pop()
    options: dict[str, Any] = {}
    if reader == "csv":
        tab = paths[0].removesuffix(".gz").endswith(".tsv")
        options["delimiter"] = args.delimiter or ("\t" if tab else ",")
        options |= {"column_names": args.column_names} if args.column_names else {}
        options |= {"quoting": 3} if args.no_quotes else {}
    if getattr(args, "group_by", None) != FILE:
        return _read_files(paths, f"{argument}={' '.join(names)}", reader, options)
    by_path = [(path, _read_files([path], f"{argument}={path}", reader, options)) for path in paths]
    named = [rows.add_column(FILE, [Path(path).name.partition(".")[0]] * len(rows)) for path, rows in by_path]
    return concatenate_datasets(named)


def _read_files(paths: list[str], named: str, reader: str, options: dict[str, Any]) -> Dataset:
    """The rows of files, which on the command line were `named` so."""
    try:
        if not any(map(_is_blank, paths)):
            return load_dataset(reader, data_files=paths, split="train", **options)
        reason: object = None
    except (DatasetsError, ValueError, OSError, EOFError, StopIteration) as error:
        reason = None if "corresponds to no data" in str(error) else error.__cause__ or error  # a header alone
    if len(paths) > 1:  # which of them?
        for path in paths:
            _read_files([path], f"{named.partition('=')[0]}={path}", reader, options)
    if reason is None:
        raise ValueError(f"`{named}` has no rows. Leave it out, or write rows to it.")
    raise ValueError(f"`{named}` cannot be read as {reader}: {reason}")


def _is_blank(path: str) -> bool:
    """Whether a file has nothing but spaces and line breaks."""
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        return all(not chunk.strip() for chunk in iter(lambda: file.read(1 << 16), b""))


def _reader(path: str) -> str | None:
    name = path.lower()
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if reader == "parquet" and name.endswith(".gz") else reader


def _as_list(value: list[str] | str | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def column(rows: Dataset | dict[str, list], name: str) -> list:
    """The values of a column; `translation.en` is the entry `en` of the column `translation`."""
    outer, _, inner = name.partition(".")
    return [value and value[inner] for value in rows[outer]] if inner else list(rows[outer])


def require_columns(data: DatasetDict, **columns: str | None) -> None:
    """Raise a `ValueError` unless every split has the columns; each keyword is the argument that names one."""
    for split, dataset in data.items():
        known = dict(dataset.features)
        for argument, name in columns.items():
            outer, _, inner = (name or "").partition(".")
            entries = known.get(outer)
            missing = (
                inner not in entries if inner and isinstance(entries, dict) else bool(inner) or outer not in known
            )
            if name is not None and missing:
                raise ValueError(f"`--{argument}={name}` is no column of the {split} data; it has {sorted(known)}.")


def require_rows(data: DatasetDict, allowed: Callable[..., bool], needed: str, **columns: str | None) -> None:
    """
    Raise a `ValueError` unless in every row of every split `allowed` takes the values of the columns; each keyword is
    the argument that names one.
    """
    names = {argument: name for argument, name in columns.items() if name is not None}
    for split, rows in data.items():
        values = zip(*(column(rows, name) for name in names.values()), strict=True)
        wrong = [place for place, row in enumerate(values) if not allowed(*row)]
        if wrong:
            arguments = " and ".join(f"`--{argument}={name}`" for argument, name in names.items())
            raise ValueError(
                f"{arguments} must hold {needed} in every row: not so in {len(wrong)} of {len(rows)} rows of the "
                f"{split} data, such as {str(rows[wrong[0]])[:200]}. Remove or repair them."
            )


def require_texts(data: DatasetDict, **columns: str | None) -> None:
    """[`require_rows`] for columns of texts."""
    for argument, name in columns.items():
        if name is not None:
            require_rows(data, lambda value: isinstance(value, str), "a text", **{argument: name})


def sequence_length(args: DataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """`--max_length`, or its default; never more than model and tokenizer take."""
    limit = min(tokenizer.model_max_length, usable_positions(config) or sys.maxsize)
    if args.max_length is not None and args.max_length > limit:
        raise ValueError(f"`--max_length={args.max_length}` is more than the {limit} tokens that the model takes.")
    return args.max_length or min(limit, 512)
