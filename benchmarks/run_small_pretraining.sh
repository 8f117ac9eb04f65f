#!/usr/bin/env bash
# The small model on real cells, from files to numbers: tokenizer, corpus, pretraining, held-out losses, embeddings.
#
#     DATA=folder/of/h5ad RUN=runs/small bash benchmarks/run_small_pretraining.sh
#
# DATA holds the files below (human, raw counts, more than 5,000 genes), papalexi2021_eccite_299g.h5ad (its gene names
# alone) and reference/{hgnc,gencode}_human.parquet.
# Two cores take about an hour and a half; bf16 is worth it only where the processor has bf16 instructions.
set -euo pipefail
: "${DATA:?folder with the h5ad files}" "${RUN:=runs/small}" "${PRECISION:=no}" "${STEPS:=2600}" "${PYTHON:=.venv/bin/python}"
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=32  # by default it keeps a kernel for every shape, gigabytes in bf16

files=()
for name in breast_tumour_unlabelled cellmix_celseq2_tian2019 crohn_gut_scp1884 kang2018_ifnb_pbmc \
    pancreas_baron_human_mini pbmc_donorA_unlabelled pbmc_eccite_adt_gated pbmc_facs_zheng2017 \
    pbmc_protein_5k_10k_mini pbmc_tcell_16samples_unlabelled pbmc_zheng2017_b_cd4_cd8 \
    thyroid_carcinoma_unlabelled zheng68k_mini; do
    files+=("$DATA/$name.h5ad")
done

"$PYTHON" data/build_vocabulary.py "${files[@]}" --output "$RUN/tokenizer" \
    --gene_table "$DATA/reference/hgnc_human.parquet" "$DATA/reference/gencode_human.parquet" \
    --min_cells 5 --n_genes 4096 --max_genes 256 \
    --keep_genes "$DATA/papalexi2021_eccite_299g.h5ad"  # its screen is read downstream
"$PYTHON" benchmarks/run_corpus.py "${files[@]}" --tokenizer "$RUN/tokenizer" --obs_keys cell_type \
    --output benchmarks/results
"$PYTHON" data/build_corpus.py "${files[@]}" --tokenizer "$RUN/tokenizer" --output "$RUN/corpus" \
    --num-shards 2 --obs_keys cell_type
"$PYTHON" -m accelerate.commands.launch --num_processes 1 --mixed_precision "$PRECISION" examples/pretrain.py \
    --corpus "$RUN/corpus" --config examples/configs/small.json --output_dir "$RUN/scdiva" \
    --batch_size 32 --learning_rate 6e-4 --ema_decay 0.998 --n_steps "$STEPS" \
    --log_every 20 --eval_every 400 --save_every 200 --resume
"$PYTHON" benchmarks/run_denoising.py --model "$RUN/scdiva" --corpus "$RUN/corpus" --output benchmarks/results
"$PYTHON" benchmarks/run_embedding_probes.py --model "$RUN/scdiva" --data "$DATA" --corpus "$RUN/corpus" \
    --pooling lat mean --output benchmarks/results
