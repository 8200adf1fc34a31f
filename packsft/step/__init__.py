"""Inside an optimizer step: passes, the loss's denominator, metrics, memory."""
