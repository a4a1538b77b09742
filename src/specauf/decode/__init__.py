"""Exact speculative decoding and the measurement of acceptance, live and by replay."""
