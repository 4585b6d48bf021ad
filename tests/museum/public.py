"""Bugs that other projects had, each re-created in a few words of ours.

`origin` names the issue or pull request that reports it. The words are ours, and so is the place: what is
the same is the number that comes out wrong.
"""

from tests.museum.exhibit import Exhibit

GRPO, COLLATE = "train_grpo.main", "align.data.packing.collate"
LOSS = "total / denominator, no_tokens"
MEAN_OF_MEANS = {
    "align.training.engine.run": [(LOSS, "total / batch.mask.sum().clamp(min=1) / len(batches), no_tokens")]
}
COUNTED = "engine.forward_backward(policy, minibatch, loss_fn, count)"
SCALED = "(total * dist.get_world_size()) / denominator, no_tokens"
DPO_SUM = "ref_rejected, beta, **extra).sum()"
RANKING = 'batch.extra["target"]).sum()'
NORM = "align.model.layers.norm_parameter"

NORMALISATION = {
    "the loss is a mean of micro-batches' means": Exhibit(
        MEAN_OF_MEANS, beside="small micro-batches", origin="huggingface/transformers 34191"
    ),
    "sft: the loss is a mean of micro-batches' means": Exhibit(
        MEAN_OF_MEANS,
        "sft",
        beside="sft, small micro-batches",
        origin="PrimeIntellect-ai/prime-rl 583, verl-project/verl 7200",
    ),
    "the loss is divided by the number of responses": Exhibit(
        {GRPO: [(COUNTED, COUNTED.replace("count", "float(config.batch.global_batch_size)"))]},
        caught="update",
        origin="PrimeIntellect-ai/prime-rl 2034",
    ),
    "the loss of an update is divided by the tokens of all updates": Exhibit(
        {GRPO: [(COUNTED, COUNTED.replace("count", "sum(num_tokens)"))]},
        "two updates",
        "update",
        origin="huggingface/trl 6024",
    ),
    "each data parallel rank divides by its own tokens": Exhibit(
        {
            "align.training.engine.run": [
                (LOSS, "total / sum(float(b.mask.sum()) for b in batches) / parallel.dp_size(), no_tokens")
            ]
        },
        "dp 2",
        beside="usual",
        origin="huggingface/transformers 34242",
    ),
    "the loss is multiplied by the number of all ranks": Exhibit(
        {"align.training.engine.run": [(LOSS, SCALED)]},
        "tp 2",
        beside="usual",
        origin="huggingface/transformers 39674",
    ),
    "dpo: the loss is a mean over the pairs of a micro-batch": Exhibit(
        {"train_dpo.main": [(DPO_SUM, DPO_SUM.replace("sum", "mean"))]},
        "dpo, small micro-batches",
        "start",
        origin="modelscope/ms-swift 10144",
    ),
    "rm: the loss is a mean over the pairs of a micro-batch": Exhibit(
        {"train_rm.main": [(RANKING, RANKING.replace("sum", "mean"))]},
        "rm",
        beside="rm, small micro-batches",
        origin="CarperAI/trlx 220",
    ),
    "whitening takes the moments of a part of the rollout": Exhibit(
        {
            "align.losses.rl.whiten": [
                ("    return (x - x.mean())", "    x, y = x.tensor_split(2)[0], x\n    return (y - x.mean())")
            ]
        },
        "reinforce",
        test="tests.losses.test_rl:test_whiten_against_a_loop",
        origin="THUDM/slime 2235, radixark/miles 3229",
    ),
}
CREDIT = {
    "responses are compared with those to all prompts": Exhibit(
        {
            "align.losses.rl.grpo": [
                ("returns, 0.0).sum(1, keepdim=True) / number.clamp(min=1)", "returns, 0.0).mean()")
            ]
        },
        caught="groups",
        test="tests.losses.test_rl:test_grpo_by_hand",
        origin="THUDM/slime 2062, radixark/miles 1325",
    ),
    "groups are of equal places in the list, not of equal prompts": Exhibit(
        {
            "train_grpo.Config.estimate_advantages": [
                (
                    "compare(returns.view(groups), counted.view(groups)).view(-1)",
                    "compare(returns.view(groups[::-1]).T, counted.view(groups[::-1]).T).T.reshape(-1)",
                )
            ]
        },
        caught="groups",
        origin="huggingface/trl 5030",
    ),
    "a response gets the reward of the one before it": Exhibit(
        {GRPO: [("for judge in judges))", "for judge in judges)); scores = np.roll(scores, 1)")]},
        test="samples",
        origin="om-ai-lab/VLM-R1 129",
    ),
    "prompts get the responses to other prompts": Exhibit(
        {
            GRPO: [
                (
                    "Rollout(numbers, chosen, samples, scores)",
                    "Rollout(numbers, chosen, samples[::-1], scores)",
                )
            ]
        },
        caught="sampler",
        origin="huggingface/trl 3098",
    ),
    "gae: a truncated response goes on with the values of padding": Exhibit(
        {"align.losses.rl.gae": [("batch_first=True)", "batch_first=True, padding_value=0.5)")]},
        "ppo",
        test="tests.losses.test_rl:test_gae_against_its_sum",
        origin="alibaba/ROLL 447",
    ),
    "gae: the value after the last token is not 0": Exhibit(
        {"align.losses.rl.gae": [("F.pad(value, (0, 1))", "torch.cat([value, value[:, -1:]], 1)")]},
        "ppo",
        test="tests.losses.test_rl:test_gae_golden_vector",
        origin="verl-project/verl 1850",
    ),
    "the score stands after the last token": Exhibit(
        {"align.losses.rl.token_rewards": [(".cumsum(0) - 1] += scores", ".cumsum(0)[:-1]] += scores[:-1]")]},
        "ppo",
        test="tests.losses.test_rl:test_the_score_is_on_the_last_token_and_nowhere_else",
        origin="huggingface/trl 3750",
    ),
}
POLICY = {
    "the KL penalty is maximised": Exhibit(
        {GRPO: [("loss + kl_coef * (weights", "loss - kl_coef * (weights")]},
        caught="update",
        after=1,
        origin="Unakar/Logic-RL 58",
    ),
    "the KL penalty has no gradient": Exhibit(
        {"align.losses.rl.kl_k3": [("torch.expm1(-d) + d", "(torch.expm1(-d) + d).detach() + 0 * d")]},
        test="tests.losses.test_rl:test_gradients_of_kl",
        origin="NVIDIA-NeMo/RL 2506, allenai/open-instruct 534",
    ),
    "training's log-probs are one place off": Exhibit(
        {
            GRPO: [
                (
                    "output.index_select(0, batch.trained).double()",
                    "output.roll(1, 0).index_select(0, batch.trained).double()",
                )
            ]
        },
        caught="ratio",
        origin="PrimeIntellect-ai/prime-rl 1525",
    ),
    "old log-probs are the present ones": Exhibit(
        {
            "align.losses.rl.importance_ratio": [
                ("log_ratio = logprobs - old_logprobs", "log_ratio = logprobs - logprobs.detach()")
            ]
        },
        test="tests.losses.test_rl:test_policy_loss_four_cases_by_hand",
        origin="huggingface/trl 2608",
    ),
    "critic: values of the prompt in place of the response": Exhibit(
        {
            "train_ppo.main": [
                (
                    "output.index_select(0, batch.trained)[:, 0].double()",
                    "output[: len(batch.trained), 0].double()",
                )
            ]
        },
        "ppo",
        "update",
        after=1,  # a new critic's values are all 0
        origin="hpcaitech/ColossalAI 3623",
    ),
    "critic: values are one place off": Exhibit(
        {
            "train_ppo.main": [
                (
                    "output.index_select(0, batch.trained)[:, 0].double()",
                    "output.roll(1, 0).index_select(0, batch.trained)[:, 0].double()",
                )
            ]
        },
        "ppo",
        "update",
        after=1,
        origin="verl-project/verl 1758",
    ),
}
TOKENS = {
    "sft: EOS is masked, since it is the padding token too": Exhibit(
        {
            COLLATE: [
                (
                    "example.trained[skip + 1 :]",
                    "example.trained[skip + 1 :] & (example.ids[skip + 1 :] != 258)",
                )
            ]
        },
        "sft",
        test="tests.data.test_formats:test_pad_may_be_eos",
        origin="huggingface/trl 6357, NVIDIA-NeMo/Megatron-Bridge 4660",
    ),
    "prompts begin with BOS twice": Exhibit(
        {
            "align.data.prompts.encode_chat": [
                ("formats.bos_before_chat(tokenizer, fmt) + ids", "[tokenizer.bos_id] + ids")
            ],
        },
        caught="two BOS",
        origin="huggingface/open-r1 462, sgl-project/sglang 888",
    ),
    "packed sequences continue each other's positions": Exhibit(
        {COLLATE: [("np.arange(skip, skip + end - start)", "np.arange(start, end)")]},
        caught="sampler",
        test="tests.data.test_packing:test_collate_by_hand",
        origin="hiyouga/LlamaFactory 7318",
    ),
    "dpo: the prompt of the rejected response is trained": Exhibit(
        {
            "align.data.preferences.make_pair": [
                ("return Pair(*sides", "sides[1].trained[:] = True; return Pair(*sides")
            ]
        },
        "dpo",
        test="tests.data.test_preferences:test_only_the_last_answer_is_trained",
        origin="OpenRLHF/OpenRLHF 294",
    ),
    "dpo: the first token of a response is not trained": Exhibit(
        {
            "align.data.preferences.make_example": [
                (
                    "[False] * len(context) + [True] * len(response)",
                    "[False] * (len(context) + 1) + [True] * (len(response) - 1)",
                )
            ]
        },
        "dpo",
        test="tests.data.test_preferences:test_only_the_last_answer_is_trained",
        origin="jingyaogong/minimind 621",
    ),
    "rm: the score is read one token early": Exhibit(
        {"align.data.preferences.as_scored": [("trained[-1]", "trained[-2]")]},
        "rm",
        test="tests.data.test_preferences:test_as_scored_through_collate",
        origin="EleutherAI/gpt-neox 1285",
    ),
}
MODEL = {
    "rotary angles are rounded to bf16": Exhibit(
        {
            "align.model.layers.rotary_cos_sin": [
                (
                    "angles = torch.outer(positions.float(), frequencies)[:, None]",
                    "angles = torch.outer(positions.float(), frequencies)[:, None].bfloat16().float()",
                )
            ]
        },
        test="tests.model.test_layers:test_angles_of_far_positions_are_fp32_before_they_are_rounded",
        origin="huggingface/transformers 29285",
    ),
    "gradients of context parallel ranks are summed once more": Exhibit(
        {
            "align.training.engine.whole_sequence": [
                ("tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True")
            ]
        },
        "cp 2",
        beside="usual",
        origin="NVIDIA/Megatron-LM 673, NVIDIA/Megatron-LM 7452",
    ),
    "gradients of norms are not summed over sequence parallel ranks": Exhibit(
        {
            NORM: [
                (
                    "parameter.sequence_parallel = config.sequence_parallel",
                    "parameter.sequence_parallel = False",
                )
            ]
        },
        "sequence parallel",
        "replicas",
        origin="NVIDIA/Megatron-LM 7452",
    ),
    "dpo: the apo loss takes the margin for the rejected log-ratio": Exhibit(
        {
            "align.losses.preference.apo_zero": [
                ("rejected - ref_rejected", "chosen - ref_chosen - rejected + ref_rejected")
            ]
        },
        "dpo, apo_zero",
        test="tests.losses.test_preference:test_other_losses_by_hand",
        origin="huggingface/trl 6593",
    ),
}
PUBLIC = NORMALISATION | CREDIT | POLICY | TOKENS | MODEL
