"""A GPT workbench model in transformers: our network, with the interface that `generate` and lm-eval use."""
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
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would need

    def __init__(self, config: GPTWorkbenchConfig):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        if self.gpt.config.tied:
            tied = {"gpt.head.weight": "gpt.embed.weight"}
            # transformers 5 takes the dict, transformers 4 a list of its keys
            self._tied_weights_keys = tied if hasattr(self, "get_expanded_tied_weights_keys") else list(tied)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if hasattr(module, "init_buffers"):  # non-persistent, so in no file
            module.init_buffers()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # not every mixer keeps keys and values; ours is passed as `cache`

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                cache: Cache | None = None, use_cache: bool | None = None, **kwargs) -> GPTWorkbenchOutput:
        """input_ids: (B, T) int64. attention_mask: (B, T), 0 at padding, on either side. labels: (B, T), -100 where ignored;
        the loss is in nats/token. Logits are (B, T, V), but (B, 1, V), of the last token, for left-padded rows with
        use_cache. Raises ValueError for more tokens than the context holds."""
        n_cached = cache.length if cache is not None else 0
        if n_cached + input_ids.size(1) > self.gpt.config.block_size:
            raise ValueError(f"{n_cached + input_ids.size(1)} tokens exceed the context of {self.gpt.config.block_size}")
        if cache is not None:
            logits = self.gpt(input_ids, cache=cache)
        elif attention_mask is not None and bool((attention_mask[:, 0] == 0).any()):
            first_tokens = attention_mask.long().argmax(dim=1).tolist()
            rows = [row[first:] for row, first in zip(input_ids, first_tokens)]
            logits, cache = self.forward_left_padded(rows, use_cache)
        elif use_cache:
            cache = self.gpt.init_cache(len(input_ids), self.gpt.config.block_size, self.dtype)
            logits = self.gpt(input_ids, cache=cache)
        else:
            logits = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return GPTWorkbenchOutput(loss=loss, logits=logits, cache=cache if use_cache else None)

    def forward_left_padded(self, rows: list[Tensor], use_cache: bool | None) -> tuple[Tensor, Cache | None]:
        """rows: each (T,) int64, without its padding. Returns logits, 0 at padding, and the cache if it is wanted."""
        if use_cache:
            logits, cache = self.gpt.prefill(rows, self.gpt.config.block_size, self.dtype)
            return logits[:, None], cache
        longest = max(map(len, rows))
        return torch.stack([F.pad(self.gpt(row[None])[0], (0, 0, longest - len(row), 0)) for row in rows]), None

    def prepare_inputs_for_generation(self, input_ids: Tensor, cache: Cache | None = None,
                                      attention_mask: Tensor | None = None, use_cache: bool | None = True, **kwargs) -> dict:
        return {"input_ids": input_ids if cache is None else input_ids[:, -1:], "attention_mask": attention_mask,
                "cache": cache, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: GPTWorkbenchOutput, model_kwargs: dict, **kwargs) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return model_kwargs | {"cache": outputs.cache}
