"""The gated delta rule: a linear-attention mixer whose cost per token and cache do not grow with the length of the text.

Each head holds a matrix S, head_size x head_size, that maps keys to values. At every token it decays, and then corrects the
value that it returns for the token's key towards the token's value:

    S_t = α_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - α_t S_{t-1}ᵀ k_t),   y_t = S_tᵀ q_t

Source: Yang et al. 2024 (Gated DeltaNet), arXiv:2412.06464. β_t ranges up to 2, where a correction flips the sign of the
stored value, which lets a head count modulo two: Grazzi et al. 2024, arXiv:2411.12537. The model's token shift takes the
place of the short convolutions, which --d_conv adds.

DeltaProduct makes several such corrections at every token, each with a key, a value and a β of its own, after one decay. Two
of them can be a rotation, which lets a head count modulo any number, and several permute what it holds. Source: Siems et al.
2025, arXiv:2502.10297.

RotaryDelta turns the state instead: before the decay, each pair of channels of the keys' side by an angle that the token
says. A turn by a fraction of a circle counts modulo any number, and with the reflections of β = 2 it makes the products of
permutations of three things, for the price of one correction. Turned keys and queries are those of the plain rule, as in
rotary embeddings (Su et al. 2021, arXiv:2104.09864), but with angles that depend on the text: Lahoti et al. 2026 (Mamba-3)
turn the state of a diagonal recurrence so, arXiv:2603.15569.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from kernels.decode import can_step, delta_step
from layers.attention import rotate
from layers.attention_metadata import AttentionMetadata
from layers.cache import RowCache, last_positions
from layers.convolution import ShortConvolution
from layers.linear import elementwise_flops, linear_class, matrix_flops
from layers.norm import rms_norm

NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)  # see kernels/rational.py
CHUNK_SIZE = 64  # corrections processed in parallel; more of them take more operations, but fewer sequential steps
DEFAULT_HOUSEHOLDER = 2
INITIAL_MEMORY = 4, 1024  # tokens after which all but 1/e has decayed at initialisation, from the first head to the last
COUNTING_MEMORY = 4, 65_536  # the same where the state turns to count: what is counted must not fade
# log α where a new document starts: what is left of the one before is below rounding. (-∞ minus itself would be NaN.)
LOG_ALPHA_RESET = -50.0


@dataclass
class DeltaCache(RowCache):
    """states: the matrix of each head, in fp32: (B, 1, n_head, head_size, head_size). inputs: of the convolution, if there
    is one, at the last `n_inputs` positions, (B, n_inputs, channels). angles: by which the state has been turned, if it is,
    (B, 1, n_embd / 2) in fp32. Where it is rewindable: all that `rewind` may return to, along the second dimensions."""
    states: Tensor
    inputs: Tensor | None = None
    n_inputs: int = 0
    angles: Tensor | None = None

    def rewind(self, n: int):
        self.states = self.states[:, -1 - n, None]
        if self.angles is not None:
            self.angles = self.angles[:, -1 - n, None]
        if self.inputs is not None:
            stop = self.inputs.size(1) - n
            self.inputs = self.inputs[:, stop - self.n_inputs:stop]


class GatedDelta(nn.Module):
    """Multi-head gated delta rule, in heads of --d_head_size. Keys and queries have length 1; the output of a head is
    normalised and multiplied by a gate per channel. value_residual: as in Attention, in the last correction of a token."""
    letter = "D"
    needs_mask = False
    n_householder = 1  # corrections per token, each a (generalised) Householder reflection of the state
    initial_memory = INITIAL_MEMORY
    initial_beta_logit = -1.0  # β is about 1/2 at first

    def __init__(self, config, layer: int):
        super().__init__()
        self.head_size = config.d_head_size or config.head_size
        self.n_head, self.n_value_heads = config.n_embd // self.head_size, config.n_head  # here, and of returned values
        width, linear = config.n_embd, lambda name, n_out: linear_class(config, f"mixer.{name}")(width, n_out, config.bias)
        self.qkv = linear("qkv", (1 + 2 * self.n_householder) * width)  # q, then every k, then every v
        self.rates = linear("rates", (1 + self.n_householder) * self.n_head)  # logits of each head's β, α
        self.gate = linear("gate", width)
        self.angles = None  # linear layer of the angles by which a token turns the state
        self.proj = linear("proj", width)
        self.conv = ShortConvolution(self.qkv.weight.size(0), config.d_conv) if config.d_conv else None
        shortest, longest = self.initial_memory
        memory = [shortest * (longest / shortest) ** (i / max(1, self.n_head - 1)) for i in range(self.n_head)]
        # inverse softplus: α = exp(-softplus(decay)) = exp(-1 / memory)
        self.decay = nn.Parameter(torch.tensor([math.log(math.expm1(1 / n)) for n in memory]))
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> DeltaCache:
        """An empty cache: B * n_embd * head_size numbers, and some for the convolution and for angles, whatever `max_len`
        is."""
        cache = DeltaCache(torch.zeros(batch_size, 1, self.n_head, self.head_size, self.head_size, device=device))
        if self.conv is not None:
            cache.n_inputs = self.conv.n_previous
            cache.inputs = torch.zeros(batch_size, cache.n_inputs, self.conv.taps.size(1), device=device, dtype=dtype)
        if self.angles is not None:
            cache.angles = torch.zeros(batch_size, 1, self.angles.weight.size(0), device=device)
        return cache

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: DeltaCache | None = None,
                first_layer_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), the positions after those in `cache`, which takes them in. first_layer_v: the values of the first
        layer. Returns (B, T, C), and this layer's values, (B, heads of the config, T, their size)."""
        (B, T, _), n = x.shape, self.n_householder
        qkv = self.qkv(x)
        if self.conv is not None:
            inputs, previous = qkv, None if cache is None else cache.inputs.to(qkv.dtype)
            qkv = self.conv(inputs, metadata, previous)
            if cache is not None:
                inputs = torch.cat((cache.inputs, inputs.to(cache.inputs.dtype)), dim=1)
                cache.inputs = inputs if metadata.rewindable else last_positions(inputs, cache.n_inputs)
        q, *kv = qkv.view(B, T, 1 + 2 * n, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.value_mix is not None:
            kv[-1] = torch.lerp(kv[-1], split_heads(first_layer_v, self.n_head), self.value_mix.to(x.dtype))
        new_v = split_heads(kv[-1], self.n_value_heads)
        if (cache is not None and not metadata.rewindable and metadata.doc_starts is None
                and can_step(qkv, state := cache.states[:, -1])):
            turns = None if self.angles is None else (self.angles(x), cache.angles[:, -1:])
            y, state, cache.angles = delta_step(qkv, kv[-1], self.rates(x), self.decay, self.initial_beta_logit, state,
                                                *(turns or ()))
            cache.states = state.unsqueeze(1)
            return self.proj(y.to(qkv.dtype) * F.silu(self.gate(x))), new_v
        k, v = (torch.stack(part, dim=3).flatten(2, 3) if n > 1 else part[0] for part in (kv[:n], kv[n:]))  # (B, H, T n, D)
        q, k = (rms_norm(part, save_input=True) * self.head_size ** -0.5 for part in (q, k))
        if self.angles is not None:
            rotation = self.rotation(x, cache, metadata.rewindable)
            q, k = rotate(q, rotation), rotate(k, rotation)
        *beta, decay = self.rates(x).float().view(B, T, 1 + n, self.n_head).permute(2, 0, 3, 1)             # each (B, H, T)
        beta = torch.stack(beta, dim=-1).flatten(2) if n > 1 else beta[0]                                   # (B, H, T n)
        beta = 2 * torch.sigmoid(beta + self.initial_beta_logit)
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
            cache.states = state.unsqueeze(1).clone()  # a view would keep the states after all chunks alive
        y = rms_norm(y).transpose(1, 2).reshape(B, T, self.n_head * self.head_size)
        return self.proj(y.to(v.dtype) * F.silu(self.gate(x))), new_v

    def rotation(self, x: Tensor, cache: DeltaCache | None, rewindable: bool) -> tuple[Tensor, Tensor]:
        """For `rotate`, from the sums of all angles up to each position, which `cache` takes in."""
        (B, T, _), angles = x.shape, running_angles(self.angles(x).float())                               # (B, T, C/2)
        if cache is not None:
            angles = wrap(cache.angles[:, -1:] + angles)
            cache.angles = torch.cat((cache.angles, angles), dim=1) if rewindable else last_positions(angles, 1)
        angles = angles.view(B, T, self.n_head, -1).transpose(1, 2)
        return angles.cos().repeat(1, 1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)          # (B, H, T, D)

    def flops_per_token(self, block_size: int) -> int:
        """Projections, and the products of `chunked_delta_rule`: one of a chunk's corrections with each other and two with
        its queries, and one more in the backward pass of the triangular system; with several chunks, two with the state, and
        for all chunks but the last two that make the next state, and the recurrence of the states. The padding of the last
        chunk counts too."""
        size, n = self.head_size, self.n_householder
        chunk = chunk_tokens(block_size, n)
        n_chunks, steps = -(-block_size // chunk), n * chunk
        flops = n_chunks * (3 * (steps + 2 * chunk) + 2 * steps) * 2 * steps * size
        if n_chunks > 1:
            next_states = 2 * 2 * steps * size**2 + 2 * size**3
            flops += 3 * (n_chunks * 2 * (steps + chunk) * size**2 + (n_chunks - 1) * next_states)
        if self.angles is not None:  # their sums, within chunks and over them
            flops += 2 * (n_chunks * chunk**2 + n_chunks**2) * size
        return 3 * matrix_flops(self) + self.n_head * flops // block_size

    def elementwise_flops_per_token(self, block_size: int) -> int:
        """Linear layers, the convolution, the gate, and solving the triangular system, which is no product, forward and
        backward."""
        width, n = self.n_head * self.head_size, self.n_householder
        convolution = 2 * self.conv.taps.numel() + 4 * self.conv.taps.size(1) if self.conv is not None else 0
        solving = 2 * 2 * n * n * chunk_tokens(block_size, n) * width
        return 3 * (elementwise_flops(self) + 5 * width + convolution) + solving


class DeltaProduct(GatedDelta):
    """GatedDelta with --n_householder corrections per token."""
    letter = "P"

    def __init__(self, config, layer: int):
        self.n_householder = config.n_householder or DEFAULT_HOUSEHOLDER
        super().__init__(config, layer)


class RotaryDelta(GatedDelta):
    """GatedDelta whose state turns. At first by no angle: it starts as GatedDelta, with longer memories and β = 1."""
    letter = "R"
    initial_memory = COUNTING_MEMORY
    initial_beta_logit = 0.0

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.angles = linear_class(config, "mixer.angles")(config.n_embd, config.n_embd // 2, config.bias)


def running_angles(angles: Tensor) -> Tensor:
    """The sums of all up to each position, less whole turns. (B, T, C) -> (B, T, C), fp32. As products with triangular
    matrices, within chunks and over them: the order in which a GPU's cumsum adds is not deterministic."""
    B, T, C = angles.shape
    chunk = chunk_tokens(T, 1)
    angles = F.pad(angles, (0, 0, 0, -T % chunk)).view(B, -1, chunk, C)
    one = lambda n, diagonal: torch.ones(n, n, device=angles.device).tril(diagonal)
    with torch.autocast(angles.device.type, enabled=False):
        sums = one(chunk, 0) @ angles
        before = one(angles.size(1), -1) @ wrap(sums[:, :, -1])
    return wrap(sums + before.unsqueeze(2)).flatten(1, 2)[:, :T]


def wrap(angles: Tensor) -> Tensor:
    """Less whole turns, so that the sums over long texts stay small and exact."""
    return angles - 2 * math.pi * (angles / (2 * math.pi)).round().detach()


def split_heads(v: Tensor, n_head: int) -> Tensor:
    """(B, H, T, D) -> (B, n_head, T, H * D / n_head): the same channels as other heads."""
    if v.size(1) == n_head:
        return v
    B, _, T, _ = v.shape
    return v.transpose(1, 2).reshape(B, T, n_head, -1).transpose(1, 2)


def chunk_tokens(n_tokens: int, n_householder: int) -> int:
    """Tokens of a chunk of a text of `n_tokens`."""
    return min(max(1, CHUNK_SIZE // n_householder), n_tokens)


def recurrent_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
                         state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The rule as defined above, correction by correction; the readable twin of `chunked_delta_rule`. q: (B, H, T, D);
    log_alpha: (B, H, T); k, v: (B, H, T n, D) and beta: (B, H, T n), those of the n corrections of a token one after the
    other; state: (B, H, D, D), keys by values. Returns (B, H, T, D) and the state after every token."""
    outputs, states, n = [], [], k.size(2) // q.size(2)
    with torch.autocast(q.device.type, enabled=False):  # see chunked_delta_rule
        for t in range(q.size(2)):
            state = state * log_alpha[:, :, t, None, None].exp()
            for i in range(n * t, n * (t + 1)):
                key, value = (part[:, :, i].float().unsqueeze(-1) for part in (k, v))              # (B, H, D, 1)
                state = state + key @ (beta[:, :, i, None, None] * (value - state.mT @ key)).mT
            outputs.append((state.mT @ q[:, :, t].float().unsqueeze(-1)).squeeze(-1))
            states.append(state)
    return torch.stack(outputs, dim=2), states


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor,
                       state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same as matrix products, a chunk of tokens at a time. state: None stands for zeros, at the start of a text, and
    then no state is returned either.

    With Γ_t the product of the α of a chunk up to t, u_t + Σ_{j<t} β_t Γ_t/Γ_j (k_t·k_j) u_j = β_t (v_t - Γ_t S₀ᵀ k_t): a
    triangular system, solved once for the v and once for the k (section 3.3 of the source). With n corrections a token it
    has n times as many rows, and n of them the same Γ; a query sees what is left after the last.
    """
    T, n_steps = q.size(2), k.size(2) // q.size(2)
    chunk = chunk_tokens(T, n_steps)
    if padding := -T % chunk:  # tokens that change nothing: β = 0 corrects nothing, log α = 0 decays nothing
        q, k, v = (F.pad(part, (0, 0, 0, padding * part.size(2) // T)) for part in (q, k, v))
        beta, log_alpha = (F.pad(part, (0, padding * part.size(2) // T)) for part in (beta, log_alpha))
    q, log_alpha = (part.unflatten(2, (-1, chunk)) for part in (q, log_alpha))                     # (B, H, n, c, …)
    k, v, beta = (part.unflatten(2, (-1, chunk * n_steps)) for part in (k, v, beta))               # (B, H, n, s, …)
    is_later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # a masked sum, because the order in which a GPU's cumsum adds is not deterministic
    log_gamma = log_alpha.unsqueeze(-2).masked_fill(is_later, 0.0).sum(dim=-1)
    gamma_of_token = log_gamma.exp().unsqueeze(-1)                                                 # (B, H, n, c, 1)
    if n_steps > 1:
        log_gamma = log_gamma.repeat_interleave(n_steps, dim=-1)
        is_later = torch.ones(chunk * n_steps, chunk * n_steps, dtype=torch.bool, device=q.device).triu(1)
    ratios = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(  # above the diagonal they may overflow
        is_later, -torch.inf).exp()                                            # Γ_t / Γ_j
    gamma, to_end = log_gamma.exp().unsqueeze(-1), ratios[..., -1, :].unsqueeze(-1)                # (B, H, n, s, 1)
    with torch.autocast(k.device.type, enabled=False):  # rounded, it would not match the k on the right: the rule overshoots
        system = (k.float() @ k.float().mT) * ratios * beta.unsqueeze(-1)      # its diagonal is taken to be 1
    right_side = torch.cat((v.float(), k.float() * gamma), dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    u_values, u_state = solved.chunk(2, dim=-1)                                # u = u_values - u_state S₀
    scores, n, returns_state = (q @ k.mT) * ratios[..., n_steps - 1::n_steps, :], q.size(2), state is not None
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
    y = scores @ (u_values - u_state @ before) + (q * gamma_of_token) @ before
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
