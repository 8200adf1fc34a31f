"""Packed rows for any training loop: planned, mixed, saved and loaded."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_from_disk
from packsft_kernels.version import __version__

from packsft.config import check_choice, integer
from packsft.data.batch import for_model
from packsft.data.collator import PackingCollator
from packsft.data.document import short
from packsft.data.packs import PackedDataset, TokenRows, pack_dataset
from packsft.data.ranks import Ranks
from packsft.data.streams import PackedStream
from packsft.loops.loader import Order, StepLoader
from packsft.loops.mixture import Mixture, check_mixable, check_weights, joined
from packsft.packing import PackingReport, PackPlan, cut_examples, packing_report
from packsft.packing.strategies import strategy_named

logger = logging.getLogger("packsft")

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
UNREAD = ("seq_lengths", "loss_weights", "completion_mask", "assistant_masks")  # that would change what is trained
ANY_VOCABULARY = 1 << 31  # finds negative ids
SAVED, ROWS, PLAN = "packsft.json", "rows", "plan.npz"  # in the folder of `PackedData.save`


class PackedData:
    """Rows and how they are packed: what `pack` and `load` return.

    Attributes:
        packs: the plan over the rows, or the stream of packs.
        max_length, batch_size, strategy: as given to `pack`.
        tokens_per_pass: likewise, or `max_length`.
        mixture: of several data sets, what an epoch takes of each; None for one.
        fingerprint: SHA-256 in hex over the plan, a sample of the rows and what their order depends on; of a stream,
            over its settings.
    """

    def __init__(
        self, packs: PackedDataset | PackedStream, settings: dict[str, Any], mixture: Mixture | None = None
    ) -> None:
        self.packs, self.mixture, self._settings = packs, mixture, settings
        self.max_length: int = settings["max_length"]
        self.batch_size: int = settings["batch_size"]
        self.strategy: str = settings["strategy"]
        self.tokens_per_pass: int = settings["tokens_per_pass"] or self.max_length
        order = [settings["shuffle"], settings["seed"], None if mixture is None else mixture.sets]
        names = ("max_length", "strategy", "overlong", "loss_normalization")
        content = [settings[name] for name in names]
        if isinstance(packs, PackedDataset):
            content = [packs.plan.fingerprint, packs.sample(), settings["loss_normalization"], *order]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def __str__(self) -> str:
        """What packing does, and of several data sets what an epoch takes of each."""
        if isinstance(self.packs, PackedStream):
            return f"a stream, packed as its rows arrive ({self.strategy}, max_length {self.max_length:,})"
        tables: list[Sequence[tuple[str, ...]]] = [self.report.rows()]
        if self.mixture is not None:
            tables.append(self.mixture.rows())
        return "\n".join(map(_aligned, tables))

    def __repr__(self) -> str:
        names = ("max_length", "batch_size", "strategy", "tokens_per_pass")
        return f"PackedData({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def report(self) -> PackingReport:
        """What packing does to the rows and to the number of steps of an epoch. Of several data sets, the account is of
        all rows, and what follows is of the first epoch. Raises ValueError for a stream."""
        plan, size = self._planned().plan, self.batch_size
        if self.mixture is not None:
            plan = self.mixture.first_epoch(plan)
        return packing_report(plan, effective_batch_size=size, num_train_epochs=1, tokens_per_pass=self.tokens_per_pass)

    def _planned(self) -> PackedDataset:
        if isinstance(self.packs, PackedStream):
            raise ValueError("a stream is planned as its rows arrive: it has no report and no folder")
        return self.packs

    def loader(
        self,
        rank: int | None = None,
        ranks: int | None = None,
        *,
        padded: bool = False,
        device: torch.device | str | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> StepLoader:
        """The steps of one rank, an epoch each time it is iterated.

        Args:
            rank, ranks: of data parallelism; default: those of `torch.distributed`, or one. Losses are such that their
                *mean* over the ranks is the step's: DDP and FSDP average gradients.
            padded: rows for a model that cannot be packed: `model.packing.padded`.
            device: where batches go; None: they stay on the host.
            num_workers, pin_memory: as in `torch.utils.data.DataLoader`.
            pad_to_multiple_of: pads each row, with tokens that are not scored.

        Raises:
            ValueError: ranks that do not exist, or another argument that is no number.
        """
        if rank is None or ranks is None:
            if (rank is None) != (ranks is None):
                raise ValueError(f"rank={rank} and ranks={ranks}: give both, or none")
            known = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if known else (0, 1)
        rank, ranks = integer("rank", rank, 0), integer("ranks", ranks, 1)
        if rank >= ranks:
            raise ValueError(f"rank={rank} must be at least 0 and below ranks={ranks}")
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = integer("pad_to_multiple_of", pad_to_multiple_of, 1)
        collator = PackingCollator(
            pad_token_id=0, padded=padded, max_length=self.max_length, pad_to_multiple_of=pad_to_multiple_of,
            per_example=self._settings["loss_normalization"] == "example",
        )  # fmt: skip
        chosen = {name: self._settings[name] for name in ("shuffle", "seed", "drop_last")}
        order = Order(self.batch_size, self.tokens_per_pass, **chosen, mixture=self.mixture)
        workers = {"num_workers": integer("num_workers", num_workers, 0), "pin_memory": pin_memory}
        return StepLoader(self.packs, order, self.fingerprint, Ranks(rank, ranks), collator, device, workers)

    @property
    def collator(self) -> PackingCollator:
        """For a trainer that asks for items of `packs` itself, as `transformers.Trainer` does: gives one batch of them,
        whose loss is divided by what the trainer passes as `num_items_in_batch`. Not for models on padded rows: prepare
        the model with `on_unpackable="error"`.

        Raises ValueError with `loss_normalization="example"`, which no such trainer knows.
        """
        if self._settings["loss_normalization"] != "token":
            raise ValueError("loss_normalization='example': a trainer that counts tokens itself would ignore it")
        return _ForTrainers(pad_token_id=0, max_length=self.max_length)

    def _digest(self) -> str:
        """SHA-256 in hex over all rows and all settings."""
        as_text = json.dumps(self._settings, sort_keys=True)
        return hashlib.sha256(f"{self._planned().rows.digest} {as_text}".encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokens (Arrow), plan and settings into a new folder, whole or not at all.

        Raises:
            FileExistsError: there is a file, or a folder that is not empty.
            ValueError: a stream.
        """
        packs, folder = copy.copy(self._planned()), Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not an empty folder: save packed data into a new one")
        packs.set_epoch(0)
        rows: Any = packs.rows
        content = {"settings": self._settings, "fingerprint": self.fingerprint, "digest": self._digest()}
        as_text = json.dumps({"packsft_version": __version__, **content}, indent=2)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            begun = Path(beside) / "packed"
            columns = [name for name in COLUMNS if name in rows.dataset.column_names]
            rows.dataset.with_format(None).select_columns(columns).save_to_disk(str(begun / ROWS))
            packs.plan.save(begun / PLAN)
            (begun / SAVED).write_text(as_text, encoding="utf-8")
            begun.replace(folder)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class _ForTrainers(PackingCollator):
    def torch_call(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        return for_model(batch, "labels")


def pack(
    rows: Any,
    max_length: int,
    *,
    batch_size: int,
    strategy: str = "step",
    tokens_per_pass: int | None = None,
    overlong: str | None = None,
    max_lost_fraction: float = 1.0,
    loss_normalization: str = "token",
    shuffle: bool = True,
    seed: int = 42,
    drop_last: bool = False,
    vocab_size: int | None = None,
    weights: Mapping[str, float] | None = None,
    weights_of: str = "token",
    stopping_strategy: str = "first_exhausted",
) -> PackedData:
    """Plan optimizer steps of packed rows. What is lost is logged.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` with the columns `input_ids` and `labels` (-100 = not scored),
            or a list of token lists, all scored, or of mappings with both; `attention_mask` and `position_ids` as in
            `PackedSFTTrainer`. Or several data sets (no streams): a mapping from names to them, with a strategy that
            makes no packs ("step", "none").
        max_length: the most tokens of an example, and of a pack.
        batch_size: with the strategy "step", the examples of an optimizer step; else its packs, one a pass. On all
            ranks together.
        strategy: a name in `packsft.packing.STRATEGIES`.
        tokens_per_pass: with "step", the most tokens of a pass; default: `max_length`.
        overlong: what happens to a longer example: as in `plan_packs`.
        max_lost_fraction: the share of tokens, 0 to 1, that may be lost for any reason.
        loss_normalization: "token", or "example": every example counts the same in the loss.
        shuffle: another order in each epoch, from `seed`; and, with "bfd", other packs. A stream keeps its order.
        drop_last: leave out a last step of fewer items.
        vocab_size: ids and labels must be below it.
        weights: of several data sets, by name; None: an epoch is every document once.
        weights_of: "token": weights are shares of an epoch's tokens; "document": of its documents.
        stopping_strategy: with weights, an epoch ends before a document comes twice ("first_exhausted"), or when every
            document came once ("all_exhausted"; refused if one would come more than 1,000 times).

    Raises:
        ValueError, TypeError: bad input; the message names the argument or the row.
    """
    exact_steps, repacks = strategy_named(strategy).exact_steps, strategy_named(strategy).repacks
    check_choice("loss_normalization", loss_normalization)
    if tokens_per_pass is not None and not exact_steps:
        raise ValueError(f"tokens_per_pass={tokens_per_pass}: the packs of strategy={strategy!r} are the passes")
    for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}: must be True or False")
    check_weights(rows if isinstance(rows, Mapping) else None, weights, weights_of, stopping_strategy)
    settings: dict[str, Any] = {
        "max_length": integer("max_length", max_length, 1),
        "batch_size": integer("batch_size", batch_size, 1),
        "strategy": strategy,
        "tokens_per_pass": None if tokens_per_pass is None else integer("tokens_per_pass", tokens_per_pass, 1),
        "overlong": overlong,
        "max_lost_fraction": max_lost_fraction,
        "loss_normalization": loss_normalization,
        "shuffle": shuffle,
        "seed": integer("seed", seed, 0),
        "drop_last": drop_last,
        "vocab_size": None if vocab_size is None else integer("vocab_size", vocab_size, 1),
        "weights": weights and {name: float(weight) for name, weight in weights.items()},
        "weights_of": weights_of,
        "stopping_strategy": stopping_strategy,
    }
    options: dict[str, Any] = {
        "strategy": strategy,
        "name": "packed",
        "overlong": overlong,
        "max_lost_fraction": max_lost_fraction,
        "vocab_size": settings["vocab_size"] or ANY_VOCABULARY,
        "per_example": loss_normalization == "example",
    }
    if isinstance(rows, IterableDataset):
        _refuse_unread(rows.column_names or (), "the stream")
        return PackedData(PackedStream(rows, settings["max_length"], **options), settings)
    mixture = None
    dataset = _joined(rows, settings) if isinstance(rows, Mapping) else _dataset_of(rows, "the data set")
    packs = pack_dataset(
        dataset, settings["max_length"], seed=settings["seed"] if shuffle and repacks else None, **options
    )
    if isinstance(rows, Mapping):
        own = {name: settings[name] for name in ("weights", "weights_of", "stopping_strategy", "shuffle", "seed")}
        mixture = Mixture(settings["sets"], packs.rows.lengths, packs.plan, **own)
    for loss in packs.plan.account.describe_losses(max_length):
        logger.warning("packed rows: %s", loss)
    if drop_last and (count := len(packs if mixture is None else mixture)) < settings["batch_size"]:
        raise ValueError(f"drop_last=True leaves nothing: an epoch has {count} items, and batch_size={batch_size}")
    return PackedData(packs, settings, mixture)


def _refuse_unread(columns: Any, where: str) -> None:
    if found := [name for name in UNREAD if name in columns]:
        raise ValueError(f"{where} has {found[0]}, which is not read: give input_ids and labels (-100 = not scored)")


def _joined(rows: Mapping[str, Any], settings: dict[str, Any]) -> Dataset:
    """The rows of several data sets; their sizes become a setting."""
    if "input_ids" in rows and not isinstance(rows["input_ids"], Dataset):
        raise ValueError("rows is a mapping of columns, and must be one of data sets: use datasets.Dataset.from_dict")
    check_mixable(settings["strategy"])
    sets = {name: _dataset_of(one, f"the set {name}") for name, one in rows.items()}
    settings["sets"] = {name: len(one) for name, one in sets.items()}
    longest, split = settings["max_length"], {name: settings[name] for name in ("strategy", "overlong")}

    def check(rows: TokenRows) -> None:
        rows.check_ids(settings["vocab_size"] or ANY_VOCABULARY)
        cut_examples(rows.lengths, longest, **split)

    return joined(sets, check)


def _dataset_of(rows: Any, where: str) -> Dataset:
    """A data set with the columns that are read. Raises TypeError and ValueError, naming the row."""
    if isinstance(rows, Dataset):
        _refuse_unread(rows.column_names, where)
        if "input_ids" not in rows.column_names:
            raise ValueError(
                f"{where} has {', '.join(rows.column_names) or 'no columns'}, but no input_ids: tokenise it"
            )
        return rows
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        streams = "a datasets.IterableDataset" if where == "the data set" else "no stream,"
        expected = f"a datasets.Dataset, {streams} or a list of token lists"
        raise TypeError(f"{where} is of the type {type(rows).__name__}, expected {expected}")
    first = rows[0] if rows else ()
    names = [name for name in COLUMNS if name in first] if isinstance(first, Mapping) else ["input_ids", "labels"]
    names += [name for name in COLUMNS[:2] if name not in names]
    columns: dict[str, list] = {name: [] for name in names}
    for number, row in enumerate(rows):
        here = f"row {number} of {where}"
        given = row if isinstance(row, Mapping) else {"input_ids": row, "labels": row}
        _refuse_unread(given, here)
        if missing := [name for name in columns if name not in given]:
            raise ValueError(f"{here} has no {missing[0]}")
        if extra := [name for name in COLUMNS if name in given and name not in columns]:
            raise ValueError(f"{here} has {extra[0]}, and the first row has not")
        for name, column in columns.items():
            column.append(_tokens(given[name], f"{here}: {name}"))
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, List(Value("int64")))))


def _tokens(value: Any, where: str) -> np.ndarray:
    try:
        tokens = np.asarray(value)
        fits = tokens.ndim == 1 and (not tokens.size or tokens.dtype.kind in "iu" or tokens.dtype == bool)
    except ValueError:  # rows of several lengths
        fits = False
    if not fits or (tokens.size and tokens.max() > np.iinfo(np.int64).max):
        raise ValueError(f"{where} must be a list of integers, got {short(value)}")
    return tokens.astype(np.int64)


def load(folder: str | os.PathLike[str]) -> PackedData:
    """What `PackedData.save` wrote. Tokens are read in place; the plan is made again, and compared.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or its rows, its plan or its settings are not those that were saved.
    """
    folder = Path(folder)
    if not (folder / SAVED).exists():
        raise FileNotFoundError(f"{folder} holds no packed data: {SAVED} is missing")
    try:
        saved = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        names = ("settings", "fingerprint", "digest", "packsft_version")
        settings, fingerprint, digest, version = (saved[name] for name in names)
        known = set(inspect.signature(pack).parameters) - {"rows"} | {"sets"}
        if not isinstance(settings, dict) or not set(settings) <= known:
            raise ValueError(f"it has settings that packsft {__version__} does not know (it was saved by {version})")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SAVED} is damaged: {error}") from None
    rows: Any = load_from_disk(str(folder / ROWS))
    if (sizes := settings.pop("sets", None)) is not None:
        stops = np.cumsum(list(sizes.values())).tolist()
        rows = {name: rows.select(range(stop - sizes[name], stop)) for name, stop in zip(sizes, stops, strict=True)}
    data = pack(rows, **settings)
    found = data.fingerprint, data._digest(), data._planned().plan.fingerprint
    if found != (fingerprint, digest, PackPlan.load(folder / PLAN).fingerprint):
        raise ValueError(
            f"{folder} holds other rows, another plan or other settings than were saved (by packsft {version}; this is "
            f"{__version__}): pack the rows again"
        )
    return data
