import torch

from diffgan_fast import data
from diffgan_fast.engine import Feed


def feed(n=10, batch=4, **options):
    values = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 2, 2) / n
    return Feed(data.load(values.clone(), labels=torch.arange(n)), batch, 7, torch.device("cpu"), **options)


def test_every_epoch_sees_every_sample_once():
    f, n = feed(), 10
    order = torch.cat([f.batch(s).labels for s in range(10)]).tolist()
    epochs = [order[i : i + n] for i in range(0, 40, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len({tuple(e) for e in epochs}) == 4


def test_a_batch_depends_on_the_step_alone():
    a, b = feed(), feed()
    for step in (25, 3, 0, 24):
        assert torch.equal(a.batch(step).labels, b.batch(step).labels)
        assert torch.equal(a.batch(step).x, feed().batch(step).x)


def test_batches_larger_than_the_data():
    labels = feed(3, 8).batch(1).labels.tolist()
    assert len(labels) == 8 and sorted(set(labels)) == [0, 1, 2]


def test_flips_mirror_about_half_of_the_images():
    images = torch.zeros(1000, 1, 1, 2)
    images[..., 0] = 1
    f = Feed(data.load(images), 1000, 7, torch.device("cpu"), flip=True)
    share = float((f.batch(0).x[..., 1] == 1).float().mean())
    assert 0.4 < share < 0.6 and not torch.equal(f.batch(0).x, f.batch(1).x)


def test_parts_of_a_batch_make_up_the_whole():
    """Samples, labels and flips, across the end of an epoch; each part knows its place."""
    images = torch.arange(10 * 2, dtype=torch.float32).view(10, 1, 1, 2) / 20
    f = Feed(data.load(images, labels=torch.arange(10)), 8, 7, torch.device("cpu"), flip=True)
    for step in range(4):
        whole = f.batch(step)
        parts = [f.batch(step, slice(first, first + 2)) for first in range(0, 8, 2)]
        assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert [p.first_sample for p in parts] == [0, 2, 4, 6] and whole.first_sample == 0
