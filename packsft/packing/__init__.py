"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""

from .account import check_losses, check_max_lost_fraction, describe_losses
from .balance import attention_costs, balanced_order, cost_imbalance
from .max_length import MaxLength, compare_max_lengths, recommended_max_length
from .plan import PackPlan, pack_segments, plan_packs
from .report import PackingReport, packing_report
from .segments import OVERLONG, Segments, cut_examples, resolve_overlong
from .steps import plan_step, simulate_steps

__all__ = [
    "OVERLONG",
    "MaxLength",
    "PackPlan",
    "PackingReport",
    "Segments",
    "attention_costs",
    "balanced_order",
    "check_losses",
    "check_max_lost_fraction",
    "compare_max_lengths",
    "cost_imbalance",
    "cut_examples",
    "describe_losses",
    "pack_segments",
    "packing_report",
    "plan_packs",
    "plan_step",
    "recommended_max_length",
    "resolve_overlong",
    "simulate_steps",
]
