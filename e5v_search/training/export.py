"""Write a trained model as a checkpoint folder that this program and transformers open."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.modules import LlavaNext, VisionLayer
from e5v_search.training.tokenizer import BOS, EOS, IMAGE, PAD

# CLIP's, as every LLaVA-NeXT has them
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def export(model: LlavaNext, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Config, weights, tokenizer and preprocessing into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    _write(folder / "config.json", _config(config, tokenizer, dtype))
    _write(folder / "tokenizer_config.json", _tokenizer_config(config))
    write_processor(folder, config, image_processor(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in _published_names(model).items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def write_processor(folder: Path, config: LlavaNextConfig, image: Mapping[str, Any]) -> None:
    """The files on preprocessing. Without them transformers cannot take a picture."""
    _write(folder / "preprocessor_config.json", {**image, "processor_class": "LlavaNextProcessor"})
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor",
            "image_processor": dict(image),
            "image_token": IMAGE,
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )


def _published_names(model: LlavaNext) -> dict[str, Tensor]:
    """The weights under the names of published checkpoints, with the vision layer that the model never reads.

    That layer is zero, which leaves its input as it is; transformers would otherwise warn and draw one at random.
    """
    renamed = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("language_model.", "language_model.model.", 1)
        renamed[key.replace("vision_tower.", "vision_tower.vision_model.", 1)] = tensor
    vision = model.config.vision_config
    for i in range(model.config.vision_layers, vision.num_hidden_layers):
        for key, tensor in VisionLayer(vision).state_dict().items():
            renamed[f"vision_tower.vision_model.encoder.layers.{i}.{key}"] = torch.zeros_like(tensor)
    renamed["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(vision.hidden_size)
    renamed["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(vision.hidden_size)
    return renamed


def _config(config: LlavaNextConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": config.image_token_id,
        "image_grid_pinpoints": [list(p) for p in config.image_grid_pinpoints],
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "use_image_newline_parameter": True,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "projection_dim": vision.hidden_size,
        },
        "text_config": {
            "model_type": text.model_type,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "hidden_act": text.hidden_act,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "max_position_embeddings": text.max_position_embeddings,
            "attention_bias": text.attention_bias,
            "mlp_bias": text.mlp_bias,
            "bos_token_id": tokenizer.token_to_id(BOS),
            "eos_token_id": tokenizer.token_to_id(PAD),
            "pad_token_id": tokenizer.token_to_id(PAD),
        },
    }


def _tokenizer_config(config: LlavaNextConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaNextProcessor",
        "bos_token": BOS,
        # the published checkpoint ends and pads with the same token
        "eos_token": PAD,
        "pad_token": PAD,
        "image_token": IMAGE,
        "additional_special_tokens": [EOS, "<|start_header_id|>", "<|end_header_id|>", IMAGE],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.text_config.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def image_processor(config: LlavaNextConfig) -> dict[str, Any]:
    """How pictures are prepared for a checkpoint that does not say so."""
    tile = config.vision_config.image_size
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": tile},
        "crop_size": {"height": tile, "width": tile},
        "image_grid_pinpoints": [list(p) for p in config.image_grid_pinpoints],
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
