"""`python -m axolotl_edpo.report`: the command without axolotl's banner."""

from .command import edpo_report

edpo_report(prog_name="python -m axolotl_edpo.report")
