"""Run single modules on one device, fed what a run under test fed them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from shardproof.parallel.initial import default_dtype
from shardproof.parallel.names import ROOT, canonical_modules
from shardproof.trace.leaves import leaves
from shardproof.train.run import TracedRun

ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "logsumexp", "multi_head_attention_forward"})
"""Functions of which a module that computes attention calls one or more."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a module on one device makes of an input and an output gradient."""

    output: Tensor
    input_gradient: Tensor | None = None
    gradients: Mapping[str, Tensor] | None = None
    """Name inside the module -> gradient."""


class Probe:
    """The modules of a model on one device, by canonical name. Only those of one tensor in and one out answer."""

    def __init__(self, run: TracedRun) -> None:
        self._run = run
        self._modules = {name or ROOT: module for name, module in canonical_modules(run.root)}

    def children(self, name: str) -> list[str]:
        """Canonical names of the modules directly inside."""
        prefix = "" if name == ROOT else f"{name}."
        return [n for n in self._modules if n != ROOT and n.startswith(prefix) and "." not in n[len(prefix) :]]

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> value of every parameter in a module and below."""
        module = self._modules.get(name)
        prefix = "" if name == ROOT else f"{name}."
        return {} if module is None else {f"{prefix}{n}": p.detach() for n, p in module.named_parameters()}

    def ask(
        self,
        name: str,
        given: Tensor,
        gradient: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Answer | None:
        """Run a module on `given`, and back from `gradient`; `parameters` (canonical names) replace its own.

        None where the module cannot be run so.
        """
        module = self._modules.get(name)
        if module is None:
            return None
        prefix = 0 if name == ROOT else len(name) + 1
        replaced = {key[prefix:]: value for key, value in (parameters or {}).items()}
        floating = given.is_floating_point()
        given = given.to(self._run.settings.device, self._run.dtype if floating else given.dtype)
        given = given.detach().requires_grad_(floating and gradient is not None)
        try:
            with default_dtype(self._run.dtype), torch.set_grad_enabled(gradient is not None):
                output = functional_call(module, replaced, (given,)) if replaced else module(given)
                found = list(leaves(output))
                if len(found) != 1:
                    return None
                value = found[0][1]
                if gradient is None:
                    return Answer(output=value.detach().cpu())
                return self._back(module, given, value, gradient)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            # A part of the batch, or one tensor alone, may not be what the module's code can work with.
            return None

    def _back(self, module: nn.Module, given: Tensor, value: Tensor, gradient: Tensor) -> Answer | None:
        if value.shape != gradient.shape or not value.requires_grad:
            return None
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        targets = ([given] if given.requires_grad else []) + [p for _, p in named]
        grads = torch.autograd.grad(value, targets, gradient.to(value), allow_unused=True)
        own = grads[1:] if given.requires_grad else grads
        return Answer(
            output=value.detach().cpu(),
            input_gradient=grads[0].cpu() if given.requires_grad and grads[0] is not None else None,
            gradients={n: g.cpu() for (n, _), g in zip(named, own, strict=True) if g is not None},
        )

    def normalises_batches(self, name: str) -> bool:
        """Whether a module is a batch norm that takes its statistics from what it is fed."""
        module = self._modules.get(name)
        return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training

    def computes_attention(self, name: str, given: Tensor) -> bool:
        """Whether a module mixes tokens (along dim 1) by a softmax of its own, not of a child's."""
        seen = _Seen()
        hooks = []
        for child in self.children(name):
            module = self._modules[child]
            hooks.append(module.register_forward_pre_hook(lambda _module, _args: seen.enter()))
            hooks.append(module.register_forward_hook(lambda _module, _args, _out: seen.leave()))
        try:
            with seen:
                answer = self.ask(name, given)
        finally:
            for hook in hooks:
                hook.remove()
        return answer is not None and bool(seen.names & ATTENTION) and self._mixes(name, given, answer.output)

    def _mixes(self, name: str, given: Tensor, output: Tensor) -> bool:
        if given.dim() < 3 or output.dim() < 3 or not given.is_floating_point() or output.shape[1] < 2:
            return False
        moved = given.detach().clone()
        moved[:, 0] = moved[:, 0].flip(-1) + 1
        other = self.ask(name, moved)
        return other is not None and not torch.equal(other.output[:, -1], output[:, -1])


class _Seen(TorchFunctionMode):
    """Names of the functions that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._depth = 0

    def enter(self) -> None:
        """What follows is called by a child."""
        self._depth += 1

    def leave(self) -> None:
        """The child is done."""
        self._depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not self._depth:
            self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))
