"""The gated delta rule: a linear-attention mixer whose cost per token and cache do not grow with the length of the text.

Each head holds a matrix S, head_size x head_size, that maps keys to values. At every token it decays, and then corrects the
value that it returns for the token's key towards the token's value:

    S_t = α_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - α_t S_{t-1}ᵀ k_t),   y_t = S_tᵀ q_t

Source: Yang et al. 2024 (Gated DeltaNet), arXiv:2412.06464. β_t ranges up to 2, where a correction flips the sign of the
stored value, which lets a head count modulo two: Grazzi et al. 2024, arXiv:2411.12537. The model's token shift takes the
place of the short convolutions.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from layers.attention_metadata import AttentionMetadata
from layers.cache import RowCache
from layers.linear import LINEARS, elementwise_flops, matrix_flops
from layers.norm import rms_norm

NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)  # see kernels/rational.py
CHUNK_SIZE = 64  # tokens processed in parallel; more of them take more operations, but fewer sequential steps
INITIAL_MEMORY = 4, 1024  # tokens after which all but 1/e has decayed at initialisation, from the first head to the last
# log α where a new document starts: what is left of the one before is below rounding. (-∞ minus itself would be NaN.)
LOG_ALPHA_RESET = -50.0


@dataclass
class DeltaCache(RowCache):
    """The matrix of each head, in fp32: (B, 1, n_head, head_size, head_size). Where it is rewindable: all that `rewind` may
    return to, along the second dimension."""
    states: Tensor

    def rewind(self, n: int):
        self.states = self.states[:, -1 - n, None]


class GatedDelta(nn.Module):
    """Multi-head gated delta rule. Keys and queries have length 1; the output of a head is normalised and multiplied by a
    gate per channel. value_residual: as in Attention."""
    letter = "D"
    needs_mask = False

    def __init__(self, config, layer: int):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width, linear = config.n_head * config.head_size, LINEARS[config.linear]
        self.qkv = linear(config.n_embd, 3 * width, config.bias)
        self.rates = linear(config.n_embd, 2 * config.n_head, config.bias)  # logits of each head's β and α
        self.gate = linear(config.n_embd, width, config.bias)
        self.proj = linear(width, config.n_embd, config.bias)
        shortest, longest = INITIAL_MEMORY
        memory = [shortest * (longest / shortest) ** (i / max(1, config.n_head - 1)) for i in range(config.n_head)]
        # inverse softplus: α = exp(-softplus(decay)) = exp(-1 / memory)
        self.decay = nn.Parameter(torch.tensor([math.log(math.expm1(1 / n)) for n in memory]))
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> DeltaCache:
        """An empty cache: B * n_head * head_size² numbers, whatever `max_len` is."""
        return DeltaCache(torch.zeros(batch_size, 1, self.n_head, self.head_size, self.head_size, device=device))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: DeltaCache | None = None,
                first_layer_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), the positions after those in `cache`, which takes them in. first_layer_v: the values of the first
        layer. Returns (B, T, C), and this layer's values, (B, n_head, T, head_size)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.value_mix is not None:
            v = torch.lerp(v, first_layer_v, self.value_mix.to(v.dtype))
        q, k = (rms_norm(part, save_input=True) * self.head_size ** -0.5 for part in (q, k))
        beta, decay = self.rates(x).float().view(B, T, 2, self.n_head).permute(2, 0, 3, 1)       # each (B, H, T)
        beta = 2 * torch.sigmoid(beta - 1)  # about 1/2 at initialisation
        log_alpha = -F.softplus(decay + self.decay[:, None])
        if metadata.doc_starts is not None:
            log_alpha = log_alpha.masked_fill(metadata.doc_starts.unsqueeze(1), LOG_ALPHA_RESET)
        if cache is None:
            y, _ = chunked_delta_rule(q, k, v, beta, log_alpha, None)
        elif T == 1 or metadata.rewindable:
            y, states = recurrent_delta_rule(q, k, v, beta, log_alpha, cache.states[:, -1])
            cache.states = (torch.stack((*cache.states.unbind(1), *states), dim=1) if metadata.rewindable
                            else states[-1].unsqueeze(1))
        else:
            y, state = chunked_delta_rule(q, k, v, beta, log_alpha, cache.states[:, -1])
            cache.states = state.unsqueeze(1)
        y = rms_norm(y).transpose(1, 2).reshape(B, T, self.n_head * self.head_size)
        return self.proj(y.to(v.dtype) * F.silu(self.gate(x))), v

    def flops_per_token(self, block_size: int) -> int:
        """Projections, and the products of `chunked_delta_rule`: three of a chunk with itself, and one more in the backward
        pass of the triangular system; with several chunks, two with the state, and for all chunks but the last two that
        make the next state, and the recurrence of the states. The padding of the last chunk counts too."""
        chunk, size = min(CHUNK_SIZE, block_size), self.head_size
        n = -(-block_size // chunk)
        flops = n * (3 * 3 + 2) * 2 * chunk * chunk * size
        if n > 1:
            flops += 3 * (n * 2 * 2 * chunk * size**2 + (n - 1) * (2 * 2 * chunk * size**2 + 2 * size**3))
        return 3 * matrix_flops(self) + self.n_head * flops // block_size

    def elementwise_flops_per_token(self, block_size: int) -> int:
        """Linear layers, the gate, and solving the triangular system, which is no product, forward and backward."""
        width = self.n_head * self.head_size
        return 3 * (elementwise_flops(self) + 5 * width) + 2 * 2 * min(CHUNK_SIZE, block_size) * width


def recurrent_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
                         state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The rule as defined above, token by token; the readable twin of `chunked_delta_rule`. q, k, v: (B, H, T, D); beta,
    log_alpha: (B, H, T); state: (B, H, D, D), keys by values. Returns (B, H, T, D) and the state after every token."""
    outputs, states = [], []
    for t in range(q.size(2)):
        key, value, query = (part[:, :, t].float().unsqueeze(-1) for part in (k, v, q))            # (B, H, D, 1)
        state = state * log_alpha[:, :, t, None, None].exp()
        correction = beta[:, :, t, None, None] * (value - state.mT @ key)
        state = state + key @ correction.mT
        outputs.append((state.mT @ query).squeeze(-1))
        states.append(state)
    return torch.stack(outputs, dim=2), states


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
                       state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same as matrix products, a chunk of tokens at a time. state: None stands for zeros, at the start of a text, and
    then no state is returned either.

    With Γ_t the product of the α of a chunk up to t, u_t + Σ_{j<t} β_t Γ_t/Γ_j (k_t·k_j) u_j = β_t (v_t - Γ_t S₀ᵀ k_t): a
    triangular system, solved once for the v and once for the k (section 3.3 of the source).
    """
    T, chunk = q.size(2), min(CHUNK_SIZE, q.size(2))
    if padding := -T % chunk:  # tokens that change nothing: β = 0 corrects nothing, log α = 0 decays nothing
        q, k, v = (F.pad(part, (0, 0, 0, padding)) for part in (q, k, v))
        beta, log_alpha = (F.pad(part, (0, padding)) for part in (beta, log_alpha))
    q, k, v, beta, log_alpha = (part.unflatten(2, (-1, chunk)) for part in (q, k, v, beta, log_alpha))  # (B, H, n, c, …)
    is_later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # a masked sum, because the order in which a GPU's cumsum adds is not deterministic
    log_gamma = log_alpha.unsqueeze(-2).masked_fill(is_later, 0.0).sum(dim=-1)
    ratios = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(  # above the diagonal they may overflow
        is_later, -torch.inf).exp()                                            # Γ_t / Γ_j
    gamma, to_end = log_gamma.exp().unsqueeze(-1), ratios[..., -1, :].unsqueeze(-1)            # (B, H, n, c, 1)
    with torch.autocast(k.device.type, enabled=False):  # rounded, it would not match the k on the right: the rule overshoots
        system = (k.float() @ k.float().mT) * ratios * beta.unsqueeze(-1)      # its diagonal is taken to be 1
    right_side = torch.cat((v.float(), k.float() * gamma), dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    u_values, u_state = solved.chunk(2, dim=-1)                                # u = u_values - u_state S₀
    scores, n, returns_state = (q @ k.mT) * ratios, q.size(2), state is not None
    if n == 1 and not returns_state:
        return (scores @ u_values).flatten(2, 3)[:, :, :T], None
    # each chunk maps the state S before it to γ S + kᵀ (u_values - u_state S) = (γ - kᵀ u_state) S + kᵀ u_values
    steps = n if returns_state else n - 1
    with torch.autocast(k.device.type, enabled=False):
        decayed_keys = (k * to_end)[:, :, :steps].float().mT
        terms, corrections = (decayed_keys @ solved[:, :, :steps]).chunk(2, dim=-1)                # (B, H, n, D, D)
        factors = gamma[:, :, :steps, -1:] * torch.eye(k.size(-1), device=k.device) - corrections
    states = linear_recurrence(factors.movedim(2, 0), terms.movedim(2, 0),
                               state if returns_state else torch.zeros_like(terms[:, :, 0])).movedim(0, 2)
    before = states[:, :, :n]
    y = scores @ (u_values - u_state @ before) + (q * gamma) @ before
    return y.flatten(2, 3)[:, :, :T], states[:, :, n] if returns_state else None


@library.custom_op(f"{NAMESPACE}::linear_recurrence", mutates_args=())
def linear_recurrence(factors: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """S_{i+1} = factors_i S_i + terms_i, from S_0 = start. factors, terms: (n, B, H, D, D); start: (B, H, D, D); all fp32.
    Returns S_0 … S_n, (n + 1, B, H, D, D). A custom operation, because torch.compile would unroll the loop."""
    states = start.new_empty(len(factors) + 1, *start.shape)
    states[0] = start
    flat = states.flatten(1, 2)
    for i, (factor, term) in enumerate(zip(factors.flatten(1, 2), terms.flatten(1, 2))):
        torch.baddbmm(term, factor, flat[i], out=flat[i + 1])
    return states


@linear_recurrence.register_fake
def _(factors: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    return start.new_empty(factors.size(0) + 1, *start.shape)


def save_recurrence(ctx, inputs: tuple, output: Tensor):
    ctx.save_for_backward(inputs[0], output)


def recurrence_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients follow the same recurrence, backwards: G_i = factors_iᵀ G_{i+1} + grad_i."""
    factors, states = ctx.saved_tensors
    grads = linear_recurrence(factors.mT.flip(0), grad[:-1].flip(0), grad[-1]).flip(0)
    return grads[1:] @ states[:-1].mT, grads[1:], grads[0]


linear_recurrence.register_autograd(recurrence_backward, setup_context=save_recurrence)
