"""Prompt sets and the measurement of drafters over them."""
