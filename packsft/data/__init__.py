"""Rows to batches, on the host: documents, packs of them, the steps of a rank, and the data loaders."""
