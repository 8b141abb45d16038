"""Names in the original codes, by canonical names; ``{}`` is a block's number. The converters have the last word.

Read off diffusers 0.42.1 (``loaders/single_file_utils.py``); `traced` runs the converter on tensors of these names,
so that a wrong line fails instead of shipping.
"""

from __future__ import annotations

from tools.make_families.trace import Rules

_D, _S = "transformer_blocks.{}", "single_transformer_blocks.{}"


def _parts(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX: Rules = {
    "img_in": "x_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "double_blocks.{}.img_mod.lin": f"{_D}.norm1.linear",
    "double_blocks.{}.img_attn.qkv": _parts(_D, *_QKV),
    "double_blocks.{}.img_attn.norm.query_norm.scale": f"{_D}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": f"{_D}.attn.norm_k.weight",
    "double_blocks.{}.img_attn.proj": f"{_D}.attn.to_out.0",
    "double_blocks.{}.img_mlp.0": f"{_D}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": f"{_D}.ff.net.2",
    "double_blocks.{}.txt_mod.lin": f"{_D}.norm1_context.linear",
    "double_blocks.{}.txt_attn.qkv": _parts(_D, *_ADDED),
    "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{_D}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{_D}.attn.norm_added_k.weight",
    "double_blocks.{}.txt_attn.proj": f"{_D}.attn.to_add_out",
    "double_blocks.{}.txt_mlp.0": f"{_D}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": f"{_D}.ff_context.net.2",
    "single_blocks.{}.linear1": _parts(_S, *_QKV, "proj_mlp"),
    "single_blocks.{}.linear2": f"{_S}.proj_out",
    "single_blocks.{}.norm.query_norm.scale": f"{_S}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": f"{_S}.attn.norm_k.weight",
    "single_blocks.{}.modulation.lin": f"{_S}.norm.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

_R, _O = "context_embedder.token_refiner.refiner_blocks.{}", "txt_in.individual_token_refiner.blocks.{}"
HUNYUAN: Rules = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    f"{_O}.norm1": f"{_R}.norm1",
    f"{_O}.self_attn_qkv": _parts(_R, *_QKV),
    f"{_O}.self_attn_proj": f"{_R}.attn.to_out.0",
    f"{_O}.norm2": f"{_R}.norm2",
    f"{_O}.mlp.fc1": f"{_R}.ff.net.0.proj",
    f"{_O}.mlp.fc2": f"{_R}.ff.net.2",
    f"{_O}.adaLN_modulation.1": f"{_R}.norm_out.linear",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.{}.img_mod.linear": f"{_D}.norm1.linear",
    "double_blocks.{}.img_attn_qkv": _parts(_D, *_QKV),
    "double_blocks.{}.img_attn_q_norm": f"{_D}.attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": f"{_D}.attn.norm_k",
    "double_blocks.{}.img_attn_proj": f"{_D}.attn.to_out.0",
    "double_blocks.{}.img_mlp.fc1": f"{_D}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": f"{_D}.ff.net.2",
    "double_blocks.{}.txt_mod.linear": f"{_D}.norm1_context.linear",
    "double_blocks.{}.txt_attn_qkv": _parts(_D, *_ADDED),
    "double_blocks.{}.txt_attn_q_norm": f"{_D}.attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": f"{_D}.attn.norm_added_k",
    "double_blocks.{}.txt_attn_proj": f"{_D}.attn.to_add_out",
    "double_blocks.{}.txt_mlp.fc1": f"{_D}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": f"{_D}.ff_context.net.2",
    "single_blocks.{}.linear1": _parts(_S, *_QKV, "proj_mlp"),
    "single_blocks.{}.linear2": f"{_S}.proj_out",
    "single_blocks.{}.q_norm": f"{_S}.attn.norm_q",
    "single_blocks.{}.k_norm": f"{_S}.attn.norm_k",
    "single_blocks.{}.modulation.linear": f"{_S}.norm.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# ComfyUI's own names of the same blocks (fact from the LoRA key map of ComfyUI 0.3.64).
HUNYUAN_COMFY = {
    "img_mod.linear": "img_mod.lin",
    "txt_mod.linear": "txt_mod.lin",
    "img_attn_qkv": "img_attn.qkv",
    "txt_attn_qkv": "txt_attn.qkv",
    "img_attn_proj": "img_attn.proj",
    "txt_attn_proj": "txt_attn.proj",
    "img_mlp.fc1": "img_mlp.0",
    "img_mlp.fc2": "img_mlp.2",
    "txt_mlp.fc1": "txt_mlp.0",
    "txt_mlp.fc2": "txt_mlp.2",
    "modulation.linear": "modulation.lin",
}

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN: Rules = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    **{f"blocks.{{}}.self_attn.{old}": f"blocks.{{}}.attn1.{new}" for old, new in _ATTENTION.items()},
    "blocks.{}.norm3": "blocks.{}.norm2",
    **{f"blocks.{{}}.cross_attn.{old}": f"blocks.{{}}.attn2.{new}" for old, new in _ATTENTION.items()},
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}

_L, _B = "text_model.encoder.layers.{}", "transformer.resblocks.{}"
OPEN_CLIP: Rules = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    f"{_B}.ln_1": f"{_L}.layer_norm1",
    f"{_B}.attn.in_proj_weight": _parts(_L, *(f"self_attn.{x}_proj.weight" for x in "qkv")),
    f"{_B}.attn.in_proj_bias": _parts(_L, *(f"self_attn.{x}_proj.bias" for x in "qkv")),
    f"{_B}.attn.out_proj": f"{_L}.self_attn.out_proj",
    f"{_B}.ln_2": f"{_L}.layer_norm2",
    f"{_B}.mlp.c_fc": f"{_L}.mlp.fc1",
    f"{_B}.mlp.c_proj": f"{_L}.mlp.fc2",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
