"""The gated delta rule: a mixer whose cost grows evenly with the length of the text, and whose cache does not grow.

Each head keeps a matrix S, head_size x head_size, that answers a key with a value. At every token it forgets a share of all
it holds, and then corrects its answer to the token's key towards the token's value:

    S_t = α_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - α_t S_{t-1}ᵀ k_t),   y_t = S_tᵀ q_t

Source: Yang et al. 2024 (Gated DeltaNet), arXiv:2412.06464. β_t goes up to 2, where the correction turns the old answer
around, and so can count modulo two: Grazzi et al. 2024, arXiv:2411.12537. What it has of convolutions, the model's token
shift does here.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from layers.attention_metadata import AttentionMetadata
from layers.kan import LINEARS
from layers.linear import elementwise_flops, matrix_flops
from layers.norm import rms_norm

NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)  # see kernels/rational.py
CHUNK = 64  # tokens that are worked on at once; the work grows with it, the number of steps one after the other falls
MEMORY = 4, 1024  # tokens after which the heads have forgotten all but 1/e, at first: from the first head to the last
# Of α where a new text begins: what is left of the one before is less than any rounding. (-∞ less itself would be NaN.)
LOG_FORGOTTEN = -50.0


@dataclass
class DeltaCache:
    """What the heads hold: (B, n_head, head_size, head_size), in fp32."""
    state: Tensor

    def copy_rows_from(self, rows: list[int], other: "DeltaCache", other_rows: list[int], stop: int, n: int):
        """See KVCache."""
        self.state[rows] = other.state[other_rows]


class GatedDelta(nn.Module):
    """Multi-head gated delta rule. Keys and queries have length 1; what a head answers is normalised, and passes a gate that
    the token sets, channel by channel. value_residual: as in Attention."""
    letter = "D"

    def __init__(self, config, layer: int):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width, linear = config.n_head * config.head_size, LINEARS[config.linear]
        self.qkv = linear(config.n_embd, 3 * width, config.bias)
        self.rates = linear(config.n_embd, 2 * config.n_head, config.bias)  # β and α of each head
        self.gate = linear(config.n_embd, width, config.bias)
        self.proj = linear(width, config.n_embd, config.bias)
        shortest, longest = MEMORY
        steps = [shortest * (longest / shortest) ** (i / max(1, config.n_head - 1)) for i in range(config.n_head)]
        # softplus of it is 1 / steps
        self.decay = nn.Parameter(torch.tensor([math.log(math.expm1(1 / n)) for n in steps]))
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None

    def init_cache(self, batch_size: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> DeltaCache:
        """B * n_head * head_size² numbers, however many tokens come."""
        return DeltaCache(torch.zeros(batch_size, self.n_head, self.head_size, self.head_size, device=device))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: DeltaCache | None = None,
                first_layer_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), which stand after what `cache` holds; it takes them in. first: the values of the first layer.
        Returns (B, T, C), and the values of this layer, (B, n_head, T, head_size)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.value_mix is not None:
            v = torch.lerp(v, first_layer_v, self.value_mix.to(v.dtype))
        q, k = (rms_norm(part, save_input=True) * self.head_size ** -0.5 for part in (q, k))
        beta, decay = self.rates(x).float().view(B, T, 2, self.n_head).permute(2, 0, 3, 1)       # each (B, H, T)
        beta = 2 * torch.sigmoid(beta - 1)  # about 1/2 at first
        log_alpha = -F.softplus(decay + self.decay[:, None])
        if metadata.doc_starts is not None:
            log_alpha = log_alpha.masked_fill(metadata.doc_starts.unsqueeze(1), LOG_FORGOTTEN)
        if cache is None:
            y, _ = chunked_delta_rule(q, k, v, beta, log_alpha, None)
        else:
            step = recurrent_delta_rule if T == 1 else chunked_delta_rule
            y, cache.state = step(q, k, v, beta, log_alpha, cache.state)
        y = rms_norm(y).transpose(1, 2).reshape(B, T, self.n_head * self.head_size)
        return self.proj(y.to(v.dtype) * F.silu(self.gate(x))), v

    def flops_per_token(self, block_size: int) -> int:
        """Projections, and the products of `chunked_delta_rule`: three of a chunk with itself, and one more in the backward
        pass of the triangular system; if there are several chunks, two with the state, and of all but the last two that
        make the next state, and the recurrence of the states. The padding of a last chunk counts too."""
        chunk, size = min(CHUNK, block_size), self.head_size
        n = -(-block_size // chunk)
        flops = n * (3 * 3 + 2) * 2 * chunk * chunk * size
        if n > 1:
            flops += 3 * (n * 2 * 2 * chunk * size**2 + (n - 1) * (2 * 2 * chunk * size**2 + 2 * size**3))
        return 3 * matrix_flops(self) + self.n_head * flops // block_size

    def elementwise_flops_per_token(self, block_size: int) -> int:
        """Of the linear layers, the gate, and solving the triangular system, which is no product, forward and backward."""
        width = self.n_head * self.head_size
        return 3 * (elementwise_flops(self) + 5 * width) + 2 * 2 * min(CHUNK, block_size) * width


def recurrent_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
                         state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as it stands above, token by token. q, k, v: (B, H, T, D); beta, log_alpha: (B, H, T); state: (B, H, D, D),
    keys by values. Returns (B, H, T, D) and the new state."""
    answers = []
    for t in range(q.size(2)):
        key, value, query = (part[:, :, t].float().unsqueeze(-1) for part in (k, v, q))            # (B, H, D, 1)
        state = state * log_alpha[:, :, t, None, None].exp()
        correction = beta[:, :, t, None, None] * (value - state.mT @ key)
        state = state + key @ correction.mT
        answers.append((state.mT @ query).squeeze(-1))
    return torch.stack(answers, dim=2), state


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
              state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same in products of matrices, a chunk of tokens at a time. state: None, at the start of a text, asks for no state
    in return.

    With Γ_t the product of the α of a chunk up to t, u_t + Σ_{j<t} β_t Γ_t/Γ_j (k_t·k_j) u_j = β_t (v_t - Γ_t S₀ᵀ k_t): a
    triangular system, solved once for the v and once for the k (section 3.3 of the source).
    """
    T, chunk = q.size(2), min(CHUNK, q.size(2))
    if rest := -T % chunk:  # tokens that change nothing: no correction, nothing forgotten
        q, k, v = (F.pad(part, (0, 0, 0, rest)) for part in (q, k, v))
        beta, log_alpha = (F.pad(part, (0, rest)) for part in (beta, log_alpha))
    q, k, v, beta, log_alpha = (part.unflatten(2, (-1, chunk)) for part in (q, k, v, beta, log_alpha))  # (B, H, n, c, …)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    log_gamma = log_alpha.unsqueeze(-2).masked_fill(later, 0.0).sum(dim=-1)  # a GPU's cumsum has no order of its own
    ratios = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(  # above the diagonal they may overflow
        later, -torch.inf).exp()                                               # Γ_t / Γ_j
    gamma, to_end = log_gamma.exp().unsqueeze(-1), ratios[..., -1, :].unsqueeze(-1)            # (B, H, n, c, 1)
    with torch.autocast(k.device.type, enabled=False):  # rounded, it would not fit the k beside it: the rule overshoots
        system = (k.float() @ k.float().mT) * ratios * beta.unsqueeze(-1)      # its diagonal is taken to be 1
    known = torch.cat((v.float(), k.float() * gamma), dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    from_values, from_state = solved.chunk(2, dim=-1)
    scores, n, is_asked = (q @ k.mT) * ratios, q.size(2), state is not None
    if n == 1 and not is_asked:
        return (scores @ from_values).flatten(2, 3)[:, :, :T], None
    # what each chunk makes of the state before it: γ S + kᵀ (u_values - u_state S) = (γ - kᵀ u_state) S + kᵀ u_values
    steps = n if is_asked else n - 1
    with torch.autocast(k.device.type, enabled=False):
        tells = (k * to_end)[:, :, :steps].float().mT
        added, taken = (tells @ solved[:, :, :steps]).chunk(2, dim=-1)                             # (B, H, n, D, D)
        kept = gamma[:, :, :steps, -1:] * torch.eye(k.size(-1), device=k.device) - taken
    states = linear_recurrence(kept.movedim(2, 0), added.movedim(2, 0),
                               state if is_asked else torch.zeros_like(added[:, :, 0])).movedim(0, 2)
    before = states[:, :, :n]
    y = scores @ (from_values - from_state @ before) + (q * gamma) @ before
    return y.flatten(2, 3)[:, :, :T], states[:, :, n] if is_asked else None


@library.custom_op(f"{NAMESPACE}::linear_recurrence", mutates_args=())
def linear_recurrence(factors: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """S_{i+1} = factors_i S_i + terms_i, from S_0 = start. factors, terms: (n, B, H, D, D); start: (B, H, D, D); all fp32.
    Returns S_0 … S_n, (n + 1, B, H, D, D). One operation, or torch.compile would unroll as many steps as a text has."""
    states = start.new_empty(len(factors) + 1, *start.shape)
    states[0] = start
    flat = states.flatten(1, 2)
    for i, (factor, term) in enumerate(zip(factors.flatten(1, 2), terms.flatten(1, 2))):
        torch.baddbmm(term, factor, flat[i], out=flat[i + 1])
    return states


@linear_recurrence.register_fake
def _(factors: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    return start.new_empty(factors.size(0) + 1, *start.shape)


def save_for_backward(ctx, inputs: tuple, output: Tensor):
    ctx.save_for_backward(inputs[0], output)


def recurrence_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients obey the same recurrence, from the end: G_i = factors_iᵀ G_{i+1} + grad_i."""
    factors, states = ctx.saved_tensors
    grads = linear_recurrence(factors.mT.flip(0), grad[:-1].flip(0), grad[-1]).flip(0)
    return grads[1:] @ states[:-1].mT, grads[1:], grads[0]


linear_recurrence.register_autograd(recurrence_backward, setup_context=save_for_backward)
