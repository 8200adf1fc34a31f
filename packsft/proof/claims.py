"""Is packed training the same training, on this very model and data? Each claim measured beside what it may differ by.

Isolation is exact (`isolation.py`). The others compare two ways to the same numbers, in the dtype of the training:

- *alone*: every document through the model by itself, the loss by its definition on the model's own logits;
- *rounded*: the same documents as one right-padded batch in which embeddings, each layer's hidden states and the logits
  are rounded otherwise, so that the model's difference from itself is known;
- *packed*: the batches of the training, the loss by its definition on the model's own logits;
- *trained*: the batches of the training through the head that is trained, in one pass, in two, and one per document.

Knows models and batches; what trains them is the trainer's.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from packsft_kernels import LossOptions, reference
from torch import Tensor, nn

from packsft.data.batch import IGNORE_INDEX, loss_inputs, model_inputs
from packsft.data.collator import PackingCollator
from packsft.model.head import eval_mode
from packsft.model.isolation import IsolationVerdict, decoder_layers, watch_layers
from packsft.proof.invariance import rounds_to_float32

Row = Mapping[str, Any]
Numbers = dict[str, Tensor]  # the loss and the gradient of every parameter, by name

LOSS = "the loss"  # its name among the numbers
# What a tensor may differ by: twice what it changes by where the model rounds otherwise, and so many roundings. Sums of
# half-precision products are kept in float32 and rounded once; those of float32 and float64 round as they grow.
NOISE = 2
ROUNDINGS = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}
ROUNDED_AWAY = 100  # a gradient so many times smaller than the largest may be its rounding


@dataclass(frozen=True)
class Claim:
    """What was found of `claim`: the largest `difference` beside the `allowed` one, and `where` it is.

    Both are norms, relative to that of the tensor they are in. Of isolation, the difference is the largest gradient at
    another document, and the allowed one is 0.
    """

    claim: str
    holds: bool
    difference: float
    allowed: float
    where: str = ""


@dataclass(frozen=True)
class PackingCheck:
    """`claims`, and the `facts` they were found under, by name."""

    claims: tuple[Claim, ...]
    facts: dict[str, str]

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None for a difference that is no finite number."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        claims = [{name: plain(value) for name, value in asdict(claim).items()} for claim in self.claims]
        return {"holds": self.holds, "claims": claims, "facts": self.facts}

    def rows(self) -> list[tuple[str, ...]]:
        """Texts of a table's lines, the headings first."""
        return [
            ("claim", "holds", "largest difference", "allowed", "where"),
            *(
                (claim.claim, "yes" if claim.holds else "NO", f"{claim.difference:.1e}", f"{claim.allowed:.1e}",
                 claim.where)
                for claim in self.claims
            ),
        ]  # fmt: skip


def check_claims(ways: Ways, isolation: IsolationVerdict) -> tuple[Claim, ...]:
    """Measure every claim; the first is what `check_isolation` found.

    Parameters, gradients, modes and random state stay as they are. Takes the memory of three sets of gradients of all
    trained parameters, in float32 at least.
    """
    devices = [ways.device] if ways.device.type == "cuda" else []
    with torch.random.fork_rng(devices), eval_mode(ways.model):
        rounding = ways.rounding
        logits = _compare("hidden states and logits are those of the documents alone", *ways.logits(), rounding)
        alone, rounded = ways.alone(), ways.rounded()
        noise = {name: _norm(rounded[name] - alone[name]) for name in alone}
        del rounded  # each of these is as large as the parameters that are trained
        trained = ways.trained([ways.documents])
        as_alone = _compare("loss and gradients are those of the documents alone", trained, alone, noise, rounding)
        del alone
        own = "the head gives the model's own loss and gradients"
        head = _compare(own, trained, ways.packed(), noise, rounding)
        halves = [rows for rows in (ways.documents[::2], ways.documents[1::2]) if rows]
        two_passes = "two passes give the loss and gradients of one"
        two = _compare(two_passes, ways.trained(halves), trained, noise, rounding)
        each_document = "a pass per document gives the loss and gradients of one"
        singles = [[document] for document in ways.documents]
        each = _compare(each_document, ways.trained(singles), trained, noise, rounding)
    reason = isolation.reason or ""
    apart = Claim("documents in one row do not see each other", isolation.isolated, isolation.leak, 0.0, reason)
    return apart, logits, head, two, each, as_alone


def random_documents(vocab_size: int, max_length: int) -> list[Row]:
    """Documents of unequal lengths, `max_length` (of at most 128) among them, tokens at random."""
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for length in (9, 14, 11, 33, 2, 128):
        ids = generator.integers(vocab_size, size=min(length, max_length)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return rows


def first_documents(rows: Any, max_length: int | None, max_tokens: int = 256, max_documents: int = 8) -> list[Row]:
    """The first documents of a training set, as many as make at most so many tokens.

    Of a document longer than half of `max_tokens` the end is taken, where its answer is.

    Args:
        rows: items with `input_ids` and, where not all are scored, `labels`; or, with `seq_lengths`, several documents.
            Of a stream a copy is read.
        max_length: where documents are cut.
    """
    documents: list[Row] = []
    rows = copy.deepcopy(rows) if isinstance(rows, torch.utils.data.IterableDataset) else rows
    for document in _split(rows):
        cut: Row = {name: values[:max_length][-(max_tokens // 2) :] for name, values in document.items()}
        if len(documents) == max_documents or sum(len(one["input_ids"]) for one in [*documents, cut]) > max_tokens:
            break
        documents.append(cut)
    return documents


def _split(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        ids = np.asarray(row["input_ids"])
        labels = np.asarray(row.get("labels", ids))
        for stop, length in zip(np.cumsum(lengths := row.get("seq_lengths", [len(ids)])), lengths, strict=True):
            yield {"input_ids": ids[stop - length : stop], "labels": labels[stop - length : stop]}


@dataclass
class Ways:
    """The ways to the numbers of an optimizer step over all documents.

    Args:
        model: as it is trained.
        documents: rows of one document each, `input_ids` and `labels`.
        collator: of the training.
        prepare: brings a batch to the device.
        loss: of a batch, divided by the number, through the head that is trained.
        autocast: the context that training runs its forward in.
        packed_forward: the context of a forward on a batch of the training, `loss` apart.
        options: of the loss.

    Raises:
        ValueError: no document has a token to score.
    """

    model: Any
    documents: Sequence[Row]
    collator: PackingCollator
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    loss: Callable[[dict[str, Any], float], Tensor]
    autocast: Callable[[], AbstractContextManager]
    packed_forward: Callable[[], AbstractContextManager]
    options: LossOptions

    def __post_init__(self) -> None:
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.device = next(self.model.parameters()).device
        self._num_items = sum(self.collator([document])["num_items"] for document in self.documents)
        if not self._num_items:
            raise ValueError("none of the documents has a token to score: all their labels are -100")

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The lowest precision that the forward uses."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.dtype in ROUNDINGS}
        with self.autocast():
            if torch.is_autocast_enabled(self.device.type):
                dtypes = {torch.get_autocast_dtype(self.device.type)}
        dtype = max(dtypes, key=lambda one: torch.finfo(one).eps)
        if dtype == torch.float64 and rounds_to_float32(self.model):
            dtype = torch.float32
        return dtype

    @property
    def rounding(self) -> float:
        return ROUNDINGS[self.dtype] * torch.finfo(self.dtype).eps

    # ---- hidden states and logits ----

    @torch.no_grad()
    def logits(self) -> tuple[Numbers, Numbers, dict[str, float]]:
        """Those of each layer and the logits, by name, documents end to end: packed, alone, and what rounded ones are
        off by."""
        each = [self._hidden([document], input_ids=_ids(document)) for document in self.documents]
        alone = {name: torch.cat([hidden[name] for hidden in each]) for name in each[0]}
        with self._rounded_otherwise():
            rounded = self._hidden(self.documents, **self._padded())
        noise = {name: _norm(rounded[name] - alone[name]) for name in alone}
        with self.packed_forward():
            packed = self._hidden(self.documents, **model_inputs(self._batch(self.documents)))
        return packed, alone, noise

    def _hidden(self, rows: Sequence[Row], **inputs: Any) -> Numbers:
        with self.autocast(), watch_layers(self.model) as layers:
            logits = self._own_logits(**inputs)
        named = [*((name, hidden) for name, hidden in layers if hidden.dim() == 3), ("logits", logits)]
        return {name: _end_to_end(hidden, rows) for name, hidden in named}

    def _own_logits(self, **inputs: Any) -> Tensor:
        inputs = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return self.model(use_cache=False, **inputs).logits

    def _padded(self) -> dict[str, Tensor]:
        """Documents below each other, as everybody's collator lays them out."""
        lengths = torch.tensor([len(document["input_ids"]) for document in self.documents])
        ids = [_ids(document)[0] for document in self.documents]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True), "attention_mask": mask.long()}

    @contextmanager
    def _rounded_otherwise(self) -> Iterator[None]:
        """Embeddings and hidden states of each layer are off by up to `rounding`, and the head's sums by roundings of
        the terms they are made of, which may be far larger (outlier features cancel in a softmax)."""
        generators: dict[torch.device, torch.Generator] = {}  # a model may lie on several devices

        def off(like: Tensor) -> Tensor:
            if like.device not in generators:
                generators[like.device] = torch.Generator(like.device).manual_seed(0)
            drawn = torch.rand(like.shape, generator=generators[like.device], device=like.device)
            return drawn.to(torch.promote_types(like.dtype, torch.float32)) * 2 - 1

        def round_otherwise(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden, *others = output if isinstance(output, tuple) else (output,)
            hidden = (hidden * (1 + self.rounding * off(hidden))).to(hidden.dtype)
            return (hidden, *others) if isinstance(output, tuple) else hidden

        def round_sums(head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
            hidden, weight = args[0], getattr(head, "weight", None)
            if weight is None or not weight.is_floating_point():  # quantised
                return None
            weight_VM = weight.detach()
            eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
            # a sum of n terms that are as large is off by some sqrt(n) roundings (Higham and Mary, 2019)
            forward_eps, backward_eps = (eps * math.sqrt(n) for n in (weight_VM.shape[1], weight_VM.shape[0]))
            terms = hidden.detach().norm(dim=-1, keepdim=True) * weight_VM.norm(dim=1)
            logits = logits + (forward_eps * off(logits) * terms).to(logits.dtype)
            if logits.requires_grad and hidden.requires_grad:
                sizes: list[Tensor] = []
                largest_M = torch.linalg.vector_norm(weight_VM, math.inf, dim=0)

                def round_gradient(gradient: Tensor) -> Tensor:
                    return gradient + (backward_eps * off(gradient) * sizes[-1] * largest_M).to(gradient.dtype)

                logits.register_hook(lambda gradient: sizes.append(gradient.abs().sum(-1, keepdim=True)))
                hidden.register_hook(round_gradient)
            return logits

        places = [self.model.get_input_embeddings(), *(layer for _, layer in decoder_layers(self.model))]
        handles = [place.register_forward_hook(round_otherwise) for place in places]
        handles.append(self.model.get_output_embeddings().register_forward_hook(round_sums))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- loss and gradients ----

    def alone(self) -> Numbers:
        return self._add(self._own_loss([document], input_ids=_ids(document)) for document in self.documents)

    def rounded(self) -> Numbers:
        with self._rounded_otherwise():
            return self._add([self._own_loss(self.documents, **self._padded())])

    def packed(self) -> Numbers:
        with self.packed_forward():
            return self._add([self._own_loss(self.documents, **model_inputs(self._batch(self.documents)))])

    def trained(self, passes: Iterable[Sequence[Row]]) -> Numbers:
        return self._add(self._trained_loss(rows) for rows in passes)

    def _trained_loss(self, rows: Sequence[Row]) -> Tensor:
        with self.autocast():
            return self.loss(self._batch(rows), self._num_items)

    def _batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.prepare(self.collator(list(rows)))

    def _own_loss(self, rows: Sequence[Row], **inputs: Any) -> Tensor:
        """By its definition, from the model's own logits."""
        with self.autocast():
            logits_TV = _end_to_end(self._own_logits(**inputs), rows)
        scored = loss_inputs(self.prepare(replace(self.collator, padded=False)(list(rows))))
        return reference.cross_entropy(
            logits_TV.double(),  # or the rounding of this loss would be taken for the head's
            rows=scored["loss_rows"], targets=scored["loss_targets"], weights=scored.get("loss_weights"),
            options=self.options, num_items=self._num_items,
        ).loss  # fmt: skip

    def _add(self, losses: Iterable[Tensor]) -> Numbers:
        """Loss and gradients of the passes together; the graph of one is gone before the next is made."""
        total: Numbers = {}
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
            numbers = {LOSS: loss.detach()}
            for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
                numbers[name] = torch.zeros_like(parameter) if gradient is None else gradient
            numbers = {
                name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in numbers.items()
            }
            total = {name: total[name] + value for name, value in numbers.items()} if total else numbers
        return total


def _ids(document: Row) -> Tensor:
    return torch.tensor(np.asarray(document["input_ids"], dtype=np.int64))[None]


def _end_to_end(hidden: Tensor, rows: Sequence[Row]) -> Tensor:
    """`[T, ...]` of a packed row `[1, T + pad, ...]` or of padded ones `[D, S, ...]`."""
    lengths = [len(row["input_ids"]) for row in rows]
    if hidden.shape[0] == 1:
        return hidden[0, : sum(lengths)]
    return torch.cat([hidden[i, :length] for i, length in enumerate(lengths)])


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm(dtype=torch.float64))


def _compare(claim: str, found: Numbers, truth: Numbers, noise: Mapping[str, float], rounding: float) -> Claim:
    """Every tensor of `found` beside `truth`; the claim speaks of the first that is too far off, or of the worst."""
    sizes = {name: _norm(exact) for name, exact in truth.items()}
    # a gradient that is zero but for rounding (a key's bias changes no softmax) has the rounding of what it is a sum of
    largest = max((size for name, size in sizes.items() if name != LOSS), default=0.0)
    worst = (-1.0, Claim(claim, True, 0.0, 0.0))
    for name, exact in truth.items():
        allowed = NOISE * noise[name] + rounding * (sizes[name] + (0.0 if name == LOSS else largest / ROUNDED_AWAY))
        difference = _norm(found[name].to(exact.dtype) - exact) if name in found else math.inf
        unit = max(sizes[name], rounding * largest) or 1.0
        one = Claim(claim, difference <= allowed, difference / unit, allowed / unit, name)
        if not one.holds:
            return one
        worst = max(worst, (difference / allowed if allowed else 0.0, one), key=lambda pair: pair[0])
    return worst[1]
