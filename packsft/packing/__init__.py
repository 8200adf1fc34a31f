"""Packing: lengths in, plans out. Knows numpy, not tokens, tensors or models."""

from .plan import PackPlan, plan_packs
from .report import PackingReport, packing_report

__all__ = ["PackPlan", "PackingReport", "packing_report", "plan_packs"]
