"""The rules of the repository: who may import whom, what importing does, the user's flags, and true documents."""
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import write_flags

import train
from conftest import REPO, TINY_MODEL
from runtime.config import declared_flags

# Scripts import only scripts to their left.
ORDER = ["tokenizer", "shards", "download_data", "model", "optimizer", "sharding", "dataloader", "sampling", "speculative",
         "candidates", "trainer", "learner", "chat", "generate", "players", "strength", "budget", "evaluate", "train",
         "meta", "finetune", "think", "fewshot", "adapt", "grpo", "rollouts", "play", "selfplay", "export", "compare",
         "probes"]
SCRIPTS = [name for name in ORDER if (REPO / f"{name}.py").exists()]
COMMANDS = [*write_flags.COMMANDS]
# What each folder may import of ours.
FOLDERS = {"runtime": {"runtime"}, "kernels": {"kernels"}, "layers": {"layers", "kernels"}, "text": {"text", "runtime"},
           "tasks": {"tasks", "text", "runtime", "kernels"}, "experiments": {"experiments", "runtime"},
           "convert": {"convert", "layers", "runtime", "model", "tokenizer"}}
# Flag names that users' commands and notes hold; they never change.
USERS_FLAGS = {
    "download_data": "shard_size_threshold data_path tokenizer_path streaming tokens_threshold",
    "train": "learning_rate max_iter num_batch_accum batch_size n_layer vocab_size block_size n_head head_size data_path "
             "checkpoint_path dataloader_num_workers val_iter val_intervals resume_checkpoint verbose compile_model"}
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def modules_in(folder: str) -> list[Path]:
    return sorted((REPO / folder).glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of the modules that `path` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """First parts of these names."""
    return {name.split(".")[0] for name in imported_modules(path)}


# -- imports ----------------------------------------------------------------------------------------------------------

def test_every_script_has_a_place_in_the_order():
    assert {path.stem for path in REPO.glob("*.py")} == set(SCRIPTS)


def test_every_folder_of_code_has_a_rule():
    folders = {path.parent.name for path in REPO.glob("*/*.py")} - {"bench", "tests", "docs"}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_to_their_left(script):
    allowed = set(ORDER[:ORDER.index(script)])
    assert imported(REPO / f"{script}.py") & set(ORDER) <= allowed


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_what_their_rule_allows(folder):
    ours = {*ORDER, *FOLDERS, "bench", "tests"}
    for path in modules_in(folder):
        assert imported(path) & ours <= FOLDERS[folder], path


def test_model_needs_layers_and_config_alone():
    names = {name for name in imported_modules(REPO / "model.py") if name.split(".")[0] in {*ORDER, *FOLDERS}}
    assert all(name.startswith(("layers", "runtime.config")) for name in names)


def test_no_module_imports_itself_in_a_circle():
    names = {str(path.relative_to(REPO).with_suffix("")).replace(os.sep, "."): path
             for path in [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in modules_in(folder))]}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: (imported_modules(path) & names.keys()) - {name} for name, path in names.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name):], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                if not other.startswith(f"{name}.") and not (name.startswith(f"{other}.")):  # a package and its parts
                    visit(other)
            path.pop()
            done.add(name)
    for name in graph:
        visit(name)


def test_nothing_imports_bench_docs_or_tests():
    for path in [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in modules_in(folder))]:
        assert not imported(path) & {"bench", "docs", "tests", "conftest", "pytest", "write_flags"}, path


@pytest.mark.integration
def test_importing_does_nothing(tmp_path):
    """Prints nothing, writes nothing, starts no process or thread, draws no random number, opens no connection."""
    modules = [*SCRIPTS, *(f"{folder}.{path.stem}" for folder in FOLDERS for path in modules_in(folder))]
    if importlib.util.find_spec("triton") is None:  # for Linux only
        modules = [module for module in modules if not module.endswith("_triton")]
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


# -- flags ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """command -> what --help prints in a terminal of 80 columns."""
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        for script in COMMANDS:
            patch.setattr(sys, "argv", [f"{script}.py"])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                importlib.import_module(script).main(["--help"])
            texts[script] = printed.getvalue()
    return texts


@pytest.mark.integration
def test_help_fits_the_terminal_and_has_every_flag(helps):
    for script, configs in write_flags.COMMANDS.items():
        assert max(map(len, helps[script].splitlines())) <= 80, script
        listed = re.findall(r"^  --(\w+)", helps[script], re.MULTILINE)
        assert [*declared_flags(*configs)] == listed[:len(declared_flags(*configs))], script
    assert set(declared_flags(train.RunConfig)) - set(re.findall(r"--(\w+)", helps["compare"])) <= {
        name for name, field in declared_flags(train.RunConfig).items() if field.metadata["flag"].scope == "run"}


def test_the_users_flags_are_there():
    for script, names in USERS_FLAGS.items():
        assert set(names.split()) <= declared_flags(*write_flags.COMMANDS[script]).keys()


def test_the_page_of_flags_is_up_to_date():
    page = (REPO / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == write_flags.page(), "run `python docs/write_flags.py`"


# -- documents --------------------------------------------------------------------------------------------------------

def commands_in(path: Path) -> list[tuple[str, str]]:
    """(script, flags) of every `python SCRIPT.py --…` in a document."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [(script, flags) for script, flags in re.findall(r"python (\w+)\.py\b([^\n`&|]*)", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_in_documents_have_real_flags(page):
    scripts = "train", "finetune", "think", "adapt", "selfplay"
    compared = {name for script in scripts for name in declared_flags(*write_flags.COMMANDS[script])}
    for script, flags in commands_in(page):
        if script == "SCRIPT":
            continue  # stands for any
        known = set(declared_flags(*write_flags.COMMANDS[script])) | (compared if script == "compare" else set()) | {"help"}
        unknown = set(re.findall(r"--(\w+)", flags)) - known
        assert not unknown, f"{page.name}: {script}.py --{min(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_files_that_documents_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
    for named in re.findall(r"`((?:bench|studies|layers|kernels|runtime|text|tasks|experiments|convert|tests)/[\w/]+\.\w+)`",
                            text):
        assert (REPO / named).exists(), f"{page.name}: {named}"


def test_readme_fits_one_sitting():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2500


def test_every_page_can_be_reached_from_readme():
    linked, waiting = set(), [REPO / "README.md"]
    while waiting:
        page = waiting.pop()
        for link in re.findall(r"\]\(([\w/.-]+\.md)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            path = (page.parent / link).resolve()
            if path not in linked and path.parent == REPO / "docs":
                linked.add(path)
                waiting.append(path)
    assert {path.resolve() for path in PAGES[1:]} <= linked


def test_quick_start_is_one_block_of_two_lines():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Quick start$(.*?)^## ", readme, re.MULTILINE | re.DOTALL).group(1)
    (block,) = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    run, tests = block.splitlines()
    assert "download_data.py --dataset=builtin" in run and "train.py --preset=quickstart" in run
    assert "tests/requirements.txt" in tests and tests.endswith("pytest -n 2")


RECIPE = re.compile(r"```python\n# at the end of layers/mlp.py\n(.*?)\n# in layers/__init__.py, in place of.*?\n(.*?)```",
                    re.DOTALL)


@pytest.mark.integration
@pytest.mark.parametrize("page", ["README.md", "docs/extending.md"])
def test_the_recipe_for_an_architecture_trains(tmp_path, data_path, page):
    """Copied into the two files as the page says."""
    recipe = RECIPE.search((REPO / page).read_text(encoding="utf-8"))
    for path in [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).glob("*.*"))]:
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with open(tmp_path / "layers" / "mlp.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + recipe.group(1))
    init = tmp_path / "layers" / "__init__.py"
    lines = init.read_text(encoding="utf-8").splitlines()
    for new in recipe.group(2).splitlines():
        at, = (i for i, line in enumerate(lines) if line.split()[:2] == new.split()[:2])
        lines[at] = new
    init.write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", f"--data_path={data_path}", *TINY_MODEL, "--mlp=squared",
                           "--max_iter=1", "--num_batch_accum=1", "--sample_tokens=0"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "attention and squared" in done.stdout, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_in_documents_runs(page, tmp_path, monkeypatch, run_train):
    """Blocks that begin with an import, beside a trained checkpoints/gpt.pt."""
    blocks = re.findall(r"```python\n((?:from|import) .*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if any("checkpoints/gpt.pt" in block for block in blocks):
        run_train("--max_iter=1", checkpoint="checkpoints/gpt.pt")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
