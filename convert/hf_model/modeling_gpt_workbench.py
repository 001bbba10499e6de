"""A model of GPT workbench for transformers: its own network, and what `generate` and lm-eval ask of a model."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_gpt_workbench import GPTWorkbenchConfig
from .model import GPT, Cache, GPTConfig


@dataclass
class GPTWorkbenchOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None


class GPTWorkbenchForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTWorkbenchConfig
    base_model_prefix = "gpt"
    main_input_name = "input_ids"
    _is_stateful = True  # a recurrent state cannot be cut back, as assisted decoding would

    def __init__(self, config: GPTWorkbenchConfig):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        if self.gpt.config.tied:
            # a list until transformers 4, a dict from 5 on
            names = {"gpt.head.weight": "gpt.embed.weight"}
            self._tied_weights_keys = names if hasattr(self, "get_expanded_tied_weights_keys") else list(names)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if hasattr(module, "init_buffers"):  # with tables that are in no file
            module.init_buffers()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a cache that every mixer can have is ours

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                cache: Cache | None = None, use_cache: bool | None = None, **kwargs) -> GPTWorkbenchOutput:
        """input_ids: (B, T) int64. attention_mask: (B, T), 0 where a row is filled up, on either side. Logits are (B, T, V),
        or (B, 1, V) of the last token where rows are filled up on the left and a cache is asked for."""
        if input_ids.size(1) + (cache.length if cache is not None else 0) > self.gpt.config.block_size:
            raise ValueError(f"{input_ids.size(1)} tokens are more than the context of {self.gpt.config.block_size} holds")
        padded = attention_mask is not None and cache is None and bool((attention_mask[:, 0] == 0).any())
        if cache is not None:
            logits = self.gpt(input_ids, cache=cache)
        elif padded:
            firsts = attention_mask.long().argmax(dim=1).tolist()
            logits, cache = self.forward_padded([row[first:] for row, first in zip(input_ids, firsts)], use_cache)
        elif use_cache:
            cache = self.gpt.init_cache(len(input_ids), self.gpt.config.block_size, self.dtype)
            logits = self.gpt(input_ids, cache=cache)
        else:
            logits = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return GPTWorkbenchOutput(loss=loss, logits=logits, cache=cache if use_cache else None)

    def forward_padded(self, texts: list[Tensor], use_cache: bool | None) -> tuple[Tensor, Cache | None]:
        """Rows without what fills them up on the left."""
        if use_cache:
            logits, cache = self.gpt.prefill(texts, self.gpt.config.block_size, self.dtype)
            return logits[:, None], cache
        longest = max(map(len, texts))
        return torch.stack([F.pad(self.gpt(text[None])[0], (0, 0, longest - len(text), 0)) for text in texts]), None

    def prepare_inputs_for_generation(self, input_ids: Tensor, cache: Cache | None = None,
                                      attention_mask: Tensor | None = None, use_cache: bool | None = True, **kwargs) -> dict:
        return {"input_ids": input_ids if cache is None else input_ids[:, -1:], "attention_mask": attention_mask,
                "cache": cache, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: GPTWorkbenchOutput, model_kwargs: dict, **kwargs) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return model_kwargs | {"cache": outputs.cache}
