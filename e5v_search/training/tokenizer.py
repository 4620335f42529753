"""A byte-level BPE tokenizer of our own with LLaMA-3's special tokens, so that the published prompts fit it."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from e5v_search.prompts import LLAMA3_CHAT, PROMPT_SETS

BOS, EOS, PAD, IMAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<image>"
SPECIAL = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", PAD, IMAGE)

# Words with their blank in front, digits one by one, punctuation, and line ends that keep the blanks before them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens, the special ones included and last. Case is not kept: captions hardly use it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_prompt_texts()], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _prompt_texts() -> list[str]:
    # The prompts stand around every input: their words must be single tokens, so each counts a hundred times.
    parts = [LLAMA3_CHAT.replace("{}", "\n")]
    for prompts in PROMPT_SETS.values():
        parts += [p for p in (prompts.text, prompts.image, prompts.composed) if p]
    for token in (*SPECIAL, "<sent>"):
        parts = [piece for part in parts for piece in part.split(token)]
    return parts * 100
