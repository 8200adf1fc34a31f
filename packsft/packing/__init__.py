"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""

from .balance import attention_costs, balanced_order, cost_imbalance
from .plan import PackPlan, pack_segments, plan_packs
from .report import PackingReport, packing_report
from .segments import OVERLONG, Segments, check_max_lost_fraction, cut_examples, resolve_overlong
from .steps import plan_step

__all__ = [
    "OVERLONG",
    "PackPlan",
    "PackingReport",
    "Segments",
    "attention_costs",
    "balanced_order",
    "check_max_lost_fraction",
    "cost_imbalance",
    "cut_examples",
    "pack_segments",
    "packing_report",
    "plan_packs",
    "plan_step",
    "resolve_overlong",
]
