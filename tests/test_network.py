"""Tests of the network: its initial weights, what is in its state dict, FSR's place, the skips."""

import torch

from unet import UNet


def test_unet_proper_is_the_same_for_one_seed():
    states = []
    for fsr, levels in (("none", []), ("adaptive", [0, 1, 2]), ("global", [1])):
        torch.manual_seed(5)
        states.append(UNet(4, fsr=fsr, levels=levels).state_dict())
    bare = states[0]
    assert not any(name.startswith(("fsr", "fusion")) for name in bare)
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in bare.items())


def test_fsr_stands_behind_encoder_blocks_2_to_4():
    """A layer's shift moves its own map by just that, and no map above it."""
    model, x = UNet(2, fsr="global", levels=[]), torch.rand(2, 3, 32, 32)
    before = model.features(x)[1]["encoder"]
    for k in (1, 2, 3):
        model.fsr[k - 1].shift.data += 5
        after = model.features(x)[1]["encoder"]
        torch.testing.assert_close(after[k], before[k] + 5)
        assert all(torch.equal(after[i], before[i]) for i in range(k))
        model.fsr[k - 1].shift.data -= 5


def test_gradients_pass_through_the_skips():
    model = UNet(2, levels=[])
    for up in model.up:
        up.weight.data.zero_()  # so that the skips alone lead down
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert model.encoder[0][0].weight.grad.abs().max() > 0


def test_state_dict_holds_no_statistics():
    """Nor weights of a norm layer, which has no affine map."""
    model = UNet(4, levels=[])
    convolutions, up, head, of_fsr = 18, 4, 1, 3
    model.features(torch.rand(2, 3, 32, 32))
    weights = sum(name.endswith(".weight") for name in model.state_dict())
    assert weights == convolutions + up + head + of_fsr
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    assert not any("running" in name or "num_batches" in name for name in model.state_dict())
