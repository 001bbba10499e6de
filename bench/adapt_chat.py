"""What `chat.py --adapt` remembers: made-up facts that it is told, asked for in a new conversation.

    python bench/adapt_chat.py --checkpoint_path=checkpoints/quickstart.pt

For every fact, such as "Zorblatt lives in Quaxville.": the loss of its last words given the first ones, and whether each of
their tokens is the likeliest; before, after it was told, after another fact was told instead (the control), and after
`/forget`. The differences are paired over facts, with their 95 % intervals. A minute on one core.
"""
import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chat import Chat  # noqa: E402
from experiments.report import Table, markdown  # noqa: E402
from experiments.stats import Estimate  # noqa: E402
from learner import AdaptConfig, Learner  # noqa: E402
from runtime.device import Machine  # noqa: E402
from sampling import GREEDY, load_pretrained  # noqa: E402

SYLLABLES = ["zor", "bla", "quax", "vil", "mer", "ton", "gri", "pel", "dar", "nuk", "sho", "fen", "lim", "bor", "tas", "wex"]
SETTINGS = [(rate, times) for rate in ("auto", 2e-3) for times in (1, 3)]  # --adapt_rate, and how often a fact is told


def make_facts(n: int) -> list[tuple[str, str]]:
    """The first words of each, and those to remember."""
    rng = random.Random(0)
    name = lambda: "".join(rng.choices(SYLLABLES, k=2)).capitalize()
    return [(f"{name()} lives in", f" {name()}.") for _ in range(n)]


@torch.no_grad()
def recall(chat: Chat, start: str, end: str) -> tuple[float, bool]:
    """Nats per token of `end` after `start`, as the user's words at the beginning of a conversation, and whether the model
    finds each of its tokens the likeliest."""
    before = [chat.tokenizer.separator_id, chat.role_ids["user"]]
    ids = torch.tensor(before + chat.tokenizer.encode(start + end))
    n = len(ids) - len(before) - len(chat.tokenizer.encode(start))
    logprobs, targets = chat.model(ids[None, :-1])[0, -n:].log_softmax(-1), ids[-n:]
    return -logprobs.gather(1, targets[:, None]).mean().item(), bool((logprobs.argmax(-1) == targets).all())


def tell(chat: Chat, fact: str, times: int):
    """Learns the fact in a new conversation, from the weights as they were, and leaves that without an answer."""
    chat.forget()
    chat.reset()
    for _ in range(times):
        chat.learn(fact)
        chat.turns.append([*chat.encode_turn(fact), chat.end_id])


def measure(path: Path, rate: float | str, times: int, facts: list[tuple[str, str]]) -> tuple[str, ...]:
    model, tokenizer, _ = load_pretrained(path, chat=True)
    chat = Chat(model, tokenizer, GREEDY, 1, learner=Learner(model, AdaptConfig(adapt_rate=rate),
                                                             Machine(torch.device("cpu"), "fp32")))
    static, told, control, seconds = [recall(chat, *fact) for fact in facts], [], [], 0.0
    for i, fact in enumerate(facts):
        start = time.perf_counter()
        tell(chat, "".join(fact), times)
        seconds += time.perf_counter() - start
        told.append(recall(chat, *fact))
        control.append(recall(chat, *facts[i - 1]))
    control = control[1:] + control[:1]  # of fact i, after fact i + 1 was told
    chat.forget()
    assert [recall(chat, *fact) for fact in facts] == static
    gain, own = (Estimate.from_values([a - b for (a, _), (b, _) in zip(told, other)]) for other in (static, control))
    losses = (f"{sum(loss for loss, _ in results) / len(facts):.2f}, {sum(hit for _, hit in results)} of {len(facts)}"
              for results in (static, told, control))
    return (str(rate), str(times), *losses, f"{gain.mean:+.2f} ± {gain.margin:.2f}", f"{own.mean:+.2f} ± {own.margin:.2f}",
            f"{1000 * seconds / len(facts) / times:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=Path("checkpoints/quickstart.pt"))
    parser.add_argument("--facts", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(args.checkpoint_path, rate, times, make_facts(args.facts)) for rate, times in SETTINGS]
    print(markdown(Table(("--adapt_rate", "told", "before", "after", "another fact told", "after − before",
                          "after − another", "ms a message"), rows)))


if __name__ == "__main__":
    main()
