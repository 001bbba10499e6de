"""What inference-time compute buys: thoughts, several answers, votes that stop early, loops.

    python bench/think.py --out=runs/think --jobs=2             every stage, about two hours on two cores
    python bench/think.py --out=runs/think --stages samples

A stage trains its arms with `think.py` from three seeds each, and asks all arms the same held-out questions. Finished runs
are kept, so the same command continues. Writes a table of each stage into docs/benchmarks.md. Speculative decoding is
bench/speculative.py's, search that of bench/selfplay.py.
"""
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch  # noqa: E402
from side_by_side import REPO, estimate, run_stages, train  # noqa: E402

from budget import (  # noqa: E402
    LOOPS,
    Point,
    Pool,
    Subject,
    ask_problems,
    choice_accuracy,
    draw_pool,
    inference_flops,
    mean_length,
    measure_greedy,
    stop_early,
)
from candidates import sample_texts  # noqa: E402
from compare import parse_arm  # noqa: E402
from experiments.report import Table, markdown  # noqa: E402
from experiments.runner import TrainingJob  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.checkpoint import load_checkpoint  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DeviceConfig, open_machine  # noqa: E402
from sampling import SamplingConfig  # noqa: E402
from tasks.synthetic import TASKS as PROBES  # noqa: E402
from tasks.thinking import TASKS  # noqa: E402
from think import byte_tokenizer  # noqa: E402

SEEDS = range(1, 4)
PROBLEMS = 256
SAMPLES = 32
DEPTH_ARMS = {"n_layer=3": "3 layers", "n_layer=6": "6 layers", "n_layer=3,loops=4": "3 layers, the middle one 4 times",
              "n_layer=3,loops=4,sampled_loops=1": "the same, sampled in training"}
DEPTH_SHAPE = {"n_head": 4, "head_size": 16, "block_size": 128}
DEPTH_FLAGS = "--max_iter=2000", "--batch_size=64"
PROMPT_TOKENS, NEW_TOKENS = 128, 64  # of the stage samples
T1 = SamplingConfig(temperature=1.0, top_k=0)
BYTES = byte_tokenizer()


def arm(folder: Path, name: str, *flags: str) -> list[TrainingJob]:
    """A run from each seed."""
    return [TrainingJob(REPO / "think.py", folder / f"{name}-{seed}.pt",
                        (*flags, f"--seed={seed}", "--device=cpu", "--threads=1"), "out_path", ("exact_match",),
                        keeps_model=True) for seed in SEEDS]


def load(run: TrainingJob) -> GPT:
    return GPT.from_checkpoint(load_checkpoint(run.checkpoint)).requires_grad_(False)


def ask(model: GPT, name: str, size: int) -> Subject:
    """The held-out problems of a task at this size, with each amount of thought."""
    task = TASKS[name]
    return ask_problems(model, BYTES, open_machine(DeviceConfig("cpu", "fp32")), task.make(PROBLEMS, size, seed=0),
                        task.levels, size, task.has_verifier)


def minutes(runs: list[TrainingJob]) -> float:
    return max(run.rows()[-1]["seconds"] for run in runs) / 60


def accuracies(points: list[Point]) -> list[float]:
    return [float(point.right.mean()) for point in points]


# -- stages -----------------------------------------------------------------------------------------------------------

def thoughts(folder: Path, jobs: int) -> str:
    """Permutations: with as much thought as is told, and by a model that was trained to answer at once alone; also at twice
    the trained length."""
    own = arm(folder, "permutations", "--task=permutations")
    control = arm(folder, "at_once", "--task=permutations", "--thoughts=0")
    train(jobs, own, control)
    models, size, rows = [load(run) for run in own], TASKS["permutations"].size, []
    for length in (size, 2 * size):
        subjects = [ask(model, "permutations", length) for model in models]
        for i, depth in enumerate(subjects[0].depths):
            points = [measure_greedy(subject, subject.depths[i], "", 0) for subject in subjects]
            rows.append((f"{length} permutations", f"thinking, {depth.name}" if depth.n_tokens else depth.name,
                         f"{statistics.mean(point.tokens for point in points):.0f}", estimate(accuracies(points))))
        points = [measure_greedy(subject, subject.depths[-1], "", 0)
                  for subject in (ask(load(run), "permutations", length) for run in control)]
        rows.append((f"{length} permutations", "at once, trained for that alone",
                     f"{statistics.mean(point.tokens for point in points):.0f}", estimate(accuracies(points))))
    head = (f"training: {minutes(own):.0f} min at most, one core", "answering", "tokens generated",
            "right (1/6 by guessing)")
    return markdown(Table(head, rows))


def countdown(folder: Path, jobs: int) -> str:
    """One sample against the best of several by the verifier, and against one sample of a model of twice the size. All are
    trained to answer at once."""
    small = arm(folder, "countdown", "--task=countdown", "--thoughts=0")
    large = arm(folder, "countdown_large", "--task=countdown", "--thoughts=0", "--n_layer=8")
    train(jobs, small, large)
    pools = [draw_answers(run) for run in small]
    one, rows = [float(pool.right.mean()) for _, pool in pools], []

    def add(label: str, way: str, k: int, found: list[tuple[Subject, Pool]]):
        right = [float(choice_accuracy(pool, way, k).mean()) for _, pool in found]
        flops = [inference_flops(subject.model, mean_length(subject.depths[-1].prompts), pool.n_new.mean(), k)
                 for subject, pool in found]
        answers = f"best of {k} by {'the verifier' if way == 'verifier' else 'vote'}" if k > 1 else "one sample"
        parameters, gains = found[0][0].model.n_parameters(), [a - b for a, b in zip(right, one)]
        rows.append((label, f"{parameters / 1e3:,.0f} k", answers, f"{statistics.mean(flops) / 1e6:,.1f}", estimate(right),
                     estimate(gains, "{:+.3f}")))
    for k in (1, 2, 4, 8, SAMPLES):
        add("4 layers", "verifier", k, pools)
    add("4 layers", "vote", SAMPLES, pools)
    add("8 layers", "verifier", 1, [draw_answers(run) for run in large])
    return markdown(Table(("Countdown with 4 numbers", "parameters", "answers", "MFLOP of a question", "right",
                           "minus one sample of 4 layers"), rows))


def draw_answers(run: TrainingJob) -> tuple[Subject, Pool]:
    """SAMPLES answers at once to each held-out problem."""
    task = next(flag.partition("=")[2] for flag in run.flags if flag.startswith("--task="))
    subject = ask(load(run), task, TASKS[task].size)
    return subject, draw_pool(subject, subject.depths[-1], SAMPLES, T1)


def vote(folder: Path, jobs: int) -> str:
    """A vote of all samples against votes that stop once they are decided, on sums that are answered at once."""
    runs = arm(folder, "sums", "--task=addition", "--thoughts=0", "--max_iter=1500")
    train(jobs, runs)
    rows, pools = [], [draw_answers(run)[1] for run in runs]
    whole = [float(choice_accuracy(pool, "vote", SAMPLES).mean()) for pool in pools]
    tokens = [float(SAMPLES * pool.n_new.mean()) for pool in pools]
    one = [float(pool.right.mean()) for pool in pools]
    rows.append(("one sample", estimate([1 / SAMPLES] * len(pools)), estimate(one), ""))
    rows.append((f"vote of {SAMPLES}", "1", estimate(whole), ""))
    for k in (4, 8, 16):
        fewer = [float(choice_accuracy(pool, "vote", k).mean()) for pool in pools]
        rows.append((f"vote of {k}", f"{k / SAMPLES:.3f}", estimate(fewer),
                     estimate([a - b for a, b in zip(fewer, whole)], "{:+.4f}")))
    for certainty in (1.0, 0.99, 0.95, 0.9):
        found = [stop_early(pool, certainty) for pool in pools]
        right = [float(part[0].mean()) for part in found]
        rows.append((f"of at most {SAMPLES}, certain to {certainty:.0%}",
                     estimate([part[2] / all_tokens for part, all_tokens in zip(found, tokens)]), estimate(right),
                     estimate([a - b for a, b in zip(right, whole)], "{:+.4f}")))
    return markdown(Table(("sums of 12 digits", "tokens / those of the whole vote", "right", "minus the whole vote"), rows))


def samples(folder: Path, jobs: int) -> str:
    """N samples of one prompt in one batch against as many calls."""
    torch.set_num_threads(1)
    rows = []
    for label, shape, n_new in (("4 layers x 128", {"n_layer": 4, "n_head": 4, "head_size": 32}, NEW_TOKENS),
                                ("GPT-2's size", {"vocab_size": 32_768}, NEW_TOKENS // 4)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{"block_size": 256, "vocab_size": 256} | shape)).requires_grad_(False)  # no token ends them
        prompt = torch.randint(256, (PROMPT_TOKENS,)).tolist()
        together, alone = [], []
        for _ in range(4):
            together.append(speed(model, [prompt] * SAMPLES, n_new))
            alone.append(statistics.median(speed(model, [prompt], n_new) for _ in range(3)))
        ours, single = statistics.median(together[1:]), statistics.median(alone[1:])  # the first warms up
        rows.append((label, f"{ours / single:.1f}", f"{ours:,.0f}", f"{single:,.0f}"))
    return markdown(Table((f"{SAMPLES} samples of a prompt of {PROMPT_TOKENS} tokens, one core", "in one batch / one by one",
                           "tok/s in one batch", "tok/s one by one"), rows))


def speed(model: GPT, prompts: list[list[int]], n_new: int) -> float:
    """Tokens a second, the reading of the prompts included."""
    start = time.perf_counter()
    answers = sample_texts(model, BYTES, prompts, n_new, T1, torch.Generator().manual_seed(0))
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - start)


def depth(folder: Path, jobs: int) -> str:
    """Recurrent depth: the product of all permutations so far, at every position, which needs depth; with equal parameters,
    and with equal FLOPs."""
    out = folder / "depth"
    subprocess.run([sys.executable, REPO / "probes.py", "--arms", *DEPTH_ARMS, "--tasks=permute", f"--seeds={len(SEEDS)}",
                    f"--jobs={jobs}", f"--out_path={out}", *DEPTH_FLAGS], check=True, stdout=subprocess.DEVNULL)
    cells = {}
    with open(out / "probes.csv", encoding="utf-8", newline="") as file:
        for cell in csv.DictReader(file):
            cells.setdefault(cell["arm"], []).append(cell)
    task, plain = PROBES["permute"], [float(cell["accuracy_1x"]) for cell in cells[DEPTH_ARMS[0]]]
    rows = []
    for arm, label in DEPTH_ARMS.items():
        model = GPT(read_flags(GPTConfig, parse_arm(arm, "--arms") | DEPTH_SHAPE | {"vocab_size": task.vocab_size}))
        for loops in LOOPS if model.loops > 1 else (1,):
            model.loops = loops
            name = f"accuracy_{loops}_loops" if model.config.loops > 1 else "accuracy_1x"
            found = [float(cell[name]) for cell in cells[arm]]
            rows.append((label, f"{model.n_parameters() / 1e3:,.0f} k", f"{loops}",
                         f"{task.length * model.flops_per_token(task.length) / 3e6:,.1f}", estimate(found),
                         estimate([a - b for a, b in zip(found, plain)], "{:+.3f}")))
    head = (f"products of {task.length} permutations", "parameters", "loops at inference", "MFLOP of a question",
            "right (1/6 by guessing)", "minus 3 layers")
    return markdown(Table(head, rows))


STAGES: dict[str, Callable[[Path, int], str]] = {
    "thoughts": thoughts, "countdown": countdown, "vote": vote, "samples": samples, "depth": depth}


def main():
    torch.set_num_threads(1)
    run_stages("bench/think.py", __doc__, STAGES,
               f"{len(SEEDS)} seeds each, {PROBLEMS} held-out problems, the same ones for all arms; means over seeds ± the "
               f"half-width of their 95 % interval")


if __name__ == "__main__":
    main()
