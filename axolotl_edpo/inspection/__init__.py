"""`axolotl edpo-inspect`: shows pairs as they will be trained, before any training.

The pairs are prepared and tokenized by the functions that `axolotl train` calls. No
model is loaded, and nothing is written but the prepared data.

Files, in reading order:
    pair_set.py    from a recipe to tokens
    tokens.py      the tokens of a pair: text, and which are scored
    marks.py       makes scored tokens and boundaries visible, in colour or without
    pages.py       the lines of a pair
    counts.py      the lines about the whole set
    command.py     the command line
"""
