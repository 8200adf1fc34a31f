"""From rows to batches, on the host: documents, packs, the steps of a rank, data loaders."""
