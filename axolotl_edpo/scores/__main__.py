"""`python -m axolotl_edpo.scores`: the command for a launcher, without a banner."""

from .command import edpo_score

edpo_score(prog_name="python -m axolotl_edpo.scores")
