"""x0, noise, v and flow are one prediction; their losses differ by a weight in t alone."""

import pytest
import torch

from dynamic_video_sf import flow_matching_loss
from flow_match import FlowMatchScheduler
from parametrisation import KINDS, from_flow, loss_weight, to_flow
from randomness import generator, randn

T = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64).reshape(5, 1, 1, 1, 1)
SHAPE = (5, 4, 1, 3, 3)
X0, NOISE = (randn(SHAPE, generator(0, name), dtype=torch.float64) for name in ("x0", "noise"))
X_T = (1 - T) * X0 + T * NOISE


def test_the_true_prediction_of_each_kind():
    """Out of the true flow come x0, the noise, and v as it is defined on the variance-preserving circle."""
    angle = torch.atan2(T, 1 - T)
    truth = {"flow": NOISE - X0, "x0": X0, "noise": NOISE, "v": angle.cos() * NOISE - angle.sin() * X0}
    assert truth.keys() == set(KINDS)
    for kind, value in truth.items():
        torch.testing.assert_close(from_flow(kind, NOISE - X0, X_T, T), value)
        torch.testing.assert_close(to_flow(kind, value, X_T, T), NOISE - X0)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    """Also for a wrong flow: the coordinates change, the prediction does not."""
    flow = randn(SHAPE, generator(0, "flow"), dtype=torch.float64)
    torch.testing.assert_close(to_flow(kind, from_flow(kind, flow, X_T, T), X_T, T), flow)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_differ_by_their_weight(kind):
    """The squared error in a kind's own coordinates is the flow's times loss_weight, for any wrong flow."""
    flow = NOISE - X0 + randn(SHAPE, generator(0, "error"), dtype=torch.float64)
    own = (from_flow(kind, flow, X_T, T) - from_flow(kind, NOISE - X0, X_T, T)).square()
    torch.testing.assert_close(own, loss_weight(kind, T) * (flow - (NOISE - X0)).square())


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flow_matching_in_other_coordinates(kind, per_frame):
    """flow_matching_loss(parametrisation=kind) is the mean squared error of that prediction, written out here."""
    t = T.flatten().float()
    t = torch.stack([t, t.flip(0), t, t], dim=1) if per_frame else t
    wide = t.reshape(5, -1, 1, 1, 1)

    def model(x_t, t, cond):
        return 0.3 * x_t

    x0, noise = X0.float(), NOISE.float()
    loss = flow_matching_loss(model, FlowMatchScheduler(), x0, {}, t=t, noise=noise, parametrisation=kind)
    x_t = (1 - wide) * x0 + wide * noise
    error = from_flow(kind, 0.3 * x_t, x_t, wide) - from_flow(kind, noise - x0, x_t, wide)
    torch.testing.assert_close(loss, error.square().mean())


def test_another_kind_is_refused():
    for call, given in ((from_flow, (X0, X_T, T)), (to_flow, (X0, X_T, T)), (loss_weight, (T,))):
        with pytest.raises(ValueError, match="A network predicts one of flow, x0, noise, v; got 'eps'."):
            call("eps", *given)
