"""What torch remembers of a world that is gone."""

from __future__ import annotations

import sys


def forget_meshes() -> None:
    """Drop DTensor's caches: they hold meshes, and with them the names of process groups that no longer exist.

    A mesh of the next world that looks the same is found there, and its collectives then fail ("Could not resolve the
    process group"), or run in another group that has inherited the name.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import _redistribute  # noqa: PLC0415 (only where it is loaded already)
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # noqa: PLC0415 (likewise)

    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    clear = getattr(_redistribute._gen_transform_infos, "cache_clear", None)
    if clear is not None:
        clear()
