"""`axolotl edpo-report`: what runs did, as one page and as numbers.

    output_dir/checkpoint-*/trainer_state.json    what was logged
    output_dir/edpo_pairs/*.parquet               what single pairs did, if traced

Files, in reading order:
    logged.py      what a run logs, and how to read it
    runs.py        runs, read from their directories
    trace.py       pairs, read from a run's trace
    figures.py     charts, as SVG and PNG
    content.py     charts with their captions, and the same as numbers
    tables.py      tables and sentences
    page.py        the page: template, files
    command.py     the command

No weights and no pickles are loaded, and training imports nothing of this.
"""
