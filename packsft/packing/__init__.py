"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""

from .balance import attention_costs, balanced_order, cost_imbalance
from .plan import PackPlan, plan_packs
from .report import PackingReport, packing_report
from .steps import plan_step

__all__ = [
    "PackPlan",
    "PackingReport",
    "attention_costs",
    "balanced_order",
    "cost_imbalance",
    "packing_report",
    "plan_packs",
    "plan_step",
]
