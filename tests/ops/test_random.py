import numpy as np
import pytest
import torch
from scipy import stats

import diffgan_fast as dgf
from diffgan_fast import _native
from tests.ops import oracle

R = dgf.random
KNOWN = [  # Random123, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FIRSTS = [0, 1, 2, 3, 5, 2**32 * 4 - 9, 2**34 + 2, 2**40 + 7]


def philox_of(name):
    """The back end's own philox4x32 as a function of int64 tensors."""
    if name == "reference":
        from diffgan_fast import _philox

        return lambda c, k: torch.stack(_philox.block(*c.unbind(1), *k.unbind(1)), 1)
    if name == "triton":
        import diffgan_fast.kernels.random as kernels

        return kernels.philox4x32
    return torch.ops.diffgan_fast.philox4x32


def test_known_answers(backend):
    counters = torch.tensor([c for c, _, _ in KNOWN], device=backend.device)
    keys = torch.tensor([k for _, k, _ in KNOWN], device=backend.device)
    got = philox_of(backend.name)(counters, keys)
    assert got.tolist() == [list(answer) for _, _, answer in KNOWN]


def test_known_answers_of_the_oracle_and_the_host_module():
    for counter, key, answer in KNOWN:
        assert tuple(oracle.philox(counter, key)) == answer
        if _native.host is not None:
            got = _native.host.philox4x32(np.array([counter], np.uint32), np.array([key], np.uint32))
            assert tuple(got[0].tolist()) == answer


@pytest.mark.parametrize("first", FIRSTS)
def test_bits_are_the_same_everywhere(backend, first):
    key, n = 0x0123456789ABCDEF, 83
    got = R.bits(n, key, stream=7, first=first, device=backend.device)
    assert got.dtype == torch.int64
    assert got.tolist() == [oracle.word(first + i, key, 7) for i in range(n)]
    if _native.host is not None:
        assert got.tolist() == _native.host.bits(n, key, 7, first).tolist()


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 2048, 4099])
def test_normals_follow_the_formula(backend, first, n):
    key = 2**63 - 1
    want = oracle.normal(n, key, first, 2)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-14)):
        if dtype in backend.dtypes:
            got = R.normal(n, key, stream=2, first=first, dtype=dtype, device=backend.device)
            assert got.dtype == dtype
            assert np.abs(got.double().cpu().numpy() - want).max() <= tolerance


def test_host_normals_and_uniforms_follow_the_formula():
    if _native.host is None:
        pytest.skip("_host is not built")
    assert np.abs(_native.host.normal(21, 5, 1, 6) - oracle.normal(21, 5, 6, 1)).max() < 1e-14
    want = [(oracle.word(6 + i, 5, 1) >> 8) / 2**24 for i in range(21)]
    assert _native.host.uniform(21, 5, 1, 6).tolist() == want


def test_uniforms_and_integers_follow_the_formula(backend):
    words = [oracle.word(3 + i, 9, 1) for i in range(30)]
    uniform = R.uniform(30, 9, stream=1, first=3, device=backend.device)
    assert uniform.tolist() == [(w >> 8) / 2**24 for w in words]
    for high in (1, 2, 10, 1000, 2**31 + 5, 2**32):
        got = R.randint(high, 30, 9, stream=1, first=3, device=backend.device)
        assert got.tolist() == [(w * high) >> 32 for w in words]


def test_extreme_words_stay_finite():
    """u never reaches 0 or 1, so the largest normal is sqrt(-2 ln 2^-24) = 5.768."""
    for w0 in (0, 2**32 - 1):
        u = ((w0 >> 9) + 0.5) * 2.0**-23
        assert 0 < u < 1 and np.sqrt(-2 * np.log(u)) < 5.77


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_the_rounded_float32(backend, dtype):
    wide = R.normal((5, 7, 11), 4, device=backend.device)
    assert torch.equal(R.normal((5, 7, 11), 4, dtype=dtype, device=backend.device), wide.to(dtype))


def test_one_key_a_sample_makes_samples_independent_of_their_batch(backend):
    keys = R.fold_in(11, torch.arange(5, device=backend.device))
    batch = R.normal((5, 3, 7), keys)
    for n in range(5):
        alone = R.normal((1, 3, 7), keys[n : n + 1])
        assert torch.equal(batch[n], alone[0])
        assert torch.equal(batch[n], R.normal((3, 7), int(keys[n]), device=backend.device))


def test_a_key_in_a_tensor_is_the_same_key(backend):
    key = torch.tensor([12345], device=backend.device)
    assert torch.equal(R.normal(100, key, first=3), R.normal(100, 12345, first=3, device=backend.device))


def test_parts_make_the_whole(backend):
    whole = R.normal(1000, 6, device=backend.device)
    parts = [R.normal(b - a, 6, first=a, device=backend.device) for a, b in ((0, 1), (1, 130), (130, 999), (999, 1000))]
    assert torch.equal(torch.cat(parts), whole)


def test_empty_and_scalar_shapes(backend):
    assert R.normal((0, 3), 1, device=backend.device).shape == (0, 3)
    assert R.uniform((), 1, device=backend.device).shape == ()


def test_moments_and_distribution():
    z = R.normal(2_000_000, R.key(1), dtype=torch.float32).double().numpy()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5 and abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(z[:200_000], "norm").pvalue > 1e-3
    u = R.uniform(200_000, R.key(2)).double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    counts = np.bincount(R.randint(10, 200_000, R.key(3)).numpy(), minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_streams_keys_and_neighbours_are_uncorrelated():
    n = 500_000
    base = R.normal(n, 1)
    others = [R.normal(n, 1, stream=1), R.normal(n, 2), R.normal(n, R.fold_in(1, 1)), base.roll(1), base.roll(4)]
    for other in others:
        assert abs(float((base * other).mean())) < 5 / n**0.5
        assert abs(float((base.square() * other.square()).mean()) - 1) < 5 * (8 / n) ** 0.5


def test_fold_in_agrees_between_ints_and_tensors(backend):
    data = torch.tensor([0, 1, -1, 2**62, 5], device=backend.device)
    got = R.fold_in(77, "noise", data, 3)
    assert got.tolist() == [R.fold_in(77, "noise", int(d), 3) for d in data]
    keys = torch.tensor([1, 2, 3], device=backend.device)
    assert R.fold_in(keys, 9, "x").tolist() == [R.fold_in(k, 9, "x") for k in (1, 2, 3)]
    both = R.fold_in(keys[:, None], data)
    assert both.tolist() == [[R.fold_in(k, int(d)) for d in data] for k in (1, 2, 3)]
    one = R.fold_in(keys[1], "t", keys[2])
    assert one.dim() == 0 and one.item() == R.fold_in(2, "t", 3)
    many = torch.arange(3000, device=backend.device)
    assert R.fold_in(5, many)[[0, 1023, 1024, 2999]].tolist() == [R.fold_in(5, i) for i in (0, 1023, 1024, 2999)]
    assert R.fold_in(5, many[:0]).shape == (0,)
    assert all(0 <= k < 2**63 for k in got.tolist())


def test_fold_in_of_other_types_is_refused():
    for key, data in ((torch.tensor([1.0]), 1), (torch.tensor([1], dtype=torch.int32), 1), (1, torch.tensor([True]))):
        with pytest.raises(ValueError, match="int64"):
            R.fold_in(key, data)


def test_fold_in_values_never_change():
    """Runs must resume on another machine and another version: these numbers are part of the format."""
    assert R.fold_in(0, 0) == FOLD_0_0
    assert R.fold_in(1, "torch", 7) == FOLD_1_TORCH_7
    assert R.key(0) == KEY_0


# The first from the Philox definition itself; the others recorded on the day the format was fixed.
_w = oracle.philox((0, 0, 0xF01D, 1), (0, 0))
FOLD_0_0 = (_w[0] | _w[1] << 32) & (2**63 - 1)
FOLD_1_TORCH_7 = 0x64E0A0495B29DCE
KEY_0 = 0x3ADCDACF2E1042A3


def test_keys_of_different_seeds_differ():
    keys = {R.key(s) for s in [*range(-50, 1000), 2**62, 2**63 + 1, -(2**70)]}
    assert len(keys) == 1053


def test_key_from_a_generator_follows_its_seed():
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert R.key_from(a) == R.key_from(b) != R.key_from(a)


@pytest.mark.parametrize("key", [-1, 2**63, True, 1.0, "1", None])
def test_bad_keys_are_named(key):
    with pytest.raises(ValueError, match="key must be"):
        R.normal(3, key)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="high"):
        R.randint(0, 3, 1)
    with pytest.raises(ValueError, match="first"):
        R.normal(3, 1, first=-1)
    with pytest.raises(ValueError, match="stream"):
        R.normal(3, 1, stream=2**32)
    with pytest.raises(ValueError, match="seed"):
        R.key("a")
    with pytest.raises(ValueError, match="one for each of 3 samples"):
        R.normal((3, 2), torch.tensor([1, 2]))
