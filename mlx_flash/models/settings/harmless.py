"""Keys of configs that change no logit, in whatever family, and why."""

from __future__ import annotations

TRAINING = "used in training only"
OUTPUT = "says what is returned or kept, not what is computed"
TOKENS = "tokens are the tokenizer's and generation_config.json's"
LABELS = "for classification, which is not done here"
ABOUT = "about the file, not the model"
SPEED = "chooses between ways to compute the same"
EXTRA_LAYERS = "layers that predict further tokens, which are left out"
LIMIT = "a limit: longer texts are refused, whatever the family"

HARMLESS: dict[str, str] = {
    **dict.fromkeys(
        (
            "attention_dropout",
            "attn_pdrop",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "embedding_dropout",
            "final_w_init_variance_scale",
            "hidden_dropout",
            "init_std",
            "initializer_range",
            "input_jitter_noise",
            "layerdrop",
            "linear_a_log_max",
            "linear_a_log_min",
            "linear_dt_init_floor",
            "linear_dt_max",
            "linear_dt_min",
            "mtp_loss_scaling_factor",
            "pretraining_tp",
            "rescale_prenorm_residual",
            "resid_pdrop",
            "residual_dropout",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "time_step_floor",
            "time_step_max",
            "w_init_variance_scale",
        ),
        TRAINING,
    ),
    **dict.fromkeys(
        (
            "chunk_size_feed_forward",
            "is_decoder",
            "is_encoder_decoder",
            "num_logits_to_keep",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "use_cache",
        ),
        OUTPUT,
    ),
    **dict.fromkeys(("max_position_embeddings", "model_max_length"), LIMIT),
    **dict.fromkeys(("bos_token_id", "eod_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(
        (
            "id2label",
            "label2id",
            "problem_type",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ),
        LABELS,
    ),
    **dict.fromkeys(
        ("_name_or_path", "architectures", "dtype", "model_type", "transformers_version"), ABOUT
    ),
    **dict.fromkeys(
        (
            "attention_softmax_in_fp32",
            "chunk_size",
            "mamba_chunk_size",
            "mamba_ssm_cache_dtype",
            "moe_shared_expert_overlap",
            "scale_attention_softmax_in_fp32",
            "use_associative_scan",
            "use_mamba_kernels",
            "use_mambapy",
        ),
        SPEED,
    ),
    **dict.fromkeys(
        (
            "mtp_layer_types",
            "mtp_layers_block_type",
            "mtp_mlp_layer_types",
            "num_nextn_predict_layers",
        ),
        EXTRA_LAYERS,
    ),
}
