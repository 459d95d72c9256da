"""torch.distributed on pccl: ``torch.distributed.init_process_group("pccl")``.

`register` is an entry point of torch (``torch.backends``): with pccl installed, `import torch` calls it, and nothing need be imported.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Tell torch that there is a backend "pccl". What it needs is imported when a group is made."""
    import torch.distributed as dist

    if dist.is_available():
        dist.Backend.register_backend("pccl", _create, extended_api=True, devices=["cpu", "cuda"])


def _create(job: Any, settings: Any) -> Any:
    from pccl.bindings.torch.group import ProcessGroup
    from pccl.bindings.torch.start import start

    seconds = job.timeout.total_seconds()
    chosen = {"timeout": seconds, "connect_timeout": seconds, **(settings or {})}
    comm, end = start(job.store, job.group_rank, job.group_size, chosen)
    return ProcessGroup(comm, name=job.group_id, end=end)
