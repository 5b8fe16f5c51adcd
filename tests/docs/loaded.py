"""What the process that others are forked from loads: torch, as the ranks of a check need it, and shardproof."""

import importlib

import shardproof as sp
from shardproof.ranks import preload

preload.preload()
importlib.import_module("shardproof.cli")
importlib.import_module("shardproof.zoo.table")
# By their public names, which stand for functions even where a module has the same name.
PUBLIC = (sp.check, sp.diff, sp.record, sp.Trainer)
