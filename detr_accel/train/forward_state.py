"""What a forward pass writes into the model: running statistics of live norms. Legend: R processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_accel.train.reduce import all_reduce_sum


class ForwardState:
    """Remembers the running statistics before a window, so that a refused one leaves none behind, and makes one set of
    them from those of all processes.

    Every process sees other images, so live BatchNorm's running statistics drift apart; once a window they become their
    mean over the processes, weighted by how many images each has seen. (Gradients come from the statistics of the
    micro-batch, which no process shares: the one exception to "the layout does not matter", beside dropout.)

    Args:
        model: the bare model.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
        self._kept = [t.clone() for t in (*self.statistics, *self.counters)]

    # looked up each time: moving a model to a device, even to the one where it is, can make new buffers
    @property
    def statistics(self) -> list[Tensor]:
        return [t for m in self._norms for t in (m.running_mean, m.running_var)]

    @property
    def counters(self) -> list[Tensor]:
        return [m.num_batches_tracked for m in self._norms if m.num_batches_tracked is not None]

    @torch.no_grad()
    def remember(self) -> None:
        """Before a window."""
        if self._kept:
            torch._foreach_copy_(self._kept, [*self.statistics, *self.counters])

    @torch.no_grad()
    def restore(self) -> None:
        """After a window that does not count."""
        if self._kept:
            torch._foreach_copy_([*self.statistics, *self.counters], self._kept)

    @torch.no_grad()
    def combine(self, num_images: int, total_images: Tensor, num_processes: int, device: torch.device) -> None:
        """Weighted mean over processes, in one flat reduction of a fixed order; a process without images weighs 0.

        The counters become one more than before the window, whatever the cut.

        Args:
            num_images: this process's; total_images: of the window, a scalar on the device.
        """
        if num_processes == 1 or not self._norms:
            return
        statistics = self.statistics
        flat = torch.cat([t.flatten() for t in statistics])
        # 0 x nan is nan: a process without images has not run forward, so its statistics are those from before
        flat = all_reduce_sum(flat * num_images, device) / total_images.clamp(min=1).to(flat.dtype)
        parts = flat.split([t.numel() for t in statistics])
        torch._foreach_copy_(statistics, [p.view(t.shape) for p, t in zip(parts, statistics, strict=True)])
        if self.counters:
            torch._foreach_copy_(self.counters, [t + 1 for t in self._kept[len(statistics) :]])

    def health(self, device: torch.device) -> Tensor:
        """0 where all statistics are finite, else not finite; a scalar on the device, unread."""
        if not self._norms:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(torch._foreach_norm(self.statistics)).sum().to(torch.float64) * 0
