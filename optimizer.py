"""The optimizer and the learning-rate schedule.

AdamW in three groups, each with a learning rate of its own that `--learning_rate` scales.
"""
from dataclasses import dataclass

import torch

from model import GPT
from runtime.flags import check_flags, flag

# Learning rate of a group, relative to --learning_rate, which is that of the matrices. See bench/learning_rates.py.
EMBED_RATE, HEAD_RATE = 50.0, 10.0


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""
    learning_rate: float = flag(6e-4, "peak learning rate of the matrices; the other groups keep their ratio to it",
                                above=0)
    weight_decay: float = flag(0.1, "of the matrices inside the blocks, per step and learning rate", at_least=0)
    warmup_iter: int = flag(100, "steps of linear warmup", at_least=0)
    cooldown_frac: float = flag(0.6, "last part of the run in which the learning rate falls linearly to zero",
                                at_least=0, at_most=1)
    __post_init__ = check_flags


def make_optimizer(model: GPT, config: OptimizerConfig) -> torch.optim.AdamW:
    """Every group carries `peak_lr`, from which `set_learning_rate` derives its lr at each step."""
    groups = [
        {"params": list(model.blocks.parameters()), "peak_lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": [model.embed.weight], "peak_lr": EMBED_RATE * config.learning_rate, "weight_decay": 0.0},
        {"params": [model.head.weight], "peak_lr": HEAD_RATE * config.learning_rate, "weight_decay": 0.0},
    ]
    device = model.embed.weight.device.type
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=device in ("cuda", "cpu"))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """Takes over the moments of `state` but keeps the learning rates and decay `optimizer` was made with, so that a
    resumed run obeys its flags. Raises ValueError when the moments are not those of its parameters."""
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(optimizer.state) not in (0, len(parameters)):
        raise ValueError(f"moments of {len(optimizer.state)} of {len(parameters)} parameters")
    for parameter, moments in optimizer.state.items():
        if any(value.shape not in ((), parameter.shape) for value in moments.values()):
            raise ValueError("moments of another shape than the parameter")  # the fused kernels do not look


def lr_scale(step: int, max_iter: int, config: OptimizerConfig) -> float:
    """Fraction of the peak learning rate at `step` of 0..max_iter-1: linear warmup, constant, linear cooldown towards
    zero. Source: Zhai et al. 2022, section 3.5, arXiv:2106.04560; Hägele et al. 2024, arXiv:2405.18392."""
    assert 0 <= step < max_iter, (step, max_iter)
    scale = min(1.0, (step + 1) / max(config.warmup_iter, 1))
    cooldown = config.cooldown_frac * max_iter
    return min(scale, (max_iter - step) / cooldown) if cooldown else scale


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float):
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
