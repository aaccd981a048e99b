"""`EDPOTrainer`: the walk from a batch of pairs to the ε-DPO loss.

    batch → completions → reference hidden → policy hidden → head → sums per sequence
          → steps → pair betas → loss per pair

The controller observes every micro-batch and moves β once per optimizer step. Model
loading, data, evaluation and saving are axolotl's, TRL's and transformers' own; what is
overridden here calls super().
"""

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from axolotl.integrations.base import PluginManager
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from . import distributed as engine
from . import upstream
from .data.packing import (
    Completions,
    chosen_minus_rejected,
    completions_of,
    sum_per_sequence,
)
from .losses import edpo as loss
from .losses.beta_controller import ControllerSettings
from .losses.preference import Answers, LossSettings, wpo_weights
from .models import forward as backbone
from .models.moe import (
    collected_router_logits,
    has_router_loss,
    router_loss,
    warn_of_reentrance,
)
from .models.packing_support import RowSettings
from .ops.token_stats import TokenStats, logits_stats, token_stats
from .reference.precompute import CacheSettings
from .training.margin_filter import PairMargins
from .training.metrics import WeightedMeans

LOG = get_logger(__name__)


class Pairs(NamedTuple):
    """What a batch says of its pairs; each of shape (pairs,).

    Attributes:
        plus: Δ+, nats.
        minus: Δ-, nats.
        steps: s of Eq. 5, in {-1, 0, +1}.
        betas: β̃ = β / (1 + ε s).
        losses: Loss, with gradient, but for `sft`.
        sft: -log π_θ of chosen, nats, with gradient.
        chosen_rewards: β̃ · (log π_θ - log π_ref) of chosen.
        rejected_rewards: The same of rejected.
    """

    plus: torch.Tensor
    minus: torch.Tensor
    steps: torch.Tensor
    betas: torch.Tensor
    losses: torch.Tensor
    sft: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """Implicit reward margins."""
        return self.chosen_rewards - self.rejected_rewards

    def filtered(self, weights: torch.Tensor | None) -> "Pairs":
        """With losses times weights, shape (pairs,), 0 for what is left out."""
        return self if weights is None else self._replace(losses=self.losses * weights)


class EDPOTrainer(PairMargins):
    """DPO in which every pair has a KL penalty of its own (arXiv 2502.13177).

    Args:
        model: Policy, as AxolotlDPOTrainer takes it.
        ref_model: Reference, or None for the adapter's own reference.
        settings: β₀, ε and the mean; by default those of the axolotl recipe.
        rows: How pairs are laid in rows; by default as the axolotl recipe says, or,
            with `settings` of one's own, padded.
        cache: Where the reference's hidden states are kept; by default as the recipe
            says, or, with `settings` of one's own, nowhere.
        log_pairs: Every so many steps pairs are noted; by default as the recipe says,
            or, with `settings` of one's own, never.
        **kwargs: As AxolotlDPOTrainer takes them.
    """

    _name = "ε-DPO"
    _tag_names = ["trl", "dpo", "edpo"]
    tag_names = ["axolotl", "dpo", "edpo"]
    _paper = {
        "title": "KL Penalty Control via Perturbation for Direct Preference "
        "Optimization",
        "id": "2502.13177",
        "citation": textwrap.dedent("""\
            @article{lee2025edpo,
                title         = {{KL Penalty Control via Perturbation for Direct Preference Optimization}},
                author        = {Sangkyu Lee and Janghoon Han and Hosung Song and Stanley Jungkyu Choi and Honglak Lee and Youngjae Yu},
                year          = 2025,
                eprint        = {arXiv:2502.13177},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        peft_config=None,
        settings: ControllerSettings | None = None,
        rows: RowSettings | None = None,
        cache: CacheSettings | None = None,
        log_pairs: int | None = None,
        **kwargs,
    ):
        # whoever passes settings is no recipe of axolotl's
        cfg: Any = PluginManager.get_instance().cfg if settings is None else None
        if isinstance(data_collator, AxolotlDPODataCollatorWithPadding):
            # axolotl hands over a collator for batches TRL no longer makes;
            # TRL's own pads to a multiple as well
            args.pad_to_multiple_of = data_collator.pad_to_multiple_of
            data_collator = None
        rows = rows or (RowSettings() if cfg is None else RowSettings.of(cfg))
        self._cache = cache if cfg is None else CacheSettings.of(cfg)
        continued = cfg is not None and cfg.adapter and cfg.lora_model_dir
        if continued:
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=True
            )
            self._require_copyable(model, evaluating=peft_config is None)
        elif cfg is not None and peft_config is None:
            ref_model = self._base_reference(model, ref_model)
        self.ref_model = ref_model
        super().__init__(
            model,
            ref_model,
            args=args,
            data_collator=data_collator,
            peft_config=None if continued else peft_config,
            **kwargs,
        )
        if continued:
            self._settle_reference_adapter(evaluating=peft_config is None)
        self._settle_models()
        self._start_feed(rows, self._models())
        self._start_run(
            settings or ControllerSettings.of(cfg, self.args.beta),
            log_pairs if cfg is None else cfg.edpo_log_pairs,
        )
        self.loss = LossSettings(
            tuple(self.loss_types),
            tuple(self.loss_weights),
            self.label_smoothing,
            self.use_weighting,
            1.0 if self.ld_alpha is None else self.ld_alpha,
        )
        upstream.leave_losses_as_they_are(self)
        # a loss that is not finite ends the run: no need to look at each on its own,
        # for which the host would wait for the device
        self.args.logging_nan_inf_filter = False
        self._means = {"train": WeightedMeans(), "eval": WeightedMeans()}

    def _settle_models(self) -> None:
        """What axolotl and TRL leave open in policy and reference.

        Raises:
            ValueError: If a router loss is not known.
        """
        if isinstance(self.model, PeftModel):
            # axolotl ends by saving the model below the adapter as well: a copy of
            # `base_model` under names nothing reads, which fails where weights are tied
            below: Any = backbone.causal_lm(self.model)
            below.save_pretrained = self.model.save_pretrained
        if self.aux_loss_enabled:
            lm = backbone.causal_lm(self.model)
            self.aux_loss_enabled: bool = has_router_loss(lm)
        if self.args.disable_dropout:
            for lm in self._models():
                backbone.disable_attention_dropout(lm)

    def try_out(self, model: nn.Module) -> None:
        """As PairFeed's; also finds out whether the head op can take the head."""

        def read(unwrapped: nn.Module) -> None:
            backbone.check_causal(backbone.causal_lm(unwrapped))
            self._reads_head = self._head_is_readable(unwrapped)

        with torch.no_grad():
            self._inside_forward(model, read)
        super().try_out(model)
        self._compile_layers()

    def _head_is_readable(self, unwrapped: nn.Module) -> bool:
        """Whether the head op can take the head; if not, says what that costs."""
        lm = backbone.causal_lm(unwrapped)
        try:
            backbone.check_head(lm)
        except backbone.HeadError as error:
            vocab = lm.config.get_text_config().vocab_size
            size = vocab * (2 * lm.dtype.itemsize + 8) * 1000 / 2**30
            LOG.warning(
                f"The head of {type(lm).__name__} cannot be read: {error}. The model "
                f"makes its own logits instead: about {size:.1f} GiB more memory per "
                f"1,000 tokens of a micro-batch, slower, and rounded to {lm.dtype}."
            )
            return False
        return True

    def _models(self) -> list[PreTrainedModel]:
        """The policy and, where it is a model of its own, the reference."""
        policy = backbone.causal_lm(self.model)
        if self.ref_model is None:
            return [policy]
        return [policy, self._own_reference()]

    def create_accelerator_and_postprocess(self):
        """As TRL's; shards the reference.

        Keeps `torch_compile` for the layers, see `compile_layers`.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            engine.keep_float32(self.accelerator)
            if self.ref_model is not None:
                self.ref_model = engine.shard(self.accelerator, self.ref_model)
        dynamo = self.accelerator.state.dynamo_plugin
        self._compile_keywords = {}
        if dynamo.backend != DynamoBackend.NO:
            self._compile_keywords = dynamo.to_kwargs()
            dynamo.backend = DynamoBackend.NO

    def _compile_layers(self) -> None:
        """What `torch_compile` asks for."""
        if self._compile_keywords:
            for lm in self._models():
                backbone.compile_layers(lm.base_model, self._compile_keywords)

    # --- loss --------------------------------------------------------------------

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        """Loss of a micro-batch: its share of the mean over the step's pairs.

        Args:
            model: The policy, wrapped by its engine.
            inputs: Batch of a `PairCollator`.
            return_outputs: Refused: no logits are kept that could be returned.
            num_items_in_batch: Shape (2,), pairs of the whole optimizer step and tokens
                of their chosen answers; absent in evaluation, where the micro-batch
                stands for itself.

        Returns:
            Scalar with gradient.
        """
        if return_outputs:
            raise ValueError("`rl: edpo` keeps no logits that it could return")
        completions = completions_of(inputs)
        stats, routing = self._score(model, inputs, completions)
        training = self.model.training
        weights = self._weights(inputs, stats, completions)
        pairs = self._judge(stats, completions).filtered(weights)
        mode = "train" if training else "eval"
        self._record(mode, inputs, completions, stats, pairs)
        if training:
            self._observe(pairs.steps, pairs.losses.detach())
        if num_items_in_batch is None:
            whole = (max(len(pairs.steps), 1), max(inputs["chosen_tokens"], 1))
        else:
            # engines average gradients over ranks; the divisors count all ranks' pairs
            whole = tuple(num_items_in_batch / self.accelerator.num_processes)
        total = self._total(pairs, *whole)
        if routing is None:
            return total
        self._means[mode].add("aux_loss", routing.expand(len(pairs.steps)))
        share = len(pairs.steps) / whole[0]
        return total + self.router_aux_loss_coef * share * routing

    def _total(self, pairs: Pairs, count, chosen_tokens) -> torch.Tensor:
        """Loss of pairs, as part of a mean over so many pairs and chosen tokens."""
        total = pairs.losses.sum() / count
        if self.loss.sft_weight:
            total = total + self.loss.sft_weight * pairs.sft.sum() / chosen_tokens
        return total

    def _score(
        self, model, inputs, completions: Completions
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """Reference first, without gradient, then policy and head in one forward.

        Returns:
            What the head says, and the router loss of a mixture of experts.
        """
        epsilon, y = self.controller.epsilon, completions.targets
        weighted = self.loss.weighted
        reference = self._reference(model, inputs, completions)

        def made(unwrapped: nn.Module) -> TokenStats:
            own = self._positions(unwrapped, inputs, completions)
            return logits_stats(own, reference(own), y, epsilon, collision=weighted)

        def read(unwrapped: nn.Module) -> TokenStats:
            modules, head = others or backbone.shared_reference_head(unwrapped)
            lm = backbone.causal_lm(unwrapped)
            return engine.inside(
                [*dict.fromkeys([*backbone.head_modules(lm), *modules])],
                lambda own: token_stats(
                    own,
                    reference(own),
                    backbone.head_of(lm),
                    head,
                    y,
                    epsilon,
                    collision=weighted,
                ),
                self._positions(unwrapped, inputs, completions),
            )

        if not self._reads_head:
            return self._forward(model, made, inputs["copies"])
        with self._separate_reference_head() as others:
            return self._forward(model, read, inputs["copies"])

    def _forward(
        self, model, score: Callable[[nn.Module], TokenStats], copies: torch.Tensor
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """Runs the policy's forward, from which a router loss comes along."""

        def forward(unwrapped: nn.Module) -> tuple[torch.Tensor | None, ...]:
            if not self.aux_loss_enabled:
                return *score(unwrapped), None
            lm = backbone.causal_lm(unwrapped)
            with collected_router_logits(lm) as collected:
                stats = score(unwrapped)
            return *stats, router_loss(lm, collected[0], copies)

        *stats, routing = self._inside_forward(model, forward)
        learns = self.model.training and torch.is_grad_enabled()
        if routing is not None and learns and not routing.requires_grad:
            warn_of_reentrance()
        return TokenStats(*stats), routing

    def _judge(self, stats: TokenStats, completions: Completions) -> Pairs:
        """Steps, betas and losses of a batch's pairs."""
        lengths = completions.lengths

        def per_sequence(values: torch.Tensor) -> torch.Tensor:
            return sum_per_sequence(self.loss.counted(values, lengths), lengths)

        plus = chosen_minus_rejected(per_sequence(stats.plus))
        minus = chosen_minus_rejected(per_sequence(stats.minus))
        steps = loss.steps(plus, minus)
        betas = self.controller.pair_betas(steps)
        # differences per token first: sums near -1000 would round them away
        log_ratios = per_sequence(stats.policy_logp - stats.reference_logp)
        losses = self.loss.losses(Answers.of(log_ratios, lengths, betas))
        if self.loss.weighted:
            likely = stats.policy_logp - stats.collision.log()
            relative = sum_per_sequence(likely, lengths)
            losses = losses * wpo_weights(relative / lengths.clamp(min=1))
        sft = -sum_per_sequence(stats.policy_logp, lengths).chunk(2)[0]
        chosen, rejected = log_ratios.detach().chunk(2)
        rewards = betas * chosen, betas * rejected
        return Pairs(plus, minus, steps, betas, losses, sft, *rewards)

    # --- metrics -----------------------------------------------------------------

    def _record(
        self,
        mode: str,
        inputs,
        completions: Completions,
        stats: TokenStats,
        pairs: Pairs,
    ) -> None:
        """Adds a batch to the means that are logged next."""
        add = self._means[mode].add
        if self.controller.epsilon is not None:
            add("kl/avg_steps", pairs.steps)
            add("kl/p_epsilon_steps", pairs.steps == 1)
            add("kl/n_epsilon_steps", pairs.steps == -1)
        add("rewards/chosen", pairs.chosen_rewards)
        add("rewards/rejected", pairs.rejected_rewards)
        add("rewards/accuracies", pairs.margins > 0)
        add("rewards/margins", pairs.margins)
        logps = sum_per_sequence(stats.policy_logp.detach(), completions.lengths)
        for name, values in zip(("chosen", "rejected"), logps.chunk(2), strict=True):
            add(f"logps/{name}", values)
        chosen = inputs["chosen_tokens"]
        add("kl/policy_ref", stats.kl)
        add("entropy", stats.entropy)
        add("mean_token_accuracy", stats.hit[:chosen])
        add("logits/chosen", stats.mean_logit[:chosen])
        add("logits/rejected", stats.mean_logit[chosen:])
        if mode == "train":
            self._trace(inputs["examples"].pairs, completions, stats, pairs)

    def _trace(
        self, examples, completions: Completions, stats: TokenStats, pairs: Pairs
    ) -> None:
        """Notes a batch's pairs, where the recipe asks for it."""
        step = self.state.global_step + 1
        if self.trace is None or not self.trace.is_due(step):
            return
        with self.trace.timed():
            kl = sum_per_sequence(stats.kl, completions.lengths)
            chosen, rejected = completions.lengths.chunk(2)
            tokens = (chosen + rejected).clamp(min=1)
            kl = torch.stack(kl.chunk(2)).sum(dim=0) / tokens
            moved = pairs.plus, pairs.minus, pairs.steps, pairs.betas, pairs.margins
            self.trace.observe(step, examples, [*moved, kl, chosen, rejected])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands TRL the means over everything since the last log."""
        mode = "train" if self.model.training else "eval"
        self._count_tokens()
        means = self._means[mode].pop(self._sum_over_ranks)
        if means:
            means["num_tokens"] = self._total_train_tokens
            if mode == "eval":
                means["kl/beta"] = self.controller.beta
            self._metrics[mode].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)
