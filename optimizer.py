"""The optimizer and the learning-rate schedule.

Muon for the matrices inside the blocks, AdamW for the rest: embedding, head and scalars, each group with a learning rate
of its own that `--learning_rate` scales.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model import GPT
from runtime.config import check_flags, flag


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""
    optimizer: str = flag("muon", "muon: for the matrices in the blocks, with AdamW for the rest; adamw: for everything, "
                                  "with the same groups; gpt2: AdamW with one rate and decay for every matrix",
                          choices=("muon", "adamw", "gpt2"))
    learning_rate: float = flag("auto", "peak learning rate of the matrices; the other groups keep their ratio to it; auto: "
                                        "0.05, less when a step has fewer than 8,192 tokens, and a tenth of it with "
                                        "--optimizer=gpt2", above=0, auto=True, on_resume="warn")
    momentum_dtype: str = flag("bf16", "of Muon's state; bf16 takes half the memory", choices=("bf16", "fp32"),
                               on_resume="warn")
    weight_decay: float = flag("auto", "of the matrices, per step and learning rate; auto fits it to the length of the run, "
                                       "as the schedule of the learning rate is", at_least=0, auto=True, on_resume="warn")
    schedule: str = flag("linear", "after warmup: constant, then linear to zero; or a cosine to a tenth",
                         choices=("linear", "cosine"), on_resume="warn")
    warmup_iter: int = flag(10, "steps of linear warmup", at_least=0, on_resume="warn")
    cooldown_frac: float = flag(0.6, "last fraction of the run, in which the learning rate falls linearly to zero",
                                at_least=0, at_most=1, on_resume="warn")
    __post_init__ = check_flags

    def peak_lr(self, step_tokens: int) -> float:
        """The peak learning rate of a run whose steps see so many tokens."""
        if self.learning_rate != "auto":
            return self.learning_rate
        ratio = ADAM_RATIO if self.optimizer == "gpt2" else 1.0
        return BASE_LR * min(1.0, step_tokens / CRITICAL_BATCH_TOKENS) ** 0.5 * ratio


# Below some number of tokens a step's gradient is mostly noise, and the best rate grows with the root of that number; above
# it hardly grows (measured here from 512 to 8,192, studies/learning_rates.md). Source: McCandlish et al. 2018,
# arXiv:1812.06162; Malladi et al. 2022, arXiv:2205.10287.
BASE_LR, CRITICAL_BATCH_TOKENS = 0.05, 8192
# Learning rates relative to that of the matrices under Muon.
ADAM_RATIO = 0.1     # of the matrices, where AdamW has them
EMBED_RATIO = 0.5    # embedding and tied head, at REFERENCE_WIDTH
HEAD_RATIO = 0.5     # a head of its own
SCALAR_RATIO = 1.0
REFERENCE_WIDTH = 256
BETAS = 0.9, 0.95
# Learning rate times weight decay, summed over a run of constant rate: what was learnt early is forgotten over a share of
# the run, not over a number of steps. Source: Wang and Aitchison 2024, arXiv:2405.13698.
RUN_DECAY, MOST_DECAY = 3.0, 0.05  # the latter of a step, for runs of a few
MOMENTUM_START, MOMENTUM, MOMENTUM_WARMUP = 0.85, 0.95, 200
# Newton-Schulz iteration: coefficients that drive all singular values into [0.7, 1.2] in five steps
NS_COEFFICIENTS, NS_STEPS = (3.4445, -4.7750, 2.0315), 5
NS_NUMBERS = 2**25   # of stacked matrices at once: 64 MiB of bf16


# -- groups -----------------------------------------------------------------------------------------------------------

def parameter_groups(model: GPT, config: OptimizerConfig, step_tokens: int) -> list[dict]:
    """Every parameter once, each group with its `peak_lr`, `weight_decay`, `run_decay` (None, or what `set_rates` makes the
    weight decay from) and `method`."""
    rate, decay = config.peak_lr(step_tokens), config.weight_decay
    if config.optimizer == "gpt2":
        settings = {"matrix": ("adamw", rate, decay), "qkv": ("adamw", rate, decay), "embedding": ("adamw", rate, decay),
                    "head": ("adamw", rate, decay), "scalar": ("adamw", rate, 0.0)}
    else:
        inside = ("muon", rate, decay) if config.optimizer == "muon" else ("adamw", ADAM_RATIO * rate, decay)
        by_width = (REFERENCE_WIDTH / model.config.n_embd) ** 0.5  # a step moves logits by the width times the rate
        settings = {"matrix": inside, "qkv": inside, "embedding": ("adamw", EMBED_RATIO * rate * by_width, 0.0),
                    "head": ("adamw", HEAD_RATIO * rate * by_width, 0.0), "scalar": ("adamw", SCALAR_RATIO * rate, 0.0)}
    groups, shape = {}, model.config
    # equal ones: shared heads of keys and values leave several matrices of queries
    stacks = 2 + shape.n_head // (shape.n_kv_head or shape.n_head)
    for name, parameter in model.named_parameters():
        groups.setdefault(kind_of(name, parameter), []).append(parameter)
    return [{"params": groups[kind], "method": method, "lr": lr, "peak_lr": lr, "stacked": stacks if kind == "qkv" else 1,
             "weight_decay": 0.0 if decay == "auto" else decay, "run_decay": RUN_DECAY if decay == "auto" else None}
            for kind, (method, lr, decay) in settings.items() if kind in groups]


def kind_of(name: str, parameter: Tensor) -> str:
    """matrix; qkv, three or more of them one above the other; lookup: embeddings, with a tied head; head; scalar: all
    others, the coefficients of a rational function too."""
    if parameter.dim() != 2 or not name.endswith("weight"):
        return "scalar"
    if name.startswith("blocks."):
        return "qkv" if name.endswith("qkv.weight") else "matrix"
    return "head" if name == "head.weight" else "embedding"


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: the nearest matrix whose singular values are 1 (about), scaled by √(rows/columns) where
    that is above 1. Its state is one momentum a parameter.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Parameters of one shape are stacked: a step of
    many small products would leave a GPU idle.
    """

    def __init__(self, groups: list[dict], ns_dtype: torch.dtype, momentum_dtype: torch.dtype):
        """ns_dtype: of the products of the iteration."""
        super().__init__(groups, {"momentum": MOMENTUM})
        self.ns_dtype, self.momentum_dtype = ns_dtype, momentum_dtype

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        """skip: a bool on the device; where it is true, nothing changes."""
        for group in self.param_groups:
            for parameters in group_by_shape(group["params"], group["stacked"]):
                self.step_group(parameters, group, skip)

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        for averages in self.state.values():  # which it has cast to the parameters' dtype
            averages["momentum"] = averages["momentum"].to(self.momentum_dtype)

    def step_group(self, parameters: list[Tensor], group: dict, skip: Tensor | None):
        n, momentum = group["stacked"], group["momentum"]
        rows, columns = parameters[0].size(0) // n, parameters[0].size(1)
        grads = torch.cat([p.grad.view(n, rows, columns) for p in parameters])  # (parameters * n, rows, columns)
        keep = 1.0
        if skip is not None:
            grads.masked_fill_(skip, 0.0)  # zero times infinity would not be zero
            keep = (~skip).float()
        for p, grad in zip(parameters, grads.split(n)):
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=self.momentum_dtype)
            kept = self.state[p]["momentum"].view(n, rows, columns)
            average = torch.lerp(kept.float(), grad, (1 - momentum) * keep)
            kept.copy_(average)
            grad.lerp_(average, momentum)  # Nesterov's look ahead
        update = newton_schulz(grads, self.ns_dtype)
        if skip is not None:
            update = update * keep
        for p, part in zip(parameters, update.split(n)):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"] * keep)
            p.add_(part.reshape(p.shape), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def group_by_shape(parameters: list[Tensor], stacked: int):
    """Yields lists of parameters of one shape, none of more than NS_NUMBERS numbers if it can be helped."""
    by_shape = {}
    for p in parameters:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for shape, ps in by_shape.items():
        n = max(1, NS_NUMBERS // shape.numel())
        yield from (ps[i:i + n] for i in range(0, len(ps), n))


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x: (n, rows, columns) -> U Vᵀ of each matrix's singular value decomposition, about, in `dtype`."""
    a, b, c = NS_COEFFICIENTS
    x = x.to(dtype)
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # largest singular value at most 1
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW:
    """Both optimizers as one: their groups, one step, one state."""

    def __init__(self, groups: list[dict], ns_dtype: torch.dtype, momentum_dtype: torch.dtype):
        by_method = {method: [group for group in groups if group["method"] == method] for method in ("muon", "adamw")}
        self.parts = {}
        if by_method["muon"]:
            self.parts["muon"] = Muon(by_method["muon"], ns_dtype, momentum_dtype)
        if by_method["adamw"]:
            self.parts["adamw"] = torch.optim.AdamW(by_method["adamw"], betas=BETAS, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, skip: Tensor | None = None):
        """skip: a bool on the device; where it is true, nothing changes."""
        if skip is None or skip.device.type == "cuda":
            self.masked_step(skip)
        elif not skip:  # a CPU's host knows, and the fused AdamW of mps does not look at found_inf
            self.masked_step(None)

    def masked_step(self, skip: Tensor | None):
        """Without the host's knowing."""
        if "muon" in self.parts:
            self.parts["muon"].step(skip)
        if adamw := self.parts.get("adamw"):
            adamw.found_inf = None if skip is None else skip.float()
            adamw.step()

    def zero_grad(self):
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict):
        """Takes over the averages of `state` but keeps the learning rates and decay this optimizer was made with, so that
        a resumed run obeys its flags. Raises ValueError when they are not those of its parameters."""
        if state.keys() != self.parts.keys():
            raise ValueError(f"an optimizer of {', '.join(state)}")
        for name, part in self.parts.items():
            options = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, option in zip(part.param_groups, options):
                group.update(option)
            parameters = [p for group in part.param_groups for p in group["params"]]
            if len(part.state) not in (0, len(parameters)):
                raise ValueError(f"averages of {len(part.state)} of {len(parameters)} parameters")
            for p, averages in part.state.items():
                if any(value.shape not in ((), p.shape) for value in averages.values()):
                    raise ValueError("averages of another shape than the parameter")  # fused kernels do not look


def make_optimizer(model: GPT, config: OptimizerConfig, step_tokens: int = CRITICAL_BATCH_TOKENS,
                   ns_dtype: torch.dtype = torch.float32) -> MuonAdamW:
    """step_tokens: that a step sees; ns_dtype: of Muon's products."""
    return MuonAdamW(parameter_groups(model, config, step_tokens), ns_dtype,
                     torch.bfloat16 if config.momentum_dtype == "bf16" else torch.float32)


# -- schedule ---------------------------------------------------------------------------------------------------------

def lr_scale(step: int, progress: float, config: OptimizerConfig) -> float:
    """Fraction of the peak learning rate. step: from 0; progress: share of the run that is done before it, below 1.

    linear: warmup, constant, linear cooldown towards zero (Zhai et al. 2022, section 3.5, arXiv:2106.04560; Hägele et al.
    2024, arXiv:2405.18392). cosine: warmup, then half a cosine down to a tenth, as nanoGPT has it.
    """
    assert 0 <= progress < 1, progress
    warmup = min(1.0, (step + 1) / (config.warmup_iter + 1))
    if config.schedule == "linear":
        return min(warmup, (1 - progress) / config.cooldown_frac) if config.cooldown_frac else warmup
    if step < config.warmup_iter or step == 0:
        return warmup
    done = (step - config.warmup_iter) / max(step / progress - config.warmup_iter, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rates(optimizer: MuonAdamW, step: int, progress: float, config: OptimizerConfig):
    """Before each step: every group's learning rate and weight decay, and Muon's momentum, which grows at first. step and
    progress: as `lr_scale` has them; together they tell how many steps there will be."""
    scale = lr_scale(step, progress, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
        if group["run_decay"] is not None:
            group["weight_decay"] = min(group["run_decay"] * progress / max(step, 1), MOST_DECAY) / group["peak_lr"]
        if "momentum" in group:
            group["momentum"] = MOMENTUM_START + (MOMENTUM - MOMENTUM_START) * min(1.0, step / MOMENTUM_WARMUP)
