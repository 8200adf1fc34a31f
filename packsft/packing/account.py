"""What packing leaves out of a data set, told from its account, and when it is too much.

An account is counts by the names of `PackPlan`: `examples_in`, `examples_empty`, `tokens_truncated` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_losses(account: Mapping[str, Any], max_length: int | None) -> list[str]:
    """One clause for each reason that there is."""
    of_examples, of_tokens = f"of {account['examples_in']} examples", f"of {account['tokens_in']} tokens are lost"
    losses = []
    if account["examples_empty"]:
        losses.append(f"{account['examples_empty']} {of_examples} are empty and left out")
    unscored = [f"{account['examples_unscored']} {of_examples}"] if account["examples_unscored"] else []
    if account["segments_unscored"]:
        unscored.append(f"{account['segments_unscored']} segments of other examples")
    if unscored:
        which, tokens = " and ".join(unscored), account["tokens_unscored"]
        losses.append(f"{which} have no token to score and are left out, {tokens} {of_tokens}")
    if account["examples_overlong_dropped"]:
        losses.append(
            f"{account['examples_overlong_dropped']} {of_examples} are longer than max_length={max_length} and left "
            f"out, {account['tokens_dropped']} {of_tokens}"
        )
    if account["examples_truncated"]:
        losses.append(
            f"{account['examples_truncated']} examples are cut at max_length={max_length}, "
            f"{account['tokens_truncated']} {of_tokens}"
        )
    return losses


def check_max_lost_fraction(max_lost_fraction: float) -> None:
    """Raises ValueError for what is not between 0 and 1."""
    if not 0 <= max_lost_fraction <= 1:
        raise ValueError(f"max_lost_fraction={max_lost_fraction!r}: must be between 0 and 1, a share of all tokens")


def check_losses(account: Mapping[str, Any], max_length: int | None, max_lost_fraction: float, name: str) -> None:
    """Raises ValueError, with every reason, where more than that share of the tokens of the set `name` is lost."""
    lost = account["tokens_truncated"] + account["tokens_unscored"] + account["tokens_dropped"]
    if lost > max_lost_fraction * account["tokens_in"]:
        raise ValueError(
            f"the {name} loses {lost} of {account['tokens_in']} tokens ({lost / account['tokens_in']:.2%}), more than "
            f"max_lost_fraction={max_lost_fraction} allows: {'; '.join(describe_losses(account, max_length))}. Raise "
            "max_length or max_lost_fraction, or set overlong='split'"
        )
