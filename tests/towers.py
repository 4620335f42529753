"""Small CLIP and SigLIP models with seeded random weights, as published checkpoints lie on disk, and transformers over them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIDE, CONTEXT = 56, {"clip": 20, "siglip": 16}
TEXTS = ["a dog runs on the grass.", "Two Children, in the SNOW!", "a", "red cars and blue boats " * 9]
_WORDS = [*TEXTS, "a photo of a cat", "make it snow: more trees"]


def clip_tokenizer() -> CLIPTokenizer:
    tok = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        _WORDS * 9, trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    )
    learned = json.loads(tok.to_str())["model"]
    # the end token has the highest id, as in the published vocabulary
    vocab = learned["vocab"] | {f"{c}</w>": len(learned["vocab"]) + i for i, c in enumerate(alphabet)}
    vocab = {word: i for i, word in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]])


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tok.decoder = decoders.Replace("▁", " ")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tok.train_from_iterator(_WORDS * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=specials))
    tok.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with a model of `kind`, "clip" or "siglip"."""
    tokenizer = clip_tokenizer() if kind == "clip" else siglip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT[kind],
        "bos_token_id": 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": 2 if kind == "clip" else 1,  # CLIP's published configs say 2, wrongly, and are read so
    }
    vision = small | {"image_size": SIDE, "patch_size": 14}
    torch.manual_seed(seed)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # the library's init is so small that every input would look alike, and a bug with it
            p.copy_(torch.randn_like(p) * 0.2 + float("norm" in name and "weight" in name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Library:
    """One input at a time."""

    def __init__(self, folder: Path, kind: str) -> None:
        clip = kind == "clip"
        self.model = (CLIPModel if clip else SiglipModel).from_pretrained(folder).eval()
        self.processor = (CLIPImageProcessorPil if clip else SiglipImageProcessorPil).from_pretrained(folder)
        self.tokenizer = (CLIPTokenizer if clip else PreTrainedTokenizerFast).from_pretrained(folder)
        self.padding = False if clip else "max_length"
        self.length = CONTEXT[kind]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    @torch.no_grad()
    def text(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt")
        x = self.model.get_text_features(input_ids=ids["input_ids"]).pooler_output
        return np.asarray(torch.nn.functional.normalize(x)[0])

    @torch.no_grad()
    def image(self, image: Image.Image) -> np.ndarray:
        x = self.model.get_image_features(pixel_values=self.pixels(image)).pooler_output
        return np.asarray(torch.nn.functional.normalize(x)[0])
