"""Eq. 8-11: numbers computed by hand, special cases, the optimum by enumeration, and refusals."""

import itertools
import math

import pytest
import torch

from apo import apo_loss, response_logps, teacher_weights


def test_three_teachers_by_hand():
    logps = torch.tensor([[-10.0, -12.0, -9.0, -20.0]])
    ref = torch.tensor([[-11.0, -11.0, -11.0, -18.0]])
    losses, rewards = apo_loss(logps, ref, weights=torch.tensor([1.0, 2.0, 0.5]), beta=0.5)
    assert rewards.tolist() == [[0.5, -0.5, 1.0, -1.0]]  # Eq. 8: 0.5 * (1, -1, 2, -2)
    negatives = 1 * math.exp(-0.5) + 2 * math.exp(1.0) + 0.5 * math.exp(-1.0)
    p = math.exp(0.5) / (math.exp(0.5) + negatives)  # Eq. 9
    assert losses.item() == pytest.approx(-math.log(p), rel=1e-6)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_first_loss_is_log_of_one_plus_the_weights(n):
    logps = torch.randn(4, 1 + n)
    weights = torch.rand(n) + 0.1
    losses, rewards = apo_loss(logps, logps.clone(), weights)
    assert torch.equal(rewards, torch.zeros(4, 1 + n))
    assert torch.allclose(losses, torch.log1p(weights.sum()).expand(4), rtol=1e-6)
    assert apo_loss(logps, logps.clone())[0][0].item() == pytest.approx(math.log(1 + n), rel=1e-6)


def test_one_teacher_with_weight_one_is_dpo():
    logps, ref = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    margin = 0.3 * ((logps - ref)[:, 0] - (logps - ref)[:, 1])
    dpo = -torch.nn.functional.logsigmoid(margin)
    assert torch.allclose(apo_loss(logps, ref, beta=0.3)[0], dpo, rtol=1e-12)


def test_weights_of_one_are_s_dpo():
    """S-DPO (Chen et al. 2024): -log sigmoid( -log sum_u exp( r(t^u) - r(t+) ) )."""
    logps, ref = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    r = 0.3 * (logps - ref)
    s_dpo = -torch.nn.functional.logsigmoid(-torch.logsumexp(r[:, 1:] - r[:, :1], 1))
    assert torch.allclose(apo_loss(logps, ref, beta=0.3)[0], s_dpo, rtol=1e-12)


def test_gradient_is_beta_times_the_softmax_minus_one_hot():
    logps = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 5, dtype=torch.float64)
    w = torch.tensor([1.0, 0.2, 3.0, 0.0], dtype=torch.float64)
    losses, rewards = apo_loss(logps, ref, w, beta=0.7)
    losses.sum().backward()
    share = torch.cat([rewards[:, :1].exp(), w * rewards[:, 1:].exp()], 1)
    share = share / share.sum(1, keepdim=True)
    share[:, 0] -= 1
    assert torch.allclose(logps.grad, 0.7 * share, rtol=1e-10)
    assert not rewards.requires_grad


def test_gradcheck_with_weights_and_absent_teachers():
    logps = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(2, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    weights = torch.tensor([0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(lambda x: apo_loss(x, ref, weights, mask, 0.4)[0], logps)


@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e30, float("nan"), float("inf"), -float("inf")])
def test_an_absent_teacher_counts_for_nothing_whatever_its_column_holds(garbage):
    logps, ref = torch.randn(2, 4), torch.randn(2, 4)
    without = apo_loss(logps[:, [0, 1, 3]], ref[:, [0, 1, 3]], beta=0.5)[0]
    logps[:, 2], ref[:, 2] = garbage, garbage
    logps.requires_grad_()
    mask = torch.tensor([[True, False, True]] * 2)
    losses, rewards = apo_loss(logps, ref, mask=mask, beta=0.5)
    losses.sum().backward()
    assert torch.allclose(losses, without)
    assert torch.equal(logps.grad[:, 2], torch.zeros(2))
    assert torch.equal(rewards[:, 2], torch.zeros(2))
    assert torch.isfinite(logps.grad).all()


def test_teachers_may_be_permuted_with_their_weights():
    logps, ref = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    w = torch.rand(5, dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    columns = torch.cat([torch.tensor([0]), 1 + order])
    permuted = apo_loss(logps[:, columns], ref[:, columns], w[order])[0]
    assert torch.allclose(apo_loss(logps, ref, w)[0], permuted, rtol=1e-12)


def test_weights_per_study_equal_weights_study_by_study():
    logps, ref, w = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 3)
    each = torch.cat([apo_loss(logps[b:b + 1], ref[b:b + 1], w[b])[0] for b in range(3)])
    assert torch.allclose(apo_loss(logps, ref, w)[0], each)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_stay_finite(margin):
    logps = torch.tensor([[margin, 0.0, -5.0]], requires_grad=True)
    losses, _ = apo_loss(logps, torch.zeros(1, 3), beta=1.0)
    losses.sum().backward()
    expected = 0.0 if margin > 0 else 1e4 + math.log1p(math.exp(-5))
    assert losses.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("weights", [
    torch.tensor([1.0, -0.1]),
    torch.tensor([1.0, float("nan")]),
    torch.tensor([float("inf"), 1.0]),
])
def test_a_negative_or_non_finite_weight_is_refused(weights):
    with pytest.raises(ValueError, match="w_u >= 0"):
        apo_loss(torch.zeros(1, 3), torch.zeros(1, 3), weights)


@pytest.mark.parametrize("shapes", [
    ((3,), (3,)), ((2, 4), (2, 3)), ((2, 4), (2, 4), (2, 4)), ((2, 4), (2, 4), (3,))])
def test_other_shapes_are_refused(shapes):
    logps, ref, *mask = (torch.zeros(shape) for shape in shapes)
    message = r"expected logps and ref_logps \(B, 1\+N\) and mask \(B, N\) bool"
    with pytest.raises(ValueError, match=message):
        apo_loss(logps, ref, mask=mask[0].bool() if mask else None)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="bool"):
        apo_loss(torch.zeros(1, 3), torch.zeros(1, 3), mask=torch.ones(1, 2))


def test_a_study_without_teachers_is_refused():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="at least one teacher"):
        apo_loss(torch.zeros(2, 3), torch.zeros(2, 3), mask=mask)


# --- where the loss leads: the optimum over free rewards, found by enumerating all
# --- (t+, t^1 .. t^N) of a small outcome space

def optimal_rewards(p_plus, teachers, weights=None, joint=None):
    """Minimises E[apo_loss] over one free reward per outcome.

    p_plus    (V,)
    teachers  N tensors (V,)
    joint     P(t+ | t^1..t^N); without it t+ is independent of the teachers
    -> r (V,), up to a constant
    """
    tuples = list(itertools.product(range(len(p_plus)), repeat=len(teachers)))
    rows, mass = [], []
    for negatives in tuples:
        p = math.prod(float(t[v]) for t, v in zip(teachers, negatives))
        for v, q in enumerate(p_plus if joint is None else joint(negatives)):
            if p * float(q) > 0:
                rows.append((v, *negatives))
                mass.append(p * float(q))
    rows, mass = torch.tensor(rows), torch.tensor(mass, dtype=torch.float64)
    r = torch.zeros(len(p_plus), dtype=torch.float64, requires_grad=True)
    ref = torch.zeros(rows.shape, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(
        [r], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = (mass * apo_loss(r[rows], ref, weights, beta=1.0)[0]).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return r.detach()


def slope(r, p_plus, p_minus):
    """Least-squares slope of r against log(p+ / p-)."""
    x = (p_plus / p_minus).log()
    x, y = x - x.mean(), r - r.mean()
    return float((x * y).sum() / (x * x).sum())


def test_the_optimum_is_the_log_ratio_if_all_teachers_are_alike():
    """r = log(p+ / p-) + c exactly.

    So pi ~ pi_ref (p+ / p-)^(1/beta), and beta is an inverse guidance scale.
    """
    g = torch.Generator().manual_seed(0)
    p_plus, p_minus = torch.rand(2, 8, generator=g, dtype=torch.float64).add(0.2).unbind()
    p_plus, p_minus = p_plus / p_plus.sum(), p_minus / p_minus.sum()
    r = optimal_rewards(p_plus, [p_minus] * 3)
    expected = (p_plus / p_minus).log()
    assert torch.allclose(r - r.mean(), expected - expected.mean(), atol=1e-5)


def test_the_optimum_is_close_to_the_log_ratio_to_the_mixture_if_teachers_differ():
    g = torch.Generator().manual_seed(1)
    p = torch.rand(4, 8, generator=g, dtype=torch.float64).add(0.2)
    p = p / p.sum(1, keepdim=True)
    r, expected = optimal_rewards(p[0], [p[1], p[2], p[3]]), (p[0] / p[1:].mean(0)).log()
    error = ((r - r.mean()) - (expected - expected.mean())).abs().max()
    assert error < 0.02 * (expected.max() - expected.min())


def test_normalised_weights_are_another_objective():
    """With w = 1/N the slope against log(p+ / p-) falls below 1, with w above 1 it rises.

    It is not a rescaling of w = 1.
    """
    g = torch.Generator().manual_seed(0)
    p = torch.rand(2, 8, generator=g, dtype=torch.float64).add(0.2)
    p_plus, p_minus = p / p.sum(1, keepdim=True)
    slopes = {}
    for w in (1 / 3, 1.0, 3.0):
        r = optimal_rewards(p_plus, [p_minus] * 3, torch.full((3,), w))
        slopes[w] = slope(r, p_plus, p_minus)
    assert slopes[1 / 3] == pytest.approx(0.74, abs=0.04)
    assert slopes[1.0] == pytest.approx(1.0, abs=1e-4)
    assert slopes[3.0] == pytest.approx(1.35, abs=0.08)


def test_t_plus_drawn_from_its_own_negatives_breaks_the_independence():
    """Eq. 7 samples t+ given the same T.

    Where t+ is a plurality vote of its negatives (N = 3, 6 outcomes) the slope leaves 1.
    """
    g = torch.Generator().manual_seed(0)
    p = torch.rand(6, generator=g, dtype=torch.float64).add(0.2)
    p = p / p.sum()

    def plurality(negatives):
        counts = torch.bincount(torch.tensor(negatives), minlength=6).double()
        top = (counts == counts.max()).double()
        return top / top.sum()

    p_plus = sum(
        math.prod(float(p[v]) for v in t) * plurality(t)
        for t in itertools.product(range(6), repeat=3))
    r = optimal_rewards(p_plus, [p] * 3, joint=plurality)
    assert slope(r, p_plus, p) == pytest.approx(1.21, abs=0.12)


# --- the plain log-probability, and the flag

def test_response_logps_equals_a_python_loop():
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 7, 11, generator=g), torch.randint(0, 11, (3, 7), generator=g)
    labels = ids.clone()
    labels[0, :3], labels[1, :5], labels[2, :1], labels[0, 6:] = -100, -100, -100, -100
    for b, got in enumerate(response_logps(logits, labels).tolist()):
        want = 0
        for t in range(6):
            if labels[b, t + 1] != -100:
                want += math.log(torch.softmax(logits[b, t].double(), -1)[labels[b, t + 1]])
        assert got == pytest.approx(want, rel=1e-5)


def test_response_logps_is_fp32_for_bf16_logits_and_zero_without_a_response():
    logits = torch.randn(2, 5, 7).bfloat16()
    out = response_logps(logits, torch.full((2, 5), -100))
    assert out.dtype == torch.float32 and torch.equal(out, torch.zeros(2))


def test_the_teacher_weights_flag():
    names = ["gpt-5", "grok-4"]
    assert teacher_weights(None, names).tolist() == [1, 1]
    assert teacher_weights("grok-4=0.5", names).tolist() == [1, 0.5]
    assert teacher_weights("normalised", names) is None
    for wrong in ("kimi=1", "gpt-5=-1", "gpt-5=x", "gpt-5", "gpt-5=nan", "gpt-5=inf"):
        with pytest.raises(ValueError, match="expected NAME=W"):
            teacher_weights(wrong, names)
