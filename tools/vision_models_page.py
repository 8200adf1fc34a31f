"""`docs/vision-models.md`, written from the results of `vision_models.py`. Knows results; needs no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from models_page import LIMIT, rows, shortened

ALLOWED_OF_TRL = 1e-6  # its log-probabilities are float32
TOKENS_PER_PASS = 4096  # the longest row of LLaVA-NeXT has 2,547
RESULTS, DOCUMENT = "vision-models", Path(__file__).parents[1] / "docs" / "vision-models.md"
Result = dict[str, Any]

INTRODUCTION = """\
# Vision-language models

Is packed training with pictures the same training on *your* model? This page is the answer for the vision-language
models of transformers {transformers}, from its registry (`MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES`, {registered}
entries), that can be built without a download and run as they are. Written by

    python tools/vision_models.py --save     # {minutes} min on two cores

on {date}, with packsft {packsft}, TRL {trl} and PyTorch {torch}; not by hand. `tests/parity/test_vision_models.py`
measures some families anew. Language models on text are on the [page of models](models.md).

Each family is shrunk to two layers of width 32 with random weights, and keeps the sizes of its pictures and patches and
its own processor, with a small tokenizer. Six rows with none, one or two pictures are one optimizer step of
`PackedSFTTrainer`, in passes of at most {tokens:,} tokens. The truth is each row alone through the plain model.
**Error** is the largest relative difference of the loss and of any parameter's gradient, the tower's too, in float64.
Allowed is {limit:.0e}; what is **bold** is wrong.

**Rows** are *packed* where a pack is shown to give what its rows give alone, and no gradient of one row reaches the
pictures of another, and else *padded*: right, and slower. **Planned** says where the lengths come from: the *headers*
of the files, or, where the processor cannot tell them from a size, from every picture *processed* once.

**TRL** is TRL's trainer on the same rows as one padded batch (it packs none with pictures): *right* to {of_trl:.0e} (it
computes log-probabilities in float32), *differs* (in brackets: the loss, and any gradient, is off by), or *raises*.
"""


def is_right(result: Result) -> bool:
    ours = result["packsft"]
    return "error" not in ours and max(ours["loss_error"], ours["gradient_error"]) <= LIMIT


def status(result: Result) -> str:
    """A line of the run."""
    if "error" in result:
        return f"not measured, {result['error']}"
    ours, theirs = result["packsft"], result["trl"]
    if "error" in ours:
        return f"REFUSED, {ours['error']}; TRL {theirs['verdict']}"
    error = max(ours["loss_error"], ours["gradient_error"])
    right = "right" if is_right(result) else "WRONG"
    return f"{right}, {rows(ours)}, {ours['head']}, {ours['planned']}, off by {error:.0e}; TRL {theirs['verdict']}"


def page(report: Result) -> str:
    families = report["families"]
    measured = {name: result for name, result in families.items() if "error" not in result}
    left_out = {name: result["error"] for name, result in families.items() if "error" in result}
    introduction = INTRODUCTION.format(
        **report["versions"], date=report["date"], registered=len(families), minutes=-(-report["seconds"] // 60),
        limit=LIMIT, of_trl=ALLOWED_OF_TRL, tokens=TOKENS_PER_PASS,
    )  # fmt: skip
    lines = ["| family | rows | attention | head | planned | error | TRL |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells(name, result))} |" for name, result in measured.items()]
    return "\n".join([
        introduction, "## Measured\n", totals(measured), "\n".join(lines) + "\n", "## Not measured\n",
        "\n".join(f"- `{name}`: {shortened(reason)}" for name, reason in left_out.items()) + "\n",
    ])  # fmt: skip


def totals(families: dict[str, Result]) -> str:
    trained = {name: result["packsft"] for name, result in families.items() if "error" not in result["packsft"]}
    count = Counter(rows(run) for run in trained.values()) + Counter(run["planned"] for run in trained.values())
    refused = ", ".join(f"`{name}`" for name in families if name not in trained)
    wrong = ", ".join(f"`{name}`" for name in trained if not is_right(families[name]))
    verdicts = Counter(result["trl"]["verdict"] for result in families.values())
    said = ", ".join(f"{verdicts[name]} {name}" for name in ("right", "differs", "raises"))
    return (
        f"packsft: {sum(map(is_right, families.values()))} of {len(families)} right"
        f"{f' (not {wrong})' if wrong else ''}{f', and refused: {refused}' if refused else ''}; {count['packed']} "
        f"packed and {count['padded']} padded; {count['headers']} planned from headers and {count['processed']} by "
        f"processing once. TRL: {said}.\n"
    )


def cells(name: str, result: Result) -> tuple[str, ...]:
    ours, theirs = result["packsft"], result["trl"]
    trl = theirs["verdict"]
    trl += f" ({theirs['loss_error']:.0e}, {theirs['gradient_error']:.0e})" if trl == "differs" else ""
    trl += f": {shortened(theirs['error'])}" if "error" in theirs else ""
    if "error" in ours:
        return f"`{name}`", f"**refused**: {shortened(ours['error'])}", "", "", "", "", trl
    worst = max(ours["loss_error"], ours["gradient_error"])
    return (
        f"`{name}`",
        rows(ours) + (f": {shortened(ours['why_padded'])}" if ours["why_padded"] else ""),
        "per document" if ours["attention_calls"] else f"its own ({ours['attention']})",
        ours["head"] + (f": {shortened(ours['why_compact'])}" if ours["why_compact"] else ""),
        ours["planned"],
        f"{worst:.0e}" if worst <= LIMIT else f"**{worst:.0e}**",
        trl,
    )
