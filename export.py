"""Models to and from Hugging Face's format.

    python export.py --checkpoint_path=checkpoints/gpt.pt --out_path=exported_gpt       a folder for AutoModelForCausalLM
    python export.py --import_path=openai-community/gpt2 --checkpoint_path=checkpoints/gpt2.pt

A model trained with train.py's presets `llama` or `gpt2` becomes transformers' LlamaForCausalLM or GPT2LMHeadModel, which
other engines run. Every other model is exported with its own code, which `trust_remote_code` loads.
"""
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.gguf import require_gguf, write_gguf
from convert.hf_in import import_model
from convert.hf_mapping import hf_architecture
from convert.hf_out import export_model
from convert.hf_tokenizer import to_hf_pattern
from convert.model_card import CLASSES, load_lines, model_card
from runtime.checkpoint import explain_damage, load_checkpoint, run_folder, run_lock, save_checkpoint
from runtime.cli import command, ignore_output_errors, parse_flags, read_path, say
from runtime.config import BadInput, check_flags, flag
from runtime.device import DTYPES
from runtime.files import check_writable
from runtime.metrics import read_rows
from sampling import load_pretrained
from text.hub import hub_error, hub_unreachable, is_hub_id, is_network_error


@dataclass(frozen=True)
class ExportConfig:
    """Export and import."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to export; with --import_path, the file to write")
    out_path: Path = flag(None, "folder to write in Hugging Face's format")
    weights: str = flag("fp32", "dtype of the weights in it", choices=tuple(DTYPES))
    gguf: bool = flag(False, "also write model.gguf, for llama.cpp; only for models trained with --preset=llama on a "
                             "vocabulary with --pattern=gpt4 or gpt2")
    import_path: str = flag(None, "import instead: a folder, or a model of the hub by its id, with Llama's or GPT-2's "
                                  "architecture, or one that was exported here")
    chat_tokens: bool = flag(True, "with --import_path: add the special tokens of conversations, so that the model can be "
                                   "finetuned on them")
    overwrite: bool = flag(False, "replace an existing folder or checkpoint")

    def __post_init__(self):
        check_flags(self)
        if (self.out_path is None) == (self.import_path is None):
            raise BadInput("give either --out_path, a folder to write to, or --import_path, a model to read")


@command
def main(argv=None):
    """Writes a model in Hugging Face's format, or reads one into a checkpoint."""
    config, = parse_flags(main.__doc__, argv, ExportConfig)
    ignore_output_errors()  # what it prints is a report: a script that reads the exit code wants to know of the files
    if config.import_path is None:
        export_checkpoint(config)
    else:
        import_checkpoint(config)


# -- export -----------------------------------------------------------------------------------------------------------

def export_checkpoint(config: ExportConfig):
    """--checkpoint_path -> --out_path. Raises BadInput, OSError."""
    path = config.checkpoint_path
    checkpoint = load_checkpoint(path)
    model, tokenizer, _ = load_pretrained(path, checkpoint)
    with explain_damage(path):
        to_hf_pattern(tokenizer.pattern)  # raises before anything is written
        card = model_card(config.out_path.name, model, tokenizer, checkpoint.get("training", {}),
                          read_rows(run_folder(path) / "metrics.jsonl"))
    del checkpoint  # its optimizer state is larger than the model
    if config.gguf:
        require_gguf(model, tokenizer)
    with atomic_folder(config.out_path, config.overwrite) as folder:
        export_model(model, tokenizer, folder, config.weights, card)
        if config.gguf:
            write_gguf(model, tokenizer, folder / "model.gguf", config.weights)
    architecture, size = hf_architecture(model.config), sum(file.stat().st_size for file in config.out_path.iterdir())
    own_code = ", our own code: trust_remote_code=True lets transformers run the .py files in the folder"
    say(f"{config.out_path}: {CLASSES[architecture]}, {model.n_parameters() / 1e6:.1f} M parameters, {size / 1e6:.1f} MB"
        f"{own_code if architecture is None else ''}; it is loaded by")
    print(load_lines(str(config.out_path), architecture))


@contextmanager
def atomic_folder(folder: Path, overwrite: bool):
    """A new folder that gets the name `folder` only if the block succeeds. Raises BadInput if `folder` exists and may not be
    replaced, OSError naming it if it cannot be written."""
    flag_text, folder = f"--out_path={folder}", Path(os.path.realpath(folder))  # writes through a symbolic link
    check_replaceable(folder, overwrite, flag_text)
    check_writable(folder / "config.json", flag_text)
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: another export may be writing to the same folder
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name[:100]}.", suffix=".tmp", dir=folder.parent))
        part.chmod(0o777 & ~current_umask())
        yield part
        check_replaceable(folder, overwrite, flag_text)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def check_replaceable(folder: Path, overwrite: bool, flag_text: str):
    """Raises BadInput if `folder`, a real path, exists and may not be replaced."""
    if not folder.exists():
        return
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise BadInput(f"{flag_text}: is the current folder, or holds it, and cannot be replaced: choose another folder")
    if not overwrite:
        raise BadInput(f"{flag_text}: exists: choose another folder, or add --overwrite")
    if not (folder / "config.json").exists():
        raise BadInput(f"{flag_text}: holds no exported model, so it is not replaced: choose another folder")


def current_umask() -> int:
    umask = os.umask(0o077)  # only by setting it can it be read
    os.umask(umask)
    return umask


# -- import -----------------------------------------------------------------------------------------------------------

def import_checkpoint(config: ExportConfig):
    """--import_path -> --checkpoint_path. Raises BadInput, OSError."""
    path = config.checkpoint_path
    with run_lock(path, f"--checkpoint_path={path}"):
        if path.exists() and not config.overwrite:
            raise BadInput(f"--checkpoint_path={path}: exists: choose another path, or add --overwrite")
        check_writable(path, f"--checkpoint_path={path}")
        model, tokenizer = import_model(download(config.import_path), config.chat_tokens)
        save_checkpoint(path, model.to_checkpoint() | {"tokenizer": tokenizer.to_json()})
    say(f"{path}: {model.config.describe_shape()}, {model.n_parameters() / 1e6:.1f} M parameters, "
        f"context {model.config.block_size:,}, vocabulary {model.config.vocab_size:,}; "
        f"`python generate.py --checkpoint_path={path}` samples from it, "
        f"`python finetune.py --checkpoint_path={path}` finetunes it")


def download(source: str) -> Path:
    """The folder `source`, or where the hub's library keeps the model of that id. Raises BadInput if there is neither."""
    path = read_path(source, f"--import_path={source}")
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(source):
        raise BadInput(f"--import_path={source}: " + ("is a file: give a folder" if path.exists() else "no such folder"))
    if path.parent != Path() and path.parent.is_dir():
        raise BadInput(f"--import_path={source}: no such folder; the hub is not asked, as there is a folder {path.parent}")
    import huggingface_hub
    from huggingface_hub.utils import logging  # not an attribute of huggingface_hub until something has imported it
    logging.set_verbosity_error()
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=["*.json", "merges.txt", "*.safetensors"]))
    except Exception as error:
        if is_network_error(error):
            raise hub_unreachable(f"--import_path={source}", error, "a local folder") from None
        raise hub_error(error, f"--import_path={source}") from None


if __name__ == "__main__":
    main()
