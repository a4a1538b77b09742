"""Training: the step, its batches, and what is written to disk."""
