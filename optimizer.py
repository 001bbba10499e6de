"""The optimizer: which parameter is updated by what, and the learning-rate schedule.

By default Muon for the matrices in the blocks and AdamW for the rest (embedding, head, scalars), each group with its own
learning rate, which `--learning_rate` scales. The choices of `--optimizer` are the dict OPTIMIZERS.

    optimizer = make_optimizer(model, OptimizerConfig())
    set_rates(optimizer, step, progress, OptimizerConfig())     # before every step
    optimizer.step()
"""
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from runtime.config import BadInput, check_flags, flag

# -- choices of --optimizer -------------------------------------------------------------------------------------------

# Below some number of tokens per step the gradient is mostly noise, and the best learning rate grows with the square root of
# that number; above it, it hardly grows (measured here from 512 to 8,192 tokens, studies/learning_rates.md). Source:
# McCandlish et al. 2018, arXiv:1812.06162; Malladi et al. 2022, arXiv:2205.10287.
BASE_LR, CRITICAL_BATCH_TOKENS = 0.05, 8192
# Learning rates relative to that of the matrices under Muon
ADAM_RATIO = 0.1     # matrices under AdamW
EMBED_RATIO = 0.5    # embedding and tied head, at REFERENCE_WIDTH
HEAD_RATIO = 0.5     # untied head, at REFERENCE_WIDTH
SCALAR_RATIO = 1.0
REFERENCE_WIDTH = 256
# The coefficients of token shifts and of mixes have about as far to go in a short run as in a long one, so their rate is
# that of the matrices in runs of MIX_STEPS steps, higher in shorter ones, lower in longer ones (studies/learning_rates.md).
MIX_STEPS, MIX_RATIOS = 400, (0.25, 4.0)


def base_lr(step_tokens: int) -> float:
    return BASE_LR * min(1.0, step_tokens / CRITICAL_BATCH_TOKENS) ** 0.5


class Update(NamedTuple):
    """How a kind of parameter is updated: the class, its peak learning rate, its weight decay (a number or "auto"), and
    further options of its group."""
    optimizer_class: type
    lr: float
    weight_decay: float | str = 0.0
    options: Mapping = MappingProxyType({})


class OptimizerSpec(NamedTuple):
    """A choice of --optimizer. groups(lr, weight_decay, n_embd) returns the Update of each kind of parameter
    (see `parameter_kind`); kinds that it leaves out are updated as KINDS says.

    Such a class is constructed as `Class(groups, config, ns_dtype)`, with the groups of `parameter_groups`; where the bool
    tensor `skip` is true, its `step(skip=None)` changes neither parameters nor state, without a host sync. STATE names what
    it keeps for each parameter, in the parameter's shape, unless `state_shape(name, p)` says otherwise. If it has
    `momentum_at(step, progress, config)`, that is the "momentum" of its groups.
    """
    groups: Callable[[float, float | str, int], dict[str, Update]]
    auto_lr: Callable[[int], float] = base_lr  # tokens per step -> --learning_rate=auto


# kind of parameter -> the one that it is updated like, unless an optimizer says otherwise
KINDS = {"matrix": None, "qkv": "matrix", "value_embedding": "embedding", "ngrams": None, "embedding": None, "head": None,
         "scalar": None, "mix": "scalar", "residual_scale": "scalar", "x0_scale": "scalar", "smear": "scalar"}


def muon_groups(lr: float, weight_decay: float | str, n_embd: int) -> dict[str, Update]:
    """Muon for the matrices in the blocks, AdamW for the rest."""
    by_width = (REFERENCE_WIDTH / n_embd) ** 0.5  # a step moves logits by the width times the learning rate
    return {"matrix": Update(Muon, lr, weight_decay), "embedding": Update(AdamW, EMBED_RATIO * lr * by_width),
            "ngrams": Update(RowAdam, EMBED_RATIO * lr * by_width),
            "head": Update(AdamW, HEAD_RATIO * lr * by_width), "scalar": Update(AdamW, SCALAR_RATIO * lr),
            "mix": Update(AdamW, lr, options={"is_mix": True})}


def adamw_groups(lr: float, weight_decay: float | str, n_embd: int) -> dict[str, Update]:
    """AdamW for everything, otherwise the same groups."""
    return muon_groups(lr, weight_decay, n_embd) | {"matrix": Update(AdamW, ADAM_RATIO * lr, weight_decay)}


def normuon_groups(lr: float, weight_decay: float | str, n_embd: int) -> dict[str, Update]:
    """NorMuon for the matrices in the blocks, otherwise the same groups."""
    return muon_groups(lr, weight_decay, n_embd) | {"matrix": Update(NorMuon, lr, weight_decay)}


def gpt2_groups(lr: float, weight_decay: float | str, n_embd: int) -> dict[str, Update]:
    """AdamW with one learning rate, and weight decay for everything 2-D, as in nanoGPT."""
    decayed = Update(AdamW, lr, weight_decay)
    return {"matrix": decayed, "embedding": decayed, "ngrams": Update(RowAdam, lr), "head": decayed,
            "scalar": Update(AdamW, lr)}


# nanochat's rates are for steps of so many tokens, and those of embedding and head for a width
NANOCHAT_TOKENS, NANOCHAT_WIDTH, NANOCHAT_LR = 2**19, 768, 0.02


def nanochat_lr(step_tokens: int) -> float:
    return NANOCHAT_LR * (step_tokens / NANOCHAT_TOKENS) ** 0.5


def nanochat_groups(lr: float, weight_decay: float | str, n_embd: int) -> dict[str, Update]:
    """nanochat's, where `lr` is that of the matrices, in the ratios of its own batch of NANOCHAT_TOKENS: that of smear,
    which nanochat leaves as it is in smaller ones, scales too. An automatic weight decay is none: nanochat's own rule is
    for runs of billions of tokens."""
    by_width = (NANOCHAT_WIDTH / n_embd) ** 0.5
    adam = lambda lr, decay, *betas: Update(AdamW, lr, decay, {"betas": betas, "eps": 1e-10})
    return {"matrix": Update(NorMuon, lr, 0.0 if weight_decay == "auto" else weight_decay, {"decay_schedule": "cosine"}),
            "embedding": adam(15 * lr * by_width, 0.001, 0.8, 0.995),
            "value_embedding": adam(7.5 * lr * by_width, 0.01, 0.8, 0.995), "ngrams": Update(RowAdam, 7.5 * lr * by_width),
            "head": adam(0.4 * lr * by_width, 0.01, 0.8, 0.96), "residual_scale": adam(0.25 * lr, 0.05, 0.8, 0.95),
            "x0_scale": adam(25 * lr, 0.0, 0.96, 0.95), "scalar": adam(25 * lr, 0.0, 0.8, 0.95),
            "smear": adam(10 * lr, 0.0, 0.8, 0.95)}


OPTIMIZERS = {"muon": OptimizerSpec(muon_groups), "normuon": OptimizerSpec(normuon_groups),
              "adamw": OptimizerSpec(adamw_groups),
              "gpt2": OptimizerSpec(gpt2_groups, lambda step_tokens: ADAM_RATIO * base_lr(step_tokens)),
              "nanochat": OptimizerSpec(nanochat_groups, nanochat_lr)}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""
    optimizer: str = flag("muon", "update rule; muon: Muon for the matrices in the blocks, AdamW for the rest; normuon: "
                                  "NorMuon in its place; adamw: AdamW for everything, with the same groups; gpt2: AdamW "
                                  "with one learning rate, and weight decay for every matrix; nanochat: NorMuon and "
                                  "nanochat's rates", choices=tuple(OPTIMIZERS))
    learning_rate: float = flag("auto", "peak learning rate of the matrices; the other groups keep their ratio to it; auto: "
                                        f"{BASE_LR}, less for steps of fewer than {CRITICAL_BATCH_TOKENS:,} tokens, and a "
                                        "tenth of it with --optimizer=gpt2; with nanochat "
                                        f"{NANOCHAT_LR} times the root of the tokens over {NANOCHAT_TOKENS:,}", above=0,
                                auto=True, on_resume="warn")
    mix_lr_ratio: float = flag("auto", "learning rate of the coefficients of token shifts and of the mixes with the "
                                       "embedding and with the first layer's values, relative to --learning_rate; auto: "
                                       f"{MIX_STEPS} / steps of the run, at least {MIX_RATIOS[0]}, at most {MIX_RATIOS[1]}; "
                                       "gpt2 and nanochat have their own", above=0, auto=True, on_resume="warn")
    momentum_dtype: str = flag("bf16", "dtype of Muon's state; bf16 takes half the memory", choices=("bf16", "fp32"),
                               on_resume="warn")
    weight_decay: float = flag("auto", "weight decay of the matrices; each step multiplies it by the learning rate; auto: "
                                       "fitted to the length of the run, like the learning-rate schedule",
                               at_least=0, auto=True, on_resume="warn")
    schedule: str = flag("linear", "learning rate after warmup; linear: constant, then linearly down; cosine: down to a "
                                   "tenth", choices=("linear", "cosine"), on_resume="warn")
    warmup_iter: int = flag(10, "steps of linear warmup", at_least=0, on_resume="warn")
    cooldown_frac: float = flag(0.6, "last fraction of the run, in which the learning rate falls linearly, to zero unless "
                                     "--final_lr_frac is given",
                                at_least=0, at_most=1, on_resume="warn")
    final_lr_frac: float = flag(0.0, "learning rate at the end of that cooldown, as a fraction of the peak", at_least=0,
                                at_most=1, on_resume="warn")

    def __post_init__(self):
        check_flags(self)
        if self.final_lr_frac and (self.schedule != "linear" or self.cooldown_frac == 0):
            without = f"--schedule={self.schedule}" if self.schedule != "linear" else "--cooldown_frac=0"
            raise BadInput(f"--final_lr_frac={self.final_lr_frac}: {without} has no linear cooldown: leave one of them out")

    def peak_lr(self, step_tokens: int) -> float:
        """The peak learning rate of a run with `step_tokens` tokens per step."""
        if self.learning_rate != "auto":
            return self.learning_rate
        return OPTIMIZERS[self.optimizer].auto_lr(step_tokens)

    def mix_ratio(self, step: int, progress: float) -> float:
        """The learning rate of mixes relative to that of the matrices; 1 in the first step, which knows no length yet."""
        if self.mix_lr_ratio != "auto":
            return self.mix_lr_ratio
        least, most = MIX_RATIOS
        return min(max(MIX_STEPS * progress / step, least), most) if step and progress else 1.0


# -- parameter groups -------------------------------------------------------------------------------------------------

# Learning rate times weight decay, summed over a run of constant rate: the model forgets over a fraction of the run rather
# than over a number of steps. Source: Wang and Aitchison 2024, arXiv:2405.13698.
TOTAL_DECAY = 3.0
MAX_STEP_DECAY = 0.05  # per step, for runs of a few steps


def parameter_groups(model: GPT, config: OptimizerConfig, step_tokens: int) -> dict[type, list[dict]]:
    """Optimizer class -> its groups; every parameter that is trained is in one group. Besides `lr` and `weight_decay`, a
    group has `peak_lr`, `total_decay` (None, or what `set_rates` derives the weight decay from), `peak_decay` and
    `matrix_rows`: of each of the equal matrices that are stacked along the rows of a parameter; None: it is one matrix."""
    shape, by_kind, groups = model.config, {}, {}
    given = OPTIMIZERS[config.optimizer].groups(config.peak_lr(step_tokens), config.weight_decay, shape.n_embd)
    settings = {kind: given.get(kind) or given[like] for kind, like in KINDS.items()}
    # keys and values have one matrix each, or several; those of queries are of the same shape
    rows = (shape.n_kv_head or shape.n_head) * shape.head_size
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_kind.setdefault(parameter_kind(name, parameter), []).append(parameter)
    for kind, (optimizer_class, lr, decay, options) in settings.items():
        if kind in by_kind:
            is_auto = decay == "auto"
            groups.setdefault(optimizer_class, []).append({
                "params": by_kind[kind], "lr": lr, "peak_lr": lr, "matrix_rows": rows if kind == "qkv" else None,
                "weight_decay": 0.0 if is_auto else decay, "peak_decay": 0.0 if is_auto else decay,
                "total_decay": TOTAL_DECAY if is_auto else None, **options})
    return groups


def parameter_kind(name: str, parameter: Tensor) -> str:
    """matrix: a weight inside the blocks; qkv: likewise, several matrices stacked; value_embedding: a table inside them;
    ngrams: that of pairs of tokens; embedding: also learned positions and a tied head; head: an untied one; mix:
    coefficients of token shifts, and of mixes with the embedding, the first layer's values, what is looked up for a pair or
    the inputs of earlier blocks;
    residual_scale, x0_scale: of that name; smear: the parameters of Smear, and backout_coeff; scalar: everything else,
    including the coefficients of rational functions."""
    if name.startswith("smear.") or name == "backout_coeff":
        return "smear"
    if parameter.dim() != 2 or not name.endswith("weight"):
        last = name.rpartition(".")[2]
        if last in ("shift_coeff", "x0_mix", "value_mix", "ngram_mix", "dense_mix"):
            return "mix"
        return last if last in ("residual_scale", "x0_scale") else "scalar"
    if name.endswith("value_embedding.embed.weight"):
        return "value_embedding"
    if name.startswith("ngrams."):
        return "ngrams"
    if name.startswith("blocks."):
        return "qkv" if name.endswith("qkv.weight") else "matrix"
    return "head" if name == "head.weight" else "embedding"


class CombinedOptimizer:
    """Several optimizers behind the interface of one: their groups, one step, one state."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, skip: Tensor | None = None):
        """skip: a bool scalar on the device; where it is true, nothing changes."""
        if skip is None or skip.device.type == "cuda":
            self.masked_step(skip)
        elif not skip:  # a CPU reads it for free, and the fused AdamW of mps ignores found_inf
            self.masked_step(None)

    def masked_step(self, skip: Tensor | None):
        """Skips on the device, without a host sync."""
        for part in self.parts.values():
            part.step(skip)

    def zero_grad(self):
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Of what is kept from step to step, in this process."""
        return sum(value.numel() * value.element_size() for part in self.parts.values()
                   for averages in part.state.values() for value in averages.values())

    def saved_bytes(self) -> int:
        """Of it in a checkpoint."""
        return self.state_bytes()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict):
        """Loads the averages in `state`, but keeps this optimizer's learning rates and weight decay, so that a resumed run
        follows its flags. Raises ValueError when `state` does not fit the parameters."""
        if state.keys() != self.parts.keys():
            raise ValueError(f"the state of {', '.join(state)}, not of {', '.join(self.parts)}")
        for name, part in self.parts.items():
            if len(state[name]["param_groups"]) != len(part.param_groups):
                raise ValueError(f"{len(state[name]['param_groups'])} groups of {name}, not {len(part.param_groups)}, as an "
                                 "earlier version of this repository had: go on with that version")
            options = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, option in zip(part.param_groups, options):
                group.update(option)
            parameters = [p for group in part.param_groups for p in group["params"]]
            if len(part.state) not in (0, len(parameters)):
                raise ValueError(f"averages for {len(part.state)} of {len(parameters)} parameters")
            for p, averages in part.state.items():
                if averages.keys() != part.STATE or any(  # fused kernels do not check
                        value.shape != (part.state_shape(name, p) if hasattr(part, "state_shape") else p.shape)
                        or not value.is_floating_point() or not value.is_contiguous() for name, value in averages.items()):
                    raise ValueError("averages of another shape or kind than the parameter")


def make_optimizer(model: GPT, config: OptimizerConfig, step_tokens: int = CRITICAL_BATCH_TOKENS,
                   ns_dtype: torch.dtype = torch.float32) -> CombinedOptimizer:
    """step_tokens: tokens per optimizer step; ns_dtype: of Muon's matrix products."""
    by_class = parameter_groups(model, config, step_tokens)
    if model.ngrams is not None:
        model.ngrams.sparse = RowAdam in by_class  # no other reads such gradients
    return CombinedOptimizer({optimizer_class.__name__.lower(): optimizer_class(groups, config, ns_dtype)
                              for optimizer_class, groups in by_class.items()})


# -- AdamW and Muon ---------------------------------------------------------------------------------------------------

BETAS = 0.9, 0.95
MOMENTUM_START, MOMENTUM, MOMENTUM_WARMUP = 0.85, 0.95, 200  # Muon's momentum, and the steps over which it grows
# Polynomials a s + b s³ + c s⁵, one after the other, that move singular values s towards 1: those of Newton and Schulz into
# [0.7, 1.2]; those of Amsel et al. 2025, section 3, for five steps
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
NS_MAX_NUMEL = 2**25  # numbers in the matrices stacked for one iteration: 64 MiB in bf16


# torch imports the compiler, which takes seconds, to keep these methods out of what it compiles. Nothing here compiles an
# optimizer, so they are called as they are: this is what torch's wrapper of each looks up.
for method in vars(torch.optim.Optimizer).values():
    if plain_method := getattr(method, "__wrapped__", None):
        plain_method.__dynamo_disable = plain_method


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with a step that can be skipped on the device."""
    STATE = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter

    def __init__(self, groups: list[dict], config: OptimizerConfig, ns_dtype: torch.dtype):
        super().__init__(groups, betas=BETAS, fused=True)

    def state_shape(self, name: str, p: Tensor) -> tuple[int, ...]:
        return () if name == "step" else tuple(p.shape)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        self.found_inf = None if skip is None else skip.float()
        inspect.unwrap(torch.optim.AdamW.step)(self)  # without a wrapper that imports the compiler too


class RowAdam(torch.optim.Optimizer):
    """Adam for large tables of which a step sees some rows: without momentum, and with one second moment for each row, so
    that its state is small beside the table. As in AdamW, the average falls while a row is not seen: a step multiplies that
    one number of every row, and reads and writes the vectors of the rows alone that it has seen. Gradients may be sparse or
    dense. Each backward pass adds up those of a row, see `sum_rows`."""
    STATE = {"step", "second_moment"}
    EPS = 1e-8

    def __init__(self, groups: list[dict], config: OptimizerConfig, ns_dtype: torch.dtype):
        super().__init__(groups, {})
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(sum_rows)

    def state_shape(self, name: str, p: Tensor) -> tuple[int, ...]:
        return () if name == "step" else (p.size(0), 1)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = {name: p.new_zeros(self.state_shape(name, p)) for name in self.STATE}
                step, second = self.state[p]["step"], self.state[p]["second_moment"]
                is_sparse = p.grad.is_sparse
                rows = p.grad._indices()[0] if is_sparse else torch.arange(p.size(0), device=p.device)
                grad = p.grad._values() if is_sparse else p.grad
                if skip is not None:
                    grad = grad.masked_fill(skip, 0.0)  # zero times infinity would not be zero
                keep = 1.0 if skip is None else (~skip).float()
                step += keep
                square = torch.linalg.vector_norm(grad, dim=1, keepdim=True).square() / p.size(1)
                second.mul_(1 - (1 - BETAS[1]) * keep).index_add_(0, rows, square * keep, alpha=1 - BETAS[1])
                scale = (second[rows] / (1 - BETAS[1] ** step).clamp(min=self.EPS)).sqrt() + self.EPS
                p.index_add_(0, rows, grad / scale, alpha=-group["lr"])


@torch.no_grad()
def sum_rows(p: Tensor):
    """Replaces a sparse gradient of p, (rows, C), in which rows may repeat, by one that has each of them once, in sums whose
    order is fixed on every device. coalesce() would wait for a GPU to say how many they are; here, rows of zeros fill up
    what is left."""
    if not p.grad.is_sparse:
        return
    rows, grads = p.grad._indices()[0], p.grad._values()  # (N,), (N, C)
    ordered, order = rows.sort(stable=True)
    is_first = torch.ones_like(rows)
    is_first[1:] = ordered[1:] != ordered[:-1]
    number = is_first.cumsum(0) - 1  # of each one among the distinct rows
    n = min(rows.numel(), p.size(0))
    distinct = rows.new_zeros(n).scatter_(0, number, ordered)
    sums = torch.ops.aten.embedding_dense_backward(grads, torch.empty_like(number).scatter_(0, order, number), n, -1, False)
    p.grad = torch.sparse_coo_tensor(distinct[None], sums, p.shape, check_invariants=False)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: a step is (about) the nearest matrix whose singular values are all 1, times √(rows/columns)
    where that is above 1. The state is one momentum per parameter.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Parameters of one shape are stacked, because many
    small products would leave a GPU idle.
    """
    STATE = {"momentum"}

    def __init__(self, groups: list[dict], config: OptimizerConfig, ns_dtype: torch.dtype):
        """ns_dtype: of the matrix products of the iteration."""
        super().__init__(groups, {"momentum": MOMENTUM})
        self.ns_dtype = ns_dtype
        self.momentum_dtype = torch.bfloat16 if config.momentum_dtype == "bf16" else torch.float32

    @staticmethod
    def momentum_at(step: int, progress: float, config: OptimizerConfig) -> float:
        return MOMENTUM_START + (MOMENTUM - MOMENTUM_START) * min(1.0, step / MOMENTUM_WARMUP)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        for group in self.param_groups:
            for parameters in group_by_shape(group["params"]):
                self.step_stacked(parameters, group, skip)

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        for averages in self.state.values():  # torch has cast them to the parameters' dtype
            averages["momentum"] = averages["momentum"].to(self.momentum_dtype)

    def step_stacked(self, parameters: list[Tensor], group: dict, skip: Tensor | None):
        """Steps parameters of one shape, all their matrices at once."""
        momentum, rows, columns = group["momentum"], group["matrix_rows"] or parameters[0].size(0), parameters[0].size(1)
        n = parameters[0].size(0) // rows
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=self.momentum_dtype)
        matrices = lambda tensors: [tensor.view(n, rows, columns) for tensor in tensors]
        grads = torch.cat(matrices([p.grad for p in parameters]))  # (parameters * n, rows, columns)
        saved = matrices([self.state[p]["momentum"] for p in parameters])
        keep = 1.0  # becomes 0 in a skipped step
        if skip is not None:
            grads.masked_fill_(skip, 0.0)  # zero times infinity would not be zero
            keep = (~skip).float()
        average = torch.lerp(torch.cat(saved).float(), grads, (1 - momentum) * keep)
        torch._foreach_copy_(saved, average.split(n))
        update = self.update_of(grads.lerp_(average, momentum), parameters, keep)  # Nesterov momentum
        if skip is not None:
            update.mul_(keep)
        # one call for all parameters of one dtype: a GPU would wait for the launches of one for each
        views, updates, lr = matrices(parameters), update.split(n), group["lr"] * max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            self.decay(views, updates, group, lr, keep)
        torch._foreach_add_(views, updates, alpha=-lr)

    def update_of(self, average: Tensor, parameters: list[Tensor], keep: float | Tensor) -> Tensor:
        """average: (matrices, rows, columns) of all parameters, may be overwritten. Returns what is subtracted, the same
        shape. keep: 0 in a skipped step."""
        return average.copy_(newton_schulz(average, self.ns_dtype))

    def decay(self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict, lr: float, keep: float | Tensor):
        """lr: of the step, which the shape of the matrices scales."""
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * keep)


class NorMuon(Muon):
    """nanochat's Muon (https://github.com/karpathy/nanochat): rows of equal norm go into the iteration, Polar Express is the
    iteration, and its result is scaled to the norm of an orthogonal matrix and divided by the root mean square over time of
    each row (or column), without changing its norm; weights only decay where the update makes them smaller.

    Sources: Amsel et al. 2025 (Polar Express), arXiv:2505.16932; Li et al. 2025 (NorMuon), arXiv:2510.05491; Chen et al.
    2025 (cautious weight decay), arXiv:2510.12402; for the norms of the rows and of the result those that nanochat names,
    arXiv:2603.28254 and arXiv:2602.21545.
    """
    STATE = {"momentum", "second_moment"}
    BETA2 = 0.9

    def state_shape(self, name: str, p: Tensor) -> tuple[int, ...]:
        rows = next(group["matrix_rows"] for group in self.param_groups
                    if any(p is other for other in group["params"])) or p.size(0)
        by_row = (p.size(0), 1) if rows >= p.size(1) else (p.size(0) // rows, p.size(1))
        return by_row if name == "second_moment" else tuple(p.shape)

    @staticmethod
    def momentum_at(step: int, progress: float, config: OptimizerConfig) -> float:
        """0.85 to 0.97 in 400 steps, down to 0.90 in the cooldown."""
        if step < 400:
            return 0.85 + 0.12 * step / 400
        return 0.97 - 0.07 * max(0.0, 1 - (1 - progress) / config.cooldown_frac) if config.cooldown_frac else 0.97

    def update_of(self, average: Tensor, parameters: list[Tensor], keep: float | Tensor) -> Tensor:
        rows, columns = average.shape[1:]
        update = average.copy_(polar_express(equal_rows(average.to(self.ns_dtype))))
        update *= min(rows, columns) ** 0.5 / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        for p in parameters:
            if "second_moment" not in self.state[p]:
                self.state[p]["second_moment"] = p.new_zeros(self.state_shape("second_moment", p))
        saved = [self.state[p]["second_moment"] for p in parameters]
        dim = 2 if rows >= columns else 1
        square = update.square().mean(dim=dim, keepdim=True)  # (matrices, rows, 1) or (matrices, 1, columns)
        second = torch.cat(saved).view_as(square).lerp(square, (1 - self.BETA2) * keep)
        torch._foreach_copy_(saved, second.view(-1, saved[0].size(1)).split(saved[0].size(0)))
        scale = second.clamp(min=1e-10).rsqrt()
        norm, scaled_norm = square.sum(dim=(1, 2), keepdim=True), (square * scale.square()).sum(dim=(1, 2), keepdim=True)
        return update.mul_(scale * (norm / scaled_norm.clamp(min=1e-20)).sqrt())

    def decay(self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict, lr: float, keep: float | Tensor):
        for p, update in zip(parameters, updates):
            p.sub_(p * (update * p >= 0) * (lr * group["weight_decay"] * keep))


def group_by_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters that have a gradient and one shape, of NS_MAX_NUMEL numbers at most where one has fewer."""
    by_shape = {}
    for p in parameters:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for shape, ps in by_shape.items():
        n = max(1, NS_MAX_NUMEL // shape.numel())
        yield from (ps[i:i + n] for i in range(0, len(ps), n))


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x: (n, rows, columns) -> about U Vᵀ of the singular value decomposition of each matrix, in `dtype`."""
    return orthogonalize(x.to(dtype), NEWTON_SCHULZ)


def polar_express(x: Tensor) -> Tensor:
    """As `newton_schulz`, in the dtype of x, with a polynomial of its own for each step."""
    return orthogonalize(x, POLAR_EXPRESS, margin=1.01)


def orthogonalize(x: Tensor, polynomials: Sequence[tuple[float, float, float]], margin: float = 1.0) -> Tensor:
    """x: (n, rows, columns). Applies a s + b s³ + c s⁵ to all singular values s of each matrix for each (a, b, c), after a
    division that leaves them at most 1 / margin."""
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / (margin * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def equal_rows(x: Tensor) -> Tensor:
    """x: (n, rows, columns), each row scaled to the root mean square of their norms."""
    norms = x.float().norm(dim=2, keepdim=True)
    wanted = norms.square().mean(dim=1, keepdim=True).sqrt()
    return x * (wanted / norms.clamp(min=1e-6)).to(x.dtype)


# -- schedule ---------------------------------------------------------------------------------------------------------

def lr_scale(step: int, progress: float, config: OptimizerConfig) -> float:
    """Fraction of the peak learning rate. step: counts from 0; progress: fraction of the run done before it, below 1.

    linear: warmup, constant, linear cooldown towards zero (Zhai et al. 2022, section 3.5, arXiv:2106.04560; Hägele et al.
    2024, arXiv:2405.18392), or to `final_lr_frac`. cosine: warmup, then half a cosine down to a tenth, as in nanoGPT.
    """
    assert 0 <= progress < 1, progress
    warmup = min(1.0, (step + 1) / (config.warmup_iter + 1))
    if config.schedule == "linear":
        if not config.cooldown_frac:
            return warmup
        left = min(1.0, (1 - progress) / config.cooldown_frac)
        return min(warmup, left + (1 - left) * config.final_lr_frac)
    if step < config.warmup_iter or step == 0:
        return warmup
    done = (step - config.warmup_iter) / max(step / progress - config.warmup_iter, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rates(optimizer: CombinedOptimizer, step: int, progress: float, config: OptimizerConfig):
    """Sets every group's learning rate and weight decay, and Muon's momentum, which warms up. Call before each step. step,
    progress: as in `lr_scale`; together they imply the number of steps in the run."""
    scale = lr_scale(step, progress, config)
    for part in optimizer.parts.values():
        for group in part.param_groups:
            group["lr"] = group["peak_lr"] * scale
            if group.get("is_mix"):
                group["lr"] *= config.mix_ratio(step, progress)
            if group["total_decay"] is not None:
                step_decay = min(group["total_decay"] * progress / max(step, 1), MAX_STEP_DECAY)
                group["weight_decay"] = step_decay / group["peak_lr"]
            if group.get("decay_schedule") == "cosine":
                group["weight_decay"] = group["peak_decay"] * 0.5 * (1 + math.cos(math.pi * progress))
            if hasattr(part, "momentum_at"):
                group["momentum"] = part.momentum_at(step, progress, config)
