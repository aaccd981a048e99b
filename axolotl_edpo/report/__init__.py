"""`axolotl edpo-report`: shows runs as an HTML page, or as numbers in JSON.

It reads:
    output_dir/checkpoint-*/trainer_state.json    what was logged
    output_dir/edpo_pairs/*.parquet               values of single pairs, if traced
    output_dir/edpo_scores/*.parquet              what `axolotl edpo-score` wrote

Files, in reading order:
    logged.py      the metrics that a run logs
    runs.py        reads runs from their directories
    trace.py       reads pairs from the trace of a run, and from its scores
    figures.py     draws charts, as SVG and PNG
    content.py     charts with captions, and the JSON
    tables.py      tables and sentences
    page.py        fills the template and writes the files
    command.py     the command line

It loads no weights and no pickles. Training does not import this package.
"""
