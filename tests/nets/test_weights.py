import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffgan_fast.nets import DCGANCritic, DCGANGenerator, load_weights

from .helpers import images

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def csinva(*layers):
    """Random weights under the keys of the csinva repository: (number in `main`, shape) of a conv, or of a batch norm
    its number and channels."""
    weights = {}
    for number, shape in layers:
        if isinstance(shape, tuple):
            weights[f"main.{number}.weight"] = torch.randn(shape) * 0.02
        else:
            weights |= {f"main.{number}.{name}": torch.rand(shape) + 0.5 for name in NORM[:-1]}
            weights[f"main.{number}.num_batches_tracked"] = torch.tensor(93_800)
    return weights


def mnist_critic():
    return csinva((0, (64, 1, 4, 4)), (2, (128, 64, 4, 4)), (3, 128), (5, (256, 128, 4, 4)), (6, 256),
                  (8, (1, 256, 4, 4)))  # fmt: skip


PUBLIC = {
    "mnist critic": (mnist_critic, lambda: DCGANCritic(1, 28), 661_248),
    "cifar critic": (
        lambda: csinva((0, (64, 3, 4, 4)), (2, (128, 64, 4, 4)), (3, 128), (5, (256, 128, 4, 4)), (6, 256),
                       (8, (512, 256, 4, 4)), (9, 512), (11, (1, 512, 2, 2))),
        lambda: DCGANCritic(3, 32),
        2_759_424,
    ),
    "mnist generator": (
        lambda: csinva((0, (100, 512, 4, 4)), (1, 512), (3, (512, 256, 4, 4)), (4, 256), (6, (256, 128, 4, 4)),
                       (7, 128), (9, (128, 64, 4, 4)), (10, 64), (12, (64, 1, 1, 1))),
        lambda: DCGANGenerator(1, 28),
        3_573_696,
    ),
}  # fmt: skip


def written(weights, path):
    """The file of these weights; .old.pth in the format of torch before 1.6, as the public files are."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=".old" not in path.suffixes)
    return path


def same(network, weights):
    own = network.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)


@pytest.mark.parametrize("file", ["w.pth", "w.old.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_weights_load_as_they_are(name, file, tmp_path):
    weights, make, parameters = PUBLIC[name]
    weights = weights()
    assert sum(v.numel() for k, v in weights.items() if "running" not in k and "num" not in k) == parameters
    network = make()
    assert load_weights(network, written(weights, tmp_path / file)) is network
    assert same(network, weights)


def test_the_critic_judges_as_its_weights_say(tmp_path):
    w, x = mnist_critic(), images(2, 1, 28)

    def norm(h, i):
        mean, var, gain, shift = (
            w[f"main.{i}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return gain * (h - mean) / (var + 1e-5).sqrt() + shift

    def conv(h, i):
        return nn.functional.conv2d(h, w[f"main.{i}.weight"], stride=2, padding=1)

    def leaky(h):
        return torch.where(h > 0, h, 0.2 * h)

    want = conv(leaky(norm(conv(leaky(norm(conv(leaky(conv(x, 0)), 2), 3)), 5), 6)), 8)
    critic = load_weights(DCGANCritic(1, 28), str(written(w, tmp_path / "netD.pth"))).eval()
    torch.testing.assert_close(critic(x), want.flatten())


def test_the_prefix_of_data_parallel_is_taken_off_before_renaming(tmp_path):
    weights = mnist_critic()
    wrapped = nn.DataParallel(load_weights(DCGANCritic(1, 28), written(weights, tmp_path / "a.pth")))
    path = written(wrapped.state_dict(), tmp_path / "b.pth")
    assert same(load_weights(DCGANCritic(1, 28), path), weights)
    assert same(load_weights(DCGANCritic(1, 28).main, path, rename=lambda k: k.removeprefix("main.")),
                {k.removeprefix("main."): v for k, v in weights.items()})  # fmt: skip


def test_a_prefix_of_some_keys_alone_stays(tmp_path):
    path = written({"module.weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="missing: weight; unexpected: module.weight"):
        load_weights(nn.Linear(2, 1), path)


def test_keys_are_renamed_and_left_out(tmp_path):
    weights = {"a.w": torch.randn(3, 2), "a.b": torch.randn(3), "optimizer": torch.randn(7)}
    path = written(weights, tmp_path / "w.safetensors")
    layer = load_weights(nn.Linear(2, 3), path, rename={"a.w": "weight", "a.b": "bias"}.get)
    assert torch.equal(layer.weight, weights["a.w"]) and torch.equal(layer.bias, weights["a.b"])
    with pytest.raises(ValueError, match="rename gives 'weight' to two tensors"):
        load_weights(layer, path, rename=lambda k: "weight")


def test_a_batch_norm_without_a_count_loads(tmp_path):
    weights = mnist_critic()
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    critic = load_weights(DCGANCritic(1, 28), written(old, tmp_path / "w.pth"))
    assert all(torch.equal(critic.state_dict()[k], v) for k, v in old.items())


def test_dtype_and_memory_format_stay(tmp_path):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in mnist_critic().items()}
    critic = DCGANCritic(1, 28).double().to(memory_format=torch.channels_last)
    load_weights(critic, written(weights, tmp_path / "w.safetensors"))
    assert torch.equal(critic.main[2].weight, weights["main.2.weight"].double())
    assert critic.main[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    critic = DCGANCritic(1, 28)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    weights = mnist_critic()
    del weights["main.8.weight"]
    weights["main.2.weight"] = torch.ones(2, 64, 4, 4)
    weights["extra"] = torch.ones(3)
    with pytest.raises(ValueError) as raised:
        load_weights(critic, written(weights, tmp_path / "w.pth"))
    message = str(raised.value)
    assert "w.pth does not fit DCGANCritic: missing: main.8.weight; unexpected: extra; of another shape: " in message
    assert message.endswith("main.2.weight [2, 64, 4, 4], not [128, 64, 4, 4]")
    assert same(critic, before)


def test_long_lists_are_shortened(tmp_path):
    path = written({f"k{i}": torch.ones(1) for i in range(40)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: weight; unexpected: k0, k1, k2, k3, k4, k5 and 34 more$"):
        load_weights(nn.Linear(2, 2, bias=False), path)


class Code:
    """Something whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    layer = nn.Linear(2, 1)
    good = layer.state_dict()
    cases = {
        "none.pth": (None, "none.pth is not a file"),
        "w.bin": (good, "must end in .safetensors, .pt or .pth"),
        "net.pt": (layer, "is damaged, or holds more than tensors by name"),
        "code.pth": ({**good, "x": Code(tmp_path / "made")}, "is damaged, or holds more than tensors by name"),
        "list.pt": ([torch.ones(2)], "holds a list"),
        "training.pth": ({"epoch": 3, "state_dict": good}, r"also holds 'epoch' \(int\), 'state_dict' \(OrderedDict\)"),
        "numbered.pth": ({0: torch.ones(1)}, r"also holds 0 \(Tensor\)"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            load_weights(layer, tmp_path / name)
    assert not (tmp_path / "made").exists()
    for name in ("cut.pth", "cut.safetensors"):
        whole = written(mnist_critic(), tmp_path / f"whole{(tmp_path / name).suffix}").read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="is damaged"):
            load_weights(DCGANCritic(1, 28), tmp_path / name)
