"""Models out to Hugging Face's format and in from it.

    python export.py --checkpoint_path=checkpoints/gpt.pt --out_path=exported_gpt       a folder for AutoModelForCausalLM
    python export.py --import_path=openai-community/gpt2 --checkpoint_path=checkpoints/gpt2.pt

A model whose parts are those of Llama or GPT-2 (train.py's presets of these names) becomes one of theirs, which any engine
runs. Every other takes our own layers along, as code that `trust_remote_code` loads.
"""
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.gguf import require_gguf, write_gguf
from convert.hf_in import fetched, import_model
from convert.hf_mapping import hf_architecture
from convert.hf_out import export
from model import GPT
from runtime.checkpoint import load_checkpoint, reading, save_checkpoint
from runtime.cli import command, parse_flags
from runtime.config import BadInput, check_flags, flag
from runtime.device import DTYPES
from runtime.files import check_writable
from tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """What becomes what."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model; with --import_path, the file to write")
    out_path: Path = flag(None, "folder to write it into, in Hugging Face's format")
    weights: str = flag("fp32", "dtype of the weights in it", choices=tuple(DTYPES))
    gguf: bool = flag(False, "put model.gguf for llama.cpp beside them; of models of Llama's shape whose vocabulary has the "
                             "pattern\ngpt4 or gpt2, the two that llama.cpp has too")
    import_path: str = flag(None, "the other way: a folder, or a model of the hub by its id, of GPT-2's or Llama's shape, "
                                  "or one that was\nexported here")
    chat_tokens: bool = flag(True, "with --import_path: add tokens for conversations, so that it can be finetuned on them")
    overwrite: bool = flag(False, "replace what is there")

    def __post_init__(self):
        check_flags(self)
        if (self.out_path is None) == (self.import_path is None):
            raise BadInput("give --out_path, a folder to write to, or --import_path, a model to read")


@contextmanager
def atomic_folder(folder: Path, overwrite: bool):
    """A folder that takes its name only when the block ends well. Raises BadInput when there is one that may not be
    replaced."""
    if folder.exists() and not overwrite:
        raise BadInput(f"--out_path={folder}: exists: choose another folder, or add --overwrite")
    if folder.exists() and not (folder / "config.json").exists():
        raise BadInput(f"--out_path={folder}: holds no exported model, so it is not replaced: choose another folder")
    check_writable(folder / "config.json", f"--out_path={folder}")
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Writes a model in Hugging Face's format, or reads one into a checkpoint."""
    config, = parse_flags(main.__doc__, argv, ExportConfig)
    path = config.checkpoint_path
    if config.import_path is not None:
        if path.exists() and not config.overwrite:
            raise BadInput(f"--checkpoint_path={path}: exists: choose another path, or add --overwrite")
        check_writable(path, f"--checkpoint_path={path}")
        model, tokenizer = import_model(fetched(config.import_path), config.chat_tokens)
        save_checkpoint(path, model.to_checkpoint() | {"tokenizer": tokenizer.to_json()})
        shape = model.config
        print(f"{path}: {shape.n_layer} layers x {shape.n_embd}, {model.n_parameters() / 1e6:.1f} M parameters, context "
              f"{shape.block_size:,}, vocabulary {shape.vocab_size:,}; `python generate.py --checkpoint_path={path}` "
              f"samples from it, `python finetune.py --checkpoint_path={path}` finetunes it")
        return
    blob = load_checkpoint(path)
    with reading(path):
        model, tokenizer = GPT.from_checkpoint(blob), Tokenizer.from_json(blob["tokenizer"])
        _ = tokenizer.separator_id
    del blob
    if config.gguf:
        require_gguf(model, tokenizer)
    with atomic_folder(config.out_path, config.overwrite) as folder:
        export(model, tokenizer, folder, config.weights)
        if config.gguf:
            write_gguf(model, tokenizer, folder / "model.gguf", config.weights)
    kind = {"llama": "a Llama", "gpt2": "a GPT-2", None: "our own code, to be loaded with trust_remote_code"}[
        hf_architecture(model.config)]
    size = sum(file.stat().st_size for file in config.out_path.iterdir())
    print(f"{config.out_path}: {kind}, {model.n_parameters() / 1e6:.1f} M parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
