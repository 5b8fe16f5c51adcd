"""A recording on disk: a directory with an index and the tensors of every rank. docs/traces.md describes the format."""
