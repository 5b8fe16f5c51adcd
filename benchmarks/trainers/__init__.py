"""The contestants of benchmarks/trainer.py: one file for each library, one interface for all."""
