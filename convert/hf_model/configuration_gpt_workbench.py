"""The config of a GPT workbench model in transformers."""
from transformers import PretrainedConfig


class GPTWorkbenchConfig(PretrainedConfig):
    """gpt: the fields of GPTConfig."""
    model_type = "gpt_workbench"

    def __init__(self, gpt: dict | None = None, **kwargs):
        self.gpt = gpt or {}
        super().__init__(**kwargs)
