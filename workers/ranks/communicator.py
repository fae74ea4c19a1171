"""The default group of `torch.distributed` in one process: joined, told through, left when a rank failed, and joined anew.

Ranks of a group are processes of one host. They meet in a file, so no port is chosen by anybody; gloo listens on the loopback device.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed as dist

from millijoule.workers.engines.deepspeed_library import kept_environment

#: All ranks have loaded when they join, and one that fails meanwhile is waited for in vain.
JOIN_TIMEOUT = timedelta(seconds=60)


class Communicator:
    """What one rank does with the others.

    Args:
        rank, ranks: which, of how many.
        device: "cpu" or "cuda", where tensors are that are summed.
    """

    def __init__(self, rank: int, ranks: int, device: str) -> None:
        self.rank, self.ranks = rank, ranks
        self.backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"

    @property
    def ends_with_a_rank(self) -> bool:
        """Whether sums end at once, with an error, where a rank has left or ended: connections are closed. Kernels just wait on."""
        return self.backend == "gloo"

    def join(self, meeting_point: str) -> None:
        """Enter the group whose ranks all name the file `meeting_point`, a new one for each group."""
        self.leave()
        store = dist.FileStore(meeting_point, self.ranks)
        store.set_timeout(JOIN_TIMEOUT)
        with kept_environment(GLOO_SOCKET_IFNAME="lo"):
            dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.ranks)
            dist.all_reduce(torch.zeros(1))  # all are there

    def leave(self) -> None:
        """Out of the group, whoever is in it; those who wait for this rank there stop waiting."""
        if dist.is_initialized():
            if self.ends_with_a_rank:
                dist.destroy_process_group()
            else:  # which would wait for kernels that wait for other ranks
                dist.distributed_c10d._abort_process_group()

    def tell(self, word: int = 0) -> int:
        """What rank 0 says, in all ranks; over the hosts' memory, so no device is waited for."""
        said = torch.tensor([word])
        dist.broadcast(said, 0)
        return int(said.item())


def is_cut_off(error: BaseException) -> bool:
    """Whether `error` says no more than that another rank has left."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, ValueError)) and any(
        word in text for word in ("gloo", "NCCL", "process group has not been initialized")
    )
