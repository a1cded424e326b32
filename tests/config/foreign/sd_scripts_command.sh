accelerate launch --num_cpu_threads_per_process 2 sdxl_train_network.py --network_module=lycoris.kohya \
  --network_args "dora_wd=True" "conv_dim=8" --network_dim 16 --network_alpha 8 --fp8_base \
  --train_data_dir img --network_train_unet_only --resolution 1024,1024 --lr_scheduler cosine
