"""Ranges of parameters in files: covered by small boxes, each written once and all of them, read under any cut."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.engines import pieces
from trainer.engines.pieces import Piece, Reader, Shard, Writer, _Report, small_boxes
from trainer.errors import ConfigError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), max_size=4), st.integers(1, 30), st.data())
def test_small_boxes_cover_a_range_in_order(shape, most, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = torch.arange(total).view(shape)
    found = list(small_boxes(shape, start, stop, most))
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(start, stop))
    assert all(len(part) <= most for part in parts)


def cut(whole, start, stop):
    return Piece(Shard.of(whole), start, whole.flatten()[start:stop].clone())


def test_any_range_is_read_from_any_other_cut(tmp_path, monkeypatch):
    """Also by boxes of another size than those that were written, and where a rank has nothing."""
    whole = torch.arange(7 * 6.0).view(7, 6)
    monkeypatch.setattr(pieces, "_MOST_ELEMENTS", 6)
    Writer().write({"model.w": cut(whole, 0, 42), "model.scalar": Piece.of(torch.tensor(3.0))}, 5, tmp_path)
    monkeypatch.setattr(pieces, "_MOST_ELEMENTS", 4)
    reader = Reader(tmp_path)
    assert reader.adam_step == 5
    for start, stop in ((0, 42), (5, 5), (41, 42), (3, 29)):
        piece = cut(torch.zeros(7, 6), start, stop)
        reader.read({"model.w": piece})
        assert piece.values.tolist() == list(range(start, stop))
    column = torch.zeros(7, 3)
    piece = Piece(Shard.of(column, 1, 1, 2), 0, column.view(-1))
    scalar = torch.tensor(0.0)
    reader.read({"model.w": piece, "model.scalar": Piece.of(scalar)})
    assert torch.equal(column, whole[:, 3:]) and scalar == 3


def reports(*ranges):
    """What ranks would tell of having written these ranges of one parameter."""
    whole = torch.zeros(4, 6)
    placed = [pieces._Placed(cut(whole, *one).write_items("model.w"), []) for one in ranges]
    return [_Report({}, part, None) for part in placed]


def test_every_part_is_written_by_one_rank():
    Writer()._learn(reports((0, 13), (13, 24)))
    for wrong, reason in (
        (((0, 13), (14, 24)), "invalid fill"),
        (((0, 24),) * 2, "two ranks have written the same"),
        (((0, 12), (7, 12), (12, 24)), "overlapping"),
        (((0, 12),), "invalid fill"),
    ):
        with pytest.raises(ValueError, match=reason):
            Writer()._learn(reports(*wrong))


def test_what_has_not_changed_is_not_worked_out_again(tmp_path, monkeypatch):
    writer, told = Writer(), []
    gather = writer._gather
    monkeypatch.setattr(writer, "_gather", lambda report: told.append(report) or gather(report))
    for number, size in enumerate((8, 8, 9)):
        (tmp_path / str(number)).mkdir()
        weight = torch.full((size,), float(number))
        digests = writer.write({"model.w": Piece.of(weight)}, number, tmp_path / str(number))
        assert digests.keys() == {path.name for path in (tmp_path / str(number)).iterdir()}
        read = torch.zeros(size)
        Reader(tmp_path / str(number)).read({"model.w": Piece.of(read)})
        assert torch.equal(read, weight)
    assert [report.placed is None for report in told] == [False, True, False]


def test_another_model_and_another_format_are_refused_in_one_line(tmp_path):
    Writer().write({"model.w": Piece.of(torch.zeros(3))}, 1, tmp_path)
    for name, shape, reason in (("model.w", 4, r"has \[3\]"), ("model.v", 3, "lacks it")):
        message = rf"of another model: {name} is \[{shape}\] here, and the checkpoint {reason}"
        with pytest.raises(ConfigError, match=message):
            Reader(tmp_path).read({name: Piece.of(torch.zeros(shape))})
    facts = json.loads((tmp_path / "facts.json").read_text())
    (tmp_path / "facts.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ConfigError, match="has the checkpoint format 99, and this version reads format 1; use"):
        Reader(tmp_path)
    (tmp_path / "facts.json").unlink()
    with pytest.raises(ConfigError, match="format of an earlier version"):
        Reader(tmp_path)


def test_a_failed_write_is_told_and_leaves_the_writer_as_it_was(tmp_path):
    writer = Writer()
    with pytest.raises(FileNotFoundError):
        writer.write({"model.w": Piece.of(torch.zeros(3))}, 1, tmp_path / "missing" / "deeper")
    (tmp_path / "there").mkdir()
    writer.write({"model.w": Piece.of(torch.ones(3))}, 1, tmp_path / "there")
    read = torch.zeros(3)
    Reader(tmp_path / "there").read({"model.w": Piece.of(read)})
    assert read.tolist() == [1, 1, 1]
