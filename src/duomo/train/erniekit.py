"""ERNIEKit's recipe keys: what each is called here, and which mean nothing on one machine.

`translate` renames what it can and says what it left out. A key that silently does nothing is how a recipe's
losses came to be ignored there; here every one of them is in a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STAGES = {"VL-SFT": "sft", "OCR-VL-SFT": "sft", "SFT": "sft", "PT": "text", "DPO": "dpo"}

# Theirs -> ours; a dot is a key inside a key.
_NAMES = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "train_dataset_path": "data",
    "eval_dataset_path": "eval_data",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "max_seq_len": "max_tokens",
    "gradient_accumulation_steps": "packs_per_step",
    "learning_rate": "rate",
    "lr_scheduler_type": "schedule",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "logging_steps": "report_every",
    "max_grad_norm": "clip",
    "adam_epsilon": "eps",
    "moe_gate_lr_ratio": "rates.routers",
    "vit_lr_ratio": "rates.vision_tower",
    "moe_aux_loss_lambda": "losses.balance",
    "moe_z_loss_lambda": "losses.router_z",
    "moe_orthogonal_loss_lambda": "losses.orthogonality",
    "use_ortho_loss_callback": "losses.decoupled",
    "moe_use_aux_free_update_coef": "losses.bias_update",
    "token_balance_loss": "losses.token_balanced",
    "loss_type": "preference.loss",
    "beta": "preference.beta",
    "simpo_gamma": "preference.simpo_gamma",
    "dpop_lambda": "preference.dpop_weight",
    "sft_loss_ratio": "preference.answer_weight",
}

_MEANINGLESS = """
adam_beta1 adam_beta2 add_sys_token amp_custom_black_list amp_custom_white_list amp_master_grad batch_size
bf16 buffer_size chat_template compute_type context_parallel_degree dataloader_num_workers dataset_name
dataset_type disable_ckpt_quant disable_tqdm distributed_dataloader do_eval do_train drop_history_with_k
eval_dataset_prob eval_dataset_type evaluation_strategy fp16_opt_level freeze_config fuse_rope
fuse_softmax_mask greedy_intokens hidden_dropout_prob im_prefix_length image_dtype image_token_len
logging_dir lora_plus_scale loss_subbatch_seqlen max_prompt_len min_lr mix_strategy modality_ratio moe_group
moe_multimodal_dispatch_use_allgather moe_use_aux_free moe_use_hard_gate multimodal normalize_logps
num_comparisons num_samples_each_epoch number_of_samples_each_epoch offload_optim offset_alpha
overwrite_output_dir packing_size per_device_eval_batch_size per_device_train_batch_size
pipeline_parallel_config pipeline_parallel_degree pp_need_data_degree pp_seg_method pref_loss_ratio
random_shuffle recompute recompute_granularity recompute_use_reentrant ref_model_update_steps reference_free
release_grads render_timestamp rslora rslora_plus sampling_wo_replacement_data_resuming save_strategy
save_total_limit scale_loss sequence_parallel serialize_output sharding sharding_parallel_config
sharding_parallel_degree sp_callback split tensor_parallel_config tensor_parallel_degree
tensorwise_offload_optimizer text_dataset_prob text_dataset_type train_dataset_prob train_dataset_type
trigger_data_prob unified_checkpoint unified_checkpoint_config use_flash_attention use_pic_id
use_recompute_loss_fn use_recompute_moe use_sparse_flash_attn use_sparse_head_and_loss_fn use_template
variable_resolution video_fps video_frames_sample video_max_frames video_min_frames video_target_frames
vision_model_name_or_path visual_ld visualdl
"""
_IGNORED = frozenset(_MEANINGLESS.split())


def translate(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe in our words, and a warning for each of ERNIEKit's keys that has no counterpart."""
    found: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in fields.items():
        if name == "stage":
            found["stage"] = _STAGES.get(str(value), value)
        elif name in _NAMES:
            _put(found, _NAMES[name], value)
        elif name == "packing" and isinstance(value, bool):
            found["packing"] = "best_fit" if value else "none"
        elif name in _IGNORED:
            warnings.append(f"{name} is one of ERNIEKit's keys and does nothing here")
        elif name in ("fine_tuning", "lora_rank", "lora_alpha", "text_dataset_path"):
            pass
        elif isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] |= value
        else:
            found[name] = value
    if fields.get("fine_tuning") == "LoRA" or "lora_rank" in fields:
        _lora(found, int(fields.get("lora_rank", 8)), float(fields.get("lora_alpha", -1)))
    if fields.get("text_dataset_path"):
        found["data"] = [*_listed(found.get("data")), *_listed(fields["text_dataset_path"])]
    return found, warnings


def _lora(found: dict[str, Any], rank: int, alpha: float) -> None:
    """Their rank is for every matrix; alpha -1 is twice the rank."""
    groups = ("attention", "dense", "shared", "resampler", "text_experts", "vision_experts")
    alpha = 2.0 * rank if alpha < 0 else alpha
    found.setdefault("lora", {"ranks": dict.fromkeys(groups, rank), "scale": alpha / rank})


def _listed(value: Any) -> list[Any]:
    return [] if not value else value.split(",") if isinstance(value, str) else list(value)


def _put(found: dict[str, Any], path: str, value: Any) -> None:
    home, _, last = path.rpartition(".")
    if home:
        inner = found.get(home)
        found[home] = {**inner, last: value} if isinstance(inner, dict) else {last: value}
    else:
        found[path] = value
