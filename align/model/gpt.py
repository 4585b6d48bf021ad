"""Policy and reward model: Megatron's GPTModel with our norms, attention and heads.

`Architecture` says what the model is, `ModelConfig` how this run computes it. `build_policy` and
`build_scorer` make this rank's shard without weights; align.model.huggingface.load fills it.
"""

from collections.abc import Sequence

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
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from align.distributed.parallel import ParallelConfig, device
from align.errors import UserError
from align.model.architecture import Architecture
from align.model.attention import Packing
from align.model.config import ModelConfig, check_model, overlaps_gradients, uses_te
from align.model.layers import rotation
from align.model.logprobs import target_logprobs, target_logprobs_and_entropy
from align.model.spec import (
    block_spec,
    mark_tensor_parallel,
    padded_vocab_size,
    rotary_frequencies,
    rotary_scale,
    transformer_config,
)


class Decoder(GPTModel):
    """Megatron's GPTModel with our layers; a subclass says what its last stage returns for each token."""

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        te: bool,
        tied: bool,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
    ):
        """`groups`: other process groups than training's; `embedding_rows`: V with its padding."""
        groups = groups or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config,
            block_spec(config, arch, te),
            vocab_size=embedding_rows
            or padded_vocab_size(arch.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=arch.max_positions,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none",  # the core attention rotates
            pg_collection=groups,
        )
        self.arch, self.te = arch, te
        self.frequencies = rotary_frequencies(arch).to(device())
        scale = rotary_scale(arch)
        self.rotary_scale = None if scale is None else scale.to(device())
        mark_tensor_parallel(self)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: Packing, **rest: None
    ) -> tuple:
        """Megatron's, and once for all layers the rotation of these tokens, which the attention applies."""
        packed_seq_params.rotation = rotation(
            position_ids[0], self.frequencies, self.config.params_dtype, self.rotary_scale
        )
        return super()._preprocess(input_ids, position_ids, packed_seq_params=packed_seq_params, **rest)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """For checkpoints: the weights, of the same names with all kernels."""
        return without_extra_state(super().sharded_state_dict(*args, **kwargs))


class Policy(Decoder):
    """A causal language model whose last stage returns the log-probabilities [T] of the targets.

    They are those of softmax(logits / temperature). With `entropy` it returns [T, 2], log-probs and entropies
    of these distributions, in nats. Both may be set between two passes. Ids from `known_ids` on have
    probability 0: `generate.Generator` lowers it to the ids that the tokenizer has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        te: bool,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
    ):
        super().__init__(config, arch, te, arch.tied_embeddings, groups, embedding_rows)
        self.temperature, self.entropy, self.known_ids = temperature, entropy, arch.vocab_size

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: object) -> Tensor:
        """Log-probabilities [T] of labels [1, T] where loss_mask [1, T] is not 0, and 0 elsewhere.

        With `entropy` [T, 2], the entropies in the second column, 0 in the same places.
        """
        if not self.post_process:
            return hidden_states
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        trained = loss_mask[0].nonzero()[:, 0]
        # The output layer sees trained tokens only. First select, then copy: the copy's backward all-reduce
        # silently skips a gradient that is not contiguous.
        hidden = hidden_states.squeeze(1).index_select(0, trained)
        if not self.config.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        compute = target_logprobs_and_entropy if self.entropy else target_logprobs
        found = compute(
            hidden,
            self.output_weight(),
            labels[0][trained],
            self.known_ids,
            group,
            self.temperature,
        )
        return found.new_zeros(len(labels[0]), *found.shape[1:]).index_copy(0, trained, found)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output embedding, [V/tp, H]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class Scorer(Decoder):
    """A reward model: its last stage returns `arch.labels` values [T, A] for each token, in fp32.

    The score of a text is what stands at its last token; see align.data.preferences.as_scored.
    """

    def __init__(
        self, config: TransformerConfig, arch: Architecture, te: bool, label_weights: Sequence[float]
    ):
        """`label_weights`: what each of the A labels counts in the one score."""
        super().__init__(config, arch, te, tied=False)
        assert len(label_weights) == arch.labels
        self.label_weights = torch.tensor(label_weights, dtype=torch.float32, device=device())
        self.output_layer = None
        if self.post_process:
            self.score = nn.Linear(
                arch.hidden_size, arch.labels, bias=False, dtype=config.params_dtype, device=device()
            )

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Values [T, A] of all tokens."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Every tensor parallel rank computes the same head, so each takes its part of one gradient
            # instead of a sum over all.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states.squeeze(1).float() @ self.score.weight.float().t()

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """For checkpoints: that of all Megatron modules, since GPTModel's own insists on an output layer."""
        return without_extra_state(MegatronModule.sharded_state_dict(self, *args, **kwargs))

    def one_label(self) -> Tensor:
        """The head [1, H] that gives the one score: the weighted sum of the labels, which is linear, too."""
        return (self.label_weights @ self.score.weight.float())[None].to(self.score.weight.dtype)


def without_extra_state(found: dict) -> dict:
    """A checkpoint's entries without what linear layers call their extra state.

    It holds nothing that we use: --fp8 finds its scales anew at each product.
    """
    return {name: value for name, value in found.items() if not name.endswith("_extra_state")}


def build_policy(
    arch: Architecture,
    config: ModelConfig,
    parallel: ParallelConfig,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Policy:
    """This rank's shard of a language model, its weights not yet filled; see Policy for what it returns."""
    if arch.labels:
        raise UserError(
            f"--model {config.model} is a reward model (*ForSequenceClassification) and predicts no tokens: "
            "give a language model"
        )
    check_model(arch, config, parallel)
    te = uses_te(config)
    made_of = transformer_config(arch, config, parallel, te)
    return Policy(made_of, arch, te, temperature=temperature, entropy=entropy)


def in_layout(policy: Policy, config: ModelConfig, groups: ProcessGroupCollection) -> Policy:
    """A model like `policy`, its weights not filled, split as `groups` say: tensor parallel, in one stage."""
    arch, parallel = policy.arch, ParallelConfig(tp=groups.tp.size())
    embedding_rows = padded_vocab_size(arch.vocab_size, policy.config.tensor_model_parallel_size)
    if embedding_rows % parallel.tp:
        raise UserError(
            f"--rollout-tp {parallel.tp} does not divide the {embedding_rows} rows of the embedding"
        )
    made_of = transformer_config(arch, config, parallel, policy.te)
    copy = Policy(made_of, arch, policy.te, groups, embedding_rows)
    copy.known_ids = policy.known_ids
    return copy


def build_scorer(
    arch: Architecture, config: ModelConfig, parallel: ParallelConfig, label_weights: Sequence[float] = (1.0,)
) -> Scorer:
    """This rank's shard of a reward model (`arch.labels` > 0), its weights not yet filled."""
    check_model(arch, config, parallel)
    te = uses_te(config)
    return Scorer(transformer_config(arch, config, parallel, te), arch, te, label_weights)


def distributed(model: Decoder) -> DistributedDataParallel:
    """Megatron's data parallelism: gradients in fp32 buffers, summed over data (and context) ranks.

    The sum of a bucket of gradients starts while the backward pass of the last micro-batch still makes the
    next. The weights' way back (overlap_param_gather) is not overlapped: between optimizer step and forward
    pass they would be old, and generation, exports, checkpoints and align.training.offload read them there.
    """
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlaps_gradients(),
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = ddp.no_sync
    return ddp
