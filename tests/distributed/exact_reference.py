"""What one process computes that runs every rank's path in turn: written with torch alone, no engine of the project."""

import math
import re
from functools import lru_cache

import torch
import torch.nn.functional as F
from exact_trials import Trial
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache(maxsize=64)
def reference(
    trial: Trial, nudge: int = 0, left_out: tuple[int, ...] = (), norms: list[float] | None = None
) -> dict[str, Tensor]:
    """The weights after the last step. Gradients are summed over micro-steps first, then over ranks, as ranks do.

    nudge: where it is not 0, the seed with which every weight is moved after each step to a float beside it.
    left_out: steps that are not applied. norms: gets each step's norm of the gradient before clipping.
    """
    generator = torch.Generator().manual_seed(nudge)
    torch.set_num_threads(1)
    pool, ancestry, sampler = trial.build()
    parameters = list(pool.parameters())
    optimizer = build_optimizer(trial, pool)
    averages = {name: parameter.detach().clone() for name, parameter in pool.named_parameters()}
    scale = trial.loss_scale if trial.precision == "fp16" else 1.0
    for step in sorted(set(range(trial.steps)) - set(left_out)):
        totals: list[Tensor | None] = [None] * len(parameters)
        uses = [0] * len(parameters)
        world = trial.world_at(step)
        for rank in range(world):
            pool.zero_grad()
            lead: tuple[Tensor, Tensor] | None = None
            for micro in range(trial.accumulate):
                batch = trial.batch(step, micro, rank)
                path = sampler.draw(step, micro, rank, world)
                before = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    parameter.grad = None
                with torch.autocast("cpu", DTYPES[trial.precision], enabled=trial.precision != "fp32"):
                    logits, tokens = (out.float() for out in pool(batch.images, path, True))
                    target, blocks, _ = ancestry(batch.images, (0,))
                teacher = target.float(), F.layer_norm(blocks[0].float(), blocks[0].shape[-1:])
                follows = trial.lead_weight > 0 and lead is not None
                if follows:
                    teacher = lead
                if trial.nested or not follows:
                    lead = logits.detach(), tokens.detach()
                loss = F.cross_entropy(logits, batch.targets)
                taught = -(teacher[0].softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
                loss = loss + (trial.lead_weight if follows else 1.0) * taught
                if trial.feature_weight and tokens.shape == teacher[1].shape:
                    loss = loss + trial.feature_weight * (tokens - teacher[1]).square().mean()
                (loss * scale / trial.accumulate).backward()
                for index, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
                    uses[index] += parameter.grad is not None
                    if parameter.grad is None or old is None:
                        parameter.grad = old if parameter.grad is None else parameter.grad
                    else:
                        parameter.grad = old + parameter.grad
            for index, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    share = parameter.grad / world
                    totals[index] = share if totals[index] is None else totals[index] + share
        scale = apply(trial, optimizer, parameters, totals, uses, scale, norms if norms is not None else [])
        for name, parameter in pool.named_parameters():
            if parameter.grad is not None:
                averages[name] = trial.ema * averages[name] + (1 - trial.ema) * parameter.detach()
        for parameter in parameters if nudge else ():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.data = torch.nextafter(parameter.data, torch.where(up, math.inf, -math.inf))
    return averages if trial.ema else {name: value.detach() for name, value in pool.state_dict().items()}


def build_optimizer(trial: Trial, pool: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with decay on matrices, not on vectors, class token and position embedding; rates by row."""
    rate, groups = 0.1 if trial.optimizer == "sgd" else 1e-2, []
    for name, parameter in pool.named_parameters():
        matrix = parameter.ndim > 1 and "cls_token" not in name and "pos_embed" not in name
        matrix = matrix and not (trial.stitch_rank and re.fullmatch(r"units\.stitch\d+\.layer\.weight", name))
        row = re.match(r"(?:stem\.rows\.|units\.row|head\.rows\.)(\d+)", name)
        factor = trial.row_lr[int(row[1])] if row and trial.row_lr else 1.0
        groups.append({"params": [parameter], "weight_decay": 0.1 if matrix else 0.0, "lr": rate * factor})
    if trial.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate, eps=1e-3)


def apply(
    trial: Trial,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    totals: list[Tensor | None],
    uses: list[int],
    scale: float,
    norms: list[float],
) -> float:
    """Clips and steps; with fp16 leaves out a step whose gradients are not finite and halves the scale it returns."""
    draws = trial.world * trial.accumulate
    for parameter, total, count in zip(parameters, totals, uses, strict=True):
        if total is None:
            parameter.grad = torch.zeros_like(parameter) if trial.unused == "zero" else None
            continue
        parameter.grad = total / scale
        if trial.average == "users":
            parameter.grad = parameter.grad * (draws / count)
    present = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not math.isfinite(sum(float(gradient.abs().sum()) for gradient in present)):
        return scale / 2
    norms.append(float(nn.utils.get_total_norm(present)))
    if trial.clip:
        nn.utils.clip_grad_norm_(parameters, trial.clip)
    optimizer.step()
    return scale
