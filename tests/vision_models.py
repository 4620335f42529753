"""Small Qwen2-VL, Qwen3-VL, LLaVA-OneVision and Phi-3-vision models with seeded random weights as published ones lie on
disk, and an independent computation over each, one input at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
KINDS = ["qwen2_vl", "qwen3_vl", "llava_onevision", "phi3_v"]
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
TILE = 42
CROP, MOST_CROPS = 56, 5


def tokenizer(specials: list[str] = SPECIALS) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(SENTENCES * 20, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tok


def build(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with a model of `kind`."""
    if kind == "phi3_v":
        return _build_phi(folder, seed)
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
    _randomise(model)
    model.eval().save_pretrained(folder)
    _as_published(folder, kind)
    processor.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=SPECIALS[0]).save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        # the library's init is so small that every input would look alike, and a bug with it
        p.copy_(torch.randn_like(p) * (0.02 if "norm" in name else 0.15) + float("norm" in name and "weight" in name))


def phi_config(raw: dict[str, Any]) -> transformers.Phi3Config:
    """transformers knows the published "su" as "longrope", whose lengths it wants inside."""
    rope = {k: v for k, v in raw["rope_scaling"].items() if k != "type"} | {"rope_type": "longrope"}
    rope |= {name: raw[name] for name in ("rope_theta", "original_max_position_embeddings")}
    rest = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}
    return transformers.Phi3Config(**rest, rope_parameters=rope)


def _build_phi(folder: Path, seed: int) -> Path:
    specials = ["<s>", "<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>", "<|image|>"]
    tok = tokenizer(specials)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {
        "vocab_size": 400,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": [1 + i / 10 for i in range(8)], "long_factor": [4.0] * 8},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    decoder = transformers.Phi3ForCausalLM(phi_config(text))
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision, image_size=CROP, patch_size=14))
    projection = torch.nn.Sequential(torch.nn.Linear(256, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
    for part in (decoder, tower, projection):
        _randomise(part)
    prefix = "model.vision_embed_tokens."
    tensors = dict(decoder.state_dict())
    tensors |= {
        f"{prefix}img_processor.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.state_dict().items()
        if "position_ids" not in name
    }
    tensors |= {f"{prefix}img_projection.{name}": tensor for name, tensor in projection.state_dict().items()}
    tensors |= {f"{prefix}sub_GN": torch.randn(1, 1, 1, 256), f"{prefix}glb_GN": torch.randn(1, 1, 256)}
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    layer = {
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    }
    auto = {"AutoConfig": "configuration_phi3_v.Phi3VConfig", "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"}
    more = {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"], "auto_map": auto, "embd_layer": layer}
    (folder / "config.json").write_text(json.dumps(text | more | {"sliding_window": 8192}))
    settings = {"num_crops": MOST_CROPS, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>").save_pretrained(folder)
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


class PhiFormula:
    """Phi-3-vision step by step: transformers' CLIP and Phi-3, crops, rows and separators one by one."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("embd_layer"), raw.pop("auto_map"), raw.pop("model_type")
        self.decoder = transformers.Phi3ForCausalLM(phi_config(raw)).eval()
        self.decoder.load_state_dict({k: v for k, v in tensors.items() if "vision_embed_tokens" not in k})
        self.t = {k.split("vision_embed_tokens.")[1]: v for k, v in tensors.items() if "vision_embed_tokens" in k}
        vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
        self.tower = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**vision, image_size=CROP, patch_size=14)
        ).eval()
        own = "vision_model." if any(k.startswith("vision_model.") for k in self.tower.state_dict()) else ""
        start = "img_processor.vision_model."
        self.tower.load_state_dict(
            {own + k.removeprefix(start): v for k, v in self.t.items() if k.startswith(start)}, strict=False
        )
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def seen(self, crop: torch.Tensor) -> list[list[torch.Tensor]]:
        """A crop's 2 × 2 tokens, each of four neighbouring patches."""
        states = self.tower(crop[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        at = lambda row, col: states[4 * row + col]  # noqa: E731
        return [
            [
                torch.cat([at(2 * i, 2 * j), at(2 * i, 2 * j + 1), at(2 * i + 1, 2 * j), at(2 * i + 1, 2 * j + 1)])
                for j in (0, 1)
            ]
            for i in (0, 1)
        ]

    def tokens(self, image: Image.Image) -> torch.Tensor:
        turned = image.width < image.height
        if turned:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        ratio = image.width / image.height
        scale = max(s for s in range(1, MOST_CROPS + 1) if all(t * np.ceil(t / ratio) <= MOST_CROPS for t in range(1, s + 1)))
        width = scale * CROP
        small = image.resize((width, max(1, int(width / ratio))), Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (width, int(np.ceil(small.height / CROP) * CROP)), "white")
        canvas.paste(small, (0, int((canvas.height - small.height) / 2)))
        if turned:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        x = torch.tensor(np.asarray(canvas)).permute(2, 0, 1) / 255
        x = (x - torch.tensor([0.48, 0.46, 0.41])[:, None, None]) / torch.tensor([0.27, 0.26, 0.28])[:, None, None]
        whole = torch.nn.functional.interpolate(x[None], size=(CROP, CROP), mode="bicubic")[0]
        out = []
        for top in range(0, x.shape[1], CROP):
            row = [self.seen(x[:, top : top + CROP, left : left + CROP]) for left in range(0, x.shape[2], CROP)]
            for i in (0, 1):
                out += [token for crop in row for token in crop[i]] + [self.t["sub_GN"][0, 0, 0]]
        out.append(self.t["glb_GN"][0, 0])
        for line in self.seen(whole):
            out += [*line, self.t["sub_GN"][0, 0, 0]]
        y = torch.stack(out) @ self.t["img_projection.0.weight"].T + self.t["img_projection.0.bias"]
        return torch.nn.functional.gelu(y) @ self.t["img_projection.2.weight"].T + self.t["img_projection.2.bias"]

    @torch.no_grad()
    def __call__(self, prompt: str, image: Image.Image | None = None) -> np.ndarray:
        table = self.decoder.model.embed_tokens
        parts = [table(torch.tensor(self.tokenizer(part)["input_ids"])) for part in prompt.split("<|image_1|>")]
        x = parts[0] if image is None else torch.cat([parts[0], self.tokens(image), parts[1]])
        hidden = self.decoder(inputs_embeds=x[None], output_hidden_states=True).hidden_states[-1][0, -1].numpy()
        return np.asarray(hidden / np.linalg.norm(hidden))


def independent(folder: Path, kind: str) -> Library | PhiFormula:
    return PhiFormula(folder) if kind == "phi3_v" else Library(folder, kind)
