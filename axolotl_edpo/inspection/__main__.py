"""`python -m axolotl_edpo.inspection`: the command without axolotl's banner."""

from .command import edpo_inspect

edpo_inspect(prog_name="python -m axolotl_edpo.inspection")
