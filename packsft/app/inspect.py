"""`packsft inspect`: shows what packing does to data sets before training. Rows, plan, report; draws nothing itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from packsft.app.rows import prepared_rows
from packsft.app.tables import print_table
from packsft.data.packs import PackedDataset, TokenRows, pack_dataset
from packsft.data.pictures import PictureRows
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
from packsft.packing.report import SIMULATED_STEPS
from packsft.packing.strategies import strategy_named

logger = logging.getLogger("packsft")


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
        lengths = plan.document_lengths
        steps = simulate_steps(lengths, batch_size, report.tokens_per_pass, devices, SIMULATED_STEPS)
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
