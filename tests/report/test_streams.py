"""The picture of the streams: its colours, and what it can be made of."""

import pytest
import torch

from spikedistill.report.streams import coloured, picture


def batch(steps=3, n=4):
    x = torch.randint(0, 4, (steps, n, 2, 8, 10), generator=torch.Generator().manual_seed(0)).float()
    return {
        "x": x,
        "y": torch.arange(n),
        "rgb": torch.rand(n, 3, 12, 12),
        "source": torch.rand(n, 1, 8, 10).expand(n, 2, 8, 10),
    }


def test_colours():
    frame = torch.zeros(2, 2, 2)
    frame[1, 0, 0], frame[0, 0, 1], frame[:, 1, 0] = 1, 4, 4
    (on, off), (both, none) = coloured(frame, 4.0, events=True)
    assert on[2] > on[0] and off[0] > off[2] and (both < 0.01).all() and (none == 1).all()
    assert (on > coloured(frame, 1.0, events=True)[0, 0]).any()  # paler, but to be seen
    assert (coloured(torch.zeros(2, 2, 2), 1.0, events=True) == 1).all()  # no events are white
    grey, rgb = torch.rand(1, 2, 2), torch.rand(3, 2, 2)
    assert torch.equal(coloured(grey), grey[0, ..., None].expand(2, 2, 3))
    assert torch.equal(coloured(rgb), rgb.permute(1, 2, 0))


@pytest.mark.parametrize("end", ["png", "svg"])
def test_picture(tmp_path, end):
    path = picture(batch(), tmp_path / f"a.{end}", samples=2, classes=("cat", "dog"), title="both streams")
    data = path.read_bytes()
    assert data[:4] == b"\x89PNG" if end == "png" else b"<svg" in data
    mixed = batch()
    mixed["source"] = mixed["source"].expand(3, -1, -1, -1, -1).clone()
    mixed["source"][:, 1] = mixed["x"][:, 1]
    assert picture(mixed, tmp_path / f"b.{end}", samples=99).stat().st_size > len(data)
    picture({"x": batch(1)["x"], "y": torch.arange(4)}, tmp_path / f"c.{end}", classes=("$a_{$", "b", "c", "d"))
    with pytest.raises(ValueError, match=r"x is \[3, 2, 8, 10\]: a picture over time needs frames"):
        picture({"x": batch()["x"][:, 0]}, tmp_path / f"d.{end}")
