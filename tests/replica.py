"""A small model with seeded random weights in the layouts of the published checkpoint, and the paper's plain formula.

`build(folder)` writes two folders of the same weights: `published` as on the hub (names of transformers 4.41, float16
shards, an image id outside the embedding table, no processor_config.json, pad = eot) and `current` as today's
transformers saves it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

TILE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SENTENCES = [
    "a dog runs on the grass.",
    "Two children play in the snow",
    "Summary above sentence in one word, modify this image: describe!",
    'users and assistants, a red car; "quoted"?\n\nnew lines',
]


def tokenizer(mistral: bool) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"] if mistral else SPECIALS
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(SENTENCES * 20, trainer)
    # the image token comes last: its id is the size of the table that the published revision stores
    tok.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    bos = specials[0]
    tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])
    return tok


def build(folder: Path, mistral: bool = False, seed: int = 0) -> tuple[Path, Path]:
    """-> (published, current) checkpoint folders of the same random weights, both rounded to float16."""
    tok = tokenizer(mistral)
    image_id = tok.token_to_id("<image>")
    assert isinstance(image_id, int)
    text = {
        "vocab_size": image_id,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    theta = 1e6 if mistral else 5e5
    kind = MistralConfig if mistral else LlamaConfig
    more = {"sliding_window": None} if mistral else {}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=kind(
            **text | {"vocab_size": image_id + 64}, rope_parameters={"rope_type": "default", "rope_theta": theta}, **more
        ),
        image_token_index=image_id,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # the library's init is so small that every input would look alike, and a bug with it
            p.copy_(
                torch.randn_like(p) * (0.02 if "norm" in name else 0.12) + (1.0 if "norm" in name and "weight" in name else 0.0)
            )
    model = model.half().eval()

    current = folder / "current"
    model.save_pretrained(current)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>" if mistral else "<|begin_of_text|>",
        eos_token="</s>" if mistral else "<|eot_id|>",
        pad_token="</s>" if mistral else "<|eot_id|>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
        ),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(current)

    published = folder / "published"
    published.mkdir()
    fast.save_pretrained(published)
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        elif name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        elif name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[:image_id]
        old[name] = tensor.contiguous().clone()
    names = sorted(old)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: old[n] for n in part}, published / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (published / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (published / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlavaNextForConditionalGeneration"],
                "model_type": "llava_next",
                "image_token_index": image_id,
                "image_grid_pinpoints": PINPOINTS,
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "projector_hidden_act": "gelu",
                "text_config": text | {"model_type": "mistral" if mistral else "llama", "rope_theta": theta} | more,
                "vision_config": vision | {"model_type": "clip_vision_model"},
                "torch_dtype": "float16",
                "transformers_version": "4.41.2",
            }
        )
    )
    return published, current


class PlainFormula:
    """Section 3 of the paper to the letter: whole model, batch of one, last position of hidden_states[-1], normalised."""

    def __init__(self, current: Path) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(current, dtype=torch.float32).eval()
        self.processor = LlavaNextProcessor.from_pretrained(current, backend="pil")

    @torch.no_grad()
    def __call__(self, prompt: str, image: Image.Image | None = None) -> np.ndarray:
        inputs = self.processor(text=[prompt], images=None if image is None else [image], return_tensors="pt")
        out = self.model(**inputs, output_hidden_states=True)
        hidden = out.hidden_states[-1][0, -1].numpy()
        return np.asarray(hidden / np.linalg.norm(hidden))
