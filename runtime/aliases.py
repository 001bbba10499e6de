"""What a flag of these names is called here: those of nanoGPT, nanochat, litgpt, Hugging Face's Trainer and llama.cpp.

    explain_unknown("--lr=0.01", known={"learning_rate"})  ->  "--lr=0.01: no such flag, did you mean --learning_rate?"
"""
import difflib
from collections.abc import Collection, Mapping

# our flag -> what others call it; of several flags of a command that fit, the first one here is meant
OTHER_NAMES = {
    "learning_rate": "lr max_lr peak_lr optimizer.lr matrix_lr base_lr",
    "max_iter": "max_iters max_steps num_iterations iters iterations n_iter n_iters num_steps train_steps total_steps steps "
                "train.max_steps",
    "max_tokens": "train.max_tokens num_tokens total_tokens train_tokens",
    "tokens_threshold": "max_tokens num_tokens total_tokens train_tokens",
    "max_seconds": "max_time time_limit train_time total_training_time",
    "epochs": "num_train_epochs train.epochs num_epochs n_epochs max_epochs epoch",
    "num_batch_accum": "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches "
                       "gradient_accumulation accumulation_steps",
    "batch_size": "device_batch_size per_device_train_batch_size per_device_eval_batch_size micro_batch_size "
                  "train.micro_batch_size train_batch_size eval_batch_size batch bs",
    "block_size": "max_seq_len max_seq_length train.max_seq_length seq_len seq_length sequence_length sequence_len context "
                  "context_length context_size ctx_len n_ctx n_positions max_position_embeddings max_context_length",
    "n_layer": "depth num_layers n_layers num_hidden_layers layers num_blocks n_blocks",
    "loops": "mean_recurrence num_loops n_loops n_loop recurrence num_recurrences",
    "n_head": "num_heads n_heads num_attention_heads heads",
    "head_size": "head_dim d_head head_width d_kv",
    "n_kv_head": "n_kv_heads num_key_value_heads num_kv_heads kv_heads n_query_groups",
    "n_hidden": "intermediate_size n_inner d_ff ffn_dim hidden_dim mlp_dim",
    "rotary_base": "rope_theta rope_base",
    "tied": "tie_word_embeddings tie_weights weight_tying tie_embeddings",
    "mlp": "activation hidden_act act_fn activation_function",
    "norm": "norm_class normalization norm_type",
    "warmup_iter": "warmup_iters warmup_steps train.lr_warmup_steps lr_warmup_steps warmup num_warmup_steps",
    "cooldown_frac": "warmdown_ratio warmdown_frac cooldown decay_frac",
    "schedule": "lr_scheduler_type lr_schedule scheduler decay_lr",
    "weight_decay": "wd optimizer.weight_decay",
    "grad_clip": "max_grad_norm max_norm train.max_norm clip_grad gradient_clip_val clip",
    "optimizer": "optim optimizer_type",
    "gradient_checkpointing": "activation_checkpointing grad_checkpointing",
    "compile_model": "compile torch_compile",
    "dtype": "precision fp16 bf16 mixed_precision torch_dtype amp",
    "val_intervals": "eval_interval eval_every eval_steps eval.interval val_interval val_every eval_freq save_interval "
                     "save_steps save_every train.save_interval",
    "val_bytes": "val_tokens eval_tokens",
    "val_iter": "eval_iters eval.max_iters val_iters val_steps",
    "log_intervals": "log_interval logging_steps log_every train.log_interval",
    "dataloader_num_workers": "num_workers workers n_workers",
    "resume_checkpoint": "resume resume_from resume_from_checkpoint from_checkpoint init_from",
    "out_path": "out_dir output_dir output out output_path save_path",  # before the flags that may name an input
    "checkpoint_path": "checkpoint ckpt ckpt_path out_dir output_dir model model_path model_name_or_path checkpoint_dir "
                       "load_checkpoint output out",
    "overwrite": "overwrite_output_dir force",
    "data_path": "data data_dir data_root dataset dataset_dir out_dir output_dir output out out_path output_path",
    "dataset": "data data_dir data_path dataset_name dataset_path train_file input input_file path file",
    "dataset_config": "dataset_config_name subset config_name",
    "text_column": "text_key text_field column content_column",
    "tokenizer_path": "tokenizer tokenizer_dir tokenizer_name tokenizer_file",
    "vocab_size": "n_vocab vocab",
    "max_new_tokens": "max_tokens max_length n_predict num_tokens length",
    "samples": "num_samples n_samples num_return_sequences best_of",
    "temperature": "temp",
    "repetition_penalty": "repeat_penalty",
    "system": "system_prompt system_message",
    "prompt": "start text message",
    "verbose": "quiet silent",
    "threads": "num_threads n_threads cpu_threads nthreads",
    "device": "devices accelerator gpu",
    "seeds": "num_seeds n_seeds",
    "jobs": "n_jobs parallel processes",
}
# What others have and we do not -> what there is instead.
NOT_HERE = {
    "the width is --n_head times --head_size: set these":
        "n_embd d_model hidden_size embed_dim embedding_dim n_embed dim width model_dim aspect_ratio emb_dim",
    "there is none: these models train without dropout":
        "dropout attention_dropout hidden_dropout_prob attn_pdrop resid_pdrop embd_pdrop p_dropout "
        "attention_probs_dropout_prob",
    "the rate falls to 0 over the last --cooldown_frac of the run":
        "min_lr lr_decay_iters lr_decay_steps final_lr_frac lr_end min_learning_rate train.min_lr",
    "is not a flag: see BETAS in optimizer.py":
        "beta1 beta2 betas adam_beta1 adam_beta2 adam_betas momentum",
    "one learning rate, --learning_rate, scales all groups of parameters":
        "embedding_lr unembedding_lr scalar_lr head_lr embed_lr",
    "a step's tokens are --batch_size times --num_batch_accum times --block_size":
        "total_batch_size global_batch_size train.global_batch_size effective_batch_size",
    "metrics.jsonl and TensorBoard events beside the checkpoint hold the numbers; there is no wandb":
        "wandb wandb_log wandb_project wandb_run_name report_to run_name",
    "the length is --max_iter, --max_tokens or --max_seconds":
        "epochs num_train_epochs train.epochs num_epochs n_epochs max_epochs epoch",
    "there are no adapters: all weights are trained": "lora lora_r lora_alpha lora_dropout use_peft peft qlora",
}


def alias_targets(name: str) -> list[str]:
    """Our flags that others call `name`: "lr" -> ["learning_rate"]."""
    return [flag for flag, names in OTHER_NAMES.items() if name in names.split()]


def explain_unknown(typed: str, known: Mapping[str, Collection[str]]) -> str:
    """The message for an unknown flag, `typed` as on the command line. known: name of each flag of the command -> its
    choices, () where it takes any value."""
    dashed, equals, value = typed.partition("=")
    name = dashed.lstrip("-\u2013\u2014").replace("-", "_")  # editors turn -- into a dash
    if name in known:  # --learning-rate, -seed
        return f"{typed}: no such flag, did you mean --{name}{equals}{value}?"
    targets = alias_targets(name)
    if called := [flag for flag in targets if flag in known]:
        return f"{typed}: no such flag, did you mean --{called[0]}?"
    if instead := [words for words, names in NOT_HERE.items() if name in names.split()]:
        mentioned = {word.strip(":,;") for word in instead[0].split() if word.startswith("--")}
        if mentioned <= {f"--{flag}" for flag in known}:
            return f"{typed}: no such flag: {instead[0]}"
    if not equals and (flags := [flag for flag, choices in known.items() if name in choices and name != "auto"]):
        return f"{typed}: no such flag, did you mean --{flags[0]}={name}?"
    # where it is known what is meant, and the command has no such flag, one that is only spelled alike would mislead
    spelled = [] if targets else [f"--{flag}" for flag in known if flag != "help"]
    close = difflib.get_close_matches(f"--{name}", spelled, n=1)
    return f"{typed}: no such flag" + (f", did you mean {close[0]}?" if close else ", see --help")
