"""Torch's distributed checkpoint, planning over portions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from shardproof.checkpoint.portion import Portion


class WritePlanner(DefaultSavePlanner):
    """Plans over portions: {name: Portion}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box of a portion."""
        return _box_of(self.state_dict, index)


class ReadPlanner(DefaultLoadPlanner):
    """Plans over portions: {name: Portion}, into whose tensors it reads."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the portions as they are."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box of a portion."""
        return _box_of(self.state_dict, index)


def _box_of(portions: Mapping[str, Any], index: MetadataIndex) -> Tensor:
    portion: Portion = portions[index.fqn]
    return portion.__get_tensor_shard__(index)
