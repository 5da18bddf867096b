"""Diffusion-GAN's noiser against its formulas, written out, and the numbers that follow from them."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import multiprocessing

import diffgan_fast as dgf
from diffgan_fast.ops import affine_noise
from tests.ops import oracle

AT = (1, 2, 3, 10, 100, 391)  # changes of T after which it is compared


def abar(T, t, beta_1=1e-4, beta_T=0.02):
    return float(np.prod(1 - np.linspace(beta_1, beta_T, T)[:t]))


def fixed(T, **options):
    return dgf.AdaptiveDiffusion(T_min=T, T_max=T, **options)


def follow(diffusion, logits, changes, at=AT):
    """T after some of the changes that constant logits make."""
    found = []
    for i in range(1, changes + 1):
        for _ in range(4):
            diffusion.update(logits)
        found += [int(diffusion.T)] if i in at else []
    return found


def test_T_follows_the_published_rule():
    one = torch.ones(64)
    paper, coded = dgf.AdaptiveDiffusion(), dgf.AdaptiveDiffusion(variant="as-coded")
    assert follow(paper, one, 391) == [6, 8, 9, 18, 132, 500]
    assert float(paper.p) == 1.0
    assert follow(paper, -one, 390) and 0 < float(paper.p) < 0.01
    assert follow(paper, -one, 3, at=(3,)) == [5] and float(paper.p) == 0.0
    assert follow(coded, one, 391) == [13, 15, 18, 35, 263, 1000]
    assert follow(fixed(70), one, 3, at=(3,)) == [70]


def test_T_changes_only_at_every_fourth_minibatch_and_by_the_sign():
    d = dgf.AdaptiveDiffusion(ada_kimg=1.0, d_target=0.5)
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])  # r_d = d_target: its sign is 0
    seen = []
    for _ in range(8):
        d.update(logits)
        seen.append(float(d.p))
    assert seen == [0.0] * 8
    for n, value in ((2, 1.0), (2, 1.0), (3, 1.0), (5, 1.0)):
        assert float(d.p) == 0.0
        d.update(torch.full((n, 7), value))  # several outputs a sample
    assert float(d.p) == pytest.approx(12 / 1000)


def test_threshold_turns_probabilities_into_signs():
    for threshold, outputs, p in ((0.5, 0.7, 0.256), (0.5, 0.3, 0.0), (0.0, 0.3, 0.256), (0.5, 0.5, 0.0)):
        d = dgf.AdaptiveDiffusion(ada_kimg=1.0, threshold=threshold)
        follow(d, torch.full((64,), outputs), 1)
        assert float(d.p) == pytest.approx(p)


@pytest.mark.parametrize("preset, T, expected", [
    ("pixel-priority", 10, 0.90374), ("pixel-priority", 100, 0.36356), ("pixel-priority", 500, 0.00635),
    ("pixel-priority", 1000, 4.04e-5), ("feature", 5, 0.97497), ("feature", 250, 0.28175), ("feature", 500, 0.07938),
])  # fmt: skip
def test_noise_at_T_is_the_published_one(preset, T, expected):
    d = fixed(T, preset=preset)
    beta_T, sigma = (0.01, 0.5) if preset == "feature" else (0.02, 0.05)
    t = torch.tensor([0, 1, T // 2, T])
    want = [abar(T, k, beta_T=beta_T) for k in t.tolist()]
    assert want[-1] == pytest.approx(expected, rel=2e-3)
    np.testing.assert_allclose(1 - d.level(t).double() ** 2, want, rtol=1e-5, atol=1e-7)
    x = torch.tensor([[1.0, 0.0]]).expand(4, 2).contiguous()
    y, told = d(x, t, key=9)
    z = oracle.normal(8, 9).reshape(4, 2)
    want = np.sqrt(want)[:, None] * x.numpy() + np.sqrt(1 - np.array(want))[:, None] * sigma * z
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert torch.equal(told, t) and torch.equal(y[0], x[0])


def test_the_same_t_is_other_noise_as_T_grows_unless_the_schedule_is_fixed():
    t = torch.tensor([3])
    rebuilt, kept = (dgf.AdaptiveDiffusion(schedule=kind) for kind in ("rebuild", "fixed"))
    for d in (rebuilt, kept):
        follow(d, torch.ones(64), 10)
    assert int(rebuilt.T) == int(kept.T) == 18
    assert float(rebuilt.level(t)) == pytest.approx(math.sqrt(1 - abar(18, 3)), rel=1e-5)
    assert float(kept.level(t)) == pytest.approx(math.sqrt(1 - abar(500, 3)), rel=1e-5)


PMF = {
    ("uniform", "paper"): np.full(10, 0.1),
    ("priority", "paper"): np.arange(1, 11) / 55,
    ("priority", "as-coded"): np.arange(10) / 45,
}


@pytest.mark.parametrize("mixing, variant", PMF)
def test_the_list_of_levels_has_its_zeros_and_its_law(mixing, variant):
    d = fixed(10, mixing=mixing, variant=variant)
    counts = np.zeros(11)
    for _ in range(200):
        follow(d, torch.ones(2), 1)
        counts += np.bincount(d.slots, minlength=11)
    assert counts[0] == 200 * 32
    expected = PMF[mixing, variant] * 200 * 32
    assert (counts[1:][expected == 0] == 0).all()
    some = expected > 0
    assert stats.chisquare(counts[1:][some], expected[some]).pvalue > 1e-3


def test_t_is_drawn_from_the_list():
    d = fixed(10)
    _, t = d(torch.zeros(20_000, 1))
    shares = np.bincount(d.slots, minlength=11) / 64
    counts = np.bincount(t, minlength=11)
    assert (counts[shares == 0] == 0).all()
    assert stats.chisquare(counts[shares > 0], shares[shares > 0] * 20_000).pvalue > 1e-3


def test_the_t_of_real_samples_pairs_them_with_the_fake_ones():
    """Without noise y is sqrt(abar_t) x: of each pair by one t, which is the t that is told."""
    d, real = fixed(50, sigma=0.0), torch.ones(300, 2, dtype=torch.float64)
    y, t = d(real)
    y_fake, told = d(2 * real, t)
    assert torch.equal(told, t) and len(t.unique()) > 20
    want = torch.tensor([[math.sqrt(abar(50, k))] for k in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, want * real, rtol=1e-12, atol=0)
    torch.testing.assert_close(y_fake, 2 * want * real, rtol=1e-12, atol=0)
    assert not torch.equal(d(2 * real)[1], t)  # of their own


def test_features_as_coded_noise_more_slots_as_p_grows():
    d = dgf.AdaptiveDiffusion("feature", variant="as-coded", ada_kimg=1.0)
    assert d.mixing == "priority" and (d.T_min, d.T_max, d.sigma) == (5, 500, 0.5)
    noised = []
    for _ in range(4):
        noised.append(int((d.slots > 0).sum()))
        follow(d, torch.ones(64), 1)
    assert noised == [0, 16, 33, 48]  # round(64 p) for p = 0, .256, .512, .768, at most 48


def test_every_channel_may_have_its_own_level():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    d = fixed(50, preset="feature", per_channel=True)
    y, t = d(x, key=3)
    assert t.shape == (6, 3) and len(t.unique()) > 3
    a = np.sqrt([[abar(50, k, beta_T=0.01) for k in row] for row in t.tolist()])[:, :, None, None]
    want = a * x.numpy() + np.sqrt(1 - a**2) * 0.5 * oracle.normal(x.numel(), 3).reshape(x.shape)
    np.testing.assert_allclose(y, want, atol=1e-12)
    vectors, t = d(x[:, :, 0, 0], key=3)
    assert vectors.shape == t.shape == (6, 3)
    assert torch.equal(vectors[t == 0], x[:, :, 0, 0][t == 0])
    assert d.level(t).shape == (6, 3)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 4), (5, 2, 3, 4), (5, 2, 2, 2, 2)])
def test_any_shape_and_gradients_that_carry_the_signal(shape):
    d, x = fixed(100), torch.randn(shape, requires_grad=True)
    t = torch.tensor([0, 1, 50, 99, 100])
    y, _ = d(x, t)
    (g,) = torch.autograd.grad(y.sum(), x)
    want = torch.tensor([math.sqrt(abar(100, k)) for k in t.tolist()]).view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(g, want.expand(shape))
    assert torch.equal(y[0], x[0])


def test_theorem_2_the_noise_does_not_leak():
    """E exp(isy) = phi_x(sqrt(abar) s) exp(-sigma²(1 - abar)s²/2): invertible, so equal y means equal x."""
    d, n, s = fixed(30, sigma=0.7), 200_000, 1.3
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (n, 1), generator=generator).double() * 2 - 1
    y, _ = d(x, 30, key=1)
    a = abar(30, 30)
    want = math.cos(math.sqrt(a) * s) * math.exp(-0.49 * (1 - a) * s**2 / 2)
    assert float((s * y).cos().mean()) == pytest.approx(want, abs=4 / math.sqrt(n))


def test_a_split_batch_gets_the_same_noise():
    d, x = fixed(40), torch.randn(9, 2, 3)
    y, t = d(x, key=5)
    parts = [d(x[:4], key=5), d(x[4:], key=5, first_sample=4)]
    assert torch.equal(torch.cat([p[0] for p in parts]), y) and torch.equal(torch.cat([p[1] for p in parts]), t)


def steps(d, n):
    found = []
    for i in range(n):
        y, t = d(torch.full((6, 2), 0.5))
        d.update(y[:, 0] + 1 - i % 4)
        found += [y, t, d.p.clone(), d.slots.clone()]
    return found


def test_a_stored_state_goes_on_bit_for_bit():
    d = dgf.AdaptiveDiffusion(ada_kimg=0.1, seed=5)
    follow(d, torch.ones(6), 3)
    steps(d, 6)  # two minibatches after a change
    assert float(d.p) > 0
    stored = copy.deepcopy(d.state_dict())
    assert all(type(v) is torch.Tensor for v in stored.values())
    want, other = steps(d, 9), dgf.AdaptiveDiffusion(ada_kimg=0.1, seed=99)
    other.load_state_dict(stored)
    assert all(torch.equal(a, b) for a, b in zip(steps(other, 9), want, strict=True))
    fresh = [steps(dgf.AdaptiveDiffusion(seed=s), 1)[0] for s in (5, 5, 6)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_a_cast_leaves_the_state_as_it_is(cast):
    """In bfloat16 p could not pass 1/4, since a quarter and a step of 0.0003 is again a quarter."""
    model = torch.nn.ModuleDict({"critic": torch.nn.Linear(2, 1), "noise": dgf.AdaptiveDiffusion(ada_kimg=1.0)})
    d = model["noise"]
    follow(d, torch.ones(64), 1)
    types, p = {name: v.dtype for name, v in d.state_dict().items()}, float(d.p)
    getattr(model, cast)()
    assert {name: v.dtype for name, v in d.state_dict().items()} == types and float(d.p) == p == 0.256
    assert model["critic"].weight.dtype == getattr(torch, cast)
    d.update(torch.ones(257, dtype=torch.bfloat16))  # a sum that bfloat16 does not hold
    assert float(d.signs) == 257
    follow(d, torch.ones(2), 3)
    assert float(d.p) == pytest.approx(0.256 + (257 + 3 * 2) / 1000 + 2 * 8 / 1000, abs=1e-12)


def test_it_moves_to_other_devices_with_and_without_float64():
    d = dgf.AdaptiveDiffusion(ada_kimg=1.0)
    follow(d, torch.ones(64), 1)
    elsewhere = copy.deepcopy(d).to("meta", torch.float16)
    assert {v.device.type for v in elsewhere.buffers()} == {"meta"} and elsewhere.p.dtype == torch.float64

    def to_device_without_float64(state):
        if state.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return state.clone()

    narrow = copy.deepcopy(d)._apply(to_device_without_float64)
    assert narrow.p.dtype == narrow.signs.dtype == torch.float32
    assert follow(narrow, torch.ones(64), 2, at=(1, 2)) == follow(d, torch.ones(64), 2, at=(1, 2)) == [258, 385]


def test_a_state_of_another_schedule_is_placed_in_ones_own():
    t = torch.tensor([3])
    rebuilt, kept = (dgf.AdaptiveDiffusion(schedule=kind) for kind in ("rebuild", "fixed"))
    follow(rebuilt, torch.ones(64), 10)
    stored = copy.deepcopy(rebuilt.state_dict())
    kept.load_state_dict(stored)
    assert int(kept.T) == 18 and float(kept.level(t)) == pytest.approx(math.sqrt(1 - abar(500, 3)), rel=1e-5)
    given = copy.deepcopy(stored)
    kept.load_state_dict(given, assign=True)
    assert all(torch.equal(given[name], v) for name, v in stored.items()) and int(kept.offset) == 0
    rebuilt = dgf.AdaptiveDiffusion()
    rebuilt.load_state_dict(kept.state_dict())
    assert float(rebuilt.level(t)) == pytest.approx(math.sqrt(1 - abar(18, 3)), rel=1e-5)
    narrow = torch.nn.ModuleDict({"noise": dgf.AdaptiveDiffusion(T_max=17)})
    with pytest.raises(ValueError, match=r"T must be in T_min..T_max = 5..17; the state has 18"):
        narrow.load_state_dict({f"noise.{name}": v for name, v in stored.items()})


def test_a_state_that_did_not_count_lists_is_read():
    d, other = dgf.AdaptiveDiffusion(), dgf.AdaptiveDiffusion()
    d.update(torch.ones(7, 2))
    older = d.state_dict() | {"_extra_state": d.get_extra_state()[:3]}
    other.load_state_dict(older)
    assert other.get_extra_state().tolist() == [1, 14, 7, 0]
    follow(other, torch.ones(7), 1)


def test_calls_do_not_change_the_lists():
    x, lists = torch.zeros(4, 2), []
    for calls in (0, 5):
        d = dgf.AdaptiveDiffusion(T_min=400)
        for _ in range(calls):
            d(x)
        lists.append([d.slots.clone()])
        for _ in range(2):
            follow(d, torch.ones(4), 1)
            lists[-1].append(d.slots.clone())
    assert all(torch.equal(a, b) for a, b in zip(*lists, strict=True))
    assert not torch.equal(*lists[0][:2]) and not torch.equal(*lists[0][1:])


def test_calls_without_a_key_differ():
    d, x = fixed(500), torch.zeros(64, 2)
    (y, t), (again, s) = d(x), d(x)
    assert not torch.equal(t, s) and not torch.equal(y, again)


def _process(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    d = dgf.AdaptiveDiffusion(ada_kimg=1.0, d_target=0.2)
    for _ in range(4):  # r_d is 1 in one process and -1/3 in the other: 0.2 < 5/12 over both
        d.update(torch.ones(5) if rank == 0 else torch.tensor([1.0, -1.0, -1.0]))
    x = torch.zeros(200, 2)
    if rank == 0:
        d(x)  # a call more than the other process makes
    first = d(x)
    d.calls.fill_(7)
    found = dict(p=float(d.p), slots=d.slots.clone(), t=d(x)[1], y=d(x, 3)[0], keyed=d(x, key=5)[0], first=first[1])
    for _ in range(4):
        d.update(torch.ones(5))
    results[rank] = found | dict(later=d.slots.clone())
    torch.distributed.destroy_process_group()


def test_processes_agree_on_T_and_its_list_and_draw_by_themselves():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_process, (port, results), nprocs=2)
        mine, other = results[0], results[1]
    assert mine["p"] == other["p"] == pytest.approx(32 / 1000)
    for agreed in ("slots", "later", "keyed"):
        assert torch.equal(mine[agreed], other[agreed]), agreed
    for own in ("t", "y", "first"):
        assert not torch.equal(mine[own], other[own]), own


def test_the_raw_op_takes_rows_of_ones_own():
    x, rows = torch.randn(3, 4), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    got = affine_noise(x, rows, torch.tensor([0, 1, 1]), 8, sigma=0.5)
    z = torch.tensor(oracle.normal(12, 8), dtype=torch.float32).view(3, 4)
    assert torch.equal(got[0], x[0])
    torch.testing.assert_close(got[1:], 0.5 * x[1:] + z[1:], rtol=0, atol=1e-5)
    for bad in (rows.double(), rows[:, :1], rows[0]):
        with pytest.raises(ValueError, match="rows must be torch.float32"):
            affine_noise(x, bad, 0, 8)
    with pytest.raises(ValueError, match="t must be in 0..1"):
        affine_noise(x, rows, torch.tensor([0, 1, 2]), 8)


@pytest.mark.parametrize("options, message", [
    (dict(preset="pixel"), "preset must be one of pixel-uniform, pixel-priority, feature; got 'pixel'"),
    (dict(variant="coded"), "variant must be one of paper, as-coded"),
    (dict(mixing="linear"), "mixing must be one of uniform, priority"),
    (dict(schedule="cosine"), "schedule must be one of rebuild, fixed"),
    (dict(T_min=0), "T_min must be in 1..T_max = 500, got 0"),
    (dict(T_min=1, variant="as-coded", mixing="priority"), "T_min must be in 2..T_max = 1000, got 1"),
    (dict(T_min=501), "T_min must be in"),
    (dict(beta_T=1.0), r"beta_T must be in \(0, 1\), got 1.0"),
    (dict(beta_1=float("nan")), r"beta_1 must be in \(0, 1\), got nan"),
    (dict(T_min=5.5), "T_min must be an int, got 5.5"),
    (dict(T_min="5"), "T_min must be an int, got '5'"),
    (dict(T_min=True), "T_min must be an int, got True"),
    (dict(T_max=100.5), "T_max must be an int, got 100.5"),
    (dict(sigma=-1.0), "sigma must be finite and at least 0, got -1.0"),
    (dict(sigma=float("inf")), "sigma must be finite and at least 0, got inf"),
    (dict(d_target=float("nan")), r"d_target must be in \[-1, 1\], got nan"),
    (dict(d_target=7), r"d_target must be in \[-1, 1\], got 7"),
    (dict(threshold="a"), "threshold must be finite, got 'a'"),
    (dict(ada_kimg=0.0), "ada_kimg must be finite and above 0, got 0.0"),
    (dict(ada_kimg=float("inf")), "ada_kimg must be finite and above 0, got inf"),
])  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        dgf.AdaptiveDiffusion(**options)


def test_what_no_call_can_take_is_named():
    d = fixed(10)
    for t in (True, 1.0):
        with pytest.raises(ValueError, match=f"t must be an int or an int64 tensor, got {t}"):
            d(torch.zeros(2, 2), t)
    with pytest.raises(ValueError, match=r"x must be \[N, C, …\], since each channel has its own t; got \[5\]"):
        fixed(10, per_channel=True)(torch.zeros(5))
    for outputs, got in ((torch.tensor(1.0), "a scalar"), (0.5, "float")):
        with pytest.raises(ValueError, match=rf"logits_real must be a tensor \[N, …\].*got {got}"):
            d.update(outputs)
    for x, message in (
        ([1.0, 2.0], "a float32, .* tensor, got list"),
        (torch.tensor(1.0), "a batch dimension, got a scalar"),
    ):
        with pytest.raises(ValueError, match=f"x must (be|have) {message}"):
            d(x)
    for first in (1.5, -1, True):
        with pytest.raises(ValueError, match=f"first_sample must be an int >= 0, got {first}"):
            d(torch.zeros(2, 2), key=1, first_sample=first)
    for t, got in ((5, "5"), (torch.tensor([1.0]), "torch.float32")):
        with pytest.raises(ValueError, match=f"t must be an int64 tensor, got {got}"):
            d.level(t)


def test_levels_beyond_T_are_refused():
    d = fixed(10)
    for t in (11, -1, torch.tensor([0, 11])):
        with pytest.raises(ValueError, match="t must be in 0..10"):
            d(torch.zeros(2, 2), t)
        with pytest.raises(ValueError, match="t must be in 0..10"):
            d.level(torch.as_tensor([t]) if isinstance(t, int) else t)


def test_a_compiled_call_gives_the_same(monkeypatch):
    d = fixed(20)
    x = torch.randn(8, 3, 4, 4)
    want = d(x, key=torch.tensor(4))
    got = torch.compile(lambda x, key: d(x, key=key), backend="eager")(x, torch.tensor(4))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_a_graph_replays_fresh_noise():
    d, x = fixed(30).cuda(), torch.randn(16, 3, 8, 8, device="cuda")
    for _ in range(5):  # also a change of T
        d.update(d(x)[0].mean((1, 2, 3)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            y, t = d(x)
            d.level(t)
            d(x, t)
            d.update(y.mean((1, 2, 3)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, t = d(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)
    calls = int(d.calls) - 1
    plain = fixed(30)
    plain.load_state_dict(d.state_dict())
    plain.calls.fill_(calls)
    torch.testing.assert_close(plain(x.cpu())[0], y.cpu(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="update must stay outside of a CUDA graph"), torch.cuda.graph(graph):
        d.update(t)
