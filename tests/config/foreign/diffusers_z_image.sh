#!/bin/bash
export MODEL_NAME="Tongyi-MAI/Z-Image"
export INSTANCE_DIR="dog"
# accelerate launch train_dreambooth_lora_sdxl.py --rank=3
accelerate launch --num_processes 2 train_dreambooth_lora_z_image.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --mixed_precision="bf16" --gradient_checkpointing --cache_latents \
  --instance_prompt="a photo of sks dog" \
  --resolution=1024 --train_batch_size=1 --guidance_scale=5.0 \
  --use_8bit_adam --optimizer="adamW" --learning_rate=1e-4 \
  --max_sequence_length 256 --weighting_scheme logit_normal --logit_mean 0.5 \
  --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=100 \
  --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" \
  --validation_epochs=25 --seed="0" --offload \
  --push_to_hub --hub_model_id me/dog
