import numpy as np
import pytest
import torch

from diffgan_fast.data import FloatData, ImageData, load
from diffgan_fast.data.base import Modes
from diffgan_fast.metrics import (
    DomainClassifier,
    SampleRangeWarning,
    SmallSampleWarning,
    available,
    evaluate,
    fid,
    frechet,
    inception_score,
    kid,
    knn,
    knn_kl,
    label,
    neighbours,
    prdc,
    reference,
)
from diffgan_fast.metrics.features import quantise

pytestmark = pytest.mark.filterwarnings("ignore::diffgan_fast.metrics.SmallSampleWarning")

TRAIN, TEST = load("digits"), load("digits", split="test")
REAL = TEST.batch(slice(None))
POINTS = FloatData(torch.randn(300, 2, generator=torch.Generator().manual_seed(0)))


def pixels(images):
    """The simplest extractor: every pixel is a feature."""
    return images.flatten(1)


def noisy(sigma):
    return (REAL + sigma * torch.randn(REAL.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_values_are_those_of_the_functions_on_the_same_features():
    samples = noisy(0.3)
    net = DomainClassifier.for_data(TRAIN)
    (rf, _), (ff, fz) = net(TRAIN.batch(slice(None))), net(samples)
    result = evaluate(samples, TRAIN, held_out=TEST)
    assert result["fid"] == pytest.approx(fid(rf, ff), rel=1e-4)
    assert result["kid"] == pytest.approx(kid(rf, ff), rel=1e-4)
    assert result["is"] == pytest.approx(inception_score(fz)[0], rel=1e-4)
    top = fz.softmax(1).max(1)
    assert result["mean_top_probability"] == pytest.approx(top.values.mean().item(), rel=1e-4)
    shares = torch.bincount(top.indices, minlength=10) / len(samples)
    assert result["smallest_class_share"] == pytest.approx(shares.min().item())


def test_real_images_score_their_floor_and_are_recognisable():
    result = evaluate(REAL, TRAIN, held_out=TEST)
    for metric, floor in (("fid", "fid_floor"), ("kid", "kid_floor"), ("is", "is_real")):
        assert result[metric] == pytest.approx(result[floor], rel=1e-4)
    assert (result["n"], result["reference_n"], result["floor_n"], result["comparable"]) == (360, 1437, 360, False)
    assert result["classes_covered"] == 10
    assert result["mean_top_probability"] >= 0.9 and result["smallest_class_share"] >= 0.03
    assert result["is"] > 8


def test_scores_get_worse_with_noise_and_with_missing_classes():
    by_noise = [evaluate(noisy(s), TRAIN, held_out=TEST) for s in (0.0, 0.2, 0.5, 1.0)]
    for worse, better in zip(by_noise[1:], by_noise, strict=False):
        assert worse["fid"] > better["fid"] and worse["kid"] > better["kid"]
    assert by_noise[1]["fid"] > by_noise[1]["fid_floor"]
    half = evaluate(REAL[TEST.labels < 5], TRAIN)
    assert half["fid"] > 3 * half["fid_floor"] and half["smallest_class_share"] < 0.03 and half["is"] < 6


def test_floor_without_held_out_data_is_half_against_half():
    result = evaluate(REAL, TRAIN, metrics=["fid"])
    assert result["floor_n"] == 360 and 0 < result["fid_floor"] < evaluate(noisy(0.2), TRAIN)["fid"]
    assert "kid" not in result and "is_real" not in result
    assert evaluate(REAL, TRAIN.subset(100), metrics=["fid"], extractor=pixels)["floor_n"] == 50


def test_extractors_of_ones_own():
    unlabelled = ImageData(TRAIN.images)
    result = evaluate(REAL, unlabelled, metrics=["fid", "kid"], extractor=pixels)
    stored = (TRAIN.batch(slice(None)).flatten(1), REAL.flatten(1))
    assert result["fid"] == pytest.approx(fid(*stored), rel=1e-9)
    assert result["extractor"] == {"name": "pixels", "hash": None, "comparable": False}
    assert result["labels"] == {"fid": "FID (pixels)", "kid": "KID (pixels)"}
    assert "mean_top_probability" not in result
    floats = FloatData(TRAIN.batch(slice(None)))
    assert evaluate(REAL, floats, metrics=["fid"], extractor=pixels)["fid"] == pytest.approx(result["fid"])


def test_every_extractor_gets_uint8_values_only():
    def check(images):
        steps = (images + 1) * 127.5
        assert (steps - steps.round()).abs().max() < 1e-4
        return images.flatten(1)

    evaluate(noisy(0.3), TRAIN, metrics=["fid"], extractor=check)


def test_reference_is_capped():
    seen = []
    evaluate(
        REAL,
        TRAIN,
        metrics=["fid"],
        extractor=lambda x: (seen.append(len(x)), pixels(x))[1],
        max_reference=700,
    )
    assert sum(seen) == 360 + 700


def test_precision_and_its_kin_take_equal_numbers():
    result = evaluate(REAL, TRAIN, metrics=["coverage", "recall"], extractor=pixels, halves=0)
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(TRAIN))[:360]
    order = np.random.Generator(np.random.PCG64(0)).permutation(360)
    expected = prdc(TRAIN.batch(chosen).flatten(1), REAL[order].flatten(1))
    assert (result["recall"], result["coverage"]) == (expected.recall, expected.coverage)
    assert "precision" not in result and "spread" not in result and 0.5 < result["recall_real"] <= 1
    assert evaluate(noisy(0.5), TRAIN, metrics=["precision"])["precision"] < result["recall"]


def test_spread_is_about_the_standard_error():
    def draw(n, seed):
        return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    data = FloatData(draw(400, 0))
    results = [evaluate(draw(100, seed) * 0.6, data, metrics=["fid", "kid"], extractor=pixels) for seed in range(1, 31)]
    for metric in ("fid", "kid"):
        spread = np.mean([result["spread"][metric] for result in results])
        assert 0.6 < spread / np.std([result[metric] for result in results], ddof=1) < 1.6, metric


def test_features_of_real_images_are_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    seen = []

    class Counting:
        name, hash = "counting", "1"

        def __call__(self, images):
            seen.append(len(images))
            return pixels(images), pixels(images)[:, :10]

    first = evaluate(REAL, TRAIN, held_out=TEST, extractor=Counting())
    assert sum(seen) == 360 + 1437 + 360
    assert evaluate(REAL, TRAIN, held_out=TEST, extractor=Counting()) == first
    assert sum(seen) == 360 + 1437 + 360 + 360
    for change in ({"hash": "2"}, {"name": "other"}):
        other = type("Other", (Counting,), change)()
        before = sum(seen)
        assert evaluate(REAL, TRAIN, metrics=["fid"], extractor=other)["fid"] == first["fid"]
        assert sum(seen) == before + 360 + 1437


class Watched(ImageData):
    """Images that count how often they are read."""

    reads = 0

    def batch(self, index):
        Watched.reads += 1
        return super().batch(index)


@pytest.mark.parametrize("split", ["test", None])
def test_a_second_evaluation_costs_the_samples_only(monkeypatch, tmp_path, split):
    """No real image is read, and nothing that follows from real features alone is computed: they are poisoned."""
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    data = Watched(TRAIN.images, TRAIN.labels, TRAIN.classes)
    held_out = None if split is None else Watched(TEST.images, TEST.labels, TEST.classes)
    everything = [name for name in available(TRAIN)]
    options = dict(held_out=held_out, extractor=DomainClassifier.for_data(TRAIN), metrics=everything, halves=2)
    first = evaluate(noisy(0.3), data, **options)
    assert Watched.reads > 0
    plain = evaluate(noisy(0.3), TRAIN, **{**options, "held_out": held_out and TEST, "extractor": uncached(options)})
    for name in everything:
        assert first[name] == pytest.approx(plain[name], rel=1e-9), name
    Watched.reads, seen = 0, []
    within, distances = neighbours.squared_neighbour_distances, frechet.Moments.update

    def squared_neighbour_distances(x, *rest):
        seen.append(x)
        return within(x, *rest)

    def update(self, features):
        seen.append(torch.as_tensor(features))
        return distances(self, features)

    monkeypatch.setattr(neighbours, "squared_neighbour_distances", squared_neighbour_distances)
    monkeypatch.setattr(frechet.Moments, "update", update)
    monkeypatch.setattr(reference, "mean_kernel_within", None)
    assert evaluate(noisy(0.3), data, **options) == first
    fakes = options["extractor"](noisy(0.3))[0].double()
    rows = {tuple(row) for row in fakes.tolist()}
    assert Watched.reads == 0 and len(seen) > 10
    assert all(tuple(row) in rows for x in seen for row in x.double().tolist())
    other = evaluate(noisy(0.5), data, **options)
    assert other["fid"] != first["fid"] and other["fid_floor"] == first["fid_floor"]


def test_a_second_evaluation_of_points_costs_the_samples_only(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    data, test = load("gaussians25", subset=900), load("gaussians25", split="test", subset=300)
    samples, queries, search = test.values[:200] + 0.01, [], knn._mean_log_distance

    def watched(points, among, rank):
        queries.append(len(among))
        return search(points, among, rank)

    monkeypatch.setattr(knn, "_mean_log_distance", watched)
    for held_out, of_real in ((test, [900, 200]), (None, [450, 200])):
        queries.clear()
        first = evaluate(samples, data, held_out=held_out, halves=2)
        assert sorted(queries) == sorted([200, 100, 100, *of_real])
        queries.clear()
        assert evaluate(samples, data, held_out=held_out, halves=2) == first and sorted(queries) == [100, 100, 200]
    narrow = FloatData(data.values, modes=Modes(data.modes.centres, data.modes.std / 3))
    shares = [
        evaluate(samples, of, held_out=test, metrics=["high_quality"])["high_quality_real"] for of in (data, narrow)
    ]
    assert shares[0] > shares[1]  # other modes of the same points


def uncached(options):
    """The same extractor without a hash, by which it is kept."""
    return lambda images: options["extractor"](images)


def test_floors_are_kept_by_what_they_depend_on(monkeypatch, tmp_path):
    """The number of samples, the held-out data, the reference; also where only some metrics were asked for."""
    monkeypatch.setenv("DIFFGAN_FAST_CACHE", str(tmp_path))
    net = DomainClassifier.for_data(TRAIN)

    def floors(n, **given):
        options = dict(metrics=["fid", "recall"], extractor=net, halves=0, held_out=TEST, **given)
        found = evaluate(REAL[:n], TRAIN.subset(given.get("max_reference") or 1437), **options)
        return found["floor_n"], found["fid_floor"], found["recall_real"]

    one, fewer, smaller = floors(200), floors(100), floors(200, max_reference=400)
    assert len({one, fewer, smaller}) == 3 and one == floors(200)
    assert evaluate(REAL[:200], TRAIN.subset(1437), extractor=net, held_out=TEST, halves=0)["fid_floor"] == one[1]
    half = evaluate(REAL[:200], TRAIN.subset(1437), extractor=net, metrics=["fid"], halves=0)["fid_floor"]
    part = evaluate(REAL[:200], TRAIN.subset(1437), extractor=net, metrics=["fid"], halves=0, held_out=TEST.subset(200))
    assert len({one[1], half, part["fid_floor"]}) == 3


def test_too_few_samples_are_said_to_be(recwarn):
    warned = evaluate(REAL[:40], TRAIN)["warnings"]
    assert [text.split()[0] for text in warned] == ["FID", "IS", "Precision,"]
    assert "40 are for 64 features. Take 320 or more" in warned[0]
    assert "downwards by up to 11.2%" in warned[1] and "Take 500 or more" in warned[1]
    with pytest.warns(SmallSampleWarning, match="FID is biased upwards"):
        evaluate(REAL[:40], TRAIN, metrics=["fid"])
    assert evaluate(REAL[:40], TRAIN, metrics=["kid"])["warnings"] == []


def test_few_points_are_said_to_be():
    assert [t.split()[:3] for t in evaluate(POINTS.values[:50], FloatData(torch.randn(300, 2)))["warnings"]] == [
        ["KL", "of", "50"]
    ]
    data, test = load("gaussians25"), load("gaussians25", split="test")
    few, enough = (evaluate(test.values[:n], data, halves=0, floors=False)["warnings"] for n in (600, 1000))
    assert few[1].startswith("modes: 600 samples are 24 a mode on average, of which 20 make it covered")
    assert "KL of 600" in few[0] and "Take 1,000 or more" in few[1] and enough == []
    found = evaluate(test.values[:1000], data, metrics=["modes", "high_quality"], floors=False)
    assert found["modes"] == 25 and set(found["spread"]) == {"high_quality"}  # halves would miss modes by chance


def test_samples_in_another_range_are_warned_of_and_left_as_they_are():
    shifted = (REAL + 1) / 2
    with pytest.warns(SampleRangeWarning, match=r"samples lie in 0..1, and none is below 0 as images of 'digits' are"):
        found = evaluate(shifted, TRAIN, metrics=["kid"], extractor=pixels)
    assert "samples = 2 * samples - 1" in found["warnings"][0]
    assert found["kid"] == pytest.approx(kid(TRAIN.batch(slice(None)).flatten(1), quantise(shifted).flatten(1)))
    bright = FloatData((TRAIN.batch(slice(None)) + 1) / 2)
    for samples, data in ((REAL, TRAIN), (shifted, bright)):
        assert evaluate(samples, data, metrics=["kid"], extractor=pixels)["warnings"] == []


def test_extrapolated_fid_is_there_by_name():
    result = evaluate(REAL[:200], TRAIN, held_out=TEST, metrics=["fid", "fid_infinity"], halves=0)
    assert result["fid_infinity"] < result["fid"] and result["labels"]["fid_infinity"] == "FID∞ (domain)"
    assert "fid_infinity_floor" in result


def test_labels_never_call_a_domain_score_plain():
    net = DomainClassifier.for_data(TRAIN)
    result = evaluate(REAL, TRAIN, held_out=TEST)
    names = {"fid": "FID", "kid": "KID", "is": "IS"} | {m: m for m in ("precision", "recall", "density", "coverage")}
    assert result["labels"] == {metric: f"{name} (domain)" for metric, name in names.items()}
    assert result["extractor"] == {"name": "domain", "hash": net.hash, "comparable": False}
    assert label("fid", net) == label("fid", result["extractor"]) == "FID (domain)"

    class Inception:
        name, comparable = "inception", True

    assert label("fid", Inception()) == "FID"
    assert label("is", Inception()) == "IS (1 split)"  # published is the mean of ten
    assert label("recall", Inception()) == "recall (inception)"  # its published values are on VGG-16's features
    assert set(available()) == {*names, "fid_infinity", "kl", "modes", "high_quality"}


def test_points_are_measured_as_they_are_and_against_all_of_them():
    torch.manual_seed(1)
    samples, held_out = torch.randn(100, 2), FloatData(torch.randn(400, 2))
    result = evaluate(samples, POINTS, held_out=held_out, max_reference=10)
    floor = knn_kl(POINTS.values, held_out.subset(100).values)
    assert result == {
        "n": 100, "reference_n": 300, "floor_n": 100, "kl": knn_kl(POINTS.values, samples), "kl_floor": floor,
        "spread": {"kl": result["spread"]["kl"]}, "labels": {"kl": "KL (bits)"}, "warnings": result["warnings"],
    }  # fmt: skip
    assert evaluate(samples + 1, POINTS)["kl"] > 0.5 + evaluate(samples, POINTS)["kl"]
    assert evaluate(samples, POINTS, metrics=["kl"])["floor_n"] == 100


def test_mnist_noise_order(real_data):
    data = load("mnist", root=real_data, split="test", subset=600)
    samples = data.batch(slice(0, 300))
    scores = [
        evaluate((samples + s * torch.randn_like(samples)).clamp(-1, 1), data, metrics=["fid"], extractor=pixels)["fid"]
        for s in (0.0, 0.5, 1.0)
    ]
    assert np.all(np.diff(scores) > 0)


@pytest.mark.parametrize(
    "samples, data, kw, message",
    [
        (REAL, "digits", {}, r"data must be a data set \(see data.load\), not str"),
        (REAL, TRAIN, {"metrics": ["fidelity"]}, "metrics must be among fid, .*, coverage, not 'fidelity'"),
        (REAL[:, :, 1:], TRAIN, {}, r"samples must be \[n >= 2, 1, 8, 8\] .* not \[360, 1, 7, 8\]"),
        (REAL[:1], TRAIN, {}, "n >= 2"),
        (TEST.images, TRAIN, {}, "samples must be floats"),
        (REAL * torch.nan, TRAIN, {}, "samples must be finite"),
        (REAL, ImageData(TRAIN.images), {}, "no labels"),
        (REAL, TRAIN, {"held_out": POINTS}, r"held_out must hold samples \[1, 8, 8\] as data 'digits' does, not \[2\]"),
        (REAL, TRAIN, {"halves": 1}, "halves must be 0 or at least 2, not 1"),
        (REAL, TRAIN, {"held_out": TEST.subset(1)}, "floors cannot be measured on 1 samples of held_out: fake must be"),
        (
            REAL,
            TRAIN.subset(9),
            {"extractor": pixels, "metrics": ["recall"]},
            "on 4 samples of half of data: density_k",
        ),
        (REAL[:5], TRAIN, {"metrics": ["density"]}, "density_k must be 1..4"),
        (REAL, TRAIN, {"extractor": 3}, "extractor must be a name or a callable"),
        (REAL, TRAIN, {"extractor": pixels}, "'is'. need an extractor"),
        (REAL, TRAIN, {"extractor": lambda x: x}, r"extractor must give features \[360, d\]"),
        (REAL, POINTS, {}, r"samples must be \[n >= 2, 2\] as data 'data' has, not \[360, 1, 8, 8\]"),
        (REAL, TRAIN, {"metrics": ["kl"]}, "metrics must be .*, not 'kl': data 'digits' holds images"),
        (POINTS.values, POINTS, {"metrics": ["fid", "kl"]}, "among kl, not 'fid': data 'data' holds points"),
        (POINTS.values, POINTS, {"extractor": pixels}, "extractor must be None: data 'data' holds points"),
        (POINTS.values[:3], POINTS, {}, r"k must be 1..3 for 300 real and 3 fake points"),
    ],
)
def test_what_does_not_fit_is_named(samples, data, kw, message):
    with pytest.raises(ValueError, match=message):
        evaluate(samples, data, **kw)


def test_points_of_known_modes_are_counted():
    """20 samples within 3 standard deviations make a mode; of real points 1 - exp(-4.5) lie there."""
    data, held_out = load("gaussians25"), load("gaussians25", split="test")
    centres = data.modes.centres.float()
    samples = torch.cat([centres[0].expand(20, 2), centres[1].expand(19, 2) + 0.1, centres[2].expand(30, 2) + 0.11])
    result = evaluate(samples, data, held_out=held_out, metrics=["modes", "high_quality"])
    assert (result["modes"], result["high_quality"]) == (1, pytest.approx(39 / 69))
    assert result["labels"] == {"modes": "modes", "high_quality": "high quality"}
    real = evaluate(held_out.values, data, metrics=["modes", "high_quality"], halves=0)
    assert real["modes"] == real["modes_real"] == 25
    assert real["high_quality"] == pytest.approx(1 - np.exp(-4.5), abs=4e-3)
    assert real["high_quality_real"] == pytest.approx(1 - np.exp(-4.5), abs=4e-3)
    with pytest.raises(ValueError, match="metrics must be among kl, not 'modes': data 'data' holds points"):
        evaluate(POINTS.values, POINTS, metrics=["modes"])


def test_scores_compare_with_published_ones_only_as_they_are_measured():
    """Public weights, the whole reference, 10,000 samples."""

    class Public:
        name, hash, comparable = "inception", None, True

        def __call__(self, images):
            return images.flatten(1)[:, :6].double()

    many = REAL.repeat(30, 1, 1, 1)[:10_000]
    few = evaluate(REAL, TRAIN, metrics=["fid"], extractor=Public(), halves=0)
    whole = evaluate(many, TRAIN, metrics=["fid"], extractor=Public(), halves=0)
    part = evaluate(many, TRAIN, metrics=["fid"], extractor=Public(), halves=0, max_reference=100)
    assert [r["comparable"] for r in (few, whole, part)] == [False, True, False]
    assert [r["labels"]["fid"] for r in (few, whole, part)] == ["FID (inception)", "FID", "FID (inception)"]


def test_without_floors_only_the_samples_are_measured():
    full, plain = (evaluate(REAL, TRAIN, metrics=["kid"], floors=floors, halves=0) for floors in (True, False))
    assert plain["kid"] == full["kid"] and full.keys() - plain.keys() == {"floor_n", "kid_floor"}


def test_data_that_change_are_measured_anew():
    data = ImageData(TRAIN.images.clone(), TRAIN.labels)
    before = data.fingerprint
    data.images.zero_()
    assert data.fingerprint != before
