"""Packed training in loops of one's own: `pack` gives the steps, `prepare` a model that takes them.

They are the parts that the trainer is built on: its planner of steps, its collator, its prepared model.
"""
