"""The options of TensorRT-LLM's programs for OPT, for the test of docs/migrating-from-tensorrt-llm.md.

Collected from the argument parsers of examples/opt/convert_checkpoint.py, trtllm-build (with its plugin options),
examples/run.py, examples/summarize.py and what the last two share (examples/utils.py), over the releases that had OPT, from
the first with `trtllm-build` to the last. Names only.
"""

CONVERT = """
model_dir world_size tp_size dtype use_weight_only weight_only_precision use_parallel_embedding embedding_sharding_dim
use_embedding_sharing use_prompt_tuning output_dir workers
"""

BUILD = """
checkpoint_dir model_config build_config model_cls_file model_cls_name output_dir max_batch_size max_input_len max_seq_len
max_decoder_seq_len max_beam_width max_num_tokens opt_num_tokens max_encoder_input_len max_prompt_embedding_table_size
max_multimodal_len kv_cache_type paged_kv_cache input_timing_cache output_timing_cache profiling_verbosity strip_plan
weight_sparsity weight_streaming fast_build workers log_level enable_debug_output visualize_network dry_run monitor_memory
logits_dtype gather_context_logits gather_generation_logits gather_all_token_logits lora_dir lora_ckpt_source
lora_target_modules max_lora_rank speculative_decoding_mode max_draft_len auto_parallel gpus_per_node cluster_key
bert_attention_plugin gpt_attention_plugin gemm_plugin gemm_swiglu_plugin fp8_rowwise_gemm_plugin lookup_plugin lora_plugin
dora_plugin moe_plugin mamba_conv1d_plugin nccl_plugin low_latency_gemm_plugin low_latency_gemm_swiglu_plugin
gemm_allreduce_plugin context_fmha context_fmha_fp32_acc bert_context_fmha_fp32_acc remove_input_padding
use_custom_all_reduce multi_block_mode enable_xqa attention_qk_half_accumulation tokens_per_block use_paged_context_fmha
use_fp8_context_fmha fuse_fp4_quant multiple_profiles paged_state streamingllm norm_quant_fusion reduce_fusion user_buffer
use_fused_mlp pp_reduce_scatter max_output_len tp_size pp_size weight_only_precision strongly_typed builder_opt
use_context_fmha_for_generation
"""

RUN = """
max_input_length max_output_len draft_engine_dir input_text input_file multimodal_input_file input_token_extra_ids
input_token_extra_ids_file output_csv output_npy output_generation_logits output_logits_npy output_log_probs_npy
output_cum_log_probs_npy run_profiling fail_fast_on_attention_window_too_large
"""

SUMMARIZE = """
test_hf test_trt_llm eval_task check_accuracy estimate_accuracy_std_dev tensorrt_llm_rouge1_threshold eval_ppl
tensorrt_llm_ppl_threshold dataset_dir dataset_cache_dir batch_size max_ite output_len max_input_length min_input_length
output_dir rouge_dir
"""

SHARED = """
num_beams num_return_sequences temperature top_k top_p min_p length_penalty repetition_penalty presence_penalty
frequency_penalty beam_search_diversity_rate beam_width_array random_seed early_stopping end_id stop_words bad_words
no_repeat_ngram_size sink_token_length max_attention_window_size multi_block_mode enable_context_fmha_fp32_acc
cuda_graph_mode log_level no_prompt_template use_py_session debug_mode streaming streaming_interval prompt_table_path
prompt_tasks lora_dir lora_ckpt_source lora_task_uids language_task_uids num_prepend_vtokens draft_target_model_config
prompt_lookup_config medusa_choices eagle_choices eagle_posterior_threshold eagle_use_dynamic_tree
eagle_dynamic_tree_max_top_k lookahead_config engine_dir tokenizer_type vocab_file no_add_special_tokens hf_model_dir
model_dir tokenizer_dir gpu_weights_percent max_tokens_in_paged_kv_cache kv_cache_enable_block_reuse
kv_cache_free_gpu_memory_fraction cross_kv_cache_fraction enable_chunked_context hf_data_type data_type
hf_device_map_auto return_all_generated_tokens
"""

PROGRAMS = {
    "convert_checkpoint.py": CONVERT,
    "trtllm-build": BUILD,
    "run.py": RUN,
    "summarize.py": SUMMARIZE,
    "What run.py and summarize.py share": SHARED,
}
"""Heading of the page -> options of that program."""
