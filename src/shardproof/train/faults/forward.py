"""Outputs of tensor-parallel modules that are not summed, or to which every rank adds the bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardproof.parallel.held import plain
from shardproof.train.faults.facts import Facts
from shardproof.train.faults.fault import Fault, Scene
from shardproof.train.faults.gradients import share


@dataclass(frozen=True, kw_only=True)
class OnOutput(Fault):
    """Something done to the output of one module."""

    stage = "forward"

    module: str

    @property
    def place(self) -> str:
        """The output."""
        return f"output of {self.module}"

    def initial(self, scene: Scene) -> None:
        """Hook the module, before the recorder does: what it sees is what the next module gets."""
        module = scene.modules.get(self.module)
        if module is None:
            return

        def edited(module: nn.Module, _inputs: Any, output: Any) -> Any:
            return self.edit(module, output, scene) if isinstance(output, Tensor) else output

        module.register_forward_pre_hook(lambda module, _inputs: self.before(module, scene))
        module.register_forward_hook(edited)

    def before(self, module: nn.Module, scene: Scene) -> None:
        """The module is about to run; FSDP has gathered what it holds."""

    def edit(self, module: nn.Module, output: Tensor, scene: Scene) -> Tensor:
        """What takes the place of the output."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NotSummed(OnOutput):
    """The output of a row-parallel module stays a partial sum: each tp rank has a part, and the parts add up."""

    name = "forward-not-reduced"

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One module."""
        if facts.parallelism.tp == 1:
            return "there is one tp rank"
        modules = facts.row_parallel()
        return [cls(module=facts.pick(modules, cls.name))] if modules else "no matrix is split over tp along its inputs"

    def edit(self, module: nn.Module, output: Tensor, scene: Scene) -> Tensor:
        """The own share."""
        del module
        scene.planted += 1
        return output * share(scene)


@dataclass(frozen=True, kw_only=True)
class BiasOfEveryRank(OnOutput):
    """Every tp rank adds the bias before the outputs are summed, so that it counts as often as there are ranks."""

    name = "bias-counted-k-times"

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """The row-parallel module with the smallest bias: the one that is most likely to hide it."""
        if facts.parallelism.tp == 1:
            return "there is one tp rank"
        whole = set(facts.whole_over_tp())
        modules = [module for module in facts.row_parallel() if f"{module}.bias" in whole]
        if not modules:
            return "no module that is summed over tp has a bias"
        return [cls(module=min(modules, key=lambda module: facts.largest.get(f"{module}.bias", 0.0)))]

    def reason(self, facts: Facts) -> str:
        """No bias to speak of."""
        bias = f"{self.module}.bias"
        if facts.largest.get(bias):
            return ""
        return f"{bias} is zero in every forward pass" + (
            ", of which one step has no other" if facts.steps == 1 else ""
        )

    def before(self, module: nn.Module, scene: Scene) -> None:
        """Keep the bias: when the module is done, FSDP may have let go of it."""
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            scene.kept["bias"] = plain(bias.detach()).clone()

    def edit(self, module: nn.Module, output: Tensor, scene: Scene) -> Tensor:
        """Add it once more for every other rank."""
        del module
        bias = scene.kept.get("bias")
        if bias is None or output.shape[-1:] != bias.shape:
            return output
        more: Tensor = bias * (scene.parallelism.tp - 1)
        scene.planted += 1
        if not isinstance(output, DTensor):
            return output + more
        whole: Tensor = DTensor.from_local(
            output.to_local() + more,
            output.device_mesh,
            output.placements,
            run_check=False,
            shape=output.shape,
            stride=output.stride(),
        )
        return whole
