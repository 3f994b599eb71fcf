"""Model folders: safetensors, one `config.json`, and everything that turns a film into the model's input."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from emoscale.config import ConfigError
from emoscale.forms import Manifest, Model, Options, Widths
from emoscale.records import check, read_json
from emoscale.training import checkpoint

MODEL_TYPE = "emoscale"
SCHEMA = 1
"""Of a model folder."""


@dataclass
class Exported:
    """What `config.json` of a model folder says."""

    shape: dict[str, Any]
    """Keyword arguments of `UnifiedTransformer`; under `utterance`, with those of `DialogueEncoder` under `dialogue`, where dialogues are read."""
    head: dict[str, Any] = field(default_factory=dict)
    """Name and options of the fine-tuned head; empty = a pre-trained backbone."""
    classes: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    template: str = ""
    modalities: list[str] = field(default_factory=lambda: ["text", "visual", "acoustic"])
    max_text: int = 120
    score: dict[str, Any] = field(default_factory=dict)
    """How the model did where it was chosen."""


def utterance_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Give the keyword arguments of the transformer that encodes utterances."""
    return shape.get("utterance", shape)


def write_model(folder: Path, exported: Exported, state: dict[str, Tensor], *, tokenizer: Any, corpus: Path | None, assets: Path | None) -> Path:
    """Write a model folder aside and move it into place.

    Args:
        folder: of the model; an older one is replaced.
        state: weights of a `TaskModel`.
        tokenizer: saved beside them.
        corpus: prepared corpus whose preprocessing the model needs (where it starts from no checkpoint).
        assets: a checkpoint's assets, which win over the corpus.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config = {"model_type": MODEL_TYPE, "schema": SCHEMA, "architectures": ["EmoscaleModel"], **asdict(exported)}
    (aside / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, aside / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(aside / "tokenizer")
    source = assets if assets is not None else corpus
    if source is not None:
        manifest = read_json(
            source / ("corpus.json" if assets is not None else "manifest.json"), Manifest, "prepare the corpus again, or take another checkpoint"
        )
        kept = {key: value for key, value in manifest.items() if key != "shards"}
        (aside / "preprocessor_config.json").write_text(json.dumps(kept, indent=1, sort_keys=True))
        if (source / "teacher").is_dir():
            shutil.copytree(source / "teacher", aside / "teacher")
    (aside / "labels.json").write_text(json.dumps(exported.classes))
    (aside / "score.json").write_text(json.dumps(exported.score, indent=1))
    (aside / "README.md").write_text(_card(exported))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def export(source: str | Path, out: str | Path) -> Path:
    """Turn a pre-training checkpoint (or run folder) or a fine-tuned model folder into one that `AutoModel.from_pretrained` opens.

    Raises:
        ConfigError: there is nothing to export, or `out` exists.
    """
    from emoscale.data.tokens import load_tokenizer

    source, out = Path(source), Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; name another folder")
    if is_model_folder(source):
        shutil.copytree(source, out)
        return out
    found = found_checkpoint(source)
    described = read_json(found / "assets" / "model.json", Options, checkpoint.OLDER)
    given = check({"shape": described["shape"], "max_text": described["data"].get("max_text")}, Model, found / "assets" / "model.json", checkpoint.OLDER)
    check(utterance_shape(described["shape"]), Widths, found / "assets" / "model.json", checkpoint.OLDER)
    exported = Exported(**given)  # type: ignore[arg-type]  # a dictionary of these two
    tokenizer = load_tokenizer(str(found / "assets" / "tokenizer"), None)
    return write_model(out, exported, checkpoint.read_tensors(found / "weights.safetensors"), tokenizer=tokenizer, corpus=None, assets=found / "assets")


def is_model_folder(source: Path) -> bool:
    """Tell whether a folder is one that `write_model` wrote."""
    return (source / "config.json").is_file() and (source / "model.safetensors").is_file()


def found_checkpoint(source: Path) -> Path:
    """Give a checkpoint, or the latest of a run folder, every file of it compared with its hash.

    Raises:
        ConfigError: there is none.
        DataError: it is damaged.
    """
    if (source / "weights.safetensors").is_file():
        checkpoint.verify(source)
        return source
    found = checkpoint.find_latest(source / "checkpoints")
    if found is None:
        raise ConfigError(f"{source}: neither a model folder, nor a checkpoint, nor a run folder with one")
    return found


def _kind(shape: dict[str, Any]) -> str:
    if "generator" in shape:
        return f"Responding {shape['generator']['model_type']}"
    if "layers" in shape:
        return f"Unified transformer of {shape['layers']} layers"
    return f"{shape['text']['model_type']} and {shape['picture' if 'picture' in shape else 'acoustic']['model_type']}"


def _card(exported: Exported) -> str:
    shape = utterance_shape(exported.shape)
    score = exported.score
    lines = [
        "---",
        "library_name: transformers",
        "tags: [emotion-recognition, multimodal, emoscale]",
        "---",
        "",
        f"# emoscale {'emotion model' if exported.head else 'pre-trained backbone'}",
        "",
        f"{_kind(shape)} over {', '.join(exported.modalities)}: width {shape['width']}, "
        f"vocabulary {shape['vocabulary']}, {shape['visual_width']} visual and {shape['acoustic_width']} acoustic features per frame.",
        "",
    ]
    if exported.head:
        lines += [
            f"Head: `{exported.head['name']}`, classes {', '.join(exported.classes)}.",
            f"Fold {score['fold']}, seed {score['seed']}, step {score['step']}: validation UAR {score['validation_uar']:.3f}, test UAR {score['test_uar']:.3f}.",
            {"validation": "The step was chosen on the validation split.", "paper": "The step was chosen on the TEST split, as published: an upper bound."}[
                score["selection"]
            ],
            "",
        ]
    lines += [
        "```python",
        "import emoscale",
        'rows = emoscale.load("this/folder").predict("film.mp4")',
        "```",
        "",
        "Labels describe shown emotion in the training corpus; they are no statement about what a person feels. The licence of the",
        "weights follows the licence of the corpus they were trained on.",
        "",
    ]
    return "\n".join(lines)
