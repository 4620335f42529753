"""Small Qwen2-VL, Qwen3-VL and LLaVA-OneVision models with seeded random weights as published ones lie on disk, and
transformers' whole models over them, one input at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SENTENCES = [
    "a dog runs on the grass.",
    "Two children play in the snow",
    'users and assistants, a red car; "quoted"?\n\nnew lines',
    "You are a helpful assistant. Represent the user's input. Summary above sentence in one word:",
]
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
]
KINDS = ["qwen2_vl", "qwen3_vl", "llava_onevision"]
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
TILE = 42


def tokenizer() -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(SENTENCES * 20, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tok


def build(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with a model of `kind`."""
    tok = tokenizer()
    ids = {token: tok.token_to_id(token) for token in SPECIALS}
    text: dict[str, Any] = TEXT | {"vocab_size": 400, "max_position_embeddings": 2048}
    tokens = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    tokens |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    mean_std = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    processor: Any
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        config = transformers.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens)
        model = transformers.Qwen2VLForConditionalGeneration(config)
        processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 30, patch_size=14, **mean_std)
    elif kind == "qwen3_vl":
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        more = {"rope_parameters": rope | {"mrope_interleaved": True}, "head_dim": 16}
        config = transformers.Qwen3VLConfig(text_config=text | more, vision_config=vision, **tokens)
        model = transformers.Qwen3VLForConditionalGeneration(config)
        processor = Qwen2VLImageProcessorPil(min_pixels=64 * 64, max_pixels=32 * 32 * 30, patch_size=16, **mean_std)
    else:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        pinpoints = [[TILE * i, TILE * j] for i in range(1, 5) for j in range(1, 5)]
        config = transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2"} | text,
            vision_config={"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": 14, "vision_use_head": False}
            | vision,
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=pinpoints,
            vision_aspect_ratio="anyres_max_4",
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": TILE, "width": TILE}, image_grid_pinpoints=pinpoints, **mean_std
        )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # the library's init is so small that every input would look alike, and a bug with it
            p.copy_(torch.randn_like(p) * (0.02 if "norm" in name else 0.15) + float("norm" in name and "weight" in name))
    model.eval().save_pretrained(folder)
    _as_published(folder, kind)
    processor.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=SPECIALS[0]).save_pretrained(folder)
    return folder


def _as_published(folder: Path, kind: str) -> None:
    """Tensor names, and where they differ keys of the config, as the models were published."""
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.") if kind != "qwen3_vl" else name
        if kind == "qwen2_vl":
            name = name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name
            name = f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name
        elif kind == "llava_onevision":
            if name.startswith("language_model.") and not name.startswith("language_model.model."):
                name = name.replace("language_model.", "language_model.model.", 1)
            if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
                name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            name = "language_model.lm_head.weight" if name.endswith("lm_head.weight") else name
        renamed[name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "qwen2_vl":
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        (folder / "config.json").write_text(json.dumps(text | config))


class Library:
    """The whole model with its output layer, a batch of one; ids from the prompt with its picture's tokens written out."""

    def __init__(self, folder: Path, kind: str) -> None:
        names = {
            "qwen2_vl": "Qwen2VLForConditionalGeneration",
            "qwen3_vl": "Qwen3VLForConditionalGeneration",
            "llava_onevision": "LlavaOnevisionForConditionalGeneration",
        }
        self.onevision = kind == "llava_onevision"
        self.model = getattr(transformers, names[kind]).from_pretrained(folder, dtype=torch.float32).eval()
        self.processor: Any = (LlavaOnevisionImageProcessorPil if self.onevision else Qwen2VLImageProcessorPil).from_pretrained(
            folder
        )
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.token = "<image>" if self.onevision else "<|image_pad|>"

    @torch.no_grad()
    def __call__(self, prompt: str, image: Image.Image | None = None) -> np.ndarray:
        inputs: dict[str, Any] = {}
        if image is not None:
            inputs = dict(self.processor(images=[image], return_tensors="pt"))
            inputs.pop("batch_num_images", None)
            if self.onevision:
                n = len(self.model.model.get_image_features(**inputs).pooler_output[0])
            else:
                n = int(inputs["image_grid_thw"].prod()) // self.processor.merge_size**2
            prompt = prompt.replace(self.token, self.token * n)
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if image is not None and not self.onevision:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        hidden = self.model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[-1][0, -1].numpy()
        return np.asarray(hidden / np.linalg.norm(hidden))
