"""Callbacks that come with the trainer, one a file."""
