"""`packsft inspect`: shows what packing does to a data set before training. Data, rows, plan, report.

Reads tokenised data column by column, without a tokenizer, TRL or transformers. Tokenises text with TRL's own code,
through `compat.py`. Knows a model's tokenizer but no model, and draws nothing itself.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList
from rich.console import Console

from packsft.app.json_lines import check_json, parse_json
from packsft.app.tables import print_table
from packsft.data.messages import tokenizer_without_nulls, warn_of_unseen_roles
from packsft.data.packs import PackedDataset, TokenRows, pack_dataset
from packsft.data.pictures import PictureRows, has_pictures, with_hidden_pictures
from packsft.data.raw import checked_rows, label_rows, once_of, one_form
from packsft.loops.mixture import Mixture, check_mixable, check_weights
from packsft.packing import (
    MaxLength,
    PackingReport,
    PackPlan,
    compare_max_lengths,
    packing_report,
    simulate_steps,
)
from packsft.packing.max_length import CANDIDATES, CUT_AT_MOST, recommended_max_length
from packsft.packing.strategies import strategy_named

logger = logging.getLogger("packsft")

FILE_KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
ROWS_PER_PROCESS = 2_000  # starting a process takes as long as tokenising about this many short examples


@dataclass(frozen=True)
class Inspection:
    """The rows, the plan and the report of a data set, or of several.

    - `plan`: the packs; of exact steps, the passes of some steps
    - `mixture`: of several data sets, what an epoch takes of each
    """

    data: str
    report: PackingReport
    max_lengths: list[MaxLength]
    recommended_max_length: int | None
    plan: PackPlan
    rows: TokenRows | PictureRows
    mixture: Mixture | None = None

    @property
    def lengths(self) -> np.ndarray:
        """`[examples]` in tokens, before cutting."""
        return self.rows.lengths

    @property
    def picture_tokens(self) -> np.ndarray | None:
        """`[examples]`, the tokens of pictures; None for rows of text."""
        return self.rows.picture_tokens if isinstance(self.rows, PictureRows) else None

    @property
    def of_pictures(self) -> dict[str, int | float]:
        """Tokens of pictures, and their share; empty for rows of text."""
        if self.picture_tokens is None:
            return {}
        count = int(self.picture_tokens.sum())
        return {"tokens": count, "share": count / max(1, int(self.lengths.sum()))}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `data`, `report`, `max_lengths` and `recommended_max_length`; `pictures`, `sets`, if
        any."""
        pictures = {} if self.picture_tokens is None else {"pictures": self.of_pictures}
        sets = {} if self.mixture is None else {"sets": [asdict(each) for each in self.mixture.sets]}
        return {
            "data": self.data,
            "report": self.report.as_dict(),
            "max_lengths": [asdict(each) for each in self.max_lengths],
            "recommended_max_length": self.recommended_max_length,
            **pictures,
            **sets,
        }

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """Each table by its title, with headings."""
        rows: list[tuple[str, ...]] = [("what", "value"), *self.report.rows()]
        if self.picture_tokens is not None:
            rows.append(("tokens of pictures", "{tokens:,} ({share:.2%})".format(**self.of_pictures)))
        if self.mixture is None:
            tables, what = {f"Packing of {self.data}": rows}, "Each max_length"
        else:
            tables = {f"All rows of {self.data}, and the steps of an epoch": rows}
            tables["What an epoch takes of each data set"] = self.mixture.rows()
            what = "Each max_length, of the rows of an epoch"
        tables[f"{what}, if longer examples are cut (bfd)"] = [
            ("max_length", "examples cut", "tokens lost", "packs", "fill"),
            *(
                (
                    f"{c.max_length:,}",
                    f"{c.examples_truncated:,}",
                    f"{c.share_lost:.2%}",
                    f"{c.packs:,}",
                    f"{c.fill:.2%}",
                )
                for c in self.max_lengths
            ),
        ]
        return tables

    def name_of(self, example: int) -> str:
        """A row, of several data sets in its own."""
        if self.mixture is None:
            return f"row {example:,}"
        for one in self.mixture.sets:
            if example < one.rows:
                break
            example -= one.rows
        return f"row {example:,} of {one.name}"

    @property
    def recommendation(self) -> str:
        share, best = f"{CUT_AT_MOST:.1%} of the tokens", self.recommended_max_length
        if best is None:
            return f"Each max_length in the table cuts more than {share}."
        return f"Recommended: max_length={best}, the smallest in the table that cuts at most {share}."

    def show(self, console: Console) -> None:
        """The tables and the recommendation."""
        for title, rows in self.tables().items():
            print_table(console, title, rows)
        console.print(self.recommendation)


def inspect_data(
    *data: str,
    model: str | None = None,
    split: str = "train",
    max_length: int = 1024,
    strategy: str | None = None,
    overlong: str | None = None,
    tokens_per_pass: int | None = None,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    devices: int = 1,
    num_train_epochs: float = 3.0,
    seed: int = 42,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    weights: Sequence[float] | None = None,
    weights_of: str = "token",
    stopping_strategy: str = "first_exhausted",
) -> Inspection:
    """Plan `data` as the trainer does with these arguments, and report; several data sets as `packsft.pack` does.

    Args:
        data: see `load_rows`.
        model: local folder or hub name of the model whose tokenizer (for pictures: processor) is used, or "smollm2";
            only for text and pictures.
        strategy: default "bfd"; of several data sets "step".
        seed: the seed of the training; in the best-fit strategies it decides which examples meet in a pack.
        weights: of several data sets, in their order; with `weights_of` and `stopping_strategy` as in `packsft.pack`.

    Raises:
        ValueError, OSError: anything that the user can fix; the message names it.
    """
    batch_size = per_device_train_batch_size * gradient_accumulation_steps * devices
    if not data:
        raise ValueError("data: expected one or more data sets")
    names = _names_of(data)
    if weights is not None and len(weights) != len(data):
        raise ValueError(f"weights: {len(weights)} given for {len(data)} data sets")
    by_name = None if weights is None else dict(zip(names, weights, strict=True))
    check_weights(names if len(data) > 1 else None, by_name, weights_of, stopping_strategy)
    strategy = strategy or ("bfd" if len(data) == 1 else "step")
    if len(data) > 1:
        check_mixable(strategy)
    options = model, split, assistant_only_loss, completion_only_loss, max_length
    prepared = {name: prepared_rows(one, *options) for name, one in zip(names, data, strict=True)}
    own: dict[str, Any] = {"strategy": strategy, "overlong": overlong}
    mixture = None
    if len(data) == 1:
        ((rows, once),) = prepared.values()
        seeded = seed if strategy_named(strategy).repacks else None
        packed = pack_dataset(rows, max_length, name=split, seed=seeded, once=once, **own)
    else:
        packed, mixture = _mixed(prepared, {
            **own, "max_length": max_length, "batch_size": batch_size, "seed": seed, "weights": by_name,
            "weights_of": weights_of, "stopping_strategy": stopping_strategy,
        })  # fmt: skip
    plan = packed.plan if mixture is None else mixture.first_epoch(packed.plan)
    report = packing_report(
        plan,
        effective_batch_size=batch_size,
        num_train_epochs=num_train_epochs,
        ranks=devices,
        packs_at_once=per_device_train_batch_size * devices if packed.repacks else None,
        tokens_per_pass=tokens_per_pass,
    )
    if packed.strategy.exact_steps:  # the picture shows the passes of some steps
        lengths = plan.stops.astype(np.int64) - plan.starts
        steps = simulate_steps(lengths, batch_size, tokens_per_pass or max_length, devices, 64)
        plan = _as_packs(plan, max(report.tokens_per_pass, int(lengths.max())), steps)
    return inspection_of(" + ".join(data), packed.rows, plan, report, mixture)


def inspection_of(
    data: str, rows: TokenRows | PictureRows, plan: PackPlan, report: PackingReport, mixture: Mixture | None = None
) -> Inspection:
    """Compares several `max_length` for rows that are planned and reported on."""
    # of rows with pictures, what is scored is known for one length
    count_scored = rows.count_scored if isinstance(rows, TokenRows) else None
    lengths = rows.lengths
    if mixture is not None:
        counted = mixture.rows_of_epoch()
        lengths = lengths[counted]
        count_scored = lambda examples, *segments: rows.count_scored(counted[examples], *segments)  # noqa: E731
    compared = compare_max_lengths(lengths, {*CANDIDATES, report.max_length}, count_scored)
    return Inspection(data, report, compared, recommended_max_length(compared), plan, rows, mixture)


def _names_of(data: Sequence[str]) -> list[str]:
    """The last part of each path, if they differ."""
    paths = [os.path.realpath(one) for one in data]
    if len(set(paths)) < len(data):
        raise ValueError(f"{', '.join(data)}: a data set is named twice")
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(data) else list(data)


def _mixed(prepared: Mapping[str, Any], settings: dict[str, Any]) -> tuple[PackedDataset, Mixture]:
    """Several data sets, by `packsft.pack`."""
    from packsft.loops.data import COLUMNS, pack

    sets = {}
    for name, (rows, once) in prepared.items():
        if isinstance(rows, PictureRows):
            raise ValueError(f"{name} holds pictures, which are not mixed with other data sets: inspect it alone")
        rows = _without_doubles(rows, once)
        sets[name] = rows.select_columns([column for column in COLUMNS if column in rows.column_names])
    level = logger.level
    logger.setLevel(logging.ERROR)  # `pack` logs what the tables show
    try:
        mixed = pack(sets, **settings)
    finally:
        logger.setLevel(level)
    assert isinstance(mixed.packs, PackedDataset)
    assert mixed.mixture is not None
    return mixed.packs, mixed.mixture


def _without_doubles(rows: Dataset, once: tuple[int | None, int | None]) -> Dataset:
    """The rows without the tokens that `TokenRows` leaves out of them."""
    found = TokenRows(rows, once)
    if not found.texts_with_doubles:
        return rows
    pairs = [found.tokens(row, 0, length) for row, length in enumerate(found.lengths)]
    return Dataset.from_dict(dict(zip(("input_ids", "labels"), zip(*pairs, strict=True), strict=True)))


def _as_packs(plan: PackPlan, tokens_per_pass: int, steps: list[list[list[np.ndarray]]]) -> PackPlan:
    """The passes of some steps as the packs of a plan, in step order; `plan` has one document per pack."""
    passes = [documents for shares in steps for share in shares for documents in share if len(documents)]
    segments = np.concatenate(passes)
    return replace(
        plan,
        offsets=np.cumsum([0, *map(len, passes)]),
        examples=plan.examples[segments],
        starts=plan.starts[segments],
        stops=plan.stops[segments],
        max_length=tokens_per_pass,
    )


# ---- data ----


def prepared_rows(
    data: str,
    model: str | None,
    split: str = "train",
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    max_length: int | None = None,
) -> tuple[Dataset | PictureRows, tuple[int | None, int | None]]:
    """Rows as the trainer makes them, and the tokens that it takes once: both are what `pack_dataset` takes.

    Args:
        data: see `load_rows`.
        model: for text: its tokenizer is used; for pictures: its processor.
        max_length: where rows with pictures may be cut.

    Raises:
        ValueError, OSError: anything that the user can fix; the message names it.
    """
    rows = load_rows(data, split)
    if has_pictures(rows.column_names):
        with_pictures = _with_pictures(rows, data, model, max_length, assistant_only_loss, completion_only_loss)
        return with_pictures, (None, None)
    if "seq_lengths" in rows.column_names:
        raise ValueError(f"{data} has the column seq_lengths: its rows are packed already")
    if "input_ids" not in rows.column_names:
        return _tokenise(one_form(rows, "text", data), data, model, assistant_only_loss, completion_only_loss)
    if assistant_only_loss and not {"labels", "assistant_masks"} & set(rows.column_names):
        raise ValueError(f"{data} has no column assistant_masks, which --assistant-only-loss needs")
    return label_rows(rows, completion_only_loss), (None, None)


def load_rows(data: str, split: str = "train") -> Dataset:
    """Load a JSONL, JSON, Parquet, CSV or Arrow file, a folder of `save_to_disk` or of such files, or a hub name.

    A path is never a pattern.

    Raises:
        ValueError: there are no examples or no such split, or a file cannot be parsed; for JSON the message names the
            line.
        OSError: there is no such file, folder or data set.
    """
    path = Path(data)
    kind = FILE_KINDS.get(path.suffix.lower())
    # `load_dataset` reads all files of the working folder for "" and for the name of a file type
    if not data or (not path.exists() and (kind or data in FILE_KINDS.values() or data.startswith(("/", ".")))):
        raise FileNotFoundError(f"no such file or folder: {data or repr(data)}")
    if path.is_file() and kind is None:
        raise ValueError(f"{data} has an unknown file type, expected {', '.join(FILE_KINDS)}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{data} is empty")
    saved = is_saved(path)
    whole = str(path.absolute())
    if path.exists() and ("::" in whole or os.path.expandvars(whole) != whole):
        raise ValueError(f"{data}: datasets takes the `::` or the `$` in this path for its own: rename it")
    if path.is_dir() and not saved:
        if glob.escape(str(path.resolve())) != str(path.resolve()):
            raise ValueError(f"{data}: datasets takes the name of this folder for a pattern: rename it, or name a file")
        for file in path.rglob("*.json*"):
            if FILE_KINDS.get(file.suffix.lower()) == "json" and file.is_file():
                check_json(file)
    elif kind == "json" and path.is_file():
        check_json(path)
    try:
        if saved:
            rows = load_from_disk(whole)
        elif path.is_file():
            rows = Dataset.from_file(data) if kind == "arrow" else _read_file(path, str(kind), split)
        else:
            rows = load_dataset(data, split=split)
    except OSError as error:
        raise OSError(f"{data} is neither a local file or folder nor a data set that can be loaded: {error}") from error
    except Exception as error:  # datasets raises anything about a damaged file
        if kind == "json" and path.is_file():
            _check_objects(path)
        raise ValueError(f"{data} cannot be read: {error.__cause__ or error or 'it holds no examples'}") from error
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"{data} has no split {split!r}, only {', '.join(rows)}: choose one with --split")
        rows = rows[split]
    elif split != "train" and (saved or kind == "arrow"):
        raise ValueError(f"{data} has no split {split!r}: it is a data set without splits, leave --split out")
    if len(rows) == 0:
        raise ValueError(f"{data} holds no examples")
    return rows


def is_saved(path: Path) -> bool:
    """Whether it is a folder of `save_to_disk`."""
    return path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _read_file(path: Path, kind: str, split: str) -> Dataset:
    """One file as the split "train", as `load_dataset` reads it, which would take its name for a pattern."""
    stat = path.stat()  # the cache knows a file by its name and this
    files = DataFilesList([str(path.absolute())], [(f"{stat.st_mtime_ns}", f"{stat.st_size}")])
    read: Any = {"json": Dataset.from_json, "parquet": Dataset.from_parquet, "csv": Dataset.from_csv}[kind]
    return read(DataFilesDict(train=files), split=split)


def _check_objects(path: Path) -> None:
    """Raises ValueError for the first line that is not a JSON object, or is not JSON in a file that is one array."""
    text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    if not text.strip():
        raise ValueError(f"{path} holds no examples")
    lines = [text] if text.lstrip().startswith("[") and path.suffix == ".json" else text.split("\n")
    for number, line in enumerate(lines):
        if line.strip():
            row = parse_json(line, path, number + 1)
            if len(lines) > 1 and not isinstance(row, dict):
                raise ValueError(f"{path}, line {number + 1}: a JSON {type(row).__name__}, expected an object")


# ---- rows: texts to input ids and labels ----


def _tokenise(
    rows: Dataset, data: str, model: str | None, assistant_only_loss: bool, completion_only_loss: bool | None
) -> tuple[Dataset, tuple[int | None, int | None]]:
    completion_only = completion_only_loss is not False
    if model is None:
        checked_rows(rows, text_field="text", completion_only=completion_only, eos_token=None, name=data)
        raise ValueError(f"{data} holds text, which needs a tokenizer: name its model with --model")
    from trl import SFTConfig

    from packsft.compat import prepare_rows

    tokenizer = load_tokenizer(model)
    if (eos_token := tokenizer.eos_token) is None:
        raise ValueError(f"the tokenizer of {model} has no EOS token to end an example with")
    rows = checked_rows(rows, text_field="text", completion_only=completion_only, eos_token=eos_token, name=data)
    num_processes = min((os.cpu_count() or 1), len(rows) // ROWS_PER_PROCESS)
    with warnings.catch_warnings():
        # transformers 5.23 deprecates `gradient_checkpointing`, but 5.17 does not know the new name.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        args = SFTConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,  # the plan cuts and counts
            dataset_num_proc=num_processes if num_processes > 1 else None,
            assistant_only_loss=assistant_only_loss,
            completion_only_loss=completion_only_loss,
        )
    try:
        warn_of_unseen_roles(rows, tokenizer, data)
        return prepare_rows(rows, tokenizer_without_nulls(tokenizer, rows, data), args), once_of(rows, tokenizer)
    except Exception as error:  # a tokenizer may raise anything
        raise ValueError(f"{data} cannot be tokenised: {error}") from error


def _with_pictures(
    rows: Dataset,
    data: str,
    model: str | None,
    max_length: int | None,
    assistant_only_loss: bool,
    completion_only_loss: bool | None,
) -> PictureRows:
    if model is None:
        raise ValueError(f"{data} holds pictures, which need a processor: name its model with --model")
    from transformers import AutoProcessor, ProcessorMixin
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from packsft.arguments import check_model_name

    check_model_name(model)
    try:
        processor = AutoProcessor.from_pretrained(model)
    except Exception as error:  # transformers raises anything about a damaged folder
        raise ValueError(could_not_load(model, error, "the processor of ")) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{data} holds pictures, but {model} has no processor, only a {type(processor).__name__}")
    of_completions = {"prompt", "completion"} <= set(rows.column_names)
    collator = DataCollatorForVisionLanguageModeling(
        processor,
        completion_only_loss=of_completions if completion_only_loss is None else completion_only_loss,
        assistant_only_loss=assistant_only_loss,
    )
    return PictureRows(with_hidden_pictures(rows), collator, max_length, None, data)


def could_not_load(model: str, error: Exception, what: str = "") -> str:
    where = "" if os.path.exists(model) else "there is no such folder, and from the hub: "
    return f"could not load {what}{model}: {where}{error}"


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text; an id that the tokenizer does not know is shown as a number."""

    def decode(ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, lambda token: 0 <= token < len(tokenizer))
        return "".join(tokenizer.decode(list(run)) if known else "".join(f"[{i}]" for i in run) for known, run in runs)

    return decode


def load_tokenizer(model: str) -> Any:
    """Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    from packsft.app.smollm2 import load_smollm2_tokenizer
    from packsft.arguments import check_model_name

    check_model_name(model)
    try:
        tokenizer = load_smollm2_tokenizer() if model == "smollm2" else AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises anything about a damaged folder
        raise ValueError(could_not_load(model, error, "the tokenizer of ")) from error
    return tokenizer
