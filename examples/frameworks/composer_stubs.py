"""Stands in for what Composer imports and these scripts do not use: torchvision and mcli. Import it before `composer`.

A torchvision fits one torch only, and Composer's fits an old one; mcli is the command line of a cluster, with clients
for Kubernetes and GraphQL behind it. Composer needs a few names of the first and the bare module of the second.
"""

import importlib.machinery
import importlib.util
import sys
import types

# First: it looks for torchvision as it is loaded, must not find the stub, and imports far more of it than Composer.
import torchmetrics  # noqa: F401


def _module(name: str, **names: object) -> types.ModuleType:
    module = types.ModuleType(name)
    # Libraries ask importlib.util.find_spec whether torchvision is there; a module without a spec is an error to it.
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


if importlib.util.find_spec("torchvision") is None:
    _module(
        "torchvision",
        transforms=_module("torchvision.transforms", functional=_module("torchvision.transforms.functional")),
        datasets=_module("torchvision.datasets", VisionDataset=type("VisionDataset", (), {})),
        models=_module("torchvision.models", resnet=_module("torchvision.models.resnet", Bottleneck=None)),
        utils=_module("torchvision.utils", draw_segmentation_masks=None),
        ops=_module("torchvision.ops", box_convert=None),
    )
if importlib.util.find_spec("mcli") is None:
    _module("mcli")
