import threading
import time
import warnings

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import data
from diffgan_fast.engine import Feed, memory, prefetch
from diffgan_fast.engine.feed import Order

CPU = torch.device("cpu")


@pytest.fixture(params=["device", "host"])
def where(request):
    """Where the data lie."""
    return request.param


def feed(n=10, batch=4, **options):
    values = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 2, 2) / n
    return Feed(data.load(values.clone(), labels=torch.arange(n)), batch, 7, CPU, **options)


def test_every_epoch_sees_every_sample_once(where):
    f, n = feed(data_on=where), 10
    order = torch.cat([f.batch(s).labels for s in range(10)]).tolist()
    epochs = [order[i : i + n] for i in range(0, 40, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len({tuple(e) for e in epochs}) == 4


def test_a_batch_depends_on_the_step_alone(where):
    a, b = feed(), feed(data_on=where)
    for step in (25, 3, 0, 24):
        assert torch.equal(a.batch(step).labels, b.batch(step).labels)
        assert torch.equal(a.batch(step).x, feed().batch(step).x)


def test_batches_larger_than_the_data():
    labels = feed(3, 8).batch(1).labels.tolist()
    assert len(labels) == 8 and sorted(set(labels)) == [0, 1, 2]


def test_flips_mirror_about_half_of_the_images():
    images = torch.zeros(1000, 1, 1, 2)
    images[..., 0] = 1
    f = Feed(data.load(images), 1000, 7, CPU, flip=True)
    share = float((f.batch(0).x[..., 1] == 1).float().mean())
    assert 0.4 < share < 0.6 and not torch.equal(f.batch(0).x, f.batch(1).x)


def test_parts_of_a_batch_make_up_the_whole(where):
    """Samples, labels and flips, across the end of an epoch; each part knows its place."""
    images = torch.arange(10 * 2, dtype=torch.float32).view(10, 1, 1, 2) / 20
    f = Feed(data.load(images, labels=torch.arange(10)), 8, 7, CPU, flip=True, data_on=where)
    for step in range(4):
        whole = f.batch(step)
        parts = [f.batch(step, slice(first, first + 2)) for first in range(0, 8, 2)]
        assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert [p.first_sample for p in parts] == [0, 2, 4, 6] and whole.first_sample == 0


KINDS = {
    "uint8": torch.arange(11 * 3 * 4 * 5).remainder(256).to(torch.uint8).view(11, 3, 4, 5),
    "float": torch.linspace(-1, 1, 11 * 2 * 4).view(11, 2, 2, 2),
    "points": torch.arange(22.0).view(11, 2),
}


def equal(mine, theirs):
    """Bit for bit, memory format included."""
    labels = mine.labels is theirs.labels is None or torch.equal(mine.labels, theirs.labels)
    same = torch.equal(mine.x, theirs.x) and mine.x.stride() == theirs.x.stride() and mine.x.device == theirs.x.device
    return same and labels and mine.first_sample == theirs.first_sample


def check_batches(kind, labels, device):
    """Of a run from its begin, and of one that goes on; the whole batch, and a part; two epochs and more."""
    given = data.load(KINDS[kind], labels=torch.arange(11) % 3 if labels else None)
    options = dict(flip=kind != "points", channels_last=kind != "points")
    there, here = (Feed(given, 4, 7, device, data_on=where, **options) for where in ("device", "host"))
    assert here.data.batch_device == device and there.data.batch_device is None
    for steps, part in ((range(9), slice(0, None)), (range(5, 9), slice(0, 2)), (range(5, 9), slice(2, 4))):
        for f in (there, here):
            with f.batches(steps, part) as ahead:
                found = list(ahead)  # kept: no batch is made in another's memory
            assert len(found) == len(steps)
            assert all(equal(a, there.batch(step, part)) for step, a in zip(steps, found, strict=True))
            assert all(equal(a, f.batch(step, part)) for step, a in zip(steps, found, strict=True))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_wherever_the_data_lie(kind, labels):
    check_batches(kind, labels, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_wherever_the_data_lie_of_a_gpu(kind, labels):
    check_batches(kind, labels, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
def test_a_copy_waits_for_no_step_and_no_step_reads_half_of_it():
    """Large batches, copied while the device is busy with the steps before; each is summed when it is used."""
    device = torch.device("cuda", torch.cuda.current_device())
    images = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 3, 256, 256).contiguous()
    f, busy, found = Feed(data.load(images), 32, 7, device, data_on="host"), torch.randn(4096, 4096, device=device), []
    with f.batches(range(12)) as ahead:
        for batch in ahead:
            for _ in range(4):
                busy = (busy @ busy).tanh()
            found.append(batch.x.double().mean((1, 2, 3)))
    for step, means in enumerate(found):
        torch.testing.assert_close(means, f.batch(step).x.double().mean((1, 2, 3)), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_run_in_graphs_is_fed_from_the_host(tmp_path):
    """The thread goes on while steps are captured, and spoils no capture: that would be a warning."""
    options = dict(steps=12, batch_size=16, width=8, T=10, sample_every=0, progress=False, device="cuda", flip=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run without CUDA graphs")
        a, b = (dgf.train("ddpm", "digits", tmp_path / on, data_on=on, **options) for on in ("device", "host"))
    for mine, theirs in zip(a.state["denoiser"].parameters(), b.state["denoiser"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_thread_gathers_only_so_far_ahead_and_ends(monkeypatch):
    asked, batch = [], Order.batch
    monkeypatch.setattr(Order, "batch", lambda self, step: (asked.append(step), batch(self, step))[1])
    with feed(data_on="host").batches(range(100, 200)) as ahead:
        for step in range(100, 105):
            next(ahead)
            deadline = time.monotonic() + 20
            while len(asked) < step - 99 + prefetch.AHEAD and time.monotonic() < deadline:
                time.sleep(0.001)
            assert asked == list(range(100, step + 1 + prefetch.AHEAD)) and len(threads()) == 1
    assert threads() == [] and len(asked) <= 5 + prefetch.AHEAD + 1


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_the_thread_ends_however_many_batches_were_taken(taken):
    """Also when it has gathered all it may, and waits."""
    with pytest.raises(KeyboardInterrupt), feed(data_on="host").batches(range(5 if taken == 5 else 50)) as ahead:
        for _ in range(taken):
            next(ahead)
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert threads() == []


def test_what_fails_in_the_thread_is_raised_where_its_batch_is_asked_for(monkeypatch):
    batch = Order.batch

    def failing(self, step):
        if step == 2:
            raise OSError("a fault of the disk")
        return batch(self, step)

    monkeypatch.setattr(Order, "batch", failing)
    f = feed(data_on="host")
    with f.batches(range(5)) as ahead:
        assert [next(ahead).x.shape for _ in range(2)] == [(4, 1, 2, 2)] * 2
        with pytest.raises(OSError, match="a fault of the disk"):
            next(ahead)
    assert threads() == []


def test_data_may_lie_in_a_file(tmp_path):
    """A memory-mapped tensor: data that are larger than the host's memory."""
    path, images = tmp_path / "images.u8", KINDS["uint8"]
    path.write_bytes(images.numpy().tobytes())
    mapped = torch.from_file(str(path), size=images.numel(), dtype=torch.uint8).view(images.shape)
    given = data.load(mapped)
    assert given.values.data_ptr() == mapped.data_ptr()
    with Feed(given, 4, 7, CPU, data_on="host").batches(range(6)) as ahead:
        want = Feed(data.load(images), 4, 7, CPU)
        assert all(equal(batch, want.batch(step)) for step, batch in enumerate(ahead))


@pytest.mark.parametrize(("free", "stays"), [(4 * 660, False), (4 * 660 - 1, True)])
def test_data_lie_on_the_device_where_they_take_no_more_than_a_quarter(free, stays, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    given, gpu = data.load(KINDS["uint8"]), torch.device("cuda", 0)
    assert given.values.nbytes == 660 and memory.stay(given, gpu, "auto") == stays
    assert memory.stay(given, gpu, "host") and not memory.stay(given, gpu, "device")
    assert not memory.stay(given, CPU, "auto") and memory.stay(given, CPU, "host")
