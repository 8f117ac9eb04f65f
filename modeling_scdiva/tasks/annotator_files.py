"""A fine-tuned annotator on disk: the adapter, or all weights, and beside them what a fresh process needs.

Notable choices:
- An adapter holds neither the names of its classes nor the threshold. They stand in
  ``scdiva_annotator.json``; a ``config.json`` in the folder of an adapter would make transformers take that
  folder for the base.
- The base is named by an absolute path or a Hub id, so that the folder loads from anywhere.
- PEFT alone loads the folder, too: `AutoPeftModelForSequenceClassification.from_pretrained(folder,
  num_labels=...)`.

Source: METHOD.md section 7.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from modeling_scdiva.adapters import ADAPTER_FILE, base_of, find_saved_file, load_adapter, save_adapter
from modeling_scdiva.tasks.annotation import AnnotationCalibration, CellAnnotator
from modeling_scdiva.tasks.classifier import make_classifier

ANNOTATOR_FILE = "scdiva_annotator.json"
FORMAT_VERSION = 1


def save_annotator(
    annotator: CellAnnotator,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    base_model: str | Path | None = None,
) -> None:
    """Save an annotator: the adapter alone for LoRA, else all weights.

    Args:
        annotator: What `finetune_annotator` returned.
        folder: Where to; made if it is not there.
        tokenizer: Saved beside a whole model, so that the folder is complete; an adapter takes that of its
            base.
        base_model: Path or Hub id of the base of an adapter; default where the base was loaded from.
    """
    folder = Path(folder)
    save_adapter(annotator.model, folder, tokenizer=tokenizer, base_model=base_model)
    calibration = annotator.calibration
    content = {
        "format_version": FORMAT_VERSION,
        "label_names": annotator.label_names,
        "calibration": None if calibration is None else asdict(calibration),
        "max_genes": annotator.max_genes,
        "vocabulary_hash": annotator.model.config.vocabulary_hash,
        "history": annotator.history,
        "facts": annotator.facts,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / ANNOTATOR_FILE).write_text(text, encoding="utf-8")


def load_annotator(
    name_or_folder: str | Path,
    *,
    base_model: str | Path | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> CellAnnotator:
    """Load an annotator, over its base where it is an adapter.

    Args:
        name_or_folder: Folder that `save_annotator` wrote, or its Hub id.
        base_model: Path or Hub id of the base, if it is no longer where the adapter says.
        revision: Branch, tag or commit of the annotator on the Hub. That of a base is the one which the
            adapter names.
        **kwargs: For ``from_pretrained`` of the weights: ``trust_remote_code``, ``dtype``.

    Returns:
        The annotator in evaluation mode. Load its tokenizer from `base_of` the same folder.

    Raises:
        ValueError: If the weights are not those it was trained with.
    """
    content = _read(name_or_folder, revision)
    base = base_of(name_or_folder, base_model=base_model, revision=revision)
    model: Any
    if find_saved_file(name_or_folder, ADAPTER_FILE, revision) is None:
        model = AutoModelForSequenceClassification.from_pretrained(base, revision=revision, **kwargs)
    else:
        names = content["label_names"]
        model = load_adapter(
            name_or_folder, wrap=lambda encoder: make_classifier(encoder, names), base_model=base_model,
            revision=revision, **kwargs,
        )  # fmt: skip
    expected, found = content["vocabulary_hash"], model.config.vocabulary_hash
    if expected != found:
        msg = (
            f"The annotator {name_or_folder} was trained with the vocabulary {str(expected)[:12]} and {base} "
            f"has {str(found)[:12]}. Pass the model it was trained on as base_model."
        )
        raise ValueError(msg)
    model.eval()
    calibration = content["calibration"]
    return CellAnnotator(
        model,
        calibration=None if calibration is None else AnnotationCalibration(**calibration),
        max_genes=content["max_genes"],
        history=content["history"],
        facts=content["facts"],
    )


def _read(name_or_folder: str | Path, revision: str | None) -> dict[str, Any]:
    """Read what stands beside the weights.

    Returns:
        Content of the file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is of another format.
    """
    path = find_saved_file(name_or_folder, ANNOTATOR_FILE, revision)
    if path is None:
        msg = (
            f"{name_or_folder} holds no {ANNOTATOR_FILE}, so the names of the classes are unknown. Wanted is "
            "a folder that save_annotator wrote."
        )
        raise FileNotFoundError(msg)
    content = json.loads(Path(path).read_text("utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        msg = (
            f"{path} has format version {content.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}. Load it with the release that wrote it."
        )
        raise ValueError(msg)
    return content
