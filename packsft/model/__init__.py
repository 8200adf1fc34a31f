"""What is done to a model so that it trains on packed rows: attention, isolation check, language-model head."""
