"""Faults that are planted in a run on purpose, to see whether a check would have caught them."""
