"""--shard=optimizer: several processes that train one model keep a part of the optimizer's state each.

    optimizer = ShardedOptimizer(optimizer, world)     # in place of the optimizer of one process

Each process steps what it owns and gets the rest from the others, so that all have all weights; gradients are those of a run
without it. What AdamW updates is divided evenly, a matrix under Muon has one owner, and RowAdam, whose state is small, steps
everywhere. The state of a checkpoint is that of one process, however many have written it. Source: Rajbhandari et al. 2020
(ZeRO), stage 1, arXiv:1910.02054.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from optimizer import AdamW, CombinedOptimizer, RowAdam
from runtime.distributed import World


class Piece(NamedTuple):
    """What a process owns of a parameter: numbers start to stop of it, flat. tensor: a view of them, of the parameter's
    shape where it is whole. owner: rank of a process; None: all of them, each the same."""
    parameter: Tensor
    tensor: Tensor
    start: int
    stop: int
    owner: int | None

    @property
    def is_whole(self) -> bool:
        return self.tensor.shape == self.parameter.shape


class ShardedOptimizer(CombinedOptimizer):
    """Behind the interface of a CombinedOptimizer, the one of a process of `world`."""

    def __init__(self, whole: CombinedOptimizer, world: World):
        """whole: with all parameters, that has not made a step; it is used up."""
        super().__init__(whole.parts)
        self.world = world
        # part -> its groups, each with the pieces of all processes in the order of its parameters
        self.pieces = {name: divide(part, world.size) for name, part in whole.parts.items()}
        for name, part in whole.parts.items():
            for group, pieces in zip(part.param_groups, self.pieces[name]):
                group["params"] = [piece.tensor for piece in pieces if self.is_own(piece)]

    def is_own(self, piece: Piece) -> bool:
        return piece.owner in (None, self.world.rank)

    @property
    def param_groups(self) -> list[dict]:
        """Those of the optimizer of one process, with all parameters."""
        return [group | {"params": list(dict.fromkeys(piece.parameter for piece in pieces))}
                for name, part in self.parts.items() for group, pieces in zip(part.param_groups, self.pieces[name])]

    def masked_step(self, skip: Tensor | None):
        pieces = [piece for groups in self.pieces.values() for group in groups for piece in group]
        for piece in filter(self.is_own, pieces):
            grad = piece.parameter.grad
            piece.tensor.grad = grad if grad is None or piece.is_whole else grad.view(-1)[piece.start:piece.stop]
        super().masked_step(skip)
        self.world.exchange([[piece.tensor for piece in pieces if piece.owner == rank] for rank in range(self.world.size)])

    def zero_grad(self):
        for groups in self.pieces.values():
            for pieces in groups:
                for piece in pieces:
                    piece.parameter.grad = None
        super().zero_grad()

    def saved_bytes(self) -> int:
        return self.world.size * self.state_bytes()

    def state_dict(self) -> dict:
        """In the main process that of an optimizer with all parameters; to be called in all of them at the same time."""
        return {name: self.join_state(name, part.state_dict()) for name, part in self.parts.items()}

    def join_state(self, name: str, own: dict) -> dict:
        """own: the state of a part in this process."""
        states = self.world.gather_to_main({i: {key: value.cpu() for key, value in averages.items()}
                                            for i, averages in own["state"].items()})
        joined, groups, n_parameters = {}, [], 0
        numbers = [0] * len(states)  # of each process, the next of its parameters
        for group, pieces in zip(own["param_groups"], self.pieces[name]):
            parts_of = {}
            for piece in pieces:
                parts_of.setdefault(piece.parameter, []).append(piece)
            for parts in parts_of.values():
                averages = []
                for piece in parts:
                    for rank in range(len(states)):
                        if piece.owner in (None, rank):
                            averages.append(states[rank].get(numbers[rank]))
                            numbers[rank] += 1
                if states and averages[0] is not None:
                    joined[n_parameters] = join_averages(parts, averages)
                n_parameters += 1
            groups.append(group | {"params": list(range(n_parameters - len(parts_of), n_parameters))})
        return {"state": joined, "param_groups": groups}

    def load_state_dict(self, state: dict):
        super().load_state_dict({name: self.own_state(name, saved) if name in self.parts else saved
                                 for name, saved in state.items()})

    def own_state(self, name: str, saved: dict) -> dict:
        """What this process owns of the state of a part with all parameters."""
        own, groups, n = {}, [], 0
        for group, pieces in zip(saved["param_groups"], self.pieces[name]):
            numbers, first = dict(zip(dict.fromkeys(piece.parameter for piece in pieces), group["params"])), n
            for piece in filter(self.is_own, pieces):
                if averages := saved["state"].get(numbers[piece.parameter]):
                    own[n] = {key: value.reshape(-1)[piece.start:piece.stop].clone()
                              if not piece.is_whole and value.shape == piece.parameter.shape else value
                              for key, value in averages.items()}
                n += 1
            groups.append(group | {"params": list(range(first, n))})
        return {"state": own, "param_groups": groups + saved["param_groups"][len(groups):]}


def divide(part: torch.optim.Optimizer, n: int) -> list[list[Piece]]:
    """The pieces of the parameters of each group, for `n` processes."""
    if isinstance(part, RowAdam):
        return [[whole_piece(p, None) for p in group["params"]] for group in part.param_groups]
    if isinstance(part, AdamW):
        return [[piece for p in group["params"] for piece in divide_evenly(p, n)] for group in part.param_groups]
    owners, load = {}, [0] * n
    for p in sorted((p for group in part.param_groups for p in group["params"]), key=Tensor.numel, reverse=True):
        owners[p] = load.index(min(load))
        load[owners[p]] += p.numel()
    return [[whole_piece(p, owners[p]) for p in group["params"]] for group in part.param_groups]


def whole_piece(p: Tensor, owner: int | None) -> Piece:
    return Piece(p, p.detach(), 0, p.numel(), owner)


def divide_evenly(p: Tensor, n: int) -> list[Piece]:
    """In `n` pieces, or whole where it has fewer numbers."""
    if p.numel() < n:
        return [whole_piece(p, 0)]
    bounds = [rank * p.numel() // n for rank in range(n + 1)]
    return [Piece(p, p.detach().view(-1)[start:stop], start, stop, rank)
            for rank, (start, stop) in enumerate(zip(bounds, bounds[1:]))]


def join_averages(pieces: list[Piece], averages: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a parameter. averages: of each piece, or of a whole parameter in each process."""
    if pieces[0].is_whole:
        return averages[0]
    shape = pieces[0].parameter.shape
    return {key: torch.cat([part[key] for part in averages]).view(shape) if value.dim() else value
            for key, value in averages[0].items()}
