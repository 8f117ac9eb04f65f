"""From a trained folder to one for the Hub: weights, config, tokenizer, code and a filled model card.

    python -m modeling_scdiva.export scdiva hub/scdiva --model_name org/scdiva --results run.json

Notable choices:
- Nothing is believed: before the folder gets its name, a fresh interpreter that cannot import these packages
  loads it, tokenises and embeds cells, and the vectors must equal those of the source checkpoint.
- The folder is written under another name and renamed, so half an export never looks like one.
- No number on the card is typed. A result file without baselines is refused.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import modeling_scdiva
from modeling_scdiva import export_check
from modeling_scdiva.model_card import fill_model_card, find_template
from modeling_scdiva.tasks.cells import check_vocabulary
from modeling_scdiva.training_checkpoint import flush_to_disk

logger = logging.getLogger(__name__)

NEEDED_FILES = ("config.json", "tokenizer_config.json", "gene_vocabulary.json")
N_CHECK_CELLS = 8
N_CHECK_GENES = 500
# Float32 rounding of states of size one; the same code on the same machine usually gives the same bits.
TOLERANCE = 1e-6


def export_model(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    results: Sequence[str | Path] = (),
    template: str | Path | None = None,
    model_name: str | None = None,
) -> Path:
    """Make a folder that loads anywhere, and prove it.

    Args:
        checkpoint_dir: Trained folder: model and tokenizer, as `pretrain` leaves it.
        output_dir: New folder; must not exist.
        results: Result files (JSON) for the card, see `fill_model_card`.
        template: Template of the card; default the project's own.
        model_name: Name on the card, such as ``org/scdiva``; default the name of ``output_dir``.

    Returns:
        ``output_dir``.

    Raises:
        FileExistsError: If ``output_dir`` exists. (Parts that are missing, do not belong together or do not
            reload raise where they are checked, and nothing is left behind.)
    """
    checkpoint_dir, output_dir = Path(checkpoint_dir), Path(output_dir)
    if output_dir.exists():
        msg = f"{output_dir} exists. Choose another folder, or remove it first."
        raise FileExistsError(msg)
    _check_parts(checkpoint_dir)
    template = find_template(template)
    model, tokenizer = _load(checkpoint_dir)

    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        card = fill_model_card(
            template,
            model=model,
            tokenizer=tokenizer,
            results=results,
            model_name=model_name or output_dir.name,
        )
        (partial / "README.md").write_text(card, "utf-8")
        difference = check_export(partial, model, tokenizer)
        for path in [*partial.rglob("*"), partial]:
            flush_to_disk(path)
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(
        "%s is complete: reloaded without the packages, largest difference of %d embeddings %.1e.",
        output_dir,
        N_CHECK_CELLS,
        difference,
    )
    return output_dir


def check_export(folder: Path, model: PreTrainedModel, tokenizer: Any) -> float:
    """Embed cells with the folder alone, in a fresh interpreter, and compare with the model in memory.

    Args:
        folder: Exported folder.
        model: What it was made from.
        tokenizer: What it was made from.

    Returns:
        Largest absolute difference between the embeddings.

    Raises:
        RuntimeError: If loading fails there, or the difference exceeds ``TOLERANCE``.
    """
    counts, gene_ids = _made_up_counts(tokenizer.vocabulary)
    model = model.eval()
    with torch.inference_mode():
        inputs = tokenizer(counts, gene_ids=gene_ids).to(model.device)
        expected = model.base_model(**inputs).last_hidden_state[:, 0].float().cpu().numpy()  # (N, D)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        np.savez(scratch / "cells.npz", counts=counts, gene_ids=np.array(gene_ids))
        arguments = [folder.resolve(), scratch / "cells.npz", scratch / "embedding.npy"]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "home"),
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # equal threads, equal order of sums
        }
        # -I: neither the working folder nor PYTHONPATH can lend it the packages.
        finished = subprocess.run(
            [sys.executable, "-I", export_check.__file__, *map(str, arguments)],
            env=environment,
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode != 0:
            reason = "\n".join(finished.stderr.strip().splitlines()[-15:])
            msg = f"The export does not load without the packages. A fresh interpreter says:\n{reason}"
            raise RuntimeError(msg)
        embedding = np.load(scratch / "embedding.npy")
    return _largest_difference(embedding, expected)


# Compare embeddings (N, D); refuse more than rounding.
def _largest_difference(embedding: np.ndarray, expected: np.ndarray) -> float:
    if embedding.shape != expected.shape or not np.isfinite(embedding).all():
        msg = f"The export gives embeddings {embedding.shape}, not all finite; wanted {expected.shape}."
        raise RuntimeError(msg)
    difference = float(np.abs(embedding - expected).max())
    if difference > TOLERANCE:
        msg = (
            f"The export embeds the same cells otherwise than the checkpoint: they differ by up to "
            f"{difference:.2e}, allowed are {TOLERANCE:.0e}. The folder holds other code than this package."
        )
        raise RuntimeError(msg)
    return difference


# Refuse a folder without weights, config or tokenizer.
def _check_parts(checkpoint_dir: Path) -> None:
    missing = [name for name in NEEDED_FILES if not (checkpoint_dir / name).is_file()]
    if not any(checkpoint_dir.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        msg = (
            f"{checkpoint_dir} lacks {', '.join(missing)}. Name the folder that pretraining reported as "
            "saved; the checkpoint-* folders inside it hold no tokenizer."
        )
        raise FileNotFoundError(msg)


# Load the model with the class it was saved with, and its tokenizer, by the installed packages.
def _load(checkpoint_dir: Path) -> tuple[PreTrainedModel, Any]:
    config = AutoConfig.from_pretrained(checkpoint_dir)
    names = config.architectures or []
    known = [name for name in names if name in modeling_scdiva.__all__]
    if not known:
        msg = f"{checkpoint_dir / 'config.json'} names the architectures {names}, none of this package."
        raise ValueError(msg)
    model = getattr(modeling_scdiva, known[0]).from_pretrained(checkpoint_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint_dir)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


# Draw a few cells (N, G) over genes spread through the vocabulary; any genes and counts serve to compare.
def _made_up_counts(vocabulary: Any) -> tuple[np.ndarray, list[str]]:
    n_special = vocabulary.n_special_tokens
    n_genes = min(N_CHECK_GENES, len(vocabulary) - n_special)
    tokens = np.linspace(n_special, len(vocabulary) - 1, n_genes).round().astype(int)
    counts = np.random.default_rng(0).negative_binomial(1, 0.4, size=(N_CHECK_CELLS, n_genes))
    counts[:, 0] = 1  # no cell is empty
    return counts.astype(np.int32), [vocabulary.gene_ids[token] for token in tokens]


def main(arguments: Sequence[str] | None = None) -> None:
    """Export from the command line.

    Args:
        arguments: Words of the command line; default those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m modeling_scdiva.export", description="Make a Hub-like folder of a trained model."
    )
    parser.add_argument("checkpoint", type=Path, help="trained folder: model and tokenizer")
    parser.add_argument("output", type=Path, help="new folder to write")
    parser.add_argument(
        "--results", type=Path, nargs="*", default=[], help="result files (JSON) for the card"
    )
    parser.add_argument("--template", type=Path, help="card template; default the project's own")
    parser.add_argument(
        "--model_name", help="name on the card, such as org/scdiva; default the output's name"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    export_model(
        args.checkpoint,
        args.output,
        results=args.results,
        template=args.template,
        model_name=args.model_name,
    )


if __name__ == "__main__":
    main()
