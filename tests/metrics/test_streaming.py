import subprocess
import sys

import numpy as np
import pytest
import torch

from diffgan_fast import metrics
from diffgan_fast.metrics import (
    FID,
    KID,
    ClassCoverage,
    InceptionScore,
    KnnKL,
    ModeCoverage,
    Moments,
    PrecisionRecallDensityCoverage,
)

R = np.random.RandomState(0)
REAL, FAKE = R.standard_normal((90, 12)), R.standard_normal((70, 12)) * 1.2 + 0.3
CENTRES = REAL[:5]

PAIRS = {  # of real and fake features: how to make the object, and the function
    "fid": (FID, metrics.fid),
    "kid": (KID, metrics.kid),
    "kid-subsets": (
        lambda: KID(subsets=3, subset_size=20),
        lambda r, f: metrics.kid(r, f, subsets=3, subset_size=20),
    ),
    "prdc": (lambda: PrecisionRecallDensityCoverage(2, 4), lambda r, f: metrics.prdc(r, f, 2, 4)),
    "kl": (lambda: KnnKL(3), lambda r, f: metrics.knn_kl(r, f, 3)),
}
SAMPLES = {  # of samples or logits alone
    "is": (InceptionScore, lambda f: metrics.inception_score(f)[0]),
    "modes": (
        lambda: ModeCoverage(CENTRES, 4.0, least=2),
        lambda f: metrics.mode_coverage(f, CENTRES, 4.0, least=2),
    ),
    "classes": (ClassCoverage, metrics.class_coverage),
}


@pytest.mark.parametrize("name", PAIRS)
def test_batches_give_what_the_function_gives_on_all(name):
    make, function = PAIRS[name]
    streamed = make()
    for real, fake in zip(np.array_split(REAL, 4), np.array_split(FAKE, 4), strict=True):
        streamed.update(real=torch.from_numpy(real)).update(fake=torch.from_numpy(fake))
    assert streamed.compute() == pytest.approx(function(REAL, FAKE), rel=1e-10)
    parts = [make().update(REAL[:30], FAKE[:50]), make().update(real=REAL[30:]), make().update(fake=FAKE[50:])]
    assert parts[0].merge(parts[1]).merge(parts[2]).compute() == pytest.approx(function(REAL, FAKE), rel=1e-10)
    assert parts[1].update(fake=FAKE).compute() == pytest.approx(function(REAL[30:], FAKE), rel=1e-10)  # as it was


@pytest.mark.parametrize("name", SAMPLES)
def test_batches_of_samples_give_what_the_function_gives_on_all(name):
    make, function = SAMPLES[name]
    streamed, merged = make(), make()
    for fake in np.array_split(FAKE, 5):
        streamed.update(fake)
        merged.merge(make().update(torch.from_numpy(fake)))
    merged.merge(make())
    assert streamed.compute() == pytest.approx(function(FAKE), rel=1e-10)
    assert merged.compute() == pytest.approx(function(FAKE), rel=1e-10)


def test_memory_does_not_grow_with_the_number_of_batches():
    def held(value):
        if isinstance(value, torch.Tensor):
            return value.numel()
        inner = value if isinstance(value, list | tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
        return sum(map(held, inner))

    for metric in (FID(), InceptionScore()):
        sizes = []
        for _ in range(4):
            metric.update(fake=FAKE)
            sizes.append(held(metric))
        assert len(set(sizes)) == 1


def test_fid_against_known_moments():
    reference = Moments(REAL)
    streamed = FID(reference).update(fake=FAKE)
    assert streamed.compute() == pytest.approx(metrics.fid(REAL, FAKE), rel=1e-10)
    streamed.update(real=FAKE)
    assert reference.n == len(REAL)


@pytest.mark.parametrize("make", [KID, KnnKL, FID, lambda: PrecisionRecallDensityCoverage(3, 5)])
def test_a_callers_buffer_may_be_filled_again(make):
    buffer, whole, refilled = np.empty((5, 12)), make(), make()
    for i in range(0, 10, 5):
        buffer[:] = REAL[i : i + 5]
        refilled.update(real=buffer)
        whole.update(real=REAL[i : i + 5].copy())
    assert refilled.update(fake=FAKE).compute() == whole.update(fake=FAKE).compute()


def test_what_is_fed_is_checked_at_once():
    with pytest.raises(ValueError, match=r"fake must be \[n, d\]"):
        KID().update(fake=REAL[0])
    with pytest.raises(ValueError, match="real must be finite"):
        KnnKL().update(real=REAL * np.nan)
    with pytest.raises(ValueError, match="fake must have 3 columns as before, not 2"):
        KID().update(REAL[:, :3], FAKE[:, :3]).update(fake=FAKE[:, :2])


@pytest.mark.parametrize("make", [KID, KnnKL, FID])
def test_merged_features_must_have_as_many_columns(make):
    with pytest.raises(ValueError, match="must have 12 columns as before, not 3"):
        make().update(REAL, FAKE).merge(make().update(REAL[:, :3], FAKE[:, :3]))


@pytest.mark.parametrize("n", [4, 9, 30])
def test_merging_with_itself_counts_every_sample_twice(n):
    """Of FID before and after rows become a covariance: above 12, and at 2 x 9."""
    real, fake = REAL[:n], FAKE[:n]
    fid = FID().update(real, fake)
    fid.merge(fid)
    assert fid.real.n == fid.fake.n == 2 * n
    assert fid.compute() == pytest.approx(metrics.fid(np.tile(real, (2, 1)), np.tile(fake, (2, 1))), rel=1e-6)
    kid = KID().update(real, fake)
    assert kid.merge(kid).compute() == pytest.approx(metrics.kid(np.tile(real, (2, 1)), np.tile(fake, (2, 1))))


GATHERED = """
import sys
import numpy as np
import torch
from diffgan_fast.metrics import FID, KID

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
real, fake = np.load(f"{folder}/features.npz").values()
mine = FID().update(real[rank::2], fake[rank::2]), KID().update(real[rank::2], fake[rank::2])
print(*(metric.gather().compute() for metric in mine))
torch.distributed.destroy_process_group()
"""


def test_processes_gather_what_they_have(tmp_path):
    np.savez(tmp_path / "features.npz", REAL, FAKE)
    commands = [[sys.executable, "-c", GATHERED, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        printed, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        want = [metrics.fid(REAL, FAKE), metrics.kid(REAL, FAKE)]
        assert list(map(float, printed.split())) == pytest.approx(want, rel=1e-10)


def test_what_is_missing_is_named():
    for metric in (FID(), KID(), PrecisionRecallDensityCoverage(), KnnKL(), InceptionScore(), ClassCoverage()):
        with pytest.raises(ValueError, match="call update first"):
            metric.compute()
    with pytest.raises(ValueError, match="both real and fake"):
        KID().update(real=REAL).compute()
    with pytest.raises(ValueError, match="12 classes as before, not 3"):
        InceptionScore().update(FAKE).update(FAKE[:, :3])
    with pytest.raises(ValueError, match="real must be .* n >= 2"):
        KID().update(REAL[:1], FAKE).compute()
    with pytest.raises(ValueError, match="other must be a KID, not a KnnKL"):
        KID().merge(KnnKL())
    for other in (ModeCoverage(CENTRES, 2.0), ModeCoverage(CENTRES + 1, 4.0), ModeCoverage(CENTRES[:4], 4.0)):
        with pytest.raises(ValueError, match="other must have the same modes and radius"):
            ModeCoverage(CENTRES, 4.0).update(FAKE).merge(other.update(FAKE))
