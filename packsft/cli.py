"""The `packsft` command: reads the command line, turns bad input into one line and exit code 2. Knows no tensors."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from packsft_kernels.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for input that cannot be used: `packsft: error:` and the reason, on one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    # Several GPUs in one process mean DataParallel, which cuts batches by rows and cannot cut a packed one.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    from packsft import demo  # only now: importing torch and trl takes seconds

    # Until the run has succeeded, everything is written here and not into the output folder.
    with tempfile.TemporaryDirectory(prefix="packsft-") as scratch:
        try:
            job = demo.prepare(
                command=shlex.join(["packsft", *(sys.argv[1:] if arguments is None else arguments)]),
                scratch=Path(scratch),
                output_dir=options.output_dir,
                model_name=options.model,
                data=options.data,
                max_length=options.max_length,
                max_tokens=sys.maxsize if options.full else options.max_tokens,
                compare_tokens=options.compare_tokens,
                learning_rate=options.learning_rate,
            )
        except (ValueError, OSError) as error:
            print(f"packsft: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        demo.run(job)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="packsft", description="Packed supervised fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"packsft {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a model on packed sequences and compare with TRL",
        description="Fine-tunes a model on packed sequences, then trains a part of the data through TRL's padded path, "
        "TRL's packed path and packsft, each in a fresh process. By default SmolLM2-135M-Instruct learns to write "
        "docstrings from the functions of Python's standard library.",
    )
    demo.add_argument(
        "--output-dir",
        type=Path,
        default=Path("packsft-demo"),
        help="folder for the model, the picture and the report (default: %(default)s)",
    )
    demo.add_argument("--model", help="local folder or hub name of a causal language model (default: SmolLM2)")
    demo.add_argument(
        "--data",
        type=Path,
        help="JSONL file, one object per line with `text`, `prompt` and `completion`, or `messages` "
        "(default: the standard library's docstrings)",
    )
    demo.add_argument("--max-length", type=_at_least(2), default=1024, help="tokens in a pack (default: %(default)s)")
    slow = "without bfloat16 hardware, where everything takes twice as long"
    demo.add_argument(
        "--max-tokens",
        type=_at_least(1),
        help=f"tokens to train on at most (default: 20000, or 10000 {slow})",
    )
    demo.add_argument("--full", action="store_true", help="train on all of the data, whatever --max-tokens says")
    demo.add_argument(
        "--compare-tokens",
        type=_at_least(0),
        help=f"tokens of the comparison with TRL, 0 leaves it out (default: 3500, or 1000 {slow})",
    )
    demo.add_argument(
        "--learning-rate", type=float, default=1e-4, help="peak learning rate of AdamW (default: %(default)s)"
    )
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small, expected {minimum} or more")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
