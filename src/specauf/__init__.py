"""specauf: train, measure and serve masked block drafters for speculative decoding."""

__version__ = "0.1.0"
