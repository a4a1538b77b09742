"""A matrix of objective x drafter x block size x seed from one base recipe, measured on the same recordings."""
