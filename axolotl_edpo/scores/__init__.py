"""`axolotl edpo-score`: scores pairs with a trained model against its reference.

axolotl loads both models and makes the trainer, as for `axolotl train`. The trainer
evaluates once. So scores are what an evaluation of the run would log.

Files, in reading order:
    trained.py     what a folder holds: weights or an adapter, β; what is refused
    engines.py     which engine of the recipe is used
    score.py       from a recipe and a folder to scores
    rows.py        a row per pair, in a Parquet file
    command.py     the command line
"""
