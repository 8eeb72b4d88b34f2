"""Batch norm over several processes, for CPUs, which torch's SyncBatchNorm refuses."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

aten = torch.ops.aten


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, of which each has as many images.

    (n, C, H, W) -> the same; C channels. As nn.SyncBatchNorm: two collectives of 2C numbers a
    layer, one in the forward and one in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """In eval mode as nn.BatchNorm2d."""
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, var, count = global_statistics(x)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps)


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (C,) over all processes, float32, and of how many values."""
    own = torch.stack(torch.var_mean(x.float(), dim=(0, 2, 3), correction=0))  # 2×C
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    var, mean = torch.stack(found).unbind(1)
    count = len(found) * x.numel() // x.shape[1]
    return mean.mean(0), (var + (mean - mean.mean(0)).square()).mean(0), count


class _Normalise(torch.autograd.Function):
    """(x - mean) / √(var + eps) · weight + bias, where mean and var depend on every x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx, gradient):
        """What it would be with fixed statistics, less the part that goes through them."""
        x, weight, mean, var = ctx.saved_tensors
        fixed, d_weight, d_bias = aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        through = torch.stack([d_weight, d_bias])  # Σ g·x̂ and Σ g, here of own images
        dist.all_reduce(through)
        through_var, through_mean = through / ctx.count
        scale = (var + ctx.eps).rsqrt()
        slope = weight * scale.square() * through_var
        offset = weight * scale * through_mean - slope * mean
        slope, offset = slope.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)
        return fixed - (x * slope + offset).to(fixed.dtype), d_weight, d_bias, *[None] * 4
