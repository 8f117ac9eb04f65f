"""`pipeline("cell-embedding", model="scdiva")`: from an AnnData or an h5ad file to one vector per cell.

The pipeline loads model and tokenizer itself and calls `embed_cells`. A path is opened without loading its
matrix. Importing `modeling_scdiva` registers the task. AnnData is imported when a path is opened, not before.

Dimensions: N cells in a file, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from modeling_scdiva.tasks.embedding import embed_cells

TASK = "cell-embedding"
BATCH_SIZE = 64


class CellEmbeddingPipeline(Pipeline):
    """Embeds the cells of AnnData objects and h5ad files; made by ``pipeline("cell-embedding", model=...)``.

    The arguments of `embed_cells` are given at construction or at the call, which wins.
    """

    tokenizer: Any  # a CellTokenizer, for the type checker
    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    def __call__(  # type: ignore[override]
        self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any
    ) -> np.ndarray | list[np.ndarray]:
        """Embed all cells of an AnnData or file, or of each of a list of these.

        Args:
            inputs: AnnData, in memory or backed, or path of an h5ad file, or a list of these.
            batch_size: Cells in one forward pass.
            **kwargs: As in `embed_cells`: ``max_genes``, ``pooling``, ``layer``, ``expression_is_log1p`` and
                so on.

        Returns:
            (N, D) float32, rows in the order of ``obs_names``; for a list, a list of these.
        """
        # Not the base class's loop: its batches are inputs, ours are cells.
        arguments = self._forward_params | self._sanitize_parameters(**kwargs)[1]
        chosen = (size for size in (batch_size, self._batch_size, BATCH_SIZE) if size is not None)
        arguments["batch_size"] = next(chosen)
        if isinstance(inputs, list | tuple):
            return [self.run_single(entry, {}, arguments, {}) for entry in inputs]
        return self.run_single(inputs, {}, arguments, {})

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save model and tokenizer. The pipeline belongs to this package and not to a checkpoint.

        Args:
            save_directory: Folder.
            **kwargs: As in `PreTrainedModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        kwargs.pop("local_files_only", None)  # of `pipeline`, which passes it on
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """Pass the cells on; they are tokenised block by block between forward passes.

        Args:
            input_: AnnData or path.

        Returns:
            The same under the name ``cells``.
        """
        return {"cells": input_}

    def _forward(self, input_tensors: dict[str, Any], **arguments: Any) -> Any:
        with _opened(input_tensors["cells"]) as adata:
            return {
                "cell_embeddings": embed_cells(adata, model=self.model, tokenizer=self.tokenizer, **arguments)
            }

    def postprocess(self, model_outputs: dict[str, np.ndarray], **_: Any) -> np.ndarray:
        """Unpack the vectors.

        Args:
            model_outputs: What the forward pass gave.

        Returns:
            (N, D) float32.
        """
        return model_outputs["cell_embeddings"]


# Give an AnnData: the one that came, or a file's, backed, and closed afterwards.
@contextmanager
def _opened(cells: Any) -> Iterator[Any]:
    if hasattr(cells, "obs_names"):
        yield cells
        return
    if not isinstance(cells, str | PathLike):
        msg = f"{TASK} takes AnnData, paths of h5ad files, or a list of these; got {type(cells).__name__}."
        raise TypeError(msg)
    path = Path(cells)
    if not path.is_file() or path.suffix != ".h5ad":
        msg = f"{path} is no .h5ad file. Read other formats first and pass the AnnData."
        raise FileNotFoundError(msg)
    import anndata  # here, so that importing modeling_scdiva stays free of it

    adata = anndata.read_h5ad(path, backed="r")
    try:
        yield adata
    finally:
        adata.file.close()


def register_pipelines() -> None:
    """Make the task known to `transformers.pipeline`; a second call changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=CellEmbeddingPipeline, pt_model=AutoModel)
