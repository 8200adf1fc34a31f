"""Packing: lengths in, plans out. Knows numpy only, not tokens, tensors or models."""

from .account import Account, check_max_lost_fraction
from .balance import attention_costs, balanced_order, cost_imbalance
from .max_length import MaxLength, compare_max_lengths, recommended_max_length
from .plan import PackPlan, pack_segments, plan_packs
from .report import PackingReport, packing_report
from .segments import OVERLONG, Segments, cut_examples, resolve_overlong
from .steps import plan_step, simulate_steps
from .strategies import PACKING_STRATEGIES, STRATEGIES, Strategy

__all__ = [
    "OVERLONG",
    "PACKING_STRATEGIES",
    "STRATEGIES",
    "Account",
    "MaxLength",
    "PackPlan",
    "PackingReport",
    "Segments",
    "Strategy",
    "attention_costs",
    "balanced_order",
    "check_max_lost_fraction",
    "compare_max_lengths",
    "cost_imbalance",
    "cut_examples",
    "pack_segments",
    "packing_report",
    "plan_packs",
    "plan_step",
    "recommended_max_length",
    "resolve_overlong",
    "simulate_steps",
]
