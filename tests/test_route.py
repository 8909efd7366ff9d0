"""`route` of every backend and instruction set, over all cases, and against the models' own."""

from __future__ import annotations

import pytest
import torch

import ktcore
from ktcore import ops
from ktcore.testing.cases import pairs


@pytest.mark.parametrize(
    ("format", "case"), [pytest.param(f, c, id=c.name) for f, c in pairs("route")]
)
def test_case(check, format, case):
    check(case, format)


def test_ties_go_to_the_lower_index(variant):
    ids, weights = ops.route(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), 4)
    assert ids.tolist() == [[1, 2, 4, 0]]
    assert weights[0, 0] == weights[0, 1] == weights[0, 2] > weights[0, 3] > 0


def test_nan_is_chosen_last(variant):
    logits = torch.tensor([[float("nan"), 0.0, -9.0, float("nan")]])
    ids, weights = ops.route(logits, 3, scoring="sigmoid", renormalize=False)
    assert ids.tolist() == [[1, 2, 0]]
    assert weights[0, :2].isfinite().all() and weights[0, 2].isnan()


def test_bias_steers_the_choice_but_not_the_weights(variant):
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    bias = torch.tensor([9.0, 0.0, 0.0])
    ids, weights = ops.route(
        logits, 1, scoring="sigmoid", correction_bias=bias, renormalize=False, scale=3.0
    )
    assert ids.item() == 0
    assert weights.item() == pytest.approx(1.5)


def test_groups_bar_their_experts(variant):
    # The best expert stands alone in its group; the other group's two count more.
    logits = torch.tensor([[4.0, -8.0, 1.0, 1.0]])
    ids, _ = ops.route(
        logits, 2, scoring="sigmoid", correction_bias=torch.zeros(4), n_group=2, topk_group=1
    )
    assert ids.tolist() == [[2, 3]]
    # Without a bias a group counts its best expert alone.
    ids, _ = ops.route(logits, 2, scoring="sigmoid", n_group=2, topk_group=1)
    assert ids.tolist() == [[0, 1]]


def test_more_experts_than_the_native_kernel_takes(rng):
    """They go to a backend that can; asking for the native one says why not."""
    logits = torch.randn(2, 5000, generator=rng)
    with ktcore.use():  # whatever the fixture of other tests here still forces
        ids, _ = ops.route(logits, 3)
    assert torch.equal(ids, logits.topk(3).indices)


def _sorted(ids, weights):
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)


def _same_routing(ours, theirs):
    """Upstream's order within a token is free."""
    ids, weights = _sorted(*ours)
    their_ids, their_weights = _sorted(*theirs)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen3_moe(variant, rng, renormalize):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    if not hasattr(modeling, "Qwen3MoeTopKRouter"):
        pytest.skip("this transformers has no Qwen3MoeTopKRouter")
    config = modeling.Qwen3MoeConfig(
        hidden_size=32, num_experts=64, num_experts_per_tok=8, norm_topk_prob=renormalize
    )
    router = modeling.Qwen3MoeTopKRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.randn(64, 32, generator=rng))
        logits, weights, ids = router(torch.randn(33, 32, generator=rng))
    _same_routing(ops.route(logits, 8, renormalize=renormalize), (ids, weights))


def test_deepseek_v3(variant, rng):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=3,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = modeling.DeepseekV3TopkRouter(config)
    bias = torch.randn(64, generator=rng) * 0.1
    with torch.no_grad():
        router.weight.copy_(torch.randn(64, 32, generator=rng))
        router.e_score_correction_bias.copy_(bias)
        out = router(torch.randn(33, 32, generator=rng))
    if not isinstance(out, tuple) or len(out) != 3:
        pytest.skip("this transformers routes elsewhere than in DeepseekV3TopkRouter")
    logits, weights, ids = out
    ours = ops.route(
        logits, 6, scoring="sigmoid", correction_bias=bias, n_group=8, topk_group=3, scale=2.5
    )
    _same_routing(ours, (ids, weights))
