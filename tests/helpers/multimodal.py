"""Small random multimodal models with a text model inside."""

from __future__ import annotations

import torch
import transformers as hf

TEXT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = TOWER | {"image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
QWEN_IDS = {"image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}


def gemma3() -> torch.nn.Module:
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8),
        vision_config=hf.SiglipVisionConfig(**PATCHES),
        mm_tokens_per_image=4,
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def gemma4() -> torch.nn.Module:
    text = TEXT | {
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = TOWER | {"num_key_value_heads": 2, "head_dim": 16}
    config = hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=299)
    return hf.Gemma4ForConditionalGeneration(config)


def qwen2_5_vl() -> torch.nn.Module:
    text, vision = TEXT | {"rope_parameters": ROPE}, QWEN_TOWER | {"fullatt_block_indexes": [0]}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    )


def qwen3_vl() -> torch.nn.Module:
    text = TEXT | {"head_dim": 12, "rope_parameters": ROPE}
    vision = QWEN_TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))


def qwen3_5() -> torch.nn.Module:
    text = TEXT | {
        "head_dim": 12,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5},
    }
    vision = QWEN_TOWER | {"num_position_embeddings": 16}
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_IDS))


def mistral3() -> torch.nn.Module:
    text, vision = hf.MistralConfig(**TEXT, head_dim=12), hf.PixtralVisionConfig(**PATCHES)
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=299)
    )


def llava() -> torch.nn.Module:
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**PATCHES)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    )


def llama4() -> torch.nn.Module:
    text = hf.Llama4TextConfig(
        **TEXT,
        intermediate_size_mlp=80,
        head_dim=12,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=64,
    )
    vision = PATCHES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    vision |= {"intermediate_size": 128}  # the hidden size times (1 / pixel shuffle ratio)²
    return hf.Llama4ForConditionalGeneration(
        hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=299)
    )


MODELS = {
    "Gemma-3": gemma3,
    "Gemma-4": gemma4,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Qwen-3.5": qwen3_5,
    "Mistral-3": mistral3,
    "LLaVA": llava,
    "Llama-4": llama4,
}


def build_multimodal(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
