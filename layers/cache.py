"""What layers remember of the texts of a batch while these are decoded."""
import copy

import torch
from torch import Tensor


class RowCache:
    """The state of a layer. Its attributes that are tensors have a row of each text first; what they hold is what a subclass
    says, which also has to define `rewind(n)`: forget the last `n` of the positions seen since the last `rewind` while
    `metadata.rewindable`."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def copy_rows_from(self, rows: list[int], other: "RowCache", other_rows: list[int], stop: int, n: int):
        """Copies rows `other_rows` of another cache, or of this one, to rows `rows` of this one. What is kept for every
        position: the first `n` of them, which end before position `stop` here."""
        for name, value in self.tensors().items():
            value[rows] = getattr(other, name)[other_rows]

    def select_rows(self, rows: Tensor):
        """Row i becomes what row rows[i] was. rows: int64, any number of them."""
        for name, value in self.tensors().items():
            setattr(self, name, value[rows])

    def fork(self, rows: Tensor, max_len: int, shared: Tensor | None) -> "RowCache":
        """A cache whose row i goes on from row rows[i] of this one. What is kept for every position: of as many as have been
        seen, with room for `max_len`; or with `shared` once for all that go on from a row, see KVCache."""
        fork = copy.copy(self)
        fork.select_rows(rows)
        return fork

    def detach(self):
        """Cuts it off the graph of the forward pass that made it."""
        for name, value in self.tensors().items():
            setattr(self, name, value.detach())


def last_positions(x: Tensor, n: int) -> Tensor:
    """The last `n` of x, (B, T, …), for a cache: not a view, which would keep all T alive."""
    return x if x.size(1) == n else x[:, x.size(1) - n:].clone()


class RowGroups:
    """Rows of a batch that begin alike, grouped so that what they begin with is read once for all of them."""

    def __init__(self, group_of_row: list[int], device: torch.device):
        """group_of_row: of each row of the batch, from 0 on; every group has a row."""
        rows = [[] for _ in range(max(group_of_row) + 1)]
        order = []  # of each row, how many of its group come before it
        for row, group in enumerate(group_of_row):
            order.append(len(rows[group]))
            rows[group].append(row)
        most = max(map(len, rows))
        # (G, N): the rows of each group, the first one again where it has fewer; and where each row stands in it
        slots = [own + own[:1] * (most - len(own)) for own in rows]
        places = [most * group + place for group, place in zip(group_of_row, order)]
        self.is_ordered = [row for own in slots for row in own] == places == list(range(len(group_of_row)))
        self.group_of_row, self.n_groups = group_of_row, len(rows)
        self.index, self.slots, self.places = (torch.tensor(numbers, device=device)
                                               for numbers in (group_of_row, slots, places))

    def group(self, x: Tensor) -> Tensor:
        """(B, n_head, T, D) -> (G, n_head, N * T, D)"""
        B, n_head, T, D = x.shape
        x = x.view(self.n_groups, -1, n_head, T, D) if self.is_ordered else x[self.slots]
        return x.transpose(1, 2).reshape(self.n_groups, n_head, -1, D)

    def ungroup(self, x: Tensor, T: int) -> Tensor:
        """(G, n_head, N * T, D) -> (B, n_head, T, D)"""
        _, n_head, _, D = x.shape
        x = x.view(self.n_groups, n_head, -1, T, D).transpose(1, 2).reshape(-1, n_head, T, D)
        return x if self.is_ordered else x[self.places]
