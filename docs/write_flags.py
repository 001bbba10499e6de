"""Writes docs/flags.md, the tables of every command's flags, from their declarations.

    python docs/write_flags.py            a test says when the page is out of date
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapt  # noqa: E402
import chat  # noqa: E402
import compare  # noqa: E402
import download_data  # noqa: E402
import evaluate  # noqa: E402
import export  # noqa: E402
import generate  # noqa: E402
import probes  # noqa: E402
import tokenizer  # noqa: E402
from fewshot import RulesConfig  # noqa: E402
from finetune import FINETUNING  # noqa: E402
from learner import AdaptConfig  # noqa: E402
from runtime.cli import default_text  # noqa: E402
from runtime.config import ON_RESUME, SCOPES, declared_flags  # noqa: E402
from runtime.device import DeviceConfig  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from sampling import SamplingConfig  # noqa: E402
from selfplay import SELFPLAY  # noqa: E402
from speculative import SpeculationConfig  # noqa: E402
from text.sources import SourceConfig  # noqa: E402
from think import THINKING  # noqa: E402
from train import PRETRAINING  # noqa: E402

COMMANDS = {
    "download_data": (download_data.PrepareConfig, SourceConfig),
    "tokenizer": (tokenizer.TokenizerConfig, SourceConfig),
    "train": PRETRAINING.classes,
    "generate": (generate.GenerateConfig, AdaptConfig, SamplingConfig, SpeculationConfig, DeviceConfig),
    "chat": (chat.ChatConfig, AdaptConfig, SamplingConfig, DeviceConfig),
    "finetune": FINETUNING.classes,
    "think": THINKING.classes,
    "evaluate": (evaluate.EvaluateConfig, AdaptConfig, DeviceConfig),
    "adapt": (adapt.AdaptRunConfig, AdaptConfig, RulesConfig, DeviceConfig),
    "selfplay": SELFPLAY.classes,
    "export": (export.ExportConfig,),
    "compare": (compare.CompareConfig, compare.VocabularyConfig),
    "probes": (probes.ProbeConfig, probes.CellConfig),
}
NOTES = {"compare": "And every flag of `train.py` (or of `--script`) whose scope is not *run*: it holds for all arms."}


def title(config: type) -> str:
    """The first line of the dataclass's docstring, under which --help lists its flags."""
    return config.__doc__.splitlines()[0].rstrip(".")


def table(config: type, resumes: bool) -> str:
    """Markdown rows of the flags of one dataclass. resumes: with what a resumed run and a comparison do with them."""
    head = ["flag", "default", "what it does", *(["on resume", "scope"] if resumes else [])]
    lines = [head, ["---"] * len(head)]
    for name, field in declared_flags(config).items():
        flag = field.metadata["flag"]
        words = flag.help + (f" (choices: {', '.join(flag.choices)})" if flag.choices else "")
        lines.append([f"`--{name}`", default_text(field), words, *([flag.on_resume, flag.scope] if resumes else [])])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page() -> str:
    users = {}
    for script, configs in COMMANDS.items():
        for config in configs:
            users.setdefault(config, []).append(script)
    shared = {config: scripts for config, scripts in users.items() if len(scripts) > 1}
    parts = ["# Flags", "Written by `python docs/write_flags.py` from the declarations in the code; do not edit.",
             "A yes-or-no flag is given as `--streaming=1`, `--streaming=0` or `--streaming`. Numbers may be written "
             "`10_000` or `1e9`. `python SCRIPT.py --help` prints the same.",
             "**On resume**: " + "; ".join(f"*{name}*: {words}" for name, words in ON_RESUME.items()) + ".",
             "**Scope**, who sets the flag when `compare.py` starts many runs: "
             + "; ".join(f"*{name}*: {words}" for name, words in SCOPES.items()) + "."]
    for script, configs in COMMANDS.items():
        resumes = script in ("train", "finetune", "think", "selfplay", "download_data")
        parts.append(f"## {script}.py")
        for config in configs:
            if config not in shared:
                parts += [f"**{title(config)}**", table(config, resumes)]
        if common := [f"[{title(config)}](#{anchor(config)})" for config in configs if config in shared]:
            parts.append("And: " + ", ".join(common) + ".")
        if script in NOTES:
            parts.append(NOTES[script])
    parts.append("# Shared by several commands")
    for config, scripts in shared.items():
        parts += [f"## {title(config)}", "Of " + ", ".join(f"`{script}.py`" for script in scripts) + ".",
                  table(config, any(script in ("train", "finetune", "think", "selfplay") for script in scripts))]
    return "\n\n".join(parts) + "\n"


def anchor(config: type) -> str:
    """As GitHub makes it of a heading."""
    return title(config).lower().replace(" ", "-").replace("'", "").replace(".", "").replace(",", "")


if __name__ == "__main__":
    with atomic_write(ROOT / "docs" / "flags.md", "w") as file:
        file.write(page())
    print(ROOT / "docs" / "flags.md")
