"""Layouts that nobody declared: from the values alone, how the plain tensors of several ranks make up a whole.

One file per kind of layout says how it is recognised; `choose` asks them, the simplest first.
"""

from shardproof.compare.infer.choose import infer
from shardproof.compare.infer.inferred import Cut, Inferred

__all__ = ["Cut", "Inferred", "infer"]
