"""The map of the book, and what goes onto a page."""
import re
import xml.etree.ElementTree as ET

import pytest

from lsbook import book


def test_the_book_has_no_cycle_and_every_import_leads_down():
    imports = book.room_imports()
    rows, arrows = book.room_rows(imports)
    assert rows.keys() == imports.keys() >= {"images", "scenes", "text", "segmenter", "training", "lseg", "step"}
    assert all(rows[b] < rows[room] for room, below in imports.items() for b in below)
    assert {(b, r) for b, r in arrows} <= {(b, r) for r, below in imports.items() for b in below}


def test_a_cycle_is_seen():
    with pytest.raises(ValueError, match="cycle among a, b"):
        book.room_rows({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_map_is_a_picture_with_a_link_a_room():
    links = {room: ("all", f"{room}.html?a&b") for room in book.room_imports()}
    svg = ET.fromstring(book.book_map(links))
    found = [a.get("href") for a in svg.iter("{http://www.w3.org/2000/svg}a")]
    assert sorted(found) == sorted(address for _, address in links.values())
    x0, y0, w, h = map(float, svg.get("viewBox").split())
    for r in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(r.get("x")) <= w - 116 and 0 <= float(r.get("y")) <= h - 34
    assert not re.search("https?://(?!www.w3.org/2000/svg)", book.book_map(links))
