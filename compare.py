"""Equal-budget comparison of architectures."""
from runtime.flags import BadInput, Parser, add_flags
from train import CONFIGS

# Flags of train.py that are the comparison's own business.
NOT_OF_AN_ARM = {"checkpoint_path", "resume_checkpoint", "overwrite", "plot", "preset", "data_path", "seed", "max_iter",
                 "max_tokens", "max_seconds", "vocab_size", "verbose", "sample_tokens"}


def read_arm(text: str, given: str) -> dict:
    """What flags of train.py an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}. given: the flag it was
    given by, for the message. Raises BadInput."""
    parser = Parser(None)
    add_flags(parser, *CONFIGS, suppress=True)
    try:
        values = vars(parser.parse_args([f"--{part.strip()}" for part in text.split(",")]))
    except BadInput as error:
        raise BadInput(f"{given} {text!r}: {error}") from None
    if foreign := values.keys() & NOT_OF_AN_ARM:
        raise BadInput(f"{given} {text!r}: {min(foreign)} is no part of an architecture or recipe")
    return values
