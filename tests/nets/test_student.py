import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffgan_fast.nets import StudentUNet
from diffgan_fast.nets.student import Modulation

from .helpers import count, images, randomise


def test_parameter_counts_are_the_authors():
    assert count(StudentUNet()) == 1_737_153
    assert count(StudentUNet(num_classes=10)) == 1_759_937


def test_multiplications_follow_from_the_layer_table():
    def conv(pixels, inputs, outputs, kernel=3):
        return pixels**2 * inputs * outputs * kernel**2

    expected = (
        conv(28, 1, 64)
        + conv(28, 64, 64)
        + 2 * conv(14, 64, 64)
        + conv(7, 64, 128)
        + conv(7, 128, 128)
        + conv(1, 128, 128, 7)  # transposed: counted per input pixel
        + conv(7, 256, 64, 4)
        + conv(14, 64, 64)
        + conv(14, 128, 64, 4)
        + conv(28, 64, 64)
        + conv(28, 128, 64)
        + conv(28, 64, 64)
        + conv(28, 64, 1)
        + (128 + 128**2)  # the two time networks
        + (64 + 64**2)
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        StudentUNet().eval()(images(1, 1, 28), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * expected


def test_time_enters_as_a_fraction_counted_from_zero():
    model, other = randomise(StudentUNet(T=300)).eval(), randomise(StudentUNet(T=100)).eval()
    x = images(2, 1, 28)
    torch.testing.assert_close(model(x, torch.tensor([1, 31])), other(x, torch.tensor([1, 11])))
    assert not torch.allclose(model(x, torch.tensor([1, 31])), model(x, torch.tensor([1, 32])))


def test_class_network_multiplies():
    """A class network that answers 1 for every label leaves the unconditional network."""
    plain, labelled = randomise(StudentUNet()).eval(), StudentUNet(num_classes=10).eval()
    ones = {
        f"modulate{i}.label.{layer}.{name}": torch.full(shape, float(layer == 2 and name == "bias"))
        for i, channels in ((1, 128), (2, 64))
        for layer, name, shape in (
            (0, "weight", (channels, 10)),
            (0, "bias", (channels,)),
            (2, "weight", (channels, channels)),
            (2, "bias", (channels,)),
        )
    }
    labelled.load_state_dict({**plain.state_dict(), **ones})
    x, t = images(3, 1, 28), torch.tensor([1, 100, 300])
    assert torch.equal(labelled(x, t, torch.tensor([0, 9, 10])), plain(x, t))


def test_the_label_scales_before_time_shifts():
    modulate = Modulation(2, 10)
    for network, answer in ((modulate.label, [3.0, 5.0]), (modulate.time, [0.5, 0.25])):
        torch.nn.init.zeros_(network[2].weight)
        network[2].bias.data = torch.tensor(answer)
    value = modulate(torch.ones(1, 2, 1, 1), torch.zeros(1, 1), torch.zeros(1, 10))
    assert value.flatten().tolist() == [3.5, 5.25]


def test_no_label_is_the_zero_vector():
    model = randomise(StudentUNet(num_classes=10), scale=0.2).eval()
    x, t, none = images(2, 1, 28), torch.tensor([5, 6]), torch.tensor([10, 10])
    without = model(x, t)
    assert torch.equal(without, model(x, t, none))
    assert not torch.allclose(without, model(x, t, torch.tensor([0, 1])))
    for modulate in (model.modulate1, model.modulate2):
        torch.nn.init.zeros_(modulate.label[0].weight)
    assert torch.equal(without, model(x, t, torch.tensor([0, 1])))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="T is 0"):
        StudentUNet(T=0)
    with pytest.raises(ValueError, match="num_classes is -1"):
        StudentUNet(num_classes=-1)
    with pytest.raises(ValueError, match=r"x is \[1, 1, 32, 32\]"):
        StudentUNet()(images(1, 1, 32), torch.tensor([1]))
    with pytest.raises(ValueError, match="y is given"):
        StudentUNet()(images(1, 1, 28), torch.tensor([1]), torch.tensor([1]))
