"""Rows with pictures: planned from the headers of the files, processed when a pass needs them.

A row is processed as TRL (1.16) does it, by its collator for vision-language models, alone. For its length, the same
collator runs on a processor that knows only the sizes of the pictures, and decodes none.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Image, IterableDataset, List
from torch import Tensor

from packsft.data.document import IGNORE_INDEX, Document, is_outside, make_document, outside_vocabulary, short
from packsft.data.packs import sample_of

if TYPE_CHECKING:  # needed for pictures alone
    import PIL.Image
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

logger = logging.getLogger("packsft")

PICTURES = "packsft_pictures"  # the column, under a name that TRL does not look for
FORMS = (("messages",), ("prompt", "completion"))  # or the column of texts, in TRL's order
LOOKED_AT = 1000  # rows, for some with pictures of several sizes
TRIED_ROWS = 4  # whose length is compared with that of the processed row, when a data set is planned
Rows: TypeAlias = Dataset | IterableDataset
ORIENTATION = 0x0112  # of Exif; from 5 on, height and width change places


def picture_column(columns: Any) -> str | None:
    """The name of the column of pictures, if there is one."""
    return next((name for name in ("images", "image", PICTURES) if name in columns), None)


def holds_pictures(rows: Any) -> bool:
    """Whether these are rows of `with_hidden_pictures` that have some."""
    if isinstance(rows, IterableDataset):
        return getattr(rows, "of_pictures", False)
    return isinstance(rows, Dataset) and PICTURES in rows.column_names


def with_hidden_pictures(rows: Any) -> Any:
    """Rows whose pictures are not decoded, under a name that TRL does not look for; others as they are."""
    if isinstance(rows, dict):
        return {key: with_hidden_pictures(one) for key, one in rows.items()}
    is_stream = isinstance(rows, IterableDataset)
    if not isinstance(rows, (Dataset, IterableDataset)) or hasattr(rows, "of_pictures"):
        return rows
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        return rows
    columns = (rows.column_names or list(next(iter(rows), {}))) if is_stream else rows.format["columns"]
    if (name := picture_column(columns)) in (None, PICTURES):
        return rows
    rows = rows.with_format(None)
    feature = (rows.features or {}).get(name)
    if isinstance(feature, Image):
        rows = rows.cast_column(name, Image(mode=feature.mode, decode=False))
    elif isinstance(inner := getattr(feature, "feature", None), Image):
        rows = rows.cast_column(name, List(Image(mode=inner.mode, decode=False)))
    if rows.column_names is None:  # a later row may have no such column
        rows = rows.map(_rename, fn_kwargs={"name": name}, remove_columns=[name])
    else:
        rows = rows.rename_column(name, PICTURES)
    if is_stream:
        rows.of_pictures = True
    return rows


def _rename(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {PICTURES: row.get(name)}


def _mode_of(rows: Rows) -> str | None:
    """To which a picture is converted when it is decoded."""
    feature = (rows.features or {}).get(PICTURES)
    return getattr(getattr(feature, "feature", feature), "mode", None)


def _form_of(columns: Sequence[str], text_field: str, name: str) -> tuple[str, ...]:
    """The columns of text that are read. Raises ValueError if there are none."""
    forms = [form for form in (*FORMS, (text_field,)) if set(form) <= set(columns)]
    if not forms:
        beside = ", ".join(column for column in columns if column != PICTURES)
        expected = f"messages, prompt and completion, or {text_field}"
        raise ValueError(f"the {name} has pictures and the columns {beside}, expected {expected}")
    if left := [column for form in forms[1:] for column in form if column not in forms[0]]:
        read = " and ".join(forms[0])
        logger.warning("%s: %s is trained on; %s is not read", name, read, " and ".join(left))
    return forms[0]


def _opened(picture: Any) -> PIL.Image.Image:
    """Reads the header alone."""
    import PIL.Image

    if isinstance(picture, PIL.Image.Image):
        return picture
    if isinstance(picture, Mapping):
        picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, str):
        if picture.startswith(("http://", "https://")):
            raise ValueError("addresses are not fetched: load it first")
        return PIL.Image.open(picture)
    if isinstance(picture, bytes):
        return PIL.Image.open(io.BytesIO(picture))
    raise TypeError(f"expected a picture, its path or its bytes, got {short(picture)}")


def pictures_of(row: Mapping[str, Any], where: str) -> list[PIL.Image.Image]:
    """The pictures of a row, opened, not decoded. Raises ValueError, naming the row."""
    given = row[PICTURES]
    pictures = [] if given is None else given if isinstance(given, list) else [given]
    opened = []
    for number, picture in enumerate(pictures):
        try:
            opened.append(_opened(picture))
        except Exception as error:
            raise ValueError(f"{where}: picture {number} cannot be read: {error}") from None
    return opened


def _size(picture: PIL.Image.Image) -> tuple[int, int]:
    """(height, width), as a viewer shows it."""
    # where a PNG has no such text before its pixels, PIL would decode it to look behind them
    # and where it is a TIFF, its size is that already
    looks = picture.format not in ("PNG", "TIFF") or "exif" in picture.info or "Raw profile type exif" in picture.info
    turned = looks and picture.getexif().get(ORIENTATION, 1) >= 5
    width, height = reversed(picture.size) if turned else picture.size
    return height, width


class RowProcessor:
    """Processes one row.

    Args:
        collator: TRL's collator for vision-language models, without a length.
        columns: of text.
        mode: of PIL, to which pictures are converted; None: as they are.
        planned: only for `measure`, from the sizes of the pictures alone: the text has one token for each.
        more: tokens of a picture beyond those that the processor tells from its size.
    """

    def __init__(
        self,
        collator: DataCollatorForVisionLanguageModeling,
        columns: tuple[str, ...],
        mode: str | None,
        planned: bool = False,
        more: int = 0,
    ) -> None:
        self._collator, self._columns, self._mode, self._planned, self._more = collator, columns, mode, planned, more
        self._ready: DataCollatorForVisionLanguageModeling | None = None

    @classmethod
    def of_rows(
        cls, rows: Rows, columns: Sequence[str], collator: DataCollatorForVisionLanguageModeling, name: str
    ) -> RowProcessor:
        """Raises ValueError if the rows have no text."""
        return cls(collator, _form_of(columns, collator.dataset_text_field, name), _mode_of(rows))

    def digest(self, row: Mapping[str, Any]) -> bytes:
        """SHA-256 of texts and pictures; of a picture in a file, its path, of one in memory, its size and mode."""
        given = row[PICTURES]
        digest = hashlib.sha256(repr([row.get(name) for name in self._columns]).encode())
        for picture in given if isinstance(given, list) else [given]:
            encoded = picture.get("bytes") if isinstance(picture, Mapping) else picture
            if isinstance(encoded, bytes):
                digest.update(encoded)
            else:
                digest.update(repr((picture.size, picture.mode) if hasattr(picture, "size") else picture).encode())
        return digest.digest()

    def planning(self, more: int) -> RowProcessor:
        """One that plans the same rows."""
        return RowProcessor(self._collator, self._columns, self._mode, planned=True, more=more)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ready": None}

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The collator's batch of one row. Raises ValueError, naming the row."""
        if self._ready is None:
            processor = self._collator.processor
            self._ready = copy.copy(self._collator)
            if self._planned:
                processor = knowing_sizes_alone(processor, self.picture_token, self._more)
            self._ready.processor = processor
        from PIL.ImageOps import exif_transpose

        pictures = pictures_of(row, where)
        if empty := [name for name in self._columns if row.get(name) is None]:
            raise ValueError(f"{where}: {empty[0]} is None")
        example = {name: copy.deepcopy(row[name]) for name in self._columns}
        self._check_placeholders(example, len(pictures), where)
        try:
            if not self._planned:
                pictures = [exif_transpose(picture) for picture in pictures]
            if not self._planned and self._mode is not None:
                pictures = [picture.convert(self._mode) for picture in pictures]
            return dict(self._ready.torch_call([example | {"images": pictures}]))
        except Exception as error:
            raise ValueError(f"{where} cannot be processed: {type(error).__name__}: {error}") from error

    def measure(self, row: Mapping[str, Any], where: str, max_length: int | None) -> dict[str, int]:
        """What a plan needs to know of a row: its tokens, how many of the first `max_length` are scored, and how many
        are of pictures, with the place behind the last."""
        batch = self(row, where)
        ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
        of_pictures = ids == self.picture_token
        tokens = np.ones_like(ids)
        if self._planned and of_pictures.any():
            assert self._ready is not None
            tokens[of_pictures] = self._ready.processor.tokens_of_pictures
        stops = np.cumsum(tokens)
        starts = np.maximum(stops - tokens, 1)  # nothing predicts the first token
        kept = np.minimum(stops, max_length or stops[-1]) - starts
        return {
            "length": int(stops[-1]),
            "scored": int(kept[labels != -100].clip(min=0).sum()),
            "pictures_end": int(stops[of_pictures].max(initial=0)),
            "picture_tokens": int(tokens[of_pictures].sum()),
        }

    def document(
        self,
        row: Mapping[str, Any],
        where: str,
        planned: int,
        segment: tuple[int, int],
        weight: float | None = None,
        number: int = -1,
        vocab_size: int | None = None,
    ) -> Document:
        """Tokens `start:stop` of a row that was planned with so many, with all its pictures.

        Raises ValueError, naming the row, if it has another length, or ids outside the vocabulary.
        """
        batch = self(row, where)
        ids, labels = batch.pop("input_ids")[0], batch.pop("labels")[0]
        batch.pop("attention_mask")
        if len(ids) != planned:
            raise ValueError(
                f"{where}: planned with {planned} tokens, but it has {len(ids)}: if its picture has changed since, "
                "delete the cache files of the data set"
            )
        if vocab_size is not None:
            for column, values in (("input_ids", ids.numpy()), ("labels", labels.numpy())):
                if (bad := is_outside(values, column, vocab_size)).any():
                    raise ValueError(outside_vocabulary(where, column, values[bad][0], vocab_size))
        kept = slice(*segment)
        of_tokens = {key: value[0, kept] for key, value in batch.items() if value.shape[:2] == (1, len(ids))}
        of_pictures = {key: value for key, value in batch.items() if key not in of_tokens}
        document = make_document(ids[kept].numpy(), labels[kept].numpy(), weight, number)
        return document.with_pictures(of_tokens, of_pictures)

    def planner(self, rows: Iterable[Mapping[str, Any]], max_length: int | None, name: str) -> RowProcessor:
        """What plans rows, as tried on some of them: from headers if that gives what the processor makes."""
        tried: dict[tuple, tuple[Mapping, str, dict[str, int]]] = {}
        for number, row in enumerate(rows):
            if number == LOOKED_AT or len(tried) == TRIED_ROWS:
                break
            where = f"row {number} of the {name}"
            sizes = tuple(map(_size, pictures_of(row, where)))
            if sizes not in tried:
                tried[sizes] = row, where, self.measure(row, where, max_length)
        processor = type(self._collator.processor).__name__
        why_not = f"{processor} makes other numbers of tokens than it tells from sizes"
        try:
            told = self.planning(0)
            more = {
                (made["length"] - told.measure(row, where, max_length)["length"]) // len(sizes)
                for sizes, (row, where, made) in tried.items()
                if sizes
            }
            planned = self.planning(more.pop() if len(more) == 1 else 0)
            found = [(planned.measure(row, where, max_length), made) for row, where, made in tried.values()]
            if all(one[name] == made[name] for one, made in found for name in ("length", "scored")):
                return planned
        except (AttributeError, ValueError) as error:
            why_not = f"{processor} cannot tell its tokens from a picture's size ({error})"
        logger.warning("%s: every picture is processed once, to plan it: %s", name, why_not)
        return self

    @cached_property
    def picture_token(self) -> int:
        """What most tokens of a picture are; some processors name another one, that stands for the whole picture."""
        processor = self._collator.processor
        ids, counts = np.unique(tried(processor, [drawn([(224, 160)])])["input_ids"].numpy(), return_counts=True)
        named = ids == getattr(processor, "image_token_id", None)
        return int(ids[np.argmax(counts + 0.5 * named)])

    def _check_placeholders(self, example: Mapping[str, Any], num_pictures: int, where: str) -> None:
        """In texts; TRL puts the pictures into messages, and counts."""
        texts = [text for text in example.values() if isinstance(text, str)]
        asks = placeholder_of(self._collator.processor)
        if texts and (asked := sum(text.count(asks) for text in texts)) != num_pictures:
            raise ValueError(f"{where} has {num_pictures} pictures, but its text asks for {asked} ({asks})")


def placeholder_of(processor: Any) -> str:
    """What a text holds in the place of a picture."""
    names = ("image_placeholder_token", "image_token", "boi_token")
    return next(str(getattr(processor, name)) for name in names if getattr(processor, name, None))


def drawn(sizes: Sequence[tuple[int, int]]) -> list[PIL.Image.Image]:
    """Pictures of noise, (width, height) each."""
    from PIL.Image import fromarray

    generator = np.random.default_rng(0)
    return [fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def tried(processor: Any, rows: Sequence[list[PIL.Image.Image]]) -> dict[str, Tensor]:
    """What the processor gives for rows of pictures, whose texts are nothing but the places of the pictures."""
    # HunYuan asks for them
    start, end = (getattr(processor, f"image_{name}_token", None) or "" for name in ("start", "end"))
    texts = [f"{start}{placeholder_of(processor)}{end}" * len(pictures) for pictures in rows]
    return dict(processor(images=list(rows), text=texts, return_tensors="pt", add_special_tokens=False, padding=True))


def knowing_sizes_alone(processor: Any, picture_token: int, more: int) -> Any:
    """A copy of a processor that gives a row one token for each picture, and no pixels.

    Its `tokens_of_pictures` says how many tokens each picture of the last row has. Raises AttributeError if the
    processor cannot tell from a size.
    """
    count = functools.lru_cache(1 << 16)(
        lambda size: processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"][0]
    )
    count((64, 64))
    planned, token = copy.copy(processor), processor.tokenizer.convert_ids_to_tokens(picture_token)

    def process_images(images: Any, **options: Any) -> tuple[dict, list[str]]:
        from transformers.image_utils import make_flat_list_of_images

        sizes = list(map(_size, make_flat_list_of_images(images)))
        planned.tokens_of_pictures = [count(size) + more for size in sizes]
        return {}, [token] * len(sizes)

    merged: dict[str, dict[str, Any]] = {}

    def merge_kwargs(*positional: Any, tokenizer_init_kwargs: Any = None, **named: Any) -> dict[str, Any]:
        """The same for all rows, and a third of the time."""
        if (key := repr((positional, named))) not in merged:
            own = {} if tokenizer_init_kwargs is None else {"tokenizer_init_kwargs": tokenizer_init_kwargs}
            merged[key] = processor._merge_kwargs(*positional, **own, **named)
        return copy.deepcopy(merged[key])

    planned._process_images, planned._merge_kwargs = process_images, merge_kwargs
    return planned


class MeasuredRows:
    """Rows with texts and pictures whose lengths are known: a row is processed when it is read.

    Args:
        rows: of `with_hidden_pictures`; indexed by number.
        process: processes one.
        measured: what `RowProcessor.measure` says, `[rows]` int64 each.
        name: names the rows in messages.

    Attributes:
        lengths: tokens in each row.
        pictures_end: no cut may fall before this token.
        picture_tokens: of each row.
    """

    def __init__(self, rows: Any, process: RowProcessor, measured: Mapping[str, np.ndarray], name: str) -> None:
        self.rows, self._process, self._name = rows, process, name
        self.lengths, self.pictures_end = measured["length"], measured["pictures_end"]
        self.picture_tokens = measured["picture_tokens"]
        self._vocab_size: int | None = None

    def check_ids(self, vocab_size: int) -> None:
        """Check every row from now on, when it is read."""
        self._vocab_size = vocab_size

    @property
    def picture_token(self) -> int:
        """What most tokens of a picture are."""
        return self._process.picture_token

    def document(self, row: int, start: int, stop: int, weight: float | None = None) -> Document:
        """Tokens `start:stop` of a row, with all its pictures."""
        where, planned = f"row {row} of the {self._name}", int(self.lengths[row])
        given = self.rows[int(row)]
        return self._process.document(given, where, planned, (start, stop), weight, int(row), self._vocab_size)

    def shortest_documents(self) -> list[Document]:
        """The shortest three of the first 256 rows with pictures, behind the shortest without, if there are both."""
        with_pictures, without = (np.flatnonzero(has)[:256] for has in (self.picture_tokens, self.picture_tokens == 0))
        if not len(with_pictures):
            return []
        shortest = [rows[np.argsort(self.lengths[rows])] for rows in (without, with_pictures)]
        return [self.document(row, 0, self.lengths[row]) for row in (*shortest[0][:1], *shortest[1][:3])]

    def filler(self) -> Document:
        """The row whose pictures end first, cut behind them, without a scored token."""
        rows = np.flatnonzero(self.picture_tokens)
        row = rows[np.argmin(self.pictures_end[rows])]
        document = self.document(row, 0, self.pictures_end[row])
        return replace(document, labels=np.full_like(document.labels, IGNORE_INDEX), num_scored=0, weight=0.0, row=-1)

    def tokens(self, row: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels `start:stop` of a row."""
        batch = self._process(self.rows[int(row)], f"row {row} of the {self._name}")
        return batch["input_ids"][0, start:stop].numpy(), batch["labels"][0, start:stop].numpy()


class PictureRows(MeasuredRows):
    """A data set of such rows, in the place of `TokenRows`.

    Args:
        dataset: rows of `with_hidden_pictures`.
        collator: as in `RowProcessor`.
        max_length: where rows may be cut, behind their last picture.
        num_proc: processes that plan.
        name: names the data set in messages.

    Attributes:
        processor: of the collator.

    Raises:
        ValueError: a row cannot be processed, or a picture has no header.
    """

    tokens_padding = texts_with_doubles = 0

    def __init__(
        self,
        dataset: Dataset,
        collator: DataCollatorForVisionLanguageModeling,
        max_length: int | None,
        num_proc: int | None,
        name: str,
    ) -> None:
        self.processor, name = collator.processor, f"{name} data set"
        process = RowProcessor.of_rows(dataset, dataset.column_names, collator, name)
        planner = process.planner(dataset, max_length, name)
        plan_row = functools.partial(_plan_row, planner=planner, max_length=max_length, name=name)
        with PartialState().main_process_first():  # the others find the result in the cache
            columns = dataset.column_names
            planned = dataset.map(plan_row, with_indices=True, remove_columns=columns, num_proc=num_proc)
        table = planned.with_format("numpy")
        measured = {column: np.asarray(table[column][:]) for column in table.column_names}
        super().__init__(dataset, process, measured, name)
        self._scored = measured["scored"]

    def count_scored(self, examples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[S]` integers, of segments that begin with their row."""
        return self._scored[examples]

    def sample(self) -> str:
        """SHA-256 in hex over the number of rows and the tokens and labels of some of them."""
        return sample_of(len(self.lengths), lambda row: [self.lengths[row : row + 1], self._scored[row : row + 1]])

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over texts and pictures of all rows, in order; of a picture in a file, its path."""
        digest = hashlib.sha256()
        for batch in self.rows.with_format("arrow").iter(100):
            digest.update(repr(batch.to_pylist()).encode())
        return digest.hexdigest()


def _plan_row(
    row: dict[str, Any], index: int, planner: RowProcessor, max_length: int | None, name: str
) -> dict[str, int]:
    return planner.measure(row, f"row {index} of the {name}", max_length)
