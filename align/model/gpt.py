"""Policy and reward model: Megatron's GPTModel with our norms, attention and heads.

`Architecture` describes the model, `ModelConfig` its precision and kernels in this run. `build_policy` and
`build_scorer` build this rank's shard without weights; align.model.huggingface.load fills it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from align.distributed.parallel import ParallelConfig, device
from align.errors import UserError
from align.model import lora
from align.model.architecture import Architecture
from align.model.attention import PackedAttentionParams
from align.model.config import ModelConfig, check_model, overlaps_gradients, uses_te
from align.model.layers import rotary_cos_sin
from align.model.logprobs import target_logprobs
from align.model.lora import Adapters
from align.model.spec import (
    block_spec,
    mark_tensor_parallel,
    padded_vocab_size,
    rotary_frequencies,
    rotary_scale,
    transformer_config,
)

T = TypeVar("T", bound="Decoder")


class Decoder(GPTModel):
    """Megatron's GPTModel with our layers; a subclass defines the output of the last stage."""

    def __init__(
        self,
        arch: Architecture,
        config: ModelConfig,
        parallel: ParallelConfig,
        tied: bool,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
        vp_stage: int | None = None,
        adapters: Adapters | None = None,
    ):
        """
        Args:
            groups: process groups, by default training's.
            embedding_rows: V with its padding.
            vp_stage: number of this stage among the --vp stages of the rank.
            adapters: trained in place of the weights; align.model.adapter_files.load fills them.
        """
        groups = groups or ProcessGroupCollection.use_mpu_process_groups()
        te = adapters is None and uses_te(config)
        megatron_config = transformer_config(arch, config, parallel, te)
        super().__init__(
            megatron_config,
            block_spec(megatron_config, arch, te, vp_stage, adapters),
            vocab_size=embedding_rows or padded_vocab_size(arch.vocab_size, parallel.tp),
            max_sequence_length=arch.max_positions,
            pre_process=groups.pp.rank() == 0 and not vp_stage,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and vp_stage in (None, parallel.vp - 1),
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none",  # the core attention rotates
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.arch, self.te, self.adapters = arch, te, adapters
        self.frequencies = rotary_frequencies(arch).to(device())
        scale = rotary_scale(arch)
        self.rotary_scale = None if scale is None else scale.to(device())
        mark_tensor_parallel(self, arch)
        if adapters:
            lora.freeze_base(self)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: PackedAttentionParams, **rest: None
    ) -> tuple:
        """Megatron's, and the rotary cosines and sines of these tokens, once for all layers."""
        packed_seq_params.rotation = rotary_cos_sin(
            position_ids[0], self.frequencies, self.config.params_dtype, self.rotary_scale
        )
        hidden, *others = super()._preprocess(
            input_ids, position_ids, packed_seq_params=packed_seq_params, **rest
        )
        if self.adapters and self.pre_process and torch.is_grad_enabled():
            hidden.requires_grad_()  # a recomputed layer has gradients only if its input has one
        return hidden, *others

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """The trained weights for checkpoints, with equal names for all kernels."""
        return self.stored_state(super().sharded_state_dict(*args, **kwargs))

    def stored_state(self, state: dict) -> dict:
        """Drop weights that adapters freeze, and the extra state of linear layers.

        The latter is not used: --fp8 computes its scales at each product.
        """
        state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
        return {name: value for name, value in state.items() if not self.adapters or lora.is_trained(name)}


class Policy(Decoder):
    """A causal language model whose last stage returns the log-probabilities [T] of the targets, in nats.

    The distribution is softmax(logits / temperature). With `entropy` it returns [T, 2], log-probs and
    entropies, the latter without a gradient unless `entropy_grad`. All three may be set between two passes.
    Ids from `known_ids` on have probability 0: `generator.Generator` lowers it to the tokenizer's number.
    """

    def __init__(
        self,
        arch: Architecture,
        config: ModelConfig,
        parallel: ParallelConfig,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_grad: bool = True,
        vp_stage: int | None = None,
        adapters: Adapters | None = None,
    ):
        tied = arch.tied_embeddings
        super().__init__(arch, config, parallel, tied, groups, embedding_rows, vp_stage, adapters)
        self.temperature, self.known_ids, self.keep_logits = temperature, arch.vocab_size, config.keep_logits
        self.entropy, self.entropy_grad = entropy, entropy_grad

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: object) -> Tensor:
        """Log-probabilities [T] of labels [1, T] at the places loss_mask [n], and 0 elsewhere.

        With `entropy` [T, 2], the entropies in the second column, 0 in the same places.
        """
        if not self.post_process:
            return hidden_states
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        # The output layer is applied to trained tokens only. First select, then copy: the copy's backward
        # all-reduce silently skips a gradient that is not contiguous.
        hidden = hidden_states.squeeze(1).index_select(0, loss_mask)
        if not self.config.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        entropy = self.entropy, self.entropy_grad
        options = (self.known_ids, group, self.temperature, *entropy, self.keep_logits)
        values = target_logprobs(hidden, weight, labels[0].index_select(0, loss_mask), *options)
        return values.new_zeros(len(labels[0]), *values.shape[1:]).index_copy(0, loss_mask, values)


class Scorer(Decoder):
    """A reward model: its last stage returns `arch.labels` values [T, A] for each token, in fp32.

    The score of a text is the value at its last token; see align.data.preferences.as_scored.
    """

    def __init__(
        self,
        arch: Architecture,
        config: ModelConfig,
        parallel: ParallelConfig,
        label_weights: Sequence[float],
        vp_stage: int | None = None,
        adapters: Adapters | None = None,
    ):
        """`label_weights`: weights of the A labels in the exported score."""
        super().__init__(arch, config, parallel, tied=False, vp_stage=vp_stage, adapters=adapters)
        assert len(label_weights) == arch.labels
        self.label_weights = torch.tensor(label_weights, dtype=torch.float32, device=device())
        self.output_layer = None
        if self.post_process:
            self.score = nn.Linear(
                arch.hidden_size, arch.labels, bias=False, dtype=config.dtype, device=device()
            )

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Values [T, A] of all tokens."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Every tensor parallel rank computes the same head, so each takes its part of one gradient, not
            # of a sum over all.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states.squeeze(1).float() @ self.score.weight.float().t()

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """As of a Decoder, by MegatronModule's method: GPTModel's requires an output layer."""
        return self.stored_state(MegatronModule.sharded_state_dict(self, *args, **kwargs))

    def one_label(self) -> Tensor:
        """The head [1, H] of the exported score."""
        return self.merge_labels(self.score.weight)

    def merge_labels(self, head: Tensor) -> Tensor:
        """The weighted sum [1, H] of the labels of a head [A, H]."""
        return (self.label_weights @ head.float())[None].to(head.dtype)


class Interleaved(MegatronModule):
    """The --vp stages of a rank as one model, with the names of a Decoder; Megatron's schedule runs `stages`.

    Stage i of pipeline rank r holds the layers of part i * pp + r of the model's vp * pp parts.
    """

    def __init__(self, stages: Sequence[Decoder]):
        super().__init__(stages[0].config)
        first, last = stages[0], stages[-1]
        self.stages = tuple(stages)  # no submodules: their parameters are named below
        self.arch, self.te, self.pg_collection = first.arch, first.te, first.pg_collection
        self.adapters = first.adapters
        self.pre_process, self.post_process = first.pre_process, last.post_process
        self.share_embeddings_and_output_weights = first.share_embeddings_and_output_weights
        if self.pre_process:
            self.embedding = first.embedding
        self.decoder: Any = nn.Module()
        self.decoder.layers = nn.ModuleList(layer for stage in stages for layer in stage.decoder.layers)
        if self.post_process:
            self.decoder.final_layernorm = last.decoder.final_layernorm
            name = "score" if self.arch.labels else "output_layer"
            self.add_module(name, getattr(last, name))

    def train(self, mode: bool = True) -> "Interleaved":
        for stage in self.stages:
            stage.train(mode)
        return super().train(mode)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight of the tied embeddings on the first and on the last rank, for Megatron's reduction."""
        return self.stages[0 if self.pre_process else -1].shared_embedding_or_output_weight()

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """The weights for checkpoints, which do not depend on --vp."""
        state, first_layer = {}, 0
        for stage in self.stages:
            for name, value in stage.sharded_state_dict(*args, **kwargs).items():
                if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                    name = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}"
                state[name] = value
            first_layer += len(stage.decoder.layers)
        return state


def stages(model: nn.Module) -> tuple[Decoder, ...]:
    """The model's stages on this rank, several with --vp."""
    own: Decoder | Interleaved = unwrap_model(model)
    return own.stages if isinstance(own, Interleaved) else (own,)


def interleaved(build: Callable[[int | None], T], vp: int) -> T | Interleaved:
    """Build the stages of this rank: `build(vp_stage)` makes one."""
    return build(None) if vp == 1 else Interleaved([build(stage) for stage in range(vp)])


def build_policy(
    arch: Architecture,
    config: ModelConfig,
    parallel: ParallelConfig,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_grad: bool = True,
    adapters: Adapters | None = None,
) -> Policy | Interleaved:
    """Build this rank's shard of a language model, its weights not yet filled; see Policy for the output."""
    if arch.labels:
        raise UserError(
            f"--model {config.model} is a reward model (*ForSequenceClassification) and predicts no tokens: "
            "give a language model"
        )
    check_model(arch, config, parallel, adapters=adapters)

    def build(vp_stage: int | None) -> Policy:
        return Policy(
            arch,
            config,
            parallel,
            temperature=temperature,
            entropy=entropy,
            entropy_grad=entropy_grad,
            vp_stage=vp_stage,
            adapters=adapters,
        )

    return interleaved(build, parallel.vp)


def in_layout(policy: Policy | Interleaved, config: ModelConfig, groups: ProcessGroupCollection) -> Policy:
    """Build a model like `policy`, not filled, in the layout of `groups`: tensor parallel, one stage."""
    arch, parallel = policy.arch, ParallelConfig(tp=groups.tp.size())
    embedding_rows = padded_vocab_size(arch.vocab_size, policy.config.tensor_model_parallel_size)
    if embedding_rows % parallel.tp:
        raise UserError(
            f"--rollout-tp {parallel.tp} does not divide the {embedding_rows} rows of the embedding"
        )
    copy = Policy(arch, config, parallel, groups, embedding_rows, adapters=policy.adapters)
    copy.known_ids = stages(policy)[-1].known_ids
    return copy


def build_scorer(
    arch: Architecture,
    config: ModelConfig,
    parallel: ParallelConfig,
    label_weights: Sequence[float] = (1.0,),
    adapters: Adapters | None = None,
) -> Scorer | Interleaved:
    """Build this rank's shard of a reward model (`arch.labels` > 0), its weights not yet filled."""
    check_model(arch, config, parallel, adapters=adapters)
    return interleaved(
        lambda stage: Scorer(arch, config, parallel, label_weights, stage, adapters), parallel.vp
    )


def distributed(model: Decoder | Interleaved, overlap_param_gather: bool = False) -> DistributedDataParallel:
    """Wrap a model in Megatron's data parallelism: fp32 gradients, summed over data (and context) ranks.

    The reduction of a bucket of gradients overlaps with the backward pass of the last micro-batch. With
    `overlap_param_gather` the gather of updated weights overlaps with the next forward pass, whose modules
    wait for their buckets. All else that reads weights calls `finish_param_gather` first: generation and
    align.training.offload do not, so only scripts without them have the flag.
    """
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlaps_gradients(),
            overlap_param_gather=overlap_param_gather,
        ),
        model,
    )
    if overlap_param_gather and model.post_process:
        # `_postprocess` reads the head's weight without a call of its module, which would wait for it
        stages(model)[-1].decoder.final_layernorm.register_forward_pre_hook(
            lambda *_: finish_param_gather(ddp)
        )
    # Megatron's schedules run `stages(ddp)`, and pass those on.
    model.config.finalize_model_grads_func = lambda _, *rest, **options: finalize_model_grads(
        [ddp], *rest, **options
    )
    model.config.no_sync_func = ddp.no_sync
    return ddp


def finish_param_gather(model: DistributedDataParallel) -> None:
    """Gather the updated weights that this rank still lacks, with overlap_param_gather. Collective."""
    if model.ddp_config.overlap_param_gather:
        for group in reversed(model.bucket_groups):  # in the order of the forward pass
            group.finish_param_sync()
