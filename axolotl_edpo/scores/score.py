"""From a recipe and the folder of a trained model to scores.

    recipe → config → pairs ┐
    folder → policy         ├→ `EDPOTrainer`, as `axolotl train` makes it → evaluate
    `base_model` → reference┘

The last β of the run is set before. The reference always runs: a cache would be filled
for a single pass, and may hold too little for the KL.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from axolotl import train
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.utils.distributed import cleanup_distributed
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import setup_trainer
from datasets import Dataset
from transformers.integrations import get_reporting_integration_callbacks

from .. import upstream
from ..data.evaluation_sets import SET, set_names
from ..models.forward import REFERENCE_ADAPTER
from ..models.start import TRAINED
from ..plugin import TRAINER
from ..recipe import keys_of
from ..reference.kept import KL
from ..training import assembly, checkpointing
from .engines import removed_engines
from .rows import ScoreRows
from .trained import TrainedModel

LOG = get_logger(__name__)

# Of a recipe without `output_dir`, as axolotl has it.
OUTPUT_DIR = "./model-out"
# Name of a score -> name of the metric that an evaluation logs.
METRICS = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "kl": KL,
    "loss": "loss",
}
# What a recipe says about training alone, and its value while pairs are scored. A last,
# smaller micro-batch is scored, too.
UNUSED = {
    "auto_resume_from_checkpoints": False,
    "dataloader_drop_last": False,
    "edpo_log_pairs": None,
    "precompute_ref_log_probs": False,
    "resume_from_checkpoint": None,
    "rl_adapter_ref_model": False,
}


@dataclass(frozen=True)
class Scores:
    """The scores of a trained model.

    Attributes:
        model: The folder of the model.
        split: `datasets` or `test_datasets`.
        beta: The β that they were computed with.
        beta_of: Where it comes from: a folder, or "" for the recipe.
        sets: For each set its `name`, "" for all pairs, its number of `pairs` and the
            values of METRICS; None where the run has no such metric. All pairs come
            first; the sets of `test_datasets:` follow, if there are several.
    """

    model: str
    split: str
    beta: float
    beta_of: str
    sets: list[dict[str, Any]]


def score(
    recipe: str, model: Path | None, split: str, output: Path | None = None
) -> Scores:
    """Scores the pairs of a recipe.

    Args:
        recipe: Path of the YAML file.
        model: Folder of the trained model; None: the recipe's `output_dir`.
        split: `datasets` or `test_datasets`.
        output: A Parquet file for a row per pair; None: no file.

    Raises:
        ValueError: If the recipe is refused, has no such pairs, or the folder does not
            hold what the recipe trains.
    """
    keys = keys_of(recipe)
    folder = model or Path(keys.get("output_dir") or OUTPUT_DIR)
    trained = TrainedModel.read(folder.expanduser())
    # axolotl would write its log into the folder of a finished run
    with TemporaryDirectory() as scratch:
        cfg = load_cfg(recipe, output_dir=scratch, **removed_engines(keys))
        if cfg.trainer_cls != TRAINER:
            raise ValueError(
                "`axolotl edpo-score` scores the pairs of recipes with `rl: edpo`, and "
                "this is another one"
            )
        trained.require_fit(cfg)
        pairs = _pairs(cfg, split)
        scores = _evaluate(_trainer(cfg, trained, pairs), cfg, trained, split, output)
    cleanup_distributed()
    return scores


def _pairs(cfg: Any, split: str) -> Dataset:
    data = load_preference_datasets(cfg=cfg)
    pairs = data.train_dataset if split == "datasets" else data.eval_dataset
    if not pairs:
        raise ValueError(
            "the recipe has no pairs to score: set `test_datasets` or `val_set_size`, "
            "or score its training pairs with `--split datasets`"
        )
    return pairs


def _trainer(cfg: Any, trained: TrainedModel, pairs: Dataset) -> Any:
    """The trainer of `axolotl train`, whose policy is the trained model.

    Args:
        cfg: axolotl's config, changed in place.
        trained: The trained model.
        pairs: Stand for training and evaluation pairs, as the trainer wants both.
    """
    cfg.update({**UNUSED, TRAINED: str(trained.folder)})
    start, of_policy = cfg.adapter and cfg.lora_model_dir, cfg
    if cfg.adapter:
        cfg.lora_model_dir = str(trained.folder)
    else:
        of_policy = trained.config_of(cfg)
    model, tokenizer, peft_config, processor = train.setup_model_and_tokenizer(
        of_policy
    )
    trainer = setup_trainer(
        cfg=cfg,
        train_dataset=pairs,
        eval_dataset=pairs,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        total_num_steps=1,
        # the plugin has replaced it if the loss has no reference
        model_ref=train.setup_reference_model(cfg, tokenizer, processor),
        # with it the trainer makes a reference of the adapter, else of the model below
        peft_config=peft_config if start else None,
    )
    PluginManager.get_instance().post_trainer_create(cfg, trainer)
    if start and trainer.loss.has_reference:
        trainer.model.load_adapter(start, REFERENCE_ADAPTER)
    for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
        trainer.remove_callback(tracker)
    return trainer


def _evaluate(
    trainer: Any, cfg: Any, trained: TrainedModel, split: str, output: Path | None
) -> Scores:
    beta_of = _restore(trainer, trained)
    upstream.prepare_for_evaluation(trainer)
    rows = ScoreRows(output, trainer) if output else None
    with rows.parts() if rows else nullcontext():
        trainer.records.evaluated = rows and rows.add
        names = set_names(cfg)
        sets = _sets(trainer.evaluate(), trainer.eval_dataset, names)
        of = str(trained.folder), split, trainer.controller.beta, beta_of
        scores = Scores(*of, sets)
        if rows:
            rows.write(trained.step, names, asdict(scores))
    return scores


def _restore(trainer: Any, trained: TrainedModel) -> str:
    """Sets the last β of the run, and the last reference of TR-DPO.

    Returns:
        The folder that β is from; "" if it is that of the recipe.
    """
    moving = assembly.moving_reference(trainer)
    if moving is not None:
        folder = trained.state_folder or trained.folder
        checkpointing.load_reference(folder, moving)
    saved = trained.controller
    if saved is None:
        return ""
    for difference in trainer.controller.load_state_dict(saved):
        LOG.warning(f"Scoring: {difference}.")
    found = trainer.controller.beta == saved.get("beta")
    return str(trained.state_folder) if found else ""


def _sets(
    metrics: dict[str, float], pairs: Dataset, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The values of all pairs, then of each set, as `Scores.sets` has them."""
    counts = Counter(pairs[SET] if SET in pairs.column_names else ())
    sizes = {name: counts[number] for number, name in enumerate(names)}
    return [
        {"name": name, "pairs": size}
        | {key: metrics.get(f"{prefix}{of}") for key, of in METRICS.items()}
        for name, size, prefix in [
            ("", len(pairs), "eval_"),
            *((name, size, f"eval_{name}_") for name, size in sizes.items() if size),
        ]
    ]
