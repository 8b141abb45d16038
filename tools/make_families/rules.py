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

FLUX2: Rules = {
    **{old: new for old, new in FLUX.items() if old in ("img_in", "txt_in", "final_layer.linear")},
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **{old: new for old, new in FLUX.items() if old.startswith("double_blocks.{}.") and "attn" in old},
    "double_blocks.{}.img_mlp.0": f"{_D}.ff.linear_in",
    "double_blocks.{}.img_mlp.2": f"{_D}.ff.linear_out",
    "double_blocks.{}.txt_mlp.0": f"{_D}.ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": f"{_D}.ff_context.linear_out",
    # Fused in diffusers too.
    "single_blocks.{}.linear1": f"{_S}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": f"{_S}.attn.to_out",
    "single_blocks.{}.norm.query_norm.scale": f"{_S}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": f"{_S}.attn.norm_k.weight",
}

CHROMA: Rules = {
    **{old: new for old, new in FLUX.items() if "mod" not in old and "_in." not in old},
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
    "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
    "distilled_guidance_layer.norms.{}.scale": "distilled_guidance_layer.norms.{}.weight",
}

_X, _C = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
SD3: Rules = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    f"{_X}.attn.qkv": _parts(_D, *_QKV),
    f"{_X}.attn.ln_q": f"{_D}.attn.norm_q",
    f"{_X}.attn.ln_k": f"{_D}.attn.norm_k",
    f"{_X}.attn.proj": f"{_D}.attn.to_out.0",
    f"{_X}.attn2.qkv": _parts(_D, *(f"attn2.to_{x}" for x in "qkv")),
    f"{_X}.attn2.ln_q": f"{_D}.attn2.norm_q",
    f"{_X}.attn2.ln_k": f"{_D}.attn2.norm_k",
    f"{_X}.attn2.proj": f"{_D}.attn2.to_out.0",
    f"{_X}.mlp.fc1": f"{_D}.ff.net.0.proj",
    f"{_X}.mlp.fc2": f"{_D}.ff.net.2",
    f"{_X}.adaLN_modulation.1": f"{_D}.norm1.linear",
    f"{_C}.attn.qkv": _parts(_D, *_ADDED),
    f"{_C}.attn.ln_q": f"{_D}.attn.norm_added_q",
    f"{_C}.attn.ln_k": f"{_D}.attn.norm_added_k",
    f"{_C}.attn.proj": f"{_D}.attn.to_add_out",
    f"{_C}.mlp.fc1": f"{_D}.ff_context.net.0.proj",
    f"{_C}.mlp.fc2": f"{_D}.ff_context.net.2",
    f"{_C}.adaLN_modulation.1": f"{_D}.norm1_context.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

HUNYUAN_15: Rules = {
    **{
        old: new
        for old, new in HUNYUAN.items()
        if old.startswith(("img_in", "txt_in", "double_blocks", "final_layer"))
        and not old.endswith(("img_attn_qkv", "txt_attn_qkv"))
    },
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    **{f"byt5_in.fc{i}": f"context_embedder_2.linear_{i}" for i in (1, 2, 3)},
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed",
    **{f"double_blocks.{{}}.img_attn_{x}": f"{_D}.attn.to_{x}" for x in "qkv"},
    **{f"double_blocks.{{}}.txt_attn_{x}": f"{_D}.attn.add_{x}_proj" for x in "qkv"},
}

PIXART: Rules = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "blocks.{}.scale_shift_table": f"{_D}.scale_shift_table",
    "blocks.{}.attn.qkv": _parts(_D, *(f"attn1.to_{x}" for x in "qkv")),
    "blocks.{}.attn.proj": f"{_D}.attn1.to_out.0",
    "blocks.{}.cross_attn.q_linear": f"{_D}.attn2.to_q",
    "blocks.{}.cross_attn.kv_linear": _parts(_D, "attn2.to_k", "attn2.to_v"),
    "blocks.{}.cross_attn.proj": f"{_D}.attn2.to_out.0",
    "blocks.{}.mlp.fc1": f"{_D}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": f"{_D}.ff.net.2",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}

_CL = "transformer.layers.{}"
COGVIDEOX: Rules = {
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    f"{_CL}.input_layernorm": f"{_D}.norm1.norm",
    f"{_CL}.attention.query_key_value": _parts(_D, *(f"attn1.to_{x}" for x in "qkv")),
    f"{_CL}.attention.dense": f"{_D}.attn1.to_out.0",
    f"{_CL}.post_attention_layernorm": f"{_D}.norm2.norm",
    f"{_CL}.mlp.dense_h_to_4h": f"{_D}.ff.net.0.proj",
    f"{_CL}.mlp.dense_4h_to_h": f"{_D}.ff.net.2",
    "mixins.adaln_layer.adaLN_modulations.{}.1": _parts(_D, "norm1.linear", "norm2.linear"),
    "mixins.adaln_layer.query_layernorm_list.{}": f"{_D}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": f"{_D}.attn1.norm_k",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
}
# Twelve chunks: those of the video's and of the text's first norm, then of the second.
COGVIDEOX_CHUNKS = {"norm1.linear": (0, 1, 2, 6, 7, 8), "norm2.linear": (3, 4, 5, 9, 10, 11)}

# As Wan's own text encoder has them (Wan2.1, wan/modules/t5.py).
UMT5: Rules = {
    "token_embedding.weight": "shared.weight",
    **{f"blocks.{{}}.attn.{x}": f"encoder.block.{{}}.layer.0.SelfAttention.{x}" for x in "qkvo"},
    "blocks.{}.pos_embedding.embedding": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "blocks.{}.norm1": "encoder.block.{}.layer.0.layer_norm",
    "blocks.{}.ffn.gate.0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "blocks.{}.ffn.fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "blocks.{}.ffn.fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
    "blocks.{}.norm2": "encoder.block.{}.layer.1.layer_norm",
    "norm.weight": "encoder.final_layer_norm.weight",
}

# Whole names that these converters change: everything else stays.
LTX = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


def ltx(parameters: list[str]) -> Rules:
    """LTX-Video's original names: four words differ."""
    return {".".join(LTX.get(part, part) for part in name.split(".")): name for name in parameters}


def z_image(parameters: list[str]) -> Rules:
    """Names of the repackaged single file (ComfyUI's); Tongyi's own release has the canonical ones."""
    rules: dict[str, str | tuple[str, ...]] = {}
    for name in parameters:
        old = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
        old = old.replace(".attention.norm_k.", ".attention.k_norm.").replace(
            ".attention.norm_q.", ".attention.q_norm."
        )
        old = old.replace(".attention.to_out.0.", ".attention.out.")
        if ".attention.to_q." in name:
            fused = name.replace(".to_q.", ".qkv.")
            rules[fused] = tuple(name.replace(".to_q.", f".to_{x}.") for x in "qkv")
        elif ".attention.to_" not in old:
            rules[old] = name
    return rules
