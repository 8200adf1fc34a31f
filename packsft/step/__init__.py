"""What happens within an optimizer step: its passes, the loss's denominator, metrics, memory."""
