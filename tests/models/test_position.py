import math

import torch

from detr_accel.models.position import sine_positions


def test_one_cell_written_out():
    """Cell (row 1, column 2) of a 2 x 3 image in a 3 x 5 canvas, D = 8: y first, sine and cosine in turn."""
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[:, :2, :3] = False
    code = sine_positions(mask, 8, torch.float64).reshape(3, 5, 8)[1, 2]
    y, x = (2 / (2 + 1e-6) * 2 * math.pi, 3 / (3 + 1e-6) * 2 * math.pi)
    slow = 10000 ** (2 / 4)
    row = [math.sin(y), math.cos(y), math.sin(y / slow), math.cos(y / slow)]
    column = [math.sin(x), math.cos(x), math.sin(x / slow), math.cos(x / slow)]
    torch.testing.assert_close(code, torch.tensor(row + column, dtype=torch.float64))


def test_padding_does_not_move_the_codes():
    alone = sine_positions(torch.zeros(1, 4, 6, dtype=torch.bool), 16).reshape(4, 6, 16)
    mask = torch.ones(1, 7, 9, dtype=torch.bool)
    mask[:, :4, :6] = False
    assert torch.equal(sine_positions(mask, 16).reshape(7, 9, 16)[:4, :6], alone)


def test_stays_in_float32_under_autocast():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        code = sine_positions(mask, 16)
    assert code.dtype == torch.float32 and torch.equal(code, sine_positions(mask, 16))


def test_fully_masked_image_has_finite_codes():
    assert sine_positions(torch.ones(1, 2, 2, dtype=torch.bool), 8).isfinite().all()
