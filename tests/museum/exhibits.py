"""The 55 bugs of our own, by where they sit."""

from align.training.offload import HostStore
from tests.museum.exhibit import Exhibit

COLLATE, RESPONSE = "align.data.packing.collate", "align.generation.rollout.response_example"
POSITIONS, TAIL = "np.arange(skip, skip + end - start)", "positions[total:] ="
SAMPLE, IDS = "align.generation.continuous_batching.ContinuousBatch.sample", "self.ids[slot, :count].copy()"
LOGPROBS = "(x[slot, :count].copy()"
DECODE = "align.generation.inference.InferenceModel.decode"
DROPOUT = {"align.model.gpt.transformer_config": [("hidden_dropout=0.0", "hidden_dropout=0.1")]}
LINEAR = "megatron.core.tensor_parallel.layers"
REGION = "megatron.core.tensor_parallel.mappings._CopyToModelParallelRegion"
DDP = "megatron.core.distributed.DistributedDataParallel"
BUCKET_GROUP = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
BUCKETS = "in self.bucket_groups + self.expert_parallel_bucket_groups:"
SUM = "reduce_from_tensor_model_parallel_region(output_parallel, group=self.tp_group)"
RL, TEST_RL = "align.losses.rl", "tests.losses.test_rl"
SWAP = "align.training.offload.Weights.swapped_into"
OF_NEXT, CLIPPED = "F.pad(value, (0, 1))[:, 1:]", "clamp(old_values - value_clip, old_values + value_clip)"

INPUTS = {  # what training reads
    "responses that share their prompt's places count their own from 0": Exhibit(
        {COLLATE: [(POSITIONS, "np.arange(end - start)")]}, caught="sampler"
    ),
    "positions of responses are one too high in training": Exhibit(
        {COLLATE: [(POSITIONS, f"{POSITIONS} + mask[start:end].astype(int)")]}, caught="sampler"
    ),
    "trained places are one too early": Exhibit(
        {COLLATE: [(TAIL, f"mask = np.roll(mask, -1); {TAIL}")]},
        caught="sampler",
        origin="modelscope/ms-swift 8427",
    ),
    "trained places are one too late": Exhibit(
        {COLLATE: [(TAIL, f"mask = np.roll(mask, 1); {TAIL}")]}, caught="sampler"
    ),
    "the mask is that of the inputs": Exhibit(
        {COLLATE: [("example.trained[skip + 1 :]", "example.trained[skip:-1]")]}, caught="lengths"
    ),
    "sequences of a micro-batch attend to each other": Exhibit(
        {"align.training.engine.forward": [("batch.lengths, batch.prefixes,", "[tokens], [(0, 0)],")]},
        caught="sampler",
        origin="hiyouga/EasyR1 494",
    ),
    "a response attends to the one before it in place of its prompt": Exhibit(
        {"align.model.attention.overlap": [("(start, start + size)", "(begin - size, begin)")]},
        caught="sampler",
    ),
    "training leaves out a prompt's first token": Exhibit(
        {RESPONSE: [("trained = np", "prompt = type(prompt)(prompt.ids[1:], {}); trained = np")]},
        caught="sampler",
    ),
    "numbers of other micro-batches": Exhibit(
        {"align.training.batching.micro_batches": [("arrays[i] for i", "arrays[-1 - i] for i")]},
        "one token",
        "sampler",
    ),
    "all positions are one too high": Exhibit(
        {COLLATE: [(POSITIONS, f"{POSITIONS} + 1")]},
        caught="ledger",
        test="tests.data.test_packing:test_collate_by_hand",
    ),
}
ENDS = {  # ends of responses
    "the stop token is dropped, with its log-prob": Exhibit(
        {
            SAMPLE: [
                (IDS, f"{IDS}; keep = len(ids) - (finish == 'stop'); ids = ids[:keep]"),
                (LOGPROBS, "(x[slot, :keep].copy()"),
            ]
        },
        caught="ends",
    ),
    "the stop token is dropped, and the first log-prob": Exhibit(
        {
            SAMPLE: [
                (IDS, f"{IDS}; ended = int(finish == 'stop'); ids = ids[: len(ids) - ended]"),
                (LOGPROBS, "(x[slot, ended:count].copy()"),
            ]
        },
        caught="ends",
    ),
    "the stop token is dropped, its log-prob is not": Exhibit(
        {SAMPLE: [(IDS, f"{IDS}; ids = ids[: len(ids) - (finish == 'stop')]")]}, caught="ends"
    ),
    "the stop token is not trained": Exhibit(
        {RESPONSE: [("return Example", "trained[-1] = sample.finish != 'stop'; return Example")]},
        caught="tokens",
        origin="meta-pytorch/torchtune 949",
    ),
}
DISTRIBUTION = {  # softmax of what
    "training forgets the temperature": Exhibit(
        {"align.model.gpt.build_policy": [("temperature=temperature", "temperature=1.0")]},
        caught="sampler",
        origin="huggingface/trl 3029",
    ),
    "the sampler's log-probs are without temperature": Exhibit(
        {SAMPLE: [("Sample(ids, logprobs,", "Sample(ids, model_logprobs,")]},
        caught="sampler",
        origin="huggingface/trl 4159",
    ),
    "rows that only pad the vocabulary get probability": Exhibit(
        {"align.model.logprobs.scale_and_mask_": [("z[:, real:] = ABSENT", "pass")]},
        caught="sampler",
        in_bf16="bias",
    ),
    "the sampler draws the most probable token": Exhibit(
        {
            "align.generation.sampling._draw": [
                ("return block * BLOCK + column,", "return weights.argmax(-1),")
            ]
        },
        "many tokens",
        "surprise",
        test="tests.generation.test_sampling:test_draws_by_hand",
    ),
    "the gradient forgets the temperature": Exhibit(
        {"align.model.logprobs.TargetLogProbs.backward": [("grad = grad / ctx.temperature", "pass")]},
        test="tests.model.test_logprobs:test_values_and_gradients",
        arguments={"tokens": 5, "temperature": 0.7, "entropy": False},
    ),
}
SAMPLER = {  # what the sampler computes
    "decoded tokens are rotated one place too far": Exhibit(
        {DECODE: [("run_layers(hidden, positions,", "run_layers(hidden, positions + 1,")]}, caught="sampler"
    ),
    "a decoded token does not attend to itself": Exhibit(
        {DECODE: [("places <= positions", "places < positions")]}, caught="sampler"
    ),
    "a sequence that changes its slot leaves its last key behind": Exhibit(
        {
            "align.generation.continuous_batching.ContinuousBatch.close_gaps": [
                ("self.count[last] - 1)", "self.count[last] - 2)")
            ]
        },
        "few slots",
        "sampler",
        in_bf16="",
    ),
    "the sampler keeps the weights of before the update": Exhibit(
        {
            "align.generation.generator.Generator.sample": [
                ("offload.restore(self.freed)", "hasattr(self, 'stale') or offload.restore(self.freed)"),
                ("self.reshard.run()", "hasattr(self, 'stale') or self.reshard.run()"),
                ("self.freed = offload.release(self.copy.parameters())", "self.stale = True"),
            ]
        },
        "reshard",
        "sampler",
        after=1,
        origin="huggingface/trl 5312",
    ),
}
PASSES = {  # passes over the same responses that differ
    "dropout in training": Exhibit(DROPOUT, caught="ratio", origin="huggingface/trl 3234"),
    "dropout in every pass": Exhibit(
        DROPOUT | {"align.training.engine.outputs": [("model.eval()\n", "model.train()\n")]}, caught="sampler"
    ),
    "an update after every micro-batch": Exhibit(
        {
            "train_grpo.main": [
                (
                    "engine.forward_backward(policy, minibatch, loss_fn, count)",
                    "[(engine.forward_backward(policy, [part], loss_fn, count), "
                    "optim.step(optimizer, lr)) for part in minibatch][-1][0]",
                )
            ]
        },
        caught="ratio",
    ),
    "old log-probs of other micro-batches": Exhibit(
        {
            "align.training.batching.micro_batches": [
                ("arrays[i] for", "arrays[-1 - i if name == 'old' else i] for")
            ]
        },
        "one token",
        "ratio",
    ),
}
RANKS = {  # reductions over ranks
    "no sum over tensor parallel ranks after attention and MLP": Exhibit(
        {f"{LINEAR}.RowParallelLinear.forward": [(SUM, "output_parallel")]}, "tp 2", "sampler"
    ),
    "no sum over tensor parallel ranks of embeddings": Exhibit(
        {f"{LINEAR}.VocabParallelEmbedding.forward": [(SUM, "output_parallel")]}, "tp 2", "sampler"
    ),
    "no sum over tensor parallel ranks in the softmax": Exhibit(
        {"align.model.logprobs.TargetLogProbs.forward": [("dist.all_reduce(parts, group=group)", "pass")]},
        "tp 2",
        "sampler",
    ),
    "no sum over tensor parallel ranks in the backward pass": Exhibit(
        {f"{REGION}.backward": [("_reduce(grad_output, ctx.group)", "grad_output")]}, "tp 2", "replicas"
    ),
    "data parallel ranks do not gather their updated weights": Exhibit(
        {f"{BUCKET_GROUP}.start_param_sync": [("in enumerate(self.buckets):", "in []:")]}, "dp 2", "replicas"
    ),
    "no sum of gradients over data parallel ranks": Exhibit(
        {f"{DDP}.finish_grad_sync": [(BUCKETS, "in []:")]}, "dp 2", beside="usual"
    ),
}


def in_rl(
    function: str, words: str, others: str, test: str, run: str = "usual", caught: str = "", origin: str = ""
) -> Exhibit:
    """A bug in a function of align/losses/rl.py, which a test of tests/losses/test_rl.py has to notice."""
    bug = {f"{RL}.{function}": [(words, others)]}
    return Exhibit(bug, run, caught, test=f"{TEST_RL}:{test}", origin=origin)


FOUR, HAND = "test_policy_loss_four_cases_by_hand", "test_kl_estimators_by_hand"
UNMASKED = ("only_where(weights,", "only_where(torch.ones_like(weights),")
LOSSES = {  # rewards, advantages, losses
    "the score stands one token early": in_rl(
        "token_rewards",
        ".cumsum(0) - 1]",
        ".cumsum(0) - 2]",
        "test_the_score_is_on_the_last_token_and_nowhere_else",
        "ppo",
    ),
    "KL is rewarded": in_rl(
        "token_rewards", "-kl_coef * kl", "kl_coef * kl", "test_ppo_golden_vector", "ppo"
    ),
    "KL has the wrong sign": in_rl(
        "kl_k1",
        "return logprobs - ref_logprobs",
        "return ref_logprobs - logprobs",
        HAND,
        "ppo",
        origin="Unakar/Logic-RL 58",
    ),
    "k3 has its ratio upside down": in_rl("kl_k3", "torch.expm1(-d) + d", "torch.expm1(d) - d", HAND),
    "the KL coefficient moves the wrong way": in_rl(
        "adapted_kl_coef", "1 + error", "1 - error", "test_adapted_kl_coef_by_hand", "ppo"
    ),
    "gae: this token's value in place of the next one's": in_rl(
        "gae", OF_NEXT, "value", "test_gae_golden_vector", "ppo"
    ),
    "gae: after a response comes the next response's value": in_rl(
        "gae",
        OF_NEXT,
        "pad_sequence(values.roll(-1).split(lengths), batch_first=True)",
        "test_gae_does_not_look_across_answers",
        "ppo",
    ),
    "gae: lambda is left out": in_rl(
        "gae", "gamma * gae_lambda * later", "gamma * later", "test_gae_against_its_sum", "ppo"
    ),
    "whitening leaves the mean": in_rl(
        "whiten", "(x - x.mean())", "x", "test_whiten_has_mean_zero_and_variance_one", "reinforce"
    ),
    "rloo: a response is in its own baseline": in_rl(
        "rloo",
        "- own) / (number - 1).clamp(min=1)",
        ") / number.clamp(min=1)",
        "test_rloo_golden_vector",
        "masked rloo",
    ),
    "rloo: responses left out are in the baseline": in_rl(
        "rloo",
        "torch.where(counted, returns, 0.0)",
        "returns",
        "test_rloo_by_hand",
        "masked rloo",
        "groups",
        "OpenRLHF/OpenRLHF 1239",
    ),
    "grpo: the mean is over prompts": in_rl(
        "grpo", "returns, 0.0).sum(1,", "returns, 0.0).sum(0,", "test_grpo_by_hand", caught="groups"
    ),
    "policy: responses left out are trained": Exhibit(
        {f"{RL}.policy_loss": [UNMASKED, ("(weights * terms).sum()", "terms.sum()")]},
        "masked rloo",
        "update",
        test=f"{TEST_RL}:test_policy_loss_does_not_look_at_masked_tokens",
    ),
    "policy: the ratio is upside down": in_rl(
        "importance_ratio", "logprobs - old_logprobs", "old_logprobs - logprobs", FOUR
    ),
    "policy: the clip is on the wrong side": in_rl("ppo", "torch.maximum", "torch.minimum", FOUR),
    "policy: the clip is on one side": in_rl("ppo", "clamp(1 - clip, ", "clamp(max=", FOUR),
    "policy: a mean in place of the sum": in_rl(
        "policy_loss",
        "(weights * terms).sum(), statistics",
        "(weights * terms).mean(), statistics",
        "test_policy_loss_is_a_sum",
        caught="update",
    ),
    "policy: masked tokens are multiplied by 0": Exhibit(
        {f"{RL}.policy_loss": [UNMASKED]},
        test=f"{TEST_RL}:test_policy_loss_does_not_look_at_masked_tokens",
        origin="OpenRLHF/OpenRLHF 1240",
    ),
    "critic: the smaller of the two errors": in_rl(
        "value_loss", "torch.maximum", "torch.minimum", "test_value_loss_four_cases_by_hand", "ppo"
    ),
    "critic: clipped around the returns": in_rl(
        "value_loss",
        CLIPPED,
        CLIPPED.replace("old_values", "returns"),
        "test_value_loss_against_a_loop",
        "ppo",
    ),
}
REFERENCE = {  # weights of the reference model
    "the reference is the policy": Exhibit(
        {SWAP: [("parameter.data = self.held[name]", "_ = self.held[name]")]},
        test="tests.training.test_offload:test_lent_weights_compute_and_leave_no_trace",
        arguments={"store": HostStore()},
        origin="aburkov/theLMbook 8",
    ),
    "the reference's weights stay in the policy": Exhibit(
        {SWAP: [("parameter.data = own[name]", "pass")]},
        test="tests.training.test_offload:test_lent_weights_compute_and_leave_no_trace",
        arguments={"store": HostStore()},
    ),
}
OWN = INPUTS | ENDS | DISTRIBUTION | SAMPLER | PASSES | RANKS | LOSSES | REFERENCE
