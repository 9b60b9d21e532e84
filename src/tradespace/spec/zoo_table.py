"""The zoo's numbers: one line a model, one section a family. `zoo.py` reads it; nothing else should.

A section's head is `[family]` (or `[family in text_config]` where the published config nests it) and the config keys that its columns fill. After the
columns come the published total of parameters ("-" where the card only rounds) and, where needed, more keys as key=value. Lines that begin with # are \\
    remarks.
Totals are those of model cards and repositories, multi-token prediction and vision towers left out.
"""

SHORT = {
    "D": "hidden_size", "L": "num_hidden_layers", "N": "num_attention_heads", "K": "num_key_value_heads", "F": "intermediate_size", "V": "vocab_size",
    "context": "max_position_embeddings", "theta": "rope_theta", "H": "head_dim", "E": "num_experts", "top_k": "num_experts_per_tok",
    "expert_F": "moe_intermediate_size",
    "window": "sliding_window", "tied": "tie_word_embeddings", "eps": "rms_norm_eps", "local_E": "num_local_experts", "routed_E": "n_routed_experts",
}  # fmt: skip

LLAMA3_ROPE = '{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}'
LLAMA32_ROPE = LLAMA3_ROPE.replace("8.0", "32.0", 1)
DEEPSEEK_ROPE = '{"type":"yarn","factor":40,"original_max_position_embeddings":4096,"beta_fast":32,"beta_slow":1,"mscale":1.0,"mscale_all_dim":1.0}'
KIMI_ROPE = DEEPSEEK_ROPE.replace("40", "32", 1).replace('"beta_fast":32', '"beta_fast":1')
GPT_OSS_ROPE = '{"rope_type":"yarn","factor":32.0,"original_max_position_embeddings":4096,"beta_fast":32.0,"beta_slow":1.0,"truncate":false}'

TABLE = f"""
[gpt2] n_embd n_layer n_head V n_positions
gpt2             768 12 12 50257 1024    124439808
gpt2-medium     1024 24 16 50257 1024    354823168
gpt2-large      1280 36 20 50257 1024    774030080
gpt2-xl         1600 48 25 50257 1024   1557611200
# arXiv:2005.14165, table 2.1; every other layer attends in bands there, which changes no size
gpt-3-175b     12288 96 96 50257 2048            - torch_dtype=float16 plan_only=its_weights_were_never_published

[gpt_bigcode] n_embd n_layer n_head n_inner V n_positions
starcoder       6144 40 48 24576 49152 8192  15517456384
starcoderbase-1b 2048 24 16 8192 49152 8192            -
starcoderbase-3b 2816 36 22 11264 49152 8192           -
starcoderbase-7b 4096 42 32 16384 49152 8192           -

[opt] D L N ffn_dim V
opt-125m         768 12 12  3072 50272     125239296
opt-1.3b        2048 24 32  8192 50272    1315758080
opt-2.7b        2560 32 32 10240 50272    2651596800
opt-6.7b        4096 32 32 16384 50272    6658473984
opt-13b         5120 40 40 20480 50272   12853473280
opt-30b         7168 48 56 28672 50272   29974540288
opt-66b         9216 64 72 36864 50272             -
opt-175b       12288 96 96 49152 50272             -

[bloom] D n_layer n_head V
bloom-560m      1024 24  16 250880     559214592
bloom-1b1       1536 24  16 250880    1065314304
bloom-1b7       2048 24  16 250880    1722408960
bloom-3b        2560 30  32 250880    3002557440
bloom-7b1       4096 30  32 250880    7069016064
bloom-176b     14336 70 112 250880  176247271424

[llama] D L N K F V context theta eps
llama-7b        4096  32  32 32 11008 32000   2048  10000 1e-6    6738415616 torch_dtype=float16
llama-13b       5120  40  40 40 13824 32000   2048  10000 1e-6   13015864320 torch_dtype=float16
llama-30b       6656  60  52 52 17920 32000   2048  10000 1e-6   32528943616 torch_dtype=float16
llama-65b       8192  80  64 64 22016 32000   2048  10000 1e-5   65285660672 torch_dtype=float16
llama-2-7b      4096  32  32 32 11008 32000   4096  10000 1e-5    6738415616 torch_dtype=float16
llama-2-13b     5120  40  40 40 13824 32000   4096  10000 1e-5   13015864320 torch_dtype=float16
llama-2-70b     8192  80  64  8 28672 32000   4096  10000 1e-5   68976648192 torch_dtype=float16
vicuna-7b       4096  32  32 32 11008 32000   4096  10000 1e-5    6738415616 torch_dtype=float16
vicuna-13b      5120  40  40 40 13824 32000   4096  10000 1e-5   13015864320 torch_dtype=float16
llama-3-8b      4096  32  32  8 14336 128256  8192 500000 1e-5    8030261248
llama-3-70b     8192  80  64  8 28672 128256  8192 500000 1e-5   70553706496
llama-3.1-8b    4096  32  32  8 14336 128256 131072 500000 1e-5   8030261248 rope_scaling={LLAMA3_ROPE}
llama-3.1-70b   8192  80  64  8 28672 128256 131072 500000 1e-5  70553706496 rope_scaling={LLAMA3_ROPE}
llama-3.1-405b 16384 126 128  8 53248 128256 131072 500000 1e-5 405853388800 rope_scaling={LLAMA3_ROPE}
llama-3.2-1b    2048  16  32  8  8192 128256 131072 500000 1e-5   1235814400 tied=true rope_scaling={LLAMA32_ROPE}
llama-3.2-3b    3072  28  24  8  8192 128256 131072 500000 1e-5   3212749824 tied=true rope_scaling={LLAMA32_ROPE}
llama-3.3-70b   8192  80  64  8 28672 128256 131072 500000 1e-5  70553706496 rope_scaling={LLAMA3_ROPE}
smollm2-135m     576  30   9  3  1536 49152   8192 100000 1e-5     134515008 tied=true
smollm2-360m     960  32  15  5  2560 49152   8192 100000 1e-5     361821120 tied=true
smollm2-1.7b    2048  24  32 32  8192 49152   8192 130000 1e-5    1711376384 tied=true

[smollm3] D L N K F V context theta
smollm3-3b      2048 36 16 4 11008 128256 65536 5000000  3075098624

[falcon] D L N num_kv_heads V new_decoder_architecture
falcon-7b       4544 32  71  1 65024 false   6921720704 num_ln_in_parallel_attn=1
falcon-40b      8192 60 128  8 65024 true             -
falcon-180b    14848 80 232  8 65024 true             -

[mistral] D L N K F V context theta window
mistral-7b-v0.1 4096 32 32 8 14336  32000  32768   10000 4096   7241732096 eps=1e-5
mistral-7b-v0.2 4096 32 32 8 14336  32000  32768 1000000 null   7241732096 eps=1e-5
mistral-7b-v0.3 4096 32 32 8 14336  32768  32768 1000000 null   7248023552 eps=1e-5
mistral-nemo-12b 5120 40 32 8 14336 131072 131072 1000000 null 12247782400 eps=1e-5 H=128

[mixtral] D L N K F V context local_E top_k
mixtral-8x7b    4096 32 32 8 14336 32000 32768 8 2   46702792704
mixtral-8x22b   6144 56 48 8 16384 32000 65536 8 2  140620634112

[phi3] D L N K F V context window
phi-3-mini-4k   3072 32 32 32  8192 32064  4096 2047   3821079552
phi-3-medium-4k 5120 40 40 10 17920 32064  4096 2047  13960238080
phi-4           5120 40 40 10 17920 100352 16384 null 14659507200 theta=250000

[gemma2] D L N K F H V query_pre_attn_scalar
gemma-2-2b      2304 26  8  4  9216 256 256000 256   2614341888
gemma-2-9b      3584 42 16  8 14336 256 256000 256   9241705984
gemma-2-27b     4608 46 32 16 36864 128 256000 144  27227128320

[gemma3_text] D L N K F H V query_pre_attn_scalar window context
gemma-3-270m     640 18  4  1  2048 256 262144 256  512  32768    268098176
gemma-3-1b      1152 26  4  1  6912 256 262144 256  512  32768    999885952
gemma-3-4b      2560 34  8  4 10240 256 262208 256 1024 131072   3880263168 rope_scaling={{"rope_type":"linear","factor":8.0}}
gemma-3-12b     3840 48 16  8 15360 256 262208 256 1024 131072  11766034176 rope_scaling={{"rope_type":"linear","factor":8.0}}
gemma-3-27b     5376 62 32 16 21504 128 262208 168 1024 131072  27009346304 rope_scaling={{"rope_type":"linear","factor":8.0}}

[qwen2] D L N K F V context tied
qwen2.5-0.5b     896 24 14 2  4864 151936  32768 true    494032768 theta=1000000
qwen2.5-1.5b    1536 28 12 2  8960 151936  32768 true   1543714304 theta=1000000
qwen2.5-3b      2048 36 16 2 11008 151936  32768 true   3085938688 theta=1000000
qwen2.5-7b      3584 28 28 4 18944 152064  32768 false  7615616512 theta=1000000
qwen2.5-14b     5120 48 40 8 13824 152064  32768 false 14770033664 theta=1000000
qwen2.5-32b     5120 64 40 8 27648 152064  32768 false 32763876352 theta=1000000
qwen2.5-72b     8192 80 64 8 29568 152064  32768 false 72706203648 theta=1000000

[qwen3] D L N K F V context tied
qwen3-0.6b      1024 28 16 8  3072 151936  40960 true    596049920 theta=1000000
qwen3-1.7b      2048 28 16 8  6144 151936  40960 true   1720574976 theta=1000000
qwen3-4b        2560 36 32 8  9728 151936  40960 true   4022468096 theta=1000000
qwen3-8b        4096 36 32 8 12288 151936  40960 false  8190735360 theta=1000000
qwen3-14b       5120 40 40 8 17408 151936  40960 false 14768307200 theta=1000000
qwen3-32b       5120 64 64 8 25600 151936  40960 false 32762123264 theta=1000000

[qwen3_vl in text_config] D L N K F V context tied
qwen3-vl-2b     2048 28 16 8  6144 151936 262144 true  - theta=5000000
qwen3-vl-4b     2560 36 32 8  9728 151936 262144 true  - theta=5000000
qwen3-vl-8b     4096 36 32 8 12288 151936 262144 false - theta=5000000
qwen3-vl-32b    5120 64 64 8 25600 151936 262144 false - theta=5000000

[qwen3_moe] D L N K expert_F E top_k V context theta H
qwen3-30b-a3b         2048 48 32 4  768 128 8 151936  40960  1000000 128  30532122624
qwen3-235b-a22b       4096 94 64 4 1536 128 8 151936  40960  1000000 128 235093634560
qwen3-coder-480b-a35b 6144 62 96 8 2560 160 8 151936 262144 10000000 128            -

[qwen3_vl_moe in text_config] D L N K expert_F E top_k V context theta H
qwen3-vl-30b-a3b      2048 48 32 4  768 128 8 151936 262144 5000000 128 -
qwen3-vl-235b-a22b    4096 94 64 4 1536 128 8 151936 262144 5000000 128 -

[qwen3_next] D L N K expert_F shared_expert_intermediate_size E top_k V context linear_num_value_heads
qwen3-next-80b-a3b    2048 48 16 2  512  512 512 10 151936 262144 32 - theta=10000000

[qwen3_5_moe in text_config] D L N K expert_F shared_expert_intermediate_size E top_k V context linear_num_value_heads
qwen3.5-35b-a3b       2048 40 16 2  512  512 256  8 248320 262144 32 -
qwen3.6-35b-a3b       2048 40 16 2  512  512 256  8 248320 262144 32 -
qwen3.5-122b-a10b     3072 48 32 2 1024 1024 256  8 248320 262144 64 -
qwen3.5-397b-a17b     4096 60 32 2 1024 1024 512 10 248320 262144 64 -

[qwen3_5 in text_config] D L N K F V context linear_num_value_heads
qwen3.5-27b           5120 64 24 4 17408 248320 262144 48 -
qwen3.6-27b           5120 64 24 4 17408 248320 262144 48 -

[gpt_oss] D L N K F local_E top_k V
gpt-oss-20b     2880 24 64 8 2880  32 4 201088   20914757184 rope_scaling={GPT_OSS_ROPE}
gpt-oss-120b    2880 36 64 8 2880 128 4 201088  116829156672 rope_scaling={GPT_OSS_ROPE}

[llama4 in text_config] D L N K F intermediate_size_mlp local_E interleave_moe_layer_step V context
llama-4-scout-17b-16e     5120 48 40 8 8192 16384  16 1 202048 10485760 -
llama-4-maverick-17b-128e 5120 48 40 8 8192 16384 128 2 202048  1048576 -

[minimax_m2] D L N K F local_E top_k V context
minimax-m2.5    3072 62 48 8 1536 256 8 200064 196608 - rotary_dim=64 use_mtp=true num_mtp_modules=3
minimax-m2.7    3072 62 48 8 1536 256 8 200064 204800 - rotary_dim=64 use_mtp=true num_mtp_modules=3

[glm4_moe] D L N K F expert_F routed_E top_k first_k_dense_replace V context H
glm-4.5         5120 92 96 8 12288 1536 160 8 3 151552 131072 128 - attention_bias=true use_qk_norm=true theta=1000000 num_nextn_predict_layers=1
glm-4.5-air     4096 46 96 8 10944 1408 128 8 1 151552 131072 128 - attention_bias=true theta=1000000 num_nextn_predict_layers=1

[deepseek_v3] D L N F expert_F routed_E top_k first_k_dense_replace V context
deepseek-v3     7168 61 128 18432 2048 256 8 3 129280 163840  671026419200 rope_scaling={DEEPSEEK_ROPE} num_nextn_predict_layers=1
deepseek-v3.1   7168 61 128 18432 2048 256 8 3 129280 163840  671026419200 rope_scaling={DEEPSEEK_ROPE} num_nextn_predict_layers=1
deepseek-r1     7168 61 128 18432 2048 256 8 3 129280 163840  671026419200 rope_scaling={DEEPSEEK_ROPE} num_nextn_predict_layers=1

[deepseek_v32] D L N F expert_F routed_E top_k first_k_dense_replace V context
deepseek-v3.2   7168 61 128 18432 2048 256 8 3 129280 163840 - rope_scaling={DEEPSEEK_ROPE} num_nextn_predict_layers=1

[kimi_k2] D L N F expert_F routed_E top_k first_k_dense_replace V context theta
kimi-k2         7168 61 64 18432 2048 384 8 1 163840 131072 50000 - rope_scaling={KIMI_ROPE}

[kimi_k25 in text_config] D L N F expert_F routed_E top_k first_k_dense_replace V context theta
kimi-k2.5       7168 61 64 18432 2048 384 8 1 163840 262144 50000 -
kimi-k2.6       7168 61 64 18432 2048 384 8 1 163840 262144 50000 -
kimi-k2.7-code  7168 61 64 18432 2048 384 8 1 163840 262144 50000 -

[glm_moe_dsa] D L N F expert_F routed_E top_k qk_nope_head_dim v_head_dim q_lora_rank V context
glm-5           6144 78 64 12288 2048 256 8 192 256 2048 154880  202752 - theta=1000000 num_nextn_predict_layers=1
glm-5.1         6144 78 64 12288 2048 256 8 192 256 2048 154880  202752 - theta=1000000 num_nextn_predict_layers=1
glm-5.2         6144 78 64 12288 2048 256 8 192 256 2048 154880 1048576 - theta=8000000 num_nextn_predict_layers=1 index_topk_freq=4 index_skip_topk_offset=3

[mimo] D L N K F V context theta
mimo-7b         4096 36 32 8 11008 151680 32768 640000 - H=128 num_nextn_predict_layers=1

[mimo_v2_flash] D L N K F expert_F routed_E top_k V context sliding_window_size
mimo-v2-flash   4096 48 64 4 16384 2048 256 8 152576 262144 128 -

[gemma4 in text_config] D L N K F num_global_key_value_heads window V context
gemma-4-31b     5376 60 32 16 21504 4 1024 262144 262144 - attention_k_eq_v=true hidden_size_per_layer_input=0 final_logit_softcapping=30.0
gemma-4-26b-a4b 2816 30 16  8  2112 2 1024 262144 262144 - attention_k_eq_v=true hidden_size_per_layer_input=0 enable_moe_block=true E=128 expert_F=704 \\
    top_k_experts=8

[nemotron_h] D N K mamba_num_heads ssm_state_size F context
nemotron-h-56b  8192 64 8 256 256 32768 8192 - \\
    hybrid_override_pattern=M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-

[nemotron_h] D N K mamba_num_heads expert_F moe_shared_expert_intermediate_size routed_E top_k context
nemotron-3-nano-30b-a3b   2688 32 2  64 1856  3712 128  6 262144 - hybrid_override_pattern=MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME
nemotron-3-super-120b-a12b 4096 32 2 128 2688 5376 512 22 262144 - moe_latent_size=1024 \\
    hybrid_override_pattern=MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME
nemotron-3-ultra-550b-a55b 8192 64 2 256 5120 10240 512 22 262144 - moe_latent_size=2048 \\
    hybrid_override_pattern=MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME

[nemotron-nas] D L N V context theta
# one entry a block: group size (- for no attention) : feed-forward multiplier, ×n for n alike
llama-3.3-nemotron-super-49b 8192 80 64 128256 131072 500000 - rope_scaling={LLAMA3_ROPE} \\
    blocks=8:2.625,8:5.25×5,-:2.625×2,8:5.25×3,-:3.28125,8:5.25×30,-:1.3125,-:2.625×2,-:1.3125,-:5.25,-:1.3125,-:2.625,-:1.3125×3,8:5.25,-:1.3125,\\
    -:1.0×2,-:1.3125,-:1.0×3,-:1.3125×2,-:0.5×2,-:1.0×2,-:0.5×2,-:1.0,-:0.5×2,8:5.25×9
"""
