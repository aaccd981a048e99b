"""Our options of a recipe, bounds of axolotl's options, and how keys are renamed.

`EDPOArgs` is the single place where an option is defined. axolotl merges it into its
config. `validate.py` refuses recipes that would not train as written.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from ..errors import quote
from ..losses.beta_controller import Control
from ..losses.edpo import BetaMean
from ..losses.reference_free import reference_free

PREFIX = "edpo_"
CONTROL = "edpo_control"
# Options that have an effect with one `edpo_control` only -> that control.
OF_CONTROL: dict[str, Control] = {
    "edpo_epsilon": "epsilon",
    "edpo_beta_mean": "epsilon",
    "edpo_margin_weight": "batch_margin",
    "edpo_margin_momentum": "batch_margin",
    "edpo_margin_keep": "batch_margin",
}
# Keys that axolotl refuses together with `rl` -> our keys that replace them.
LOWERED = {
    "sample_packing": "edpo_sample_packing",
    "eval_sample_packing": "edpo_eval_sample_packing",
}
# axolotl's key for a precomputed reference; our key for the folder of its cache.
PRECOMPUTE, CACHE = "precompute_ref_log_probs", "edpo_reference_cache"
# The key of Liger's loss, which our fused op replaces.
LIGER = "dpo_use_liger_kernel"
# Training arguments that axolotl passes on in supervised training only. TRL's DPO
# trainer supports them, so we pass them on.
HANDED_ON = (
    "metric_for_best_model",
    "greater_is_better",
    "lr_quadratic_warmup",
    "jagged_restart_steps",
    "jagged_restart_warmup_steps",
    "jagged_restart_anneal_steps",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false, is needed")
    return value


def _switch(value: Any) -> Any:
    if value not in (True, False, "auto"):
        raise ValueError("true, false or auto is needed")
    return value


Switch = Annotated[bool | Literal["auto"], BeforeValidator(_switch)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool)]
NotNegative = Annotated[
    float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_bool)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]


class EDPOArgs(BaseModel):
    """Options that `axolotl_edpo.EDPOPlugin` adds to a recipe."""

    beta: Positive | None = Field(
        default=None,
        description="Initial KL penalty β; `rl_beta` and `trl.beta` mean the same "
        "(absent: 0.1)",
    )
    edpo_epsilon: Number = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Perturbation ε of the KL penalty, between 0 and 1 (paper: 0.01)",
    )
    edpo_beta_mean: BetaMean = Field(
        default="arithmetic",
        description="Mean of the pairs' β̃ that becomes the next step's β: `arithmetic` "
        "(the paper's Eq. 6) or `harmonic` (the authors' released code)",
    )
    edpo_control: Control = Field(
        default="epsilon",
        description="What moves β: `epsilon` (ε-DPO), `fixed` (nothing moves it: DPO) "
        "or `batch_margin` (the margins of each step's pairs: β-DPO)",
    )
    edpo_margin_weight: Number = Field(
        default=0.6,
        ge=0,
        allow_inf_nan=False,
        description="With `edpo_control: batch_margin`: α, by how much β follows the "
        "mean margin, per nat",
    )
    edpo_margin_momentum: Number = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="With `edpo_control: batch_margin`: momentum of its averages",
    )
    edpo_margin_keep: Number = Field(
        default=1.0,
        gt=0,
        le=1,
        description="With `edpo_control: batch_margin`: share of a step's pairs that "
        "its filter keeps (paper: 0.8; 1: no filter)",
    )
    edpo_length_penalty: Number = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="R-DPO: by how much a token lowers the reward of its answer; with "
        "`dpo_loss_type` `sigmoid` or `robust` (0: not at all, plain DPO)",
    )
    edpo_log_pairs: Count | None = Field(
        default=None,
        gt=0,
        description="Every how many optimizer steps a row per pair is written to "
        "`edpo_pairs` in `output_dir` (Parquet)",
    )
    edpo_max_kl: Positive | None = Field(
        default=None,
        description="Training stops with a checkpoint when `kl/policy_ref` of a log is "
        "above this, in nats per token (absent: it goes on, and a warning names a "
        "collapse)",
    )
    edpo_slic_delta: Positive | None = Field(
        default=None,
        description="With `dpo_loss_type: [slic]`: δ, the difference of "
        "log-probabilities from which on a pair teaches nothing, in nats (absent: 1)",
    )
    edpo_prefix_sharing: Switch = Field(
        default="auto",
        description="Whether a packed row holds a prompt once, for chosen and rejected "
        "(`auto`: where pairs are packed or padding-free, and the model can)",
    )
    edpo_reference_cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the reference's cache, which runs may share; with "
        "`precompute_ref_log_probs: true` (absent: `edpo_reference` in "
        "`dataset_prepared_path`)",
    )
    edpo_sample_packing: Switch = Field(
        default=False,
        description="Write `sample_packing`. A micro-batch is one row without padding, "
        "and the pairs of a step are balanced by tokens (`auto`: padded, where the "
        "model cannot pack)",
    )
    edpo_eval_sample_packing: bool | None = Field(
        default=None,
        description="Write `eval_sample_packing`. The same in evaluation (absent: as "
        "in training)",
    )

    @model_validator(mode="after")
    def _divide_rows_ourselves(self):
        """Switches off axolotl's own context parallelism, which is for other losses.

        axolotl derives its `context_parallel:` from `context_parallel_size`, and this
        key alone sets the device mesh.
        """
        if hasattr(self, "context_parallel"):
            self.context_parallel = None
        return self


class Bounds(BaseModel):
    """Bounds of axolotl's options that axolotl does not check."""

    learning_rate: Number | None = Field(
        None, ge=0, description="Rate of the optimizer"
    )
    num_epochs: Number | None = Field(None, gt=0, description="Passes over the data")
    micro_batch_size: int | None = Field(
        None, gt=0, description="Pairs of a micro-batch on a GPU"
    )
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, description="Micro-batches of an optimizer step on a GPU"
    )
    sequence_len: int | None = Field(
        None, gt=0, description="Most tokens of a prompt with one answer"
    )
    val_set_size: Number | None = Field(
        None, ge=0, lt=1, description="Share of the pairs set aside for evaluation"
    )
    logging_steps: Number | None = Field(None, gt=0, description="Steps between logs")
    save_steps: Number | None = Field(None, ge=0, description="Steps between saves")
    lora_r: int | None = Field(None, gt=0, description="Rank of the adapter")
    lora_dropout: Number | None = Field(
        None, ge=0, le=1, description="Dropout of the adapter; has no effect here"
    )
    dpo_loss_type: list[str] | None = Field(None, description="Names of losses")
    dpo_loss_weights: list[Number] | None = Field(None, description="A weight per loss")
    dpo_label_smoothing: Number | None = Field(
        None, description="Share of labels believed to be flipped"
    )
    dpo_ld_alpha: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the tokens that one answer is longer by",
    )
    simpo_gamma: NotNegative | None = Field(
        None, description="The margin of rewards that SimPO aims at"
    )
    cpo_alpha: NotNegative | None = Field(
        None, description="Weight of the likelihood of chosen answers"
    )
    orpo_alpha: Positive | None = Field(None, description="Weight of the odds ratio")
    context_parallel_size: int | None = Field(
        None, gt=0, description="GPUs that divide a packed row among them"
    )
    sequence_parallel_degree: int | None = Field(None, description="Only 1")
    tensor_parallel_size: int | None = Field(None, description="Only 1")
    expert_parallel_size: int | None = Field(None, description="Only 1")
    ray_num_workers: int | None = Field(None, description="Processes that Ray starts")
    fsdp_version: int | None = Field(None, description="Only 2")


class Moving(BaseModel):
    """Keys of `trl:` that let the reference follow the policy (TR-DPO)."""

    sync_ref_model: bool | None = Field(
        None, description="Whether the reference follows the policy"
    )
    ref_model_mixup_alpha: Number | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the policy that the reference takes over",
    )
    ref_model_sync_steps: int | None = Field(
        None, gt=0, description="Optimizer steps between two such updates"
    )


def lowered_packing(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The packing keys of a recipe, renamed by `LOWERED`.

    Args:
        recipe: The YAML. A key whose value is None counts as absent.

    Returns:
        Our key -> value.

    Raises:
        ValueError: If the recipe has a key under both names with different values.
    """
    lowered = {
        name: recipe[key]
        for key, name in LOWERED.items()
        if recipe.get(key) is not None
    }
    for key, name in LOWERED.items():
        given = recipe.get(name)
        if name in lowered and given not in (None, lowered[name]):
            raise ValueError(
                f"{quote(key, lowered[name])} and {quote(name, given)} mean the same "
                f"and disagree: remove `{name}`"
            )
    return lowered


def handed_on(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments that axolotl does not pass on in preference training.

    Args:
        recipe: The validated recipe.

    Returns:
        Argument -> value, for arguments that the recipe sets.
    """
    arguments = {key: recipe[key] for key in HANDED_ON if recipe.get(key) is not None}
    best = recipe.get("load_best_model_at_end") or recipe.get("early_stopping_patience")
    if best:
        arguments["load_best_model_at_end"] = True
    if (trl := recipe.get("trl")) and trl.get("sync_ref_model"):
        keys = Moving.model_fields
        arguments |= {key: trl[key] for key in keys if trl.get(key) is not None}
    if recipe.get("curriculum_sampling"):
        arguments["train_sampling_strategy"] = "sequential"
    loss = reference_free(recipe.get("dpo_loss_type"))
    if loss is not None and not loss.has_beta:
        arguments["beta"] = 1.0  # or axolotl would pass on `orpo_alpha`
    return arguments
