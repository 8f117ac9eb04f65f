#!/usr/bin/env bash
# The generator on real cells, from files to numbers: tokenizer, corpus, pretraining twice, generation, likelihood.
#
#     DATA=folder/of/h5ad RUN=runs/generator bash benchmarks/run_generation_pretraining.sh
#
# DATA holds the files below (human, raw counts, more than 5,000 genes), mouse_endocrinogenesis.h5ad and
# reference/{hgnc,gencode}_human.parquet. 800 variable genes, so that nine in ten cells keep all they express.
# Hours on two cores; bf16 is worth it only where the processor has bf16 instructions.
set -euo pipefail
: "${DATA:?folder with the h5ad files}" "${RUN:=runs/generator}" "${PRECISION:=no}" "${STEPS:=1600}" "${LONG_STEPS:=4000}"
: "${PYTHON:=.venv/bin/python}"
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
    --min_cells 5 --n_genes 800 --max_genes 512
"$PYTHON" data/build_corpus.py "${files[@]}" --tokenizer "$RUN/tokenizer" --output "$RUN/corpus" \
    --num-shards 2 --obs_keys cell_type --min_count_overlap 0.1

pretrain() {  # name of the run, configuration, steps, further arguments
    "$PYTHON" -m accelerate.commands.launch --num_processes 1 --mixed_precision "$PRECISION" examples/pretrain.py \
        --corpus "$RUN/corpus" --config "$2" --output_dir "$RUN/$1" --n_steps "$3" --batch_size 32 \
        --learning_rate 8e-4 --ema_decay 0.998 --depth_corruption none --conditions cell_type library_size \
        --log_every 20 --eval_every 400 --save_every 200 --resume "${@:4}"
}
# Two objectives at equal budget: the same network, cells, order of cells and steps.
for objective in elbo paper; do
    sed -e "s/\"elbo\"/\"$objective\"/" -e 's/"exclude_unfit_genes": true/"exclude_unfit_genes": false/' \
        examples/configs/elbo.json > "$RUN/$objective.json"
    pretrain "$objective" "$RUN/$objective.json" "$STEPS"
done
# The generator goes on from the first, with the arithmetic of the sort given instead of learnt.
pretrain generator examples/configs/elbo.json "$LONG_STEPS" --init_checkpoint "$RUN/elbo"

[[ "$PRECISION" == bf16 ]] && fast=(--bf16) || fast=()
measure() {  # script, checkpoint, further arguments
    "$PYTHON" "benchmarks/$1" --checkpoint "$RUN/$2" --corpus "$RUN/corpus" "${@:3}"
}
generation() { measure run_generation.py "$1" --task "$2" "${fast[@]}" "${@:3}"; }
likelihood() { measure run_likelihood.py "$1" --task "$2" "${@:3}"; }
generation generator calls --scvi --n_cells 192
generation generator correctors --n_cells 96 --quality_steps 300
generation generator guidance --n_cells 130
generation generator completion --n_cells 32
measure run_generation.py generator --task cost
for objective in elbo paper; do
    generation "$objective" calls --calls 64 --skip_full --n_cells 128 --name "generation_$objective"
done
likelihood generator files --n_cells 15
likelihood generator spoilt --n_cells 30 --n_draws 64 --data "$DATA/pbmc_facs_zheng2017.h5ad" --mouse "$DATA/mouse_endocrinogenesis.h5ad"
likelihood generator labels --n_cells 60 --n_draws 8 --dataset pbmc_facs_zheng2017
likelihood generator scvi --n_cells 10 --name likelihood_scvi_all_cells
likelihood generator exact --n_cells 1
likelihood elbo objectives --n_cells 10 --other "$RUN/paper"
"$PYTHON" benchmarks/run_denoising.py --model "$RUN/generator" --corpus "$RUN/corpus" \
    --output "benchmarks/results/$(date +%F)_denoising_generator.json"
