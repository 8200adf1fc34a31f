"""`docs/models.md`, written from the results of `models.py`. Knows results; needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

LIMIT = 1e-9
ROUNDING_FACTOR = 4  # two computations may each be off by what the model's rounding does to it
RESULTS, DOCUMENT = "models", Path(__file__).parents[1] / "docs" / "models.md"
Result = dict[str, Any]

INTRODUCTION = """\
# Models

Is packed training the same training on *your* model? This page is the answer for every causal language model of
transformers {transformers} that can be built without a download, from its registry
(`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, {registered} entries). Written by

    python tools/models.py --save     # {minutes} min on two cores

on {date}, with packsft {packsft}, TRL {trl} and PyTorch {torch}; not by hand. `tests/parity/test_models.py` measures
some families anew.

Each family is shrunk to a few layers of width 32 with random weights, none of them zero, so that every kind of layer it
has is there and windows are 4 tokens wide. Nine documents of 1 to 14 tokens are one optimizer step of
`PackedSFTTrainer`, in passes of 32 tokens. The truth is each document alone through the plain model with its own
attention. **Error** is the largest relative difference of the loss and of any parameter's gradient, in float64 with the
model's own casts to float32 left out (of both sides), so that nothing hides behind rounding. Allowed is {limit:.0e};
what is **bold** is wrong.
**Rounding** is the gradients' error with those casts left in, and after the bar what they do to the model by itself:
the same documents alone, with the casts and without. A dash: the model has no such casts.

**Rows** are *packed* where documents end to end are shown to stay apart on the model itself, and else *padded*: right,
and slower. Hybrid models with a causal convolution or a Mamba scan refuse packed rows where `causal_conv1d` and
`mamba_ssm` are not installed, as here. **Head** is *fused* where `linear_cross_entropy` reproduces the model's own
log-probabilities, and else *compact*: the model's own head, on the scored positions alone.

**TRL** is TRL's own packed path on the same documents in one row, with the attention the model comes with (no
flash-attention build): *leaks* if the gradient of the last document reaches the input of another one, *differs* if not,
but loss or gradients are not those of the documents alone (in brackets: the loss is off by), *raises* if there is no
step. "Packed" is nothing that TRL promises without flash attention; it warns, and goes on.
"""


def results_file(results: str, version: str) -> Path:
    return Path(__file__).parent / f"{results}-transformers-{version}.json"


def latest_report(results: str) -> Result:
    """Of the newest transformers."""
    files = Path(__file__).parent.glob(results_file(results, "*").name)
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(reports, key=lambda report: [int(part) for part in report["versions"]["transformers"].split(".")])


def is_right(result: Result) -> bool:
    """Whether packsft gives what the documents give alone, with the router's loss on as well."""
    runs = [result["packsft"], *([result["router_loss_on"]] if "router_loss_on" in result else [])]
    return all("error" not in run and max(run["loss_error"], run["gradient_error"]) <= LIMIT for run in runs)


def within_rounding(result: Result) -> bool:
    """Whether, the model's casts left in, it is off by no more than they explain."""
    errors = result["rounding"]
    if errors is None or "own_loss_error" not in errors:
        return True
    names = ("loss_error", "gradient_error")
    return "error" not in errors and all(
        errors[name] <= ROUNDING_FACTOR * errors[f"own_{name}"] + LIMIT for name in names
    )


def status(result: Result) -> str:
    """A line of the run."""
    if "error" in result:
        return f"not measured, {result['error']}"
    ours = result["packsft"]
    if "error" in ours:
        return f"WRONG, {ours['error']}"
    error = max(ours["loss_error"], ours["gradient_error"])
    right = "right" if is_right(result) and within_rounding(result) else "WRONG"
    return f"{right}, {rows(ours)}, {ours['head']}, off by {error:.0e}; TRL {result['trl']['verdict']}"


def page(report: Result) -> str:
    families = report["families"]
    measured = {name: result for name, result in families.items() if "error" not in result and result["causal"]}
    decoders = {name: result for name, result in measured.items() if not result["adapted"]}
    adapted = {name: result for name, result in measured.items() if result["adapted"]}
    other = {name: result for name, result in families.items() if "error" not in result and not result["causal"]}
    left_out = {name: result["error"] for name, result in families.items() if "error" in result}
    versions = report["versions"]
    introduction = INTRODUCTION.format(
        **versions, date=report["date"], registered=len(families), minutes=-(-report["seconds"] // 60), limit=LIMIT
    )
    parts = [introduction, "## Decoders\n", totals(decoders), table(decoders)]
    parts += ["## Decoders of encoder-decoders, and encoders with a causal mask\n", totals(adapted), table(adapted)]
    parts += [
        "## Not causal\n\nWhat follows a token changes what the model says at it, also in transformers' own padded "
        "batches, so that only rows of one length train such a model. packsft does not know this, and trains them on "
        "padded rows: **not what the documents give alone.**\n",
        table(other),
        "## Not measured\n",
        "\n".join(f"- `{name}`: {reason}" for name, reason in left_out.items()) + "\n",
    ]
    return "\n".join(parts)


def totals(families: dict[str, Result]) -> str:
    trained = {name: result["packsft"] for name, result in families.items() if "error" not in result["packsft"]}
    count = Counter(rows(run) for run in trained.values()) + Counter(run["head"] for run in trained.values())
    verdicts = Counter(result["trl"]["verdict"] for result in families.values())
    right = sum(is_right(result) and within_rounding(result) for result in families.values())
    wrong = ", ".join(
        f"`{name}`" for name, result in families.items() if not (is_right(result) and within_rounding(result))
    )
    routers = Counter(result["router_loss_on"]["head"] for result in families.values() if "router_loss_on" in result)
    said = ", ".join(f"{verdicts[name]} {name}" for name in ("clean", "leaks", "differs", "raises"))
    return (
        f"packsft: {right} of {len(families)} right{f' (not {wrong})' if wrong else ''}; {count['packed']} packed and "
        f"{count['padded']} padded; {count['fused']} with the fused head and {count['compact']} with compact logits. "
        f"{routers.total()} return an auxiliary loss of their router, which is measured as well: with it on "
        f"{routers['fused']} are fused. TRL's packed path: {said}.\n"
    )


def table(families: dict[str, Result]) -> str:
    lines = ["| family | rows | attention | head | error | rounding | TRL |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(name, result))} |" for name, result in families.items())]) + "\n"


def cells(name: str, result: Result) -> tuple[str, ...]:
    ours, theirs = result["packsft"], result["trl"]
    detail = {"leaks": True, "differs": True}.get(theirs["verdict"])
    trl = theirs["verdict"] + (f" ({theirs['loss_error']:.0e})" if detail else "")
    trl += f": {shortened(theirs['error'])}" if "error" in theirs else ""
    if "error" in ours:
        return f"`{name}`", f"**raises**: {shortened(ours['error'])}", "", "", "", "", trl
    worst = max(ours["loss_error"], ours["gradient_error"])
    error = f"{worst:.0e}" if worst <= LIMIT else f"**{worst:.0e}**"
    return (
        f"`{name}`",
        rows(ours) + (f": {shortened(ours['why_padded'])}" if ours["why_padded"] else ""),
        "per document" if ours["attention_calls"] else f"its own ({ours['attention']})",
        ours["head"] + (f": {shortened(ours['why_compact'])}" if ours["why_compact"] else ""),
        error,
        rounding(result["rounding"]),
        trl,
    )


def rows(run: Result) -> str:
    return "packed" if run["way"] == "varlen" else run["way"]


def rounding(errors: Result | None) -> str:
    if errors is None:
        return "-"
    if "own_loss_error" not in errors:
        return "does not run in float64"
    if "error" in errors:
        return f"**raises**: {shortened(errors['error'])}"
    return f"{errors['gradient_error']:.0e} \\| {errors['own_gradient_error']:.0e}"


def shortened(reason: str) -> str:
    """The first sentence, without what all of them have."""
    text = reason.removeprefix("a packed forward raised ").split(". ")[0].split(", so that")[0]
    text = text.split("cu_seq_lens_q: ")[-1]
    text = text.replace("its log-probabilities would be off", "something beside the head: off").split(" (allowed")[0]
    return (text if len(text) <= 120 else text[:117] + "...").replace("|", "\\|")
