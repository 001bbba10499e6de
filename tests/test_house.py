"""The rules of the repository: who may import whom, what importing does, the user's flags, and README's truth."""
import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import download_data
import evaluate
import export
import finetune
import generate
import probes
import sampling
import tokenizer
import train
from conftest import REPO, TINY_MODEL
from runtime.config import takes_several
from runtime.device import DeviceConfig
from text.sources import SourceConfig

# Scripts import only scripts to their left.
ORDER = ["tokenizer", "model", "optimizer", "dataloader", "generate", "train", "finetune", "evaluate", "compare", "probes",
         "selfplay", "export", "download_data"]
SCRIPTS = [name for name in ORDER if (REPO / f"{name}.py").exists()]
PACKAGES = {"runtime": {"runtime"}, "kernels": {"kernels"}, "layers": {"layers", "kernels"}}
# Flag names that users' commands and notes hold; they never change.
USERS_FLAGS = {
    "download_data": "shard_size_threshold data_path tokenizer_path streaming tokens_threshold",
    "train": "learning_rate max_iter num_batch_accum batch_size n_layer vocab_size block_size n_head head_size data_path "
             "checkpoint_path dataloader_num_workers val_iter val_intervals resume_checkpoint verbose compile_model"}


def tracked_python(folder: str) -> list[Path]:
    return sorted((REPO / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    """First parts of the modules that `path` imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def test_every_script_has_a_place():
    assert {path.stem for path in REPO.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_to_their_left(script):
    allowed = set(ORDER[:ORDER.index(script)])
    assert imported(REPO / f"{script}.py") & set(ORDER) <= allowed


@pytest.mark.parametrize("package", PACKAGES)
def test_shared_parts_know_no_script(package):
    ours = set(ORDER) | set(PACKAGES) | {"bench", "tests"}
    for path in tracked_python(package):
        assert imported(path) & ours <= PACKAGES[package], path


def test_nothing_imports_bench_or_tests():
    for path in [*REPO.glob("*.py"), *(path for package in PACKAGES for path in tracked_python(package))]:
        assert not imported(path) & {"bench", "tests", "conftest", "pytest"}, path


def test_importing_does_nothing(tmp_path):
    """Prints nothing, writes nothing, starts no process or thread, draws no random number, opens no connection."""
    modules = [*SCRIPTS, *(f"{package}.{path.stem}" for package in PACKAGES for path in tracked_python(package))]
    if importlib.util.find_spec("triton") is None:  # it is for Linux alone
        modules.remove("kernels.rational_triton")
    program = f"""
import sys, threading, random, socket
sys.path.insert(0, {str(REPO)!r}); sys.dont_write_bytecode = True
import numpy, torch, datasets  # what these do is not ours
def state(): return (threading.active_count(), random.getstate(), torch.get_rng_state().tolist(), torch.initial_seed(),
                     numpy.random.get_state()[1].tolist())
before = state()
def refuse(*args, **kwargs): raise AssertionError("a connection")
socket.socket.connect = refuse
for module in {modules!r}:
    __import__(module)
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {script: help_of(script) for script in COMMANDS}


def test_the_users_flags_are_there(helps):
    for script, flags in USERS_FLAGS.items():
        for flag in flags.split():
            assert re.search(rf"^ +--{flag}\b", helps[script], re.MULTILINE), f"{script}.py --{flag}"


def test_every_flag_has_help(helps):
    for script, configs in COMMANDS.items():
        for field in flags_of(configs):
            words = field.metadata["help"].replace("\n", " ").split()
            assert words and " ".join(words) in " ".join(helps[script].split()), f"{script}.py --{field.name}"


COMMANDS = {
    "download_data": (download_data.PrepareConfig, SourceConfig), "train": train.CONFIGS,
    "tokenizer": (tokenizer.TokenizerConfig, SourceConfig),
    "generate": (generate.GenerateConfig, sampling.SamplingConfig, DeviceConfig), "finetune": finetune.CONFIGS,
    "evaluate": (evaluate.EvaluateConfig, DeviceConfig), "export": (export.ExportConfig,),
    "compare": (compare.CompareConfig,), "probes": probes.CONFIGS}


def flags_of(configs: tuple) -> list:
    return [field for config in configs for field in dataclasses.fields(config) if "help" in field.metadata]


def flag_table(configs: tuple) -> str:
    """README's table of the flags of a command."""
    rows = ["| flag | default | what |", "|---|---|---|"]
    for field in flags_of(configs):
        default = "" if field.default is None else field.default
        if takes_several(field):
            default = " ".join(map(str, default))
        if isinstance(default, bool):
            default = int(default)
        elif isinstance(default, int) and default >= 100_000:
            default = f"{default:_}"
        choices = field.metadata["choices"]
        words = " ".join(field.metadata["help"].split()) + (f": {', '.join(choices)}" if choices else "")
        rows.append(f"| `--{field.name}` | {default} | {words} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("script", COMMANDS)
def test_readme_tables_are_the_commands_flags(script, helps):
    readme, table = (REPO / "README.md").read_text(encoding="utf-8"), flag_table(COMMANDS[script])
    expected = f"### `{script}.py`\n\n{table}\n"
    assert expected in readme, f"README's table is out of date; it should be:\n\n{expected}"
    shared = [field.name for field in flags_of(train.CONFIGS) if field.name not in compare.OWN]
    assert re.findall(r"^\| `--(\w+)`", table, re.MULTILINE) + shared * (script == "compare") == \
        re.findall(r"^  --(\w+)", helps[script], re.MULTILINE)


def test_readme_commands_have_real_flags(helps):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python (\w+)\.py((?: +(?:--\w+\S*|\\\n))+)", readme)
    assert len(commands) > 5
    for script, flags in commands:
        for flag in re.findall(r"--(\w+)", flags):
            assert f"--{flag}" in helps[script], f"{script}.py --{flag}"


def test_quick_start_is_one_block_of_two_lines():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Quick start$(.*?)^## ", readme, re.MULTILINE | re.DOTALL).group(1)
    block, = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    run, test = block.splitlines()
    assert "download_data.py --dataset=builtin" in run and "train.py" in run
    assert "tests/requirements.txt" in test and test.endswith("pytest -n 2")


def test_files_that_readme_names_exist():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w/.]+)\)", readme))
    named |= set(re.findall(r"`((?:bench|studies|layers|kernels|runtime|tests)/\w+\.\w+)`", readme))
    assert named
    for path in named:
        assert (REPO / path).exists(), path


def test_readmes_recipe_for_an_architecture(tmp_path, data_path):
    """Copied into the two files as README says, it trains."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    recipe = re.search(r"```python\n# at the end of layers/mlp.py\n(.*?)\n# in layers/__init__.py, in place of.*?\n(.*?)```",
                       readme, re.DOTALL)
    for path in [*REPO.glob("*.py"), *REPO.glob("layers/*.py"), *REPO.glob("runtime/*.py"), *REPO.glob("kernels/*.*")]:
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with open(tmp_path / "layers" / "mlp.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + recipe.group(1))
    init = tmp_path / "layers" / "__init__.py"
    lines = init.read_text(encoding="utf-8").splitlines()
    for new in recipe.group(2).splitlines():
        at, = (i for i, line in enumerate(lines) if line.split()[:2] == new.split()[:2])
        lines[at] = new
    init.write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", f"--data_path={data_path}", *TINY_MODEL, "--mlp=squared",
                           "--max_iter=1", "--num_batch_accum=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "attention and squared" in done.stdout, done.stderr


def test_readmes_python_runs():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(from tokenizer import.*?)```", readme, re.DOTALL).group(1), {})
