"""Training at inference time: a model that learns from what it has just read, and then forgets it again.

A text is read a hop of tokens at a time. A hop is predicted first, with the weights as they are, and that is its score; then
one step is taken on it. `forget` puts the weights back, bit for bit.

    learner = Learner(model, AdaptConfig(), machine)
    losses = learner.read(ids)      # in nats, of every hop, before the step on it
    learner.forget()

What precedes a hop is in the cache, as earlier weights made it: no gradient flows there, and little is computed twice. When
the cache is full, it is made anew from the last half block with the weights as they are then. So every token is predicted
from what it is in `evaluate.py`. Source: dynamic evaluation, Krause et al. 2018, arXiv:1709.07432; for transformers with
cached contexts, Krause et al. 2019, arXiv:1904.08378.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from dataloader import cut_windows
from experiments.scores import Score, count
from layers.linear import linear_layers
from model import GPT, Cache, GPTConfig
from optimizer import AdamW, CombinedOptimizer, parameter_kind
from runtime.checkpoint import find_tensors
from runtime.cli import progress_bar
from runtime.config import BadInput, check_flags, flag, flag_names, refuse_given
from runtime.device import Machine
from runtime.metrics import NonFiniteGuard
from sampling import cache_dtype
from text.sources import SourceConfig, open_source, take_text
from tokenizer import Tokenizer
from trainer import MAX_FP16_SKIPS, LoopConfig, TrainState, train_step

# -- what is trained --------------------------------------------------------------------------------------------------

def in_last_half_mlps(name: str, config: GPTConfig) -> bool:
    first, layer, part = (name.split(".") + ["", ""])[:3]
    return first == "blocks" and part == "mlp" and int(layer) >= config.n_layer // 2


class AdaptScope(NamedTuple):
    """A choice of --adapt_scope. trains(name of a parameter, config) -> bool. rate_ratio: of --adapt_rate=auto, relative to
    that of all weights: the fewer are trained, the further each has to go."""
    trains: Callable[[str, GPTConfig], bool]
    rate_ratio: float


ADAPT_SCOPES = {"all": AdaptScope(lambda name, config: True, 1.0), "last_half_mlps": AdaptScope(in_last_half_mlps, 2.0),
                "norms": AdaptScope(lambda name, config: "norm." in name, 10.0),
                "lora": AdaptScope(lambda name, config: False, 15.0)}  # none of the model's own, see LowRankUpdate


def has_scope(model: GPT, scope: str) -> bool:
    """Whether the model has parameters that this --adapt_scope trains."""
    return scope == "lora" or any(ADAPT_SCOPES[scope].trains(name, model.config) for name, _ in model.named_parameters())


class LowRankUpdate(nn.Module):
    """weight + up @ down, of which `up`, zero at first, is trained, and `down` is fixed and has orthonormal rows.

    At full rank, where `down` is the identity, a step of `up` is a step of `weight`. Sources: Hu et al. 2021 (LoRA),
    arXiv:2106.09685; with `down` fixed, Zhang et al. 2023 (LoRA-FA), arXiv:2308.03303.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        n_out, n_in = weight.shape
        rank = min(rank, n_in)
        down = torch.eye(n_in) if rank == n_in else torch.linalg.qr(torch.randn(n_in, rank, generator=generator))[0].T
        self.register_buffer("down", down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank_updates(model: GPT, rank: int) -> list[nn.Parameter]:
    """Adds an update to every linear layer in the blocks. Returns the parameters that are trained."""
    generator = torch.Generator().manual_seed(0)
    updates = [LowRankUpdate(layer.weight, rank, generator) for layer in linear_layers(model.blocks)]
    for layer, update in zip(linear_layers(model.blocks), updates):
        parametrize.register_parametrization(layer, "weight", update)
    return [update.up for update in updates]


# -- update rules -----------------------------------------------------------------------------------------------------

BETAS = 0.8, 0.99  # a document is some hundred steps: averages over fewer of them than in pretraining
EMBED_RATIO = 2.0  # learning rate of embedding and head, relative to that of the rest
RMS_FLOOR = 0.1    # of the mean root mean square: other text may have never used a token
STATISTICS_BYTES = 30_000


class AdaptAdamW(AdamW):
    """Without weight decay."""

    def __init__(self, groups: list[dict], config: "AdaptConfig"):
        super().__init__([group | {"betas": BETAS, "weight_decay": 0.0} for group in groups], config, torch.float32)


class SGD(torch.optim.SGD):
    """Plain gradient descent, as the first dynamic evaluation was (Mikolov et al. 2010)."""

    def __init__(self, groups: list[dict], config: "AdaptConfig"):
        super().__init__(groups, fused=True)

    def step(self, skip: Tensor | None = None):
        self.found_inf = None if skip is None else skip.float()
        super().step()


class RmsScaled(torch.optim.Optimizer):
    """Steps along the gradient over its root mean square on other text, and back towards the initial weights, most where
    that root mean square is large. Until `end_statistics` it changes nothing, and gathers the mean squares. Source: Krause
    et al. 2018, section 4.1."""

    def __init__(self, groups: list[dict], config: "AdaptConfig"):
        """groups: with `initial`, a tensor for each parameter."""
        super().__init__(groups, {"pull": config.adapt_pull})
        self.squares = [[torch.zeros_like(p) for p in group["params"]] for group in self.param_groups]
        self.n_gathered, self.rms = 0, None

    def end_statistics(self):
        self.rms = [[(total / self.n_gathered).sqrt() for total in squares] for squares in self.squares]
        self.mean_rms = torch.cat([rms.flatten() for group in self.rms for rms in group]).mean()
        del self.squares

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        keep = 1.0 if skip is None else (~skip).float()
        if self.rms is None:
            for group, squares in zip(self.param_groups, self.squares):
                for p, total in zip(group["params"], squares):
                    total.add_(p.grad.nan_to_num().square() * keep)
            self.n_gathered += 1
            return
        for group, all_rms in zip(self.param_groups, self.rms):
            for p, initial, rms in zip(group["params"], group["initial"], all_rms):
                pull = (group["pull"] * rms / self.mean_rms).clamp(max=1.0)
                change = (initial - p) * pull - group["lr"] * p.grad / (rms + RMS_FLOOR * self.mean_rms)
                p.add_(change if skip is None else change.masked_fill(skip, 0.0))


ADAPT_OPTIMIZERS = {"adamw": AdaptAdamW, "rms": RmsScaled, "sgd": SGD}
AUTO_RATES = {"adamw": 6e-4, "rms": 2e-4, "sgd": 0.03}  # measured on the quick start's model, docs/adapt.md


@dataclass(frozen=True)
class AdaptConfig:
    """Training at inference time."""
    adapt_rate: float = flag("auto", f"learning rate; that of the embedding is {EMBED_RATIO:g} times as high; auto: " +
                             ", ".join(f"{rate:g} with {name}" for name, rate in AUTO_RATES.items()) +
                             ", more where less is trained", above=0, auto=True)
    adapt_hop: int = flag(16, "tokens that are scored, and then trained on, at a time; at most half a context", at_least=1)
    adapt_scope: str = flag("all", "what is trained: all weights, the feed-forward layers of the last half of the blocks, "
                                   "the parameters of the norms, or an update of low rank to every linear layer",
                            choices=tuple(ADAPT_SCOPES))
    adapt_optimizer: str = flag("adamw", "update rule; rms: the gradient over its root mean square on --adapt_statistics, "
                                         "with a pull towards the weights before (RMS dynamic evaluation)",
                                choices=tuple(ADAPT_OPTIMIZERS))
    adapt_pull: float = flag(0.001, "with --adapt_optimizer=rms, the strength of that pull, per step", at_least=0, at_most=1)
    adapt_statistics: str = flag("builtin", "with --adapt_optimizer=rms, a dataset as that of download_data.py, from whose "
                                            "first 30 kB the root mean squares come")
    adapt_rank: int = flag(8, "with --adapt_scope=lora, the rank of the updates", at_least=1)

    def __post_init__(self):
        check_flags(self)
        if self.adapt_optimizer != "rms":
            refuse_given(self, {"adapt_pull", "adapt_statistics"}, "is only used with --adapt_optimizer=rms: add it")
        if self.adapt_scope != "lora":
            refuse_given(self, {"adapt_rank"}, "is only used with --adapt_scope=lora: add it")

    @property
    def rate(self) -> float:
        auto = AUTO_RATES[self.adapt_optimizer] * ADAPT_SCOPES[self.adapt_scope].rate_ratio
        return auto if self.adapt_rate == "auto" else self.adapt_rate


# -- hops -------------------------------------------------------------------------------------------------------------

class Hop(NamedTuple):
    """Positions of a text: start to stop - 1 are read, given those from context_start on."""
    context_start: int
    start: int
    stop: int


def clip_hop(hop: int, block_size: int) -> int:
    """The hop in a model of this context, in which two of them fit."""
    return min(hop, max(1, block_size // 2))


def cut_hops(n: int, hop: int, block_size: int, first: int = 0) -> Iterator[Hop]:
    """The hops that read positions `first` to n - 1 once each, in the windows of `evaluate.py`.

    Example: n = 10, hop = 2, block_size = 4 -> 0-1, 2-3 with 0 on as context, 4-5 with 2 on, 6-7 with 4 on, 8-9 with 6 on.
    """
    for context_start, start, stop in cut_windows(n, block_size, first):
        for hop_start in range(start, stop, hop):
            yield Hop(context_start, hop_start, min(hop_start + hop, stop))


# -- the learner ------------------------------------------------------------------------------------------------------

class Learner:
    """A model, in fp32 and on the device of `machine`, that trains at inference time. It is its own loader, whose batch is
    what it reads now."""
    loop = LoopConfig(max_iter=1, num_batch_accum=1)

    def __init__(self, model: GPT, config: AdaptConfig, machine: Machine):
        """Raises BadInput for a scope that the model has nothing in."""
        self.model, self.config, self.machine = model, config, machine
        self.hop = clip_hop(config.adapt_hop, model.config.block_size)
        model.requires_grad_(False)
        if model.ngrams is not None:
            model.ngrams.sparse = False  # in training with RowAdam too: the rules here read dense gradients
        in_scope = ADAPT_SCOPES[config.adapt_scope].trains
        chosen = {name: p for name, p in model.named_parameters() if in_scope(name, model.config)}
        if config.adapt_scope == "lora":
            ups = {id(up) for up in add_low_rank_updates(model, config.adapt_rank)}
            chosen = {name: p for name, p in model.named_parameters() if id(p) in ups}
        if not has_scope(model, config.adapt_scope):
            raise BadInput(f"--adapt_scope={config.adapt_scope}: this model has no parameters there: choose another")
        by_ratio = {}
        for name, p in chosen.items():
            ratio = EMBED_RATIO if parameter_kind(name, p) in ("embedding", "value_embedding", "ngrams", "head") else 1.0
            by_ratio.setdefault(ratio, []).append(p.requires_grad_(True))
        groups = [{"params": params, "initial": [p.detach().clone() for p in params], "lr": config.rate * ratio}
                  for ratio, params in by_ratio.items()]
        self.weights = [pair for group in groups for pair in zip(group["params"], group["initial"])]
        name, guard = config.adapt_optimizer, self.make_guard()
        optimizer = CombinedOptimizer({name: ADAPT_OPTIMIZERS[name](groups, config)})
        self.state = TrainState(model, optimizer, machine.grad_scaler(), self, guard)
        self.batch: tuple[Tensor, ...] = ()  # what `step` trains on

    def next_batch(self, model: GPT) -> tuple[Tensor, ...]:
        return self.batch

    def step(self, batch: tuple[Tensor, ...], loss_fn: Callable) -> Tensor:
        """One step on a batch. Returns loss_fn(model, batch) before it, on the device. A step whose loss or gradient is not
        finite changes nothing, see `check`."""
        self.batch = batch
        loss, _ = train_step(self.state, self.loop, loss_fn, self.machine)
        self.state.step += 1
        return loss

    def check(self):
        """Raises FloatingPointError when a step since the last `forget` was not finite."""
        if step := self.state.guard.read()["failed_at"]:
            raise FloatingPointError(f"loss or gradient not finite at step {step:,}: lower --adapt_rate, now "
                                     f"{self.config.rate:g}")

    def read(self, ids: Tensor, first: int = 0, learn: bool = True, keep_state: bool = False) -> Tensor:
        """Reads positions `first` on of a text, ids (n + 1,) int64, given those before, and learns from every hop once it
        is scored. Returns the summed losses of the hops (`cut_hops` tells which) in nats, (hops,) float64 on the CPU.
        learn: False leaves the weights as they are. keep_state: the cache is never made anew, for models whose cache does
        not grow. Raises FloatingPointError, see `check`, and when a loss without steps is not finite: it may be the last
        step before that has led to such weights."""
        ids, n = ids.to(self.machine.device), len(ids) - 1
        means, lengths, cache, context_start = [], [], None, -1
        for hop in cut_hops(n, self.hop, n if keep_state else self.model.config.block_size, first):
            if hop.context_start != context_start:
                cache, context_start = self.fill_cache(ids[hop.context_start:hop.start]), hop.context_start
            batch = ids[None, hop.start:hop.stop], ids[None, hop.start + 1:hop.stop + 1]
            means.append(self.read_hop(batch, cache, learn))
            lengths.append(hop.stop - hop.start)
        if learn:
            self.check()
        means = torch.stack(means).cpu().double() if means else torch.zeros(0, dtype=torch.float64)
        if not learn and not means.isfinite().all():
            raise FloatingPointError(f"loss not finite after step {self.state.step:,}: lower --adapt_rate, now "
                                     f"{self.config.rate:g}")
        return means * torch.tensor(lengths, dtype=torch.float64)

    def read_hop(self, batch: tuple[Tensor, Tensor], cache: Cache, learn: bool) -> Tensor:
        """The mean loss of a hop, which goes into the cache. batch: inputs and targets, (1, T)."""
        loss_fn = lambda model, batch: model.eager_forward(*batch, cache=cache)
        if learn:
            loss = self.step(batch, loss_fn)
            cache.detach()
            return loss
        with torch.no_grad(), self.machine.autocast():
            return loss_fn(self.model, self.machine.to_device(batch))

    @torch.no_grad()
    def fill_cache(self, context: Tensor) -> Cache:
        """A cache of `block_size` positions that holds `context`, (n,) ids."""
        with self.machine.autocast():
            cache = self.model.init_cache(1, self.model.config.block_size, cache_dtype(self.model))
            if len(context):
                self.model.eager_forward(context[None], cache=cache, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def forget(self):
        """Puts the weights back as they were, bit for bit, and drops what the update rule has gathered since."""
        self.state.optimizer.zero_grad()  # of a step that was interrupted
        for parameter, initial in self.weights:
            parameter.copy_(initial)
        for part in self.state.optimizer.parts.values():
            part.state.clear()
        self.state.step, self.state.scaler, self.state.guard = 0, self.machine.grad_scaler(), self.make_guard()

    @torch.no_grad()
    def keep(self):
        """Makes the weights as they are now those that `forget` returns to."""
        for parameter, initial in self.weights:
            initial.copy_(parameter)

    def extra_bytes(self) -> int:
        """What learning holds in memory besides the model, after a step: a copy of the trained weights, their gradients, and
        what the update rule has gathered."""
        (rule,) = self.state.optimizer.parts.values()
        gathered = find_tensors([*rule.state.values(), getattr(rule, "rms", None)])
        return sum(tensor.numel() * tensor.element_size() for tensor in gathered) + sum(
            2 * initial.numel() * initial.element_size() for _, initial in self.weights)

    def n_trained(self) -> int:
        """How many numbers are trained."""
        return sum(initial.numel() for _, initial in self.weights)

    def make_guard(self) -> NonFiniteGuard:
        return NonFiniteGuard(self.machine.device, limit=MAX_FP16_SKIPS if self.machine.dtype == "fp16" else 1)

    def to_checkpoint(self) -> dict:
        """Config and weights as they are now, see GPT.to_checkpoint, with updates of low rank added to the weights."""
        checkpoint, updated = self.model.to_checkpoint(), {}
        modules = dict(self.model.named_modules())
        for name, value in checkpoint["model"].items():
            layer, is_update, part = name.partition(".parametrizations.weight.")
            if part == "original":
                updated[f"{layer}.weight"] = modules[layer].weight.detach()
            elif not is_update:
                updated[name] = value
        return checkpoint | {"model": updated}


def require_adapt(adapt: bool, config: AdaptConfig):
    """Raises BadInput for a flag of `config` that is given without --adapt, by which it would go unused."""
    if not adapt:
        refuse_given(config, flag_names(AdaptConfig), "is only used when the model learns: add --adapt")


def open_learner(model: GPT, tokenizer: Tokenizer, config: AdaptConfig, machine: Machine) -> Learner:
    """A learner that is ready to read, with the statistics that its update rule needs. Raises BadInput."""
    learner = Learner(model.to(machine.device), config, machine)
    if config.adapt_optimizer == "rms":
        try:
            texts = list(take_text(open_source(SourceConfig(config.adapt_statistics)).documents(), STATISTICS_BYTES))
        except BadInput as error:
            raise BadInput(f"--adapt_statistics={config.adapt_statistics}: {error}") from None
        for ids in progress_bar(encode_documents(tokenizer, texts), desc="statistics", unit="document", delay=1):
            learner.read(ids)
        learner.state.optimizer.parts["rms"].end_statistics()
        learner.forget()
    return learner


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Tensor]:
    """The ids of each text after the separator, (n + 1,) int64."""
    for text in texts:
        yield torch.tensor([tokenizer.separator_id, *tokenizer.encode(text)])


# -- scores after learning --------------------------------------------------------------------------------------------

def after_learning(learner: Learner, texts: Iterable[Tensor], score: Callable[[int, Tensor], object], unit: str,
                   n: int) -> list:
    """score(i, losses) for each of the `n` texts, ids, once the model has learnt from it; its hops had these losses in nats.
    Then the model forgets it. None where a step was not finite. Raises FloatingPointError if that is everywhere."""
    results, failure = [], None
    for i, ids in enumerate(progress_bar(texts, total=n, desc="adapted", unit=unit, delay=1)):
        try:
            results.append(score(i, learner.read(ids)))
        except FloatingPointError as error:
            results.append(None)
            failure = error
        learner.forget()
    if failure is not None and not any(result is not None for result in results):
        raise failure
    return results


def drop_diverged(adapted: list, *others: list) -> tuple[dict[str, Score], list[list]]:
    """The lists without what `after_learning` has no result of, and a row of the table that counts it."""
    kept = [i for i, result in enumerate(adapted) if result is not None]
    n_diverged = len(adapted) - len(kept)
    return ({"left out, as learning from them diverged": count(n_diverged)} if n_diverged else {},
            [[values[i] for i in kept] for values in (adapted, *others)])
