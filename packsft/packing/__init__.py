"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""

from .balance import attention_costs, balanced_order, cost_imbalance
from .max_length import MaxLength, compare_max_lengths, recommended_max_length
from .plan import PackPlan, plan_packs
from .report import PackingReport, packing_report

__all__ = [
    "MaxLength",
    "PackPlan",
    "PackingReport",
    "attention_costs",
    "balanced_order",
    "compare_max_lengths",
    "cost_imbalance",
    "packing_report",
    "plan_packs",
    "recommended_max_length",
]
