"""Loggers that come with the trainer, one a file. None of them loads its library before a run opens it."""
