"""Script for the tests of several ranks: trains on streams of texts, and counts the texts that each rank tokenises.

usage: stream_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration. Other options are
`rows`, `shards`, and `bad_row`, the row that is no text. Rank 1 alone reads other rows from 40 on with
`rank_1_differs`, or fewer rows with `rank_1_lacks`. With `evaluates`, the stream is the evaluation set, too.
`output_dir` is where checkpoints go, and `resume_from` is one. With `refused`, the result is the error of each rank.
"""

import json
import sys
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import IterableDataset
from runs import losses, save_and_end, trainer
from tiny import WORDS, tiny_model, tiny_tokenizer

from packsft.data.ranks import Ranks

TOKENIZER = tiny_tokenizer()
encode, calls = type(TOKENIZER)._encode_plus, torch.zeros((), dtype=torch.int64).share_memory_()  # of all workers


def counted(*args, **kwargs):
    calls.add_(1)
    return encode(*args, **kwargs)


def texts(starts, rows, bad_row, other_from):
    """Of 0 to 8 words, and `<eos>`: some are too long, or have one token, which nothing predicts."""
    words = WORDS.split()
    for start in starts:
        for i in range(start, rows, 4):
            shift = i + (i >= other_from)
            yield {
                "text": 7 if i == bad_row else " ".join(words[(shift + j * j) % len(words)] for j in range(i * 5 % 9))
            }


def run(
    rows=61, shards=4, bad_row=None, rank_1_differs=False, rank_1_lacks=0, evaluates=False, output_dir=None,
    resume_from=None, refused=False, **options,
):  # fmt: skip
    is_rank_1 = PartialState().process_index == 1
    given = {
        "starts": [list(range(4))[shard::shards] for shard in range(shards)],
        "rows": rows - rank_1_lacks * is_rank_1, "bad_row": bad_row,
        "other_from": 40 if rank_1_differs and is_rank_1 else rows,
    }  # fmt: skip
    stream = IterableDataset.from_generator(of_shards, gen_kwargs=given)
    try:
        ours = trainer(
            output_dir or tempfile.mkdtemp(), model=tiny_model("gpt2", torch.float64), train_dataset=stream,
            eval_dataset=stream if evaluates else None, processing_class=TOKENIZER,
            **{"max_length": 8, "overlong": "drop", "tokens_per_pass": 16} | options,
        )  # fmt: skip
        calls.zero_()
        ours.train(resume_from_checkpoint=resume_from)
    except (ValueError, RuntimeError) as error:
        if not refused:
            raise
        return {"errors": gather_object([str(error)])}
    logged = ours.state.log_history
    return {
        "weights": torch.cat([p.detach().flatten() for p in ours.model.parameters()]),
        "losses": losses(ours),
        "tokens": [entry["num_tokens"] for entry in logged if "loss" in entry],
        "evaluation": [entry["eval_loss"] for entry in logged if "eval_loss" in entry],
        "digests": ours._place.state(ours.state.global_step, Ranks.of(ours.accelerator))["digests"][0],
        "tokenised": gather_object([int(calls)]),
    }


def of_shards(starts, **given):
    for of_shard in starts:
        yield from texts(of_shard, **given)


if __name__ == "__main__":  # not in workers that are not forked
    PartialState(cpu=True)
    type(TOKENIZER)._encode_plus = counted
    save_and_end({name: run(**options) for name, options in json.loads(sys.argv[2]).items()}, sys.argv[1])
