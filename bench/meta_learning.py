"""Do models that finetune.py --meta has trained adapt better? Scores them and their base, document by document: with the
weights as they are, adapting, and frozen after adapting to the document before; then compares, paired over documents.

    python bench/meta_learning.py --base=checkpoints/quickstart.pt --runs=runs/meta --data=data --foreign=docs.parquet

--runs holds a checkpoint for each objective and seed, such as fomaml_1.pt. Scores go to studies/meta.jsonl, of which models
that are there already are taken; the tables are printed. studies/meta.md holds them, with the commands.
"""
import argparse
import json
import math
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from side_by_side import REPO

from download_data import open_text
from experiments.report import Table, markdown
from experiments.stats import Estimate
from learner import AdaptConfig, Learner, encode_documents
from meta import META_OBJECTIVES
from runtime.device import DeviceConfig, open_machine
from sampling import load_pretrained
from text.sources import SourceConfig

SCORES = "static", "adapted", "frozen"


def score_model(path: Path, texts: dict[str, list[str]], args) -> list[dict]:
    """A row for each document: bits per byte of its first tokens, as many as --contexts hold; shorter ones are left out."""
    model, tokenizer, _ = load_pretrained(path)
    config = AdaptConfig(adapt_hop=args.adapt_hop, adapt_rate=args.adapt_rate)
    learner = Learner(model, config, open_machine(DeviceConfig(device="cpu", dtype="fp32")))
    n, token_bytes, rows = args.contexts * model.config.block_size, tokenizer.token_bytes(), []
    for name, some in texts.items():
        documents = (ids[:n + 1] for ids in encode_documents(tokenizer, some))
        documents = list(islice((ids for ids in documents if len(ids) == n + 1), args.documents))
        nats = [{} for _ in documents]
        for i, ids in enumerate(documents):
            nats[i] |= {"static": learner.read(ids, learn=False), "adapted": learner.read(ids)}
            after = (i + 1) % len(documents)
            nats[after]["frozen"] = learner.read(documents[after], learn=False)  # with weights that have adapted to `ids`
            learner.forget()
        for i, ids in enumerate(documents):
            bits = math.log(2) * int(token_bytes[ids[1:].numpy()].sum())
            rows.append({"model": path.stem, "set": name, "document": i} | {
                score: round(nats[i][score].sum().item() / bits, 6) for score in SCORES})
    return rows


def difference(a: dict, b: dict, over_seeds: bool = False) -> str:
    """The mean of a - b, (document, seed) -> bits per byte, with its 95 % interval over documents, each the mean of its
    seeds, or over seeds, each the mean of its documents. A base has one seed, ""."""
    groups = defaultdict(list)
    for (document, seed), value in a.items():
        groups[seed if over_seeds else document].append(value - b.get((document, seed), b.get((document, ""))))
    estimate = Estimate.from_values([sum(values) / len(values) for values in groups.values()])
    return f"{estimate.mean:+.4f} ± {estimate.margin:.4f}"


def print_tables(rows: list[dict], base: str):
    scores = defaultdict(dict)  # set, objective, score -> (document, seed) -> bits per byte
    for row in rows:
        objective, seed = ("base", "") if row["model"] == base else row["model"].rsplit("_", 1)
        for score in SCORES:
            scores[row["set"], objective, score][row["document"], seed] = row[score]
    objectives = [name for name in ("joint", *META_OBJECTIVES[:2]) if any(name == key[1] for key in scores)]
    for name in dict.fromkeys(row["set"] for row in rows):
        table = []
        for objective in ("base", *objectives):
            static, adapted, frozen = (scores[name, objective, score] for score in SCORES)
            table.append((objective, *(f"{sum(part.values()) / len(part):.4f}" for part in (static, adapted)),
                          difference(adapted, static), difference(frozen, static)))
        print(f"\n{name}\n" + markdown(Table(("", "static", "adapted", "adapted − static",
                                              "adapted to another, frozen − static"), table)))
        pairs = [(one, "base") for one in objectives] + [(one, "joint") for one in objectives[1:]]
        print("\n" + markdown(Table(("", "score", "over documents", "over seeds"), [
            (f"{one} − {other}", score, *(difference(scores[name, one, score], scores[name, other, score], over_seeds)
                                          for over_seeds in (False, True)))
            for one, other in pairs for score in SCORES[:2]])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("checkpoints/quickstart.pt"))
    parser.add_argument("--runs", type=Path, default=Path("runs/meta"))
    parser.add_argument("--data", default="data", help="prepared folder, whose validation documents are scored")
    parser.add_argument("--foreign", required=True, help="text of another kind")
    parser.add_argument("--documents", type=int, default=24, help="of each set")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--adapt_hop", type=int, default=32)
    parser.add_argument("--adapt_rate", type=float, default="auto")
    parser.add_argument("--scores", type=Path, default=REPO / "studies" / "meta.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = (text for chunk in open_text(SourceConfig(args.data)).held_out_chunks() for text in chunk.documents.strings())
    texts = {"in domain": list(held_out), "foreign": list(open_text(SourceConfig(args.foreign)).documents())}
    rows = [json.loads(line) for line in args.scores.read_text().splitlines()] if args.scores.exists() else []
    for path in (args.base, *sorted(args.runs.glob("*_*.pt"))):
        if path.stem not in {row["model"] for row in rows}:
            new = score_model(path, texts, args)
            rows += new
            with open(args.scores, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
    print_tables(rows, args.base.stem)


if __name__ == "__main__":
    main()
