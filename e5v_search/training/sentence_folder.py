"""A model as a folder that sentence-transformers opens, and that gives there the vectors that it gives here.

The prompts of one set go into a chat template, where sentence-transformers puts every input; last-token pooling and
normalising do the rest. Needs sentence-transformers 6 to read it; nothing of it to write.
"""

import json
from pathlib import Path

from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.prompts import SENTENCE, PromptSet, load_prompts
from e5v_search.training.merging import Change, card_text, write_model
from e5v_search.training.whole import new_folder, replacing, write_json

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
_USE = """
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r})
model.encode(["a dog on grass"])
{image}```

Prompts: `{prompts}`.
"""


def export_sentence_transformers(model: str, out: Path, prompts: str = "retrieval") -> None:
    """The model by name, hub id or folder, with the prompts of one set, into `out`, which is there whole or not at all.

    Texts and pictures are taken, and a picture with a text when the set has a prompt for that. Weights keep their type.
    Raises what `registry.resolve` and `load_prompts` do, UsageError when `out` holds something already, DiskFull.
    """
    source, chosen = registry.resolve(model), load_prompts(prompts)
    config = LlavaNextConfig.from_json(checkpoint.read_json(source.folder / "config.json"))
    wording = source.said(config.text_config.wording)
    template = _template(PromptEncoder.read(source.folder, wording, config.text_config.max_tokens), chosen)
    with new_folder(out) as folder:
        write_model(source, folder, Change({}, lambda _, old: old))
        for path, _ in _MODULES[1:]:
            (folder / path).mkdir()
        modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(_MODULES)]
        write_json(folder / "modules.json", modules)
        write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})
        write_json(
            folder / "sentence_bert_config.json",
            {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": _FORWARD, "image": _FORWARD, "message": {**_FORWARD, "format": "structured"}},
                "module_output_name": "token_embeddings",
                # a cut text would lose the prompt behind it, a cut picture tokens that its tiles need
                "processing_kwargs": {"text": {"truncation": False}},
            },
        )
        dim = config.text_config.hidden_size
        write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": dim, "pooling_mode": "lasttoken"})
        write_json(folder / "2_Normalize" / "config.json", {})
        with replacing(folder / "chat_template.jinja") as file:
            file.write(template.encode())
        with replacing(folder / "README.md") as file:
            card = card_text(source, out.name, "what sentence-transformers needs to open it")
            image = 'model.encode([{"image": "photo.jpg"}])\n' if chosen.image else ""
            file.write((card + _USE.format(name=out.name, prompts=chosen.name, image=image)).encode())


def _template(encoder: PromptEncoder, prompts: PromptSet) -> str:
    """In Jinja: a message's texts and whether it holds a picture choose the prompt."""
    before, _, after = encoder.wording.chat.partition("{}")
    text, image, composed = (_filled(prompts, kind) for kind in ("text", "image", "composed"))
    return "".join(
        (
            '{% set it = namespace(text="", image=false) %}',
            "{% for message in messages %}{% for part in message.content %}",
            '{% if part.type == "text" %}{% set it.text = it.text ~ part.text %}',
            '{% elif part.type == "image" %}{% set it.image = true %}{% endif %}',
            "{% endfor %}{% endfor %}",
            # as `PromptEncoder.encode` does: special tokens that a user writes are text
            f"{{% for token in {json.dumps(encoder.specials)} %}}",
            '{% set it.text = it.text | replace(token, token[0] ~ " " ~ token[1:]) %}{% endfor %}',
            f"{{{{ {json.dumps(before)} }}}}",
            f"{{% if it.image and it.text %}}{composed}{{% elif it.image %}}{image}{{% else %}}{text}{{% endif %}}",
            f"{{{{ {json.dumps(after)} }}}}",
        )
    )


def _filled(prompts: PromptSet, kind: str) -> str:
    prompt: str | None = getattr(prompts, kind)
    if prompt is None:
        return f"{{{{ raise_exception({json.dumps(f'prompt set {prompts.name} has no {kind} prompt')}) }}}}"
    before, sentence, after = prompt.partition(SENTENCE)
    middle = " ~ it.text" if sentence else ""
    return f"{{{{ {json.dumps(before)}{middle} ~ {json.dumps(after)} }}}}"
