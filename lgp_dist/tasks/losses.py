"""The method's loss terms, each a mean per sample and per element, in float32."""

import torch.nn.functional as F
from torch import Tensor

from lgp_dist.config.run_config import LossScale

Pairs = list[tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """CE(y, P): logits [B, classes] against labels [B] or soft targets [B, classes]; mean over the batch."""
    return F.cross_entropy(logits.float(), targets)


def soft_cross_entropy(ancestry: Tensor, logits: Tensor, tau: float, scale: LossScale) -> Tensor:
    """L_pred: -sum over classes of softmax(P_anc / tau) log softmax(P_aux / tau), mean over the batch.

    Logits are [B, classes]. scale `paper` averages over the classes too, as some published code does.
    """
    target = F.softmax(ancestry.float() / tau, dim=-1)
    terms = -target * F.log_softmax(logits.float() / tau, dim=-1)
    return terms.mean() if scale == "paper" else terms.sum(-1).mean()


def mean_squared_error(pairs: Pairs) -> Tensor | float:
    """Mean over levels of the MSE of (target, prediction) pairs [B, N, D]; 0 where there are no levels."""
    if not pairs:
        return 0.0
    return sum(F.mse_loss(prediction.float(), target.float()) for target, prediction in pairs) / len(pairs)
