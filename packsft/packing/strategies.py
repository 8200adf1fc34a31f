"""The packing strategies by name, and what each does with examples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """What a strategy does.

    - `splits`: an example longer than `max_length` becomes several segments; otherwise it is truncated
    - `end_to_end`: examples are laid end to end and cut every `max_length` tokens
    - `repacks`: which segments meet in a pack depends on a seed, so each epoch can have its own packs
    - `exact_steps`: an item of the data set is one example; the examples of an optimizer step are packed together
    """

    name: str
    splits: bool = False
    end_to_end: bool = False
    repacks: bool = False
    exact_steps: bool = False


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("step", exact_steps=True),
        Strategy("bfd", repacks=True),
        Strategy("bfd_split", splits=True, repacks=True),
        Strategy("wrapped", splits=True, end_to_end=True),
        Strategy("none"),  # no packing: one example, or one segment of a split example, per item
    )
}
PACKING_STRATEGIES = tuple(name for name in STRATEGIES if name != "none")  # the values of `packing_strategy`


def strategy_named(name: str) -> Strategy:
    """Raises ValueError for an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r}: choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
