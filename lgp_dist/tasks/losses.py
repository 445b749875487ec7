"""The method's loss terms in float32: means over samples and, for squared errors, over elements."""

import torch.nn.functional as F
from torch import Tensor

from lgp_dist.config.run_config import LossScale

Pairs = list[tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """CE of logits [B, classes] to labels [B] or soft targets [B, classes], mean over the batch (equation 7)."""
    return F.cross_entropy(logits.float(), targets)


def soft_cross_entropy(ancestry: Tensor, logits: Tensor, tau: float, scale: LossScale) -> Tensor:
    """L_pred = -sum over classes of softmax(P_anc / tau) log softmax(P_aux / tau), mean over the batch (equation 3).

    Logits are [B, classes]. scale: `paper` also averages over classes, as the published code does.
    """
    target = F.softmax(ancestry.float() / tau, dim=-1)
    terms = -target * F.log_softmax(logits.float() / tau, dim=-1)
    return terms.mean() if scale == "paper" else terms.sum(-1).mean()


def mean_squared_error(pairs: Pairs) -> Tensor | float:
    """Mean over levels of the MSE of (target, prediction) pairs [B, N, D] (equations 4 and 5); 0 without levels."""
    if not pairs:
        return 0.0
    return sum(F.mse_loss(prediction.float(), target.float()) for target, prediction in pairs) / len(pairs)
