"""The account of a data set: how many examples and tokens went in, how many were lost, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Account:
    """Counts of examples, segments and tokens.

    - `examples_in` = `examples_packed` + `examples_empty` (length 0) + `examples_unscored` (no segment has a scored
      token) + `examples_overlong_dropped` (longer than `max_length`, and left out)
    - of the packed examples, `examples_truncated` lost tokens to `max_length`, and `examples_split` lie in more than
      one segment
    - `tokens_padding` and `texts_with_doubles`: what was left out of rows before they were counted: padding, and in
      so many texts a bos_token or eos_token that the tokenizer adds as well
    - `segments_unscored`: segments of packed examples that were left out because they have no scored token
    - `tokens_in` = `tokens_kept` + `tokens_truncated` + `tokens_unscored` (of whole examples, and of segments)
      + `tokens_dropped` (of overlong examples)
    """

    examples_in: int = 0
    examples_packed: int = 0
    examples_empty: int = 0
    examples_unscored: int = 0
    examples_overlong_dropped: int = 0
    examples_truncated: int = 0
    examples_split: int = 0
    segments_unscored: int = 0
    tokens_in: int = 0
    tokens_truncated: int = 0
    tokens_unscored: int = 0
    tokens_dropped: int = 0
    tokens_padding: int = 0
    texts_with_doubles: int = 0

    def add(self, other: Account) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    @property
    def tokens_lost(self) -> int:
        """Tokens lost for any reason."""
        return self.tokens_truncated + self.tokens_unscored + self.tokens_dropped

    @property
    def tokens_kept(self) -> int:
        """`tokens_in - tokens_lost`."""
        return self.tokens_in - self.tokens_lost

    def describe_losses(self, max_length: int | None) -> list[str]:
        """One clause for each reason why something was lost, or left out."""
        of_examples, of_tokens = f"of {self.examples_in} examples", f"of {self.tokens_in} tokens are lost"
        losses = []
        if self.examples_empty:
            losses.append(f"{self.examples_empty} {of_examples} are empty and left out")
        unscored = [f"{self.examples_unscored} {of_examples}"] if self.examples_unscored else []
        if self.segments_unscored:
            unscored.append(f"{self.segments_unscored} segments of other examples")
        if unscored:
            losses.append(
                f"{' and '.join(unscored)} have no token to score and are left out, {self.tokens_unscored} {of_tokens}"
            )
        if self.examples_overlong_dropped:
            losses.append(
                f"{self.examples_overlong_dropped} {of_examples} are longer than max_length={max_length} and left out, "
                f"{self.tokens_dropped} {of_tokens}"
            )
        if self.examples_truncated:
            losses.append(
                f"{self.examples_truncated} {of_examples} are cut at max_length={max_length}, "
                f"{self.tokens_truncated} {of_tokens}"
            )
        if self.tokens_padding:
            losses.append(f"{self.tokens_padding} tokens of padding (attention_mask is 0) are left out")
        if self.texts_with_doubles:
            losses.append(
                f"{self.texts_with_doubles} texts hold the bos_token or eos_token that the tokenizer adds: one of the "
                "two is left out"
            )
        return losses

    def check_lost_fraction(self, max_lost_fraction: float, max_length: int | None, name: str) -> None:
        """Raises ValueError, with every reason, if the data set `name` loses more than this share of its tokens."""
        if self.tokens_lost > max_lost_fraction * self.tokens_in:
            raise ValueError(
                f"the {name} loses {self.tokens_lost} of {self.tokens_in} tokens "
                f"({self.tokens_lost / self.tokens_in:.2%}), more than max_lost_fraction={max_lost_fraction} allows: "
                f"{'; '.join(self.describe_losses(max_length))}. Raise max_length or max_lost_fraction, or (without "
                "pictures) set overlong='split'"
            )


def check_max_lost_fraction(max_lost_fraction: float) -> None:
    """Raises ValueError unless it lies between 0 and 1."""
    if not isinstance(max_lost_fraction, (int, float)) or not 0 <= max_lost_fraction <= 1:
        raise ValueError(
            f"max_lost_fraction={max_lost_fraction!r}: must be a number from 0 to 1, a share of all tokens"
        )
