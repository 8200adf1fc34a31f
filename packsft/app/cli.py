"""The `packsft` command: reads the command line; bad input gives one line and exit code 2. Knows no tensors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from packsft_kernels.version import __version__

from packsft.packing.segments import OVERLONG
from packsft.packing.strategies import STRATEGIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a check fails; 2 for bad input, with one line `packsft: error:` and the reason.

    Under `run` the errors and the exit code are those of the script; under `trl`, once it trains.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["trl"]:
            return _trl(arguments[1:])  # argparse would keep `--help` from TRL
        parser = _parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return 0
        if options.command != "run" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
        run = {"demo": _demo, "inspect": _inspect, "check": _check, "run": _run}[options.command]
        return run(options, arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # One line, and the spaces inside of a path stay.
        reason = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
        print(f"packsft: error: {reason}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    # Several GPUs in one process mean DataParallel, which splits batches by rows and cannot split a packed one.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    from packsft.app import demo  # late: importing torch and trl takes seconds

    # Everything is written here until the run succeeds, not into the output folder.
    with tempfile.TemporaryDirectory(prefix="packsft-") as scratch:
        job = demo.prepare(
            command=shlex.join(["packsft", *arguments]),
            scratch=Path(scratch),
            output_dir=options.output_dir,
            model_name=options.model,
            data=options.data,
            max_length=options.max_length,
            max_tokens=sys.maxsize if options.full else options.max_tokens,
            compare_tokens=options.compare_tokens,
            learning_rate=options.learning_rate,
        )
        demo.run(job)
    return 0


def _inspect(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import datasets
    from rich.console import Console

    from packsft.app import drawing, page
    from packsft.app.inspect import inspect_data
    from packsft.app.rows import decoder_of, load_tokenizer

    for name, suffix, check in (("plot", ".png", drawing.check_matplotlib), ("html", ".html", page.check_page)):
        if (file := getattr(options, name)) is not None:
            check(f"--{name}")
            if file.suffix != suffix:  # a slip, such as the data file, would be overwritten
                raise ValueError(f"--{name} {file}: expected a name that ends in {suffix}")
            if not file.parent.is_dir():
                raise ValueError(f"--{name} {file}: there is no folder {file.parent}")
    strategy = options.strategy or ("bfd" if len(options.data) == 1 else "step")
    if options.tokens_per_pass is not None and strategy != "step":
        raise ValueError(f"--tokens-per-pass needs --strategy step, not {strategy}")
    named = options.html is not None and options.model is not None
    decode = decoder_of(load_tokenizer(options.model)) if named else None  # before the work: the name may be wrong
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it raises what it logs about a bad file
    inspection = inspect_data(
        *options.data,
        model=options.model,
        split=options.split,
        max_length=options.max_length,
        strategy=strategy,
        overlong=options.overlong,
        tokens_per_pass=options.tokens_per_pass,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        devices=options.devices,
        num_train_epochs=options.epochs,
        seed=options.seed,
        assistant_only_loss=options.assistant_only_loss,
        completion_only_loss=options.completion_only_loss,
        weights=options.weights,
        weights_of=options.weights_of,
        stopping_strategy=options.stopping_strategy,
    )
    made: dict[Path, bytes] = {}
    if options.html is not None:
        made[options.html] = page.html_page(inspection, decode, shlex.join(["packsft", *arguments]))
    if options.plot is not None:
        made[options.plot] = drawing.draw_plan(
            inspection.lengths, options.max_length, inspection.plan, inspection.picture_tokens
        )
    for file, content in made.items():
        page.write_whole(file, content)
    if options.json:
        print(json.dumps(inspection.as_dict(), indent=2))
    else:
        console = Console()
        inspection.show(console)
        if made:
            console.print(f"Written: {', '.join(map(str, made))}", markup=False, emoji=False, soft_wrap=True)
    return 0


def _check(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()
    if options.batch_invariance:
        return _check_batch_invariance(options)
    if options.model is None:
        raise ValueError("set --model or --batch-invariance: there is nothing to check")
    for name in ("steps", "engine"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} needs --batch-invariance")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # see _demo
    from rich.console import Console

    from packsft.app.check import check_model
    from packsft.app.tables import print_table

    result = check_model(
        options.model,
        adapter=options.adapter,
        attn=options.attn,
        dtype=options.dtype or "float32",
        data=options.data,
        max_length=options.max_length or 1024,
    )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        console = Console()
        print_table(console, options.model, result.rows(), texts=(0, 4))
        for name, text in result.facts.items():
            console.print(f"{name}: {text}", highlight=False, markup=False, emoji=False)
    return 0 if result.holds else 1


def _check_batch_invariance(options: argparse.Namespace) -> int:
    for name in ("adapter", "attn", "dtype", "data", "max_length"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no meaning with --batch-invariance: "
                "it trains in float64 on random tokens"
            )
    from rich.console import Console

    from packsft.app.invariance import check_batch_invariance
    from packsft.app.tables import print_table

    results = check_batch_invariance(options.model, options.steps or 10, options.engine)
    if options.json:
        print(json.dumps([result.as_dict() for result in results], indent=2))
    else:
        precision = "float32" if (options.engine or "").startswith("zero") else "float64"
        print_table(Console(), f"Weights after the same steps, compared with the first layout, in {precision}", [
            ("model", "tokens per pass", "accumulation", "processes", "passes", "off by", "allowed"),
            *(result.row() for result in results),
        ])  # fmt: skip
    return 0 if all(result.agrees for result in results) else 1


def _trl(arguments: Sequence[str]) -> int:
    from packsft.app.patch import run_trl

    return run_trl(arguments)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from packsft.app.patch import run_script

    # Not `options.arguments`: argparse takes a `--` away.
    return run_script(options.script, arguments[arguments.index(options.script, 1) + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="packsft", description="Packed supervised fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"packsft {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    _add_demo(commands)
    _add_inspect(commands)
    _add_check(commands)
    _add_patched(commands)
    return parser


def _add_patched(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands.add_parser("trl", help="run the command `trl` with packsft's trainer: packsft trl sft ...")
    run = commands.add_parser("run", help="run a script with packsft's trainer instead of TRL's SFTTrainer")
    run.add_argument("script", help="a Python file that imports SFTTrainer from trl")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a model on packed sequences and compare with TRL",
        description="Fine-tunes a model on packed sequences. Then trains on a part of the data with TRL padded, TRL "
        "packed and packsft, each in a new process. By default, SmolLM2-135M-Instruct learns to write docstrings for "
        "the functions of Python's standard library.",
    )
    demo.add_argument(
        "--output-dir",
        type=Path,
        default=Path("packsft-demo"),
        help="folder for the model, the picture, the page and the report (default: %(default)s)",
    )
    demo.add_argument("--model", help="local folder or hub name of a causal language model (default: SmolLM2)")
    demo.add_argument(
        "--data", help="a data set, as for `packsft inspect` (default: the standard library's docstrings)"
    )
    demo.add_argument("--max-length", type=_at_least(2), default=1024, help="tokens in a pack (default: %(default)s)")
    slow = "without bfloat16 hardware, where a token takes twice as long"
    demo.add_argument(
        "--max-tokens",
        type=_at_least(1),
        help=f"train on at most this many tokens (default: 20000, or 10000 {slow})",
    )
    demo.add_argument("--full", action="store_true", help="train on all data and ignore --max-tokens")
    demo.add_argument(
        "--compare-tokens",
        type=_at_least(0),
        help=f"tokens to compare with TRL on, 0 for no comparison (default: 3500, or 1000 {slow})",
    )
    demo.add_argument(
        "--learning-rate", type=_above_0, default=1e-4, help="peak learning rate of AdamW (default: %(default)s)"
    )


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what packing does to a data set and to the number of optimizer steps",
        description="Reads or tokenises a data set as the trainer does, plans the packs, and reports what is cut or "
        "dropped, packs, fill, optimizer steps, and a recommended max_length. Trains nothing.",
    )
    inspect.add_argument(
        "data",
        nargs="+",
        help="JSONL, JSON, Parquet, CSV or Arrow file, folder of datasets.save_to_disk, or hub name; has `input_ids`, "
        "`text`, `prompt` and `completion`, or `messages`, also with pictures; or several, which are mixed as by "
        "`packsft.pack`",
    )
    inspect.add_argument(
        "--model",
        help='local folder or hub name of the tokenizer, for pictures of the processor, or "smollm2"; not needed with '
        "`input_ids`",
    )
    inspect.add_argument("--split", default="train", help="split of the data set (default: %(default)s)")
    inspect.add_argument(
        "--max-length", type=_at_least(1), default=1024, help="tokens in a pack (default: %(default)s)"
    )
    inspect.add_argument(
        "--strategy", choices=STRATEGIES, help="how to pack (default: bfd; of several data sets, step)"
    )
    inspect.add_argument("--overlong", choices=OVERLONG, help="what to do with examples longer than max_length")
    inspect.add_argument(
        "--tokens-per-pass", type=_at_least(1), help="with --strategy step: tokens in a pass (default: max_length)"
    )
    for name, default, what in (
        ("--batch-size", 8, "per_device_train_batch_size"),
        ("--accumulation", 1, "gradient_accumulation_steps"),
        ("--devices", 1, "number of devices"),
    ):
        # The report plans whole steps on all devices: a second for 4,096 of them, and up to 64 steps.
        inspect.add_argument(name, type=_at_least(1, 4096), default=default, help=f"{what} (default: %(default)s)")
    inspect.add_argument("--epochs", type=_above_0, default=3.0, help="num_train_epochs (default: %(default)s)")
    inspect.add_argument(
        "--seed", type=_at_least(0, 2**32 - 1), default=42, help="seed of the training (default: %(default)s)"
    )
    inspect.add_argument("--assistant-only-loss", action="store_true", help="score only the assistant's turns")
    inspect.add_argument(
        "--completion-only-loss",
        action=argparse.BooleanOptionalAction,
        help="score only completions (default: if the columns `prompt` and `completion` exist)",
    )
    inspect.add_argument(
        "--weights", type=_above_0, nargs="+", metavar="W",
        help="after several data sets, in their order (default: an epoch is every document once)",
    )  # fmt: skip
    inspect.add_argument(
        "--weights-of", default="token", help='whether weights are shares of "token"s (default) or "document"s'
    )
    inspect.add_argument(
        "--stopping-strategy",
        default="first_exhausted",
        help='whether an epoch ends before a document comes twice ("first_exhausted", default), or when every one came '
        'once ("all_exhausted")',
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    inspect.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths and the packs")
    inspect.add_argument(
        "--html",
        type=Path,
        metavar="FILE.html",
        help="write one page with the tables, charts, and packs with their texts",
    )


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="prove on a model that packing does not change the training",
        description="Prepares a model as the trainer does and proves on a few documents: packed documents do not see "
        "each other; hidden states, loss and gradients are those of the documents alone, in one pass or several; the "
        "head gives the model's own loss. The exit code is 1 if one of these does not hold. If packed documents see "
        "each other, the trainer uses padded rows for this model. "
        "With --batch-invariance: trains the same steps in float64 on the CPU, unpacked and with 512, 1,024 and "
        "4,096 tokens per pass, accumulation 1 and 8, one process and two. The exit code is 1 if the weights differ.",
    )
    check.add_argument(
        "--model", help='local folder or hub name, or "smollm2" (--batch-invariance: two small random models)'
    )
    check.add_argument("--adapter", help="local folder or hub name of a PEFT adapter for the model")
    check.add_argument(
        "--attn",
        help="back end of packed attention (flash_attn_2, torch_varlen, sdpa, ...), or an attn_implementation of "
        "transformers (flash_attention_2, flex_attention, eager); default: the trainer's choice",
    )
    check.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="dtype of the model (default: float32)"
    )
    check.add_argument("--data", help="a data set, as for `packsft inspect` (default: random tokens)")
    check.add_argument("--max-length", type=_at_least(2), help="documents are cut here (default: 1024)")
    check.add_argument(
        "--batch-invariance", action="store_true", help="prove that the split of a step changes no weight"
    )
    check.add_argument(
        "--engine", choices=("fsdp2", "zero2", "zero3", "sp"),
        help="with --batch-invariance: two processes under FSDP2, DeepSpeed's ZeRO (float32), or that share each row",
    )  # fmt: skip
    check.add_argument("--steps", type=_at_least(1, 10_000), help="optimizer steps of --batch-invariance (default: 10)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _at_least(minimum: int, at_most: int = 2**31 - 1) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not minimum <= (value := int(text)) <= at_most:
            raise argparse.ArgumentTypeError(f"{text}: expected an integer from {minimum} to {at_most}")
        return value

    return integer


def _above_0(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1e9:  # also of NaN
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, at most 1e9")
