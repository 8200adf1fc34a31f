"""The rows of the other examples: instructions from Python's own documentation, as tokens and labels."""

from packsft import stdlib_docstrings


def tokenised_docstrings(tokenizer, count):
    def tokenise(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    rows = stdlib_docstrings().select(range(count))
    return rows.map(tokenise, remove_columns=rows.column_names)
