"""Conversations with a chat template: `python examples/chat.py MODEL OUTPUT`.

Only the answer is scored, with the template of any model. To score all turns of the assistant, give rows of `messages`
and `assistant_only_loss=True`. TRL knows where these turns are in the templates of many models; in one of your own, put
`{% generation %}` and `{% endgeneration %}` around them.
"""

import sys

from transformers import AutoTokenizer

from packsft import PackedSFTConfig, PackedSFTTrainer, stdlib_docstrings


def as_conversation(row):
    return {
        "prompt": [
            {"role": "system", "content": "You document Python."},
            {"role": "user", "content": "Write a docstring for\n\n" + row["prompt"]},
        ],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def main(name, output, *, num_rows=1000, **options):
    rows = stdlib_docstrings().select(range(num_rows))
    rows = rows.map(as_conversation).train_test_split(0.1, seed=42)
    args = PackedSFTConfig(
        output,
        max_length=1024,
        overlong="drop",  # half a conversation teaches little
        per_device_train_batch_size=16,
        tokens_per_pass=8192,
        eval_strategy="epoch",
        num_train_epochs=1,
        **options,
    )
    trainer = PackedSFTTrainer(
        name,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    trainer.train()
    trainer.save_model(output)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
