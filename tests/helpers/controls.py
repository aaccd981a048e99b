"""Keys of recipes in which β is fixed, or follows the margins of a step."""

from axolotl.integrations.base import BasePlugin

from axolotl_edpo.plugin import PLUGIN

FIXED = dict(edpo_control="fixed", edpo_epsilon=None)
MARGIN = dict(edpo_control="batch_margin", edpo_epsilon=None)
FILTERED = {**MARGIN, "edpo_margin_keep": 0.75}


class HalfTails(BasePlugin):
    """`dpo_ld_alpha: 0.5`, for axolotl before 0.21 too, whose TRL can do it."""

    def get_training_args(self, cfg) -> dict:
        """Sets the argument of TRL's trainer."""
        # a plugin stays in the process, for recipes that do not name it too
        return {"ld_alpha": 0.5} if HALF_TAILS[-1] in (cfg.plugins or ()) else {}


HALF_TAILS = [PLUGIN, "helpers.controls.HalfTails"]
