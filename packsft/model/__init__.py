"""Prepares a model to train on packed rows: attention, isolation check, language-model head."""
