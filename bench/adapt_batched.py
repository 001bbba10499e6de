"""Would several documents be read faster at once, each with weights of its own, than one by one?

    python bench/adapt_batched.py --checkpoint_path=checkpoints/quickstart.pt

A hop of every document: by a `Learner`, one after the other, against `torch.func.functional_call` under `vmap`. The batched
side is a prototype that leaves out what costs time: context in a cache, the norm of the gradient, the guard against steps
that are not finite. Its layers are plain ones, since vmap does not go through functions with a backward pass of their own.
Prints the milliseconds per hop and document of both, medians of several, on one thread.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import layers.attention  # noqa: E402
import layers.norm  # noqa: E402
import model as network  # noqa: E402
from layers.mlp import GELU  # noqa: E402
from layers.shift import TokenShift  # noqa: E402
from learner import BETAS, AdaptConfig, Learner  # noqa: E402
from runtime.device import Machine  # noqa: E402
from sampling import load_pretrained  # noqa: E402

ROUNDS = 9


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_by_one(learner: Learner, ids: torch.Tensor) -> float:
    """Seconds for a hop of every row, without filling its cache."""
    caches = [learner.fill_cache(ids[0, :0]) for _ in ids]
    return seconds(lambda: [learner.read_hop((row[None, :-1], row[None, 1:]), cache, learn=True)
                            for row, cache in zip(ids, caches)])


def use_plain_layers():
    for module in (layers.norm, layers.attention, network):
        module.rms_norm = lambda x, save_input=False, eps=layers.norm.EPS: x * torch.rsqrt(
            x.square().mean(-1, keepdim=True) + eps)
    network.cross_entropy = lambda x, weight, targets, softcap, reduction: F.cross_entropy(
        (softcap * torch.tanh(x @ weight.T / softcap)).flatten(0, 1), targets.flatten())
    GELU.forward = lambda self, x: self.proj(F.gelu(self.fc(x)))
    TokenShift.forward = lambda self, x, metadata, cache=None: torch.addcmul(
        x, self.shift_coeff, F.pad(x[:, :-1], (0, 0, 1, 0)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True)
    parser.add_argument("--documents", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _, _ = load_pretrained(args.checkpoint_path)
    learner = Learner(model, AdaptConfig(), Machine(torch.device("cpu"), "fp32"))
    ids = torch.randint(model.config.vocab_size, (max(args.documents), learner.hop + 1))
    single = statistics.median(one_by_one(learner, ids) / len(ids) for _ in range(ROUNDS))
    learner.forget()
    use_plain_layers()
    loss = lambda weights, row: functional_call(model, weights, (row[None, :-1], row[None, 1:]))
    for n in args.documents:
        stacked = {name: torch.nn.Parameter(p.detach().repeat(n, *[1] * p.dim())) for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(stacked.values(), lr=learner.config.rate, betas=BETAS, weight_decay=0.0, fused=True)

        def step(stacked=stacked, optimizer=optimizer, n=n):
            with sdpa_kernel(SDPBackend.MATH):  # vmap would loop over the fused one
                gradients = vmap(grad(loss))({name: p.detach() for name, p in stacked.items()}, ids[:n])
            for name, p in stacked.items():
                p.grad = gradients[name]
            optimizer.step()
        step()  # allocates the averages
        batched = statistics.median(seconds(step) / n for _ in range(ROUNDS))
        print(f"{n} documents: one by one {1000 * single:.1f} ms a hop, batched {1000 * batched:.1f} ms, "
              f"ratio {single / batched:.2f}")


if __name__ == "__main__":
    main()
