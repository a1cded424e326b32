accelerate launch --num_cpu_threads_per_process 1 anima_train_network.py \
  --pretrained_model_name_or_path="models/anima-base.safetensors" --qwen3="models/qwen_3_06b" \
  --vae="models/qwen_image_vae.safetensors" --t5_tokenizer_path t5 --llm_adapter_path adapter \
  --train_data_dir img --output_dir out --output_name style --save_model_as safetensors \
  --network_module networks.lora_anima --network_dim 16 --learning_rate 1e-4 --network_train_unet_only \
  --network_args "exclude_patterns=['.*mlp.*']" "network_reg_dims=.*self_attn.*=8" "train_llm_adapter=False" \
  --timestep_sampling sigmoid --sigmoid_scale 1.2 --discrete_flow_shift 1.0 --weighting_scheme uniform \
  --qwen3_max_token_length 512 --t5_max_token_length 512 --attn_mode torch --split_attn --mlp_lr 0 \
  --blocks_to_swap 10 --vae_chunk_size 64 --vae_disable_cache --mixed_precision bf16 --cache_latents \
  --gradient_checkpointing --max_train_epochs 10 --optimizer_type AdamW8bit
