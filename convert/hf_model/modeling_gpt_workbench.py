"""A GPT workbench model in transformers: our network, with the interface that `generate`, `Trainer` and lm-eval use."""
from contextlib import nullcontext
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
    cache: "BeamCache | None" = None


@dataclass
class BeamCache:
    """Our cache under the name and with the methods that transformers looks for."""
    cache: Cache
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length

    def reorder_cache(self, beam_idx: Tensor):
        """beam_idx: (B,), the row that each row continues from now on."""
        self.cache.select_rows(beam_idx.tolist())


class GPTWorkbenchForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTWorkbenchConfig
    base_model_prefix = "gpt"
    main_input_name = "input_ids"
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would need
    accepts_loss_kwargs = True  # `Trainer` then gives num_items_in_batch

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
        return False  # not every mixer keeps keys and values; ours is made in `forward`

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                cache: BeamCache | None = None, use_cache: bool | None = None,
                num_items_in_batch: Tensor | int | None = None, **kwargs) -> GPTWorkbenchOutput:
        """input_ids: (B, T) int64. attention_mask: (B, T), 0 at padding, on either side or both. labels: (B, T), -100 where
        ignored; the loss is in nats/token: the mean, or with num_items_in_batch the sum divided by it. Logits are (B, T, V),
        but (B, 1, V), of the last token, for left-padded rows with use_cache. Raises ValueError for more tokens than the
        context holds, and for padding between tokens."""
        ours, block_size = cache and cache.cache, self.gpt.config.block_size
        n_tokens = input_ids.size(1) + (ours.length if ours is not None else 0)
        if n_tokens > block_size:
            raise ValueError(f"{n_tokens} tokens exceed the context of {block_size}")
        with self.autocast():
            if ours is None and attention_mask is not None and bool((starts := left_padding(attention_mask)).any()):
                logits, ours = self.forward_left_padded(input_ids, starts.tolist(), use_cache)
            else:
                if ours is None and use_cache:
                    ours = self.gpt.init_cache(len(input_ids), block_size, self.cache_dtype())
                logits = self.gpt(input_ids, cache=ours)
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        return GPTWorkbenchOutput(loss=loss, logits=logits, cache=BeamCache(ours) if use_cache else None)

    def autocast(self):
        """Weights in bf16 or fp16 meet activations in fp32: matrix products run in their dtype, everything else in fp32."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, dtype=self.dtype)
        return nullcontext()

    def cache_dtype(self) -> torch.dtype:
        """fp32 on a CPU, whose attention of one query to many keys is slower in bf16."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def forward_left_padded(self, input_ids: Tensor, starts: list[int],
                            use_cache: bool | None) -> tuple[Tensor, Cache | None]:
        """starts: the padding at the start of each row. Returns logits, 0 at that padding, and the cache if it is wanted."""
        if use_cache:
            rows = [row[start:] for row, start in zip(input_ids, starts)]
            logits, cache = self.gpt.prefill(rows, self.gpt.config.block_size, self.cache_dtype())
            return logits[:, None], cache
        logits = [None] * len(starts)
        for start in set(starts):  # rows with equal padding together
            rows = [row for row, other in enumerate(starts) if other == start]
            for row, values in zip(rows, self.gpt(input_ids[rows, start:])):
                logits[row] = F.pad(values, (0, 0, start, 0))
        return torch.stack(logits), None

    def prepare_inputs_for_generation(self, input_ids: Tensor, cache: BeamCache | None = None,
                                      attention_mask: Tensor | None = None, use_cache: bool | None = True, **kwargs) -> dict:
        return {"input_ids": input_ids if cache is None else input_ids[:, -1:], "attention_mask": attention_mask,
                "cache": cache, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: GPTWorkbenchOutput, model_kwargs: dict, **kwargs) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # one object under two names: beam search reorders its rows under the name that this version of transformers uses
        return model_kwargs | {"cache": outputs.cache, "past_key_values": outputs.cache}

    def _reorder_cache(self, cache: BeamCache | None, beam_idx: Tensor) -> BeamCache | None:
        if cache is not None:
            cache.reorder_cache(beam_idx)
        return cache


def next_token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """logits: (B, T, V), labels: (B, T). With num_items_in_batch, the number of targets in all batches of an optimizer step,
    the losses of these batches add up to the mean."""
    predictions, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(predictions, targets)
    return F.cross_entropy(predictions, targets, reduction="sum") / torch.as_tensor(num_items_in_batch, device=logits.device)


def left_padding(attention_mask: Tensor) -> Tensor:
    """(B, T), 1 at tokens -> (B,), the number of zeros before the first token; 0 for a row that is all padding. Raises
    ValueError for zeros between tokens, or a mask of another shape."""
    if attention_mask.dim() != 2:
        raise ValueError(f"an attention mask of shape {tuple(attention_mask.shape)} is not supported, only (rows, tokens)")
    is_token = attention_mask.bool().long()
    if bool((is_token.diff(dim=1, prepend=torch.zeros_like(is_token[:, :1])) > 0).sum(dim=1).gt(1).any()):
        raise ValueError("the attention mask has padding between tokens, which is not supported")
    return is_token.argmax(dim=1)
