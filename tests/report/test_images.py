import numpy as np
import pytest
import torch
from PIL import Image

from diffgan_fast.report import grid, save_grid, strip


def numbered(n, channels=1, height=8, width=8):
    """Images of one value each: image i is i everywhere, as uint8."""
    values = torch.arange(n).view(n, 1, 1, 1) / 127.5 - 1
    return values.expand(n, channels, height, width)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_cells_lie_where_they_should_and_the_rest_is_grey(channels, mode):
    picture = grid(numbered(5, channels, 4, 6), columns=3, scale=5)
    assert (picture.mode, picture.size) == (mode, (3 * 30 + 2 * 2, 2 * 20 + 2))
    pixels = np.array(picture).reshape(42, 94, channels)
    for i, (top, left) in enumerate([(0, 0), (0, 32), (0, 64), (22, 0), (22, 32)]):
        cell = pixels[top : top + 20, left : left + 30]
        assert (cell == i).all()
        pixels[top : top + 20, left : left + 30] = 128
    assert (pixels == 128).all()


def test_pixels_become_squares_and_values_are_rounded_and_clamped():
    image = torch.tensor([[[[-1.0, 0.0], [1.0, 1.7]]]])
    pixels = np.array(grid(image, scale=3))
    want = [[0, 128], [255, 255]]  # 0 is 127.5, rounded to even
    assert pixels.shape == (6, 6) and (pixels == np.kron(want, np.ones((3, 3)))).all()


def test_channels_keep_their_order():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    assert np.array(grid(red, scale=1)).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("size, cell", [(8, 64), (28, 56), (32, 64), (64, 64), (65, 65), (200, 200)])
def test_small_images_are_enlarged_and_grids_are_about_square(size, cell):
    assert grid(numbered(7, 1, size, size)).size == (3 * cell + 4, 3 * cell + 4)


def test_any_memory_layout_and_type():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    want = grid(images).tobytes()
    assert grid(images.to(memory_format=torch.channels_last).requires_grad_()).tobytes() == want
    assert grid(images.double()).tobytes() == want


@pytest.mark.parametrize(
    "images, options",
    [
        (torch.zeros(4, 2), {}),
        (torch.zeros(0, 1, 8, 8), {}),
        (torch.zeros(2, 2, 8, 8), {}),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), {}),
        (torch.full((2, 1, 8, 8), torch.nan), {}),
        (torch.zeros(2, 1, 8, 8), {"columns": 0}),
        (torch.zeros(2, 1, 8, 8), {"scale": 0}),
    ],
)
def test_what_is_no_picture_is_refused(images, options):
    with pytest.raises(ValueError, match="must be"):
        grid(images, **options)


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_grid(numbered(4), tmp_path / "new" / "step-1.png", columns=2)
    assert np.array_equal(np.array(Image.open(path)), np.array(grid(numbered(4), columns=2)))
    assert [p.name for p in path.parent.iterdir()] == ["step-1.png"]
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_grid(numbered(9), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["step-1.png"]


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_level(tmp_path):
    images = numbered(2)
    path = strip([(0, images), (150, images + 100 / 127.5), ("end", images + 200 / 127.5)], tmp_path / "strip.png")
    picture = Image.open(path)
    assert (picture.mode, picture.size) == ("RGBA", (3 * 64 + 4, 2 * 64 + 2 + 20))
    pixels = np.array(picture)
    for column, value in enumerate((0, 100, 200)):
        for row in range(2):
            cell = pixels[20 + 66 * row : 84 + 66 * row, 66 * column : 66 * column + 64]
            assert (cell == [value + row] * 3 + [255]).all()
    labels = pixels[:20, :, 3] > 0
    assert all(labels[:, 66 * c : 66 * c + 64].any() for c in range(3)) and not labels[0].any()


def test_a_strip_needs_images_of_one_shape(tmp_path):
    for sequence in ([], [(0, numbered(2)), (1, numbered(3))]):
        with pytest.raises(ValueError, match="one shape"):
            strip(sequence, tmp_path / "strip.png")
    assert not list(tmp_path.iterdir())
