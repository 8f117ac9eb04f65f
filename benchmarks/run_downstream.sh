#!/usr/bin/env bash
# Everything downstream of one checkpoint, each task beside its baselines, at a size that two CPU cores can do.
#
#     MODEL=runs/small/scdiva CORPUS=runs/small/corpus DATA=folder/of/h5ad \
#         bash benchmarks/run_downstream.sh [TASK ...]
#
# Tasks: denoising embedding reconstruction imputation annotation integration perturbation gene_network; default all,
# some hours on two cores, of which annotation, integration and perturbation take most since they train. OUTPUT gets
# the result files (default benchmarks/results); name them in a page and run update_tables.py. Set PRECISION=bf16 where
# the processor has bf16 instructions.
set -euo pipefail
: "${MODEL:?folder with weights and tokenizer}" "${CORPUS:?corpus it was trained on}" "${DATA:?folder with the h5ad files}"
: "${OUTPUT:=benchmarks/results}" "${PRECISION:=no}" "${PYTHON:=.venv/bin/python}"
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=32  # by default it keeps a kernel for every shape, gigabytes in bf16

fast=()
[ "$PRECISION" = bf16 ] && fast=(--bf16)
common=(--model "$MODEL" --output "$OUTPUT")
tasks=("$@")
[ $# -gt 0 ] || tasks=(denoising embedding reconstruction imputation annotation integration perturbation gene_network)

for task in "${tasks[@]}"; do
    case "$task" in
    denoising) "$PYTHON" benchmarks/run_denoising.py "${common[@]}" --corpus "$CORPUS" ;;
    embedding)
        "$PYTHON" benchmarks/run_embedding_probes.py "${common[@]}" --data "$DATA" --corpus "$CORPUS" --pooling lat mean
        ;;
    reconstruction)
        "$PYTHON" benchmarks/run_reconstruction.py "${common[@]}" --max_test_cells 30 \
            --data "$DATA/pbmc_facs_zheng2017.h5ad" "$DATA/crohn_gut_scp1884.h5ad"
        ;;
    imputation)
        "$PYTHON" benchmarks/run_imputation.py "${common[@]}" --max_test_cells 60 --scvi \
            --data "$DATA/pbmc_facs_zheng2017.h5ad" "$DATA/kang2018_ifnb_pbmc.h5ad"
        ;;
    annotation)
        "$PYTHON" benchmarks/run_annotation.py "${common[@]}" --data "$DATA" "${fast[@]}" \
            --max_genes 64 --max_cells 400 --n_folds 3 --n_epochs 8 --batch_size 16
        ;;
    integration)
        "$PYTHON" benchmarks/run_integration.py "${common[@]}" --data "$DATA" "${fast[@]}" \
            --max_genes 64 --max_cells 500 --n_epochs 8 --batch_size 64 --learning_rate 1e-3
        ;;
    perturbation)
        "$PYTHON" benchmarks/run_perturbation.py "${common[@]}" --data "$DATA/kang2018_ifnb_pbmc.h5ad" \
            --match_keys cell_type --holdout_key cell_type --target IFNB=IFNAR1 \
            --trainable head --n_epochs 4 --max_genes 128
        "$PYTHON" benchmarks/run_perturbation.py "${common[@]}" --data "$DATA/papalexi2021_eccite_299g.h5ad" \
            --match_keys batch --trainable full --n_epochs 5
        ;;
    gene_network)
        "$PYTHON" benchmarks/run_gene_network.py "${common[@]}" --data "$DATA/kang2018_ifnb_pbmc.h5ad" \
            --reference "$DATA/reference/dorothea_human.parquet" "$DATA/reference/trrust_human.parquet" \
            --confidences A B C --n_cells 100
        ;;
    *)
        echo "Unknown task $task; see the head of $0." >&2
        exit 2
        ;;
    esac
done
