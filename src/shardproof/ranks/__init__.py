"""Start ranks (warm processes of our own, or torchrun's), supervise them, report the guilty one."""

from shardproof.ranks.here import Here
from shardproof.ranks.place import Place
from shardproof.ranks.pool import Ranks
from shardproof.ranks.starting import start

__all__ = ["Here", "Place", "Ranks", "start"]
