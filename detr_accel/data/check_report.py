"""What ``detr-accel check-data`` found, as text and as a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from detr_accel.data.check import Finding, Report
from detr_accel.data.coco import CocoSource
from detr_accel.data.decode import read_rgb
from detr_accel.data.dirt import printable
from detr_accel.structures import UserError, writing

_THUMB = 220  # px, the longer side
_SEEN = 12  # px
_PICTURES = 4  # of one finding
_MOST_PICTURES = 60  # on a page
_MOST_CLASSES = 30  # in the text; the page has all
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
section { border-left: 4px solid #9a9a9a; padding: .1rem 0 .4rem .9rem; margin: 1.2rem 0; }
section.harm { border-color: #c0392b; }
.what { font-weight: 600; } .does { color: #555; } ul { margin: .3rem 0; padding-left: 1.2rem; color: #444; }
li, td { overflow-wrap: anywhere; } td.name { white-space: nowrap; }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; vertical-align: top; width: 220px; }
figcaption { font-size: .75rem; color: #555; overflow-wrap: anywhere; } img { max-width: 220px; }
.ok { color: #1e7d3c; } .no { color: #c0392b; } .bar { background: #4477aa; height: .7rem; display: inline-block; }
.none { display: inline-block; width: 220px; padding: 2.5rem 0; text-align: center; background: #eee; color: #777; }
"""


def verdict(report: Report) -> str:
    harm = sum(f.harm for f in report.findings)
    if not report.findings:
        return "clean: nothing odd was found"
    if report.ok:
        return f"fine: {len(report.findings)} kinds of odd records, and training loses nothing by them"
    return (
        f"look at it: {harm} of {len(report.findings)} kinds cost the training something (data.on_bad: {report.policy})"
    )


def table(report: Report) -> str:
    """For the console."""
    lines = []
    for name, about in report.splits.items():
        lines.append(f"{name}: {_about(about)}")
    lines.append(f"sizes are those of: {report.assumed}")
    for f in report.findings:
        lines.append(f"{'HARM' if f.harm else 'note'}  {f.split:5} {f.count:7} {f.words}: {f.training}")
        lines += [f"                    {_cut(text)}" for text in f.examples[:2]]
    if report.classes:
        splits = [s for s, about in report.splits.items() if "fault" not in about]
        lines.append("boxes by class: " + ", ".join(_class(row, splits) for row in report.classes[:_MOST_CLASSES]))
        if len(report.classes) > _MOST_CLASSES:
            lines[-1] += f", and {len(report.classes) - _MOST_CLASSES} more"
    return printable("\n".join([*lines, verdict(report)]))


def _about(about: dict) -> str:
    if "fault" in about:
        return "cannot be opened"
    return (
        f"{about['images']} images ({about['read']} read as they are), {about['boxes']} boxes "
        f"({about['targets']} to learn from), at most {about['most_boxes']} in one image, "
        f"{about['categories']} categories; {about['json']}"
    )


def _class(row: dict, splits: Sequence[str]) -> str:
    return f"{row['name']} {' / '.join(str(row.get(s, 0)) for s in splits)}"


def _cut(text: str) -> str:
    return text if len(text) <= 180 else f"{text[:177]}..."


def write(report: Report, folder: Path, title: str) -> None:
    """report.html and report.json.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_json(), indent=1)
        (folder / "report.json").write_text(text, encoding="utf-8", errors="replace")
        (folder / "report.html").write_text(page(report, title), encoding="utf-8", errors="replace")


def page(report: Report, title: str) -> str:
    """One html file, pictures included."""
    left = _MOST_PICTURES
    boxes = _Boxes(report.sources)
    sections = []
    for f in report.findings:
        places = list(dict.fromkeys(f.places))[: min(_PICTURES, left)]
        left -= len(places)
        sections.append(_section(f, [_figure(path, box, boxes.of(path), boxes.held(path)) for path, box in places]))
    rows = "".join(
        f'<tr><td class="name">{escape(name)}</td><td>{escape(_about(about))}</td></tr>'
        for name, about in report.splits.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: data</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="{"ok" if report.ok else "no"}">{escape(verdict(report))}</p>'
        f"<table>{rows}</table><p>Sizes are those of: {escape(report.assumed)}.</p>"
        f"<h2>Findings</h2>{''.join(sections) or '<p>None.</p>'}<h2>Classes</h2>{_classes(report)}</body></html>"
    )


def _section(f: Finding, figures: list[str]) -> str:
    more = (
        [f"and {f.count - len(f.examples)} more"] if f.count > len(f.examples) and f.kind != "category.balance" else []
    )
    items = "".join(f"<li>{escape(text)}</li>" for text in [*f.examples, *more])
    return (
        f'<section class="{"harm" if f.harm else "note"}"><span class="what">{escape(f.split)}: {f.count} '
        f'{escape(f.words)}</span> <span class="does">({escape(f.training)})</span>'
        f"<ul>{items}</ul>{''.join(figures)}</section>"
    )


def _classes(report: Report) -> str:
    splits = [s for s, about in report.splits.items() if "fault" not in about]
    most = max((row.get(s, 0) for row in report.classes for s in splits), default=0)
    head = "".join(f'<th class="n">{escape(s)}</th>' for s in splits)
    rows = []
    for row in report.classes:
        cells = "".join(f'<td class="n">{row.get(s, 0)}</td>' for s in splits)
        width = round(220 * row.get(splits[0], 0) / max(1, most))
        bar = f'<span class="bar" style="width:{width}px"></span>'
        rows.append(f"<tr><td>{escape(row['name'])}</td>{cells}<td>{bar}</td></tr>")
    return f"<table><tr><th>class</th>{head}<th></th></tr>{''.join(rows)}</table>"


class _Boxes:
    """All boxes of a file, to draw beside the odd one."""

    def __init__(self, sources: dict[str, CocoSource]) -> None:
        self.sources = sources
        self._known: dict[str, tuple[CocoSource, int]] = {}

    def of(self, path: str) -> tuple[tuple[int, int], list[list[float]]] | None:
        """The (h, w) of the record, and boxes xyxy px; None for a file of no split."""
        if not self._known:
            self._known = {s.file(i): (s, i) for s in self.sources.values() for i in range(len(s))}
        if path not in self._known:
            return None
        source, i = self._known[path]
        boxes, *_ = source._targets(source._rows[i], source.size_px(i))
        return source.size_px(i), boxes[:200].tolist()

    def held(self, path: str) -> bytes | None:
        """What an image holds that is no file of its own."""
        return self._known[path][0].held(self._known[path][1]) if path in self._known else None


def _figure(path: str, box: tuple[float, ...] | None, known: tuple | None, data: bytes | None) -> str:
    try:
        picture = _thumbnail(path, box, known, data)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=80)
        shown = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
    except (UserError, OSError, ValueError, OverflowError, MemoryError):
        shown = '<span class="none">cannot be shown</span>'
    text = Path(path).name + (f", box {', '.join(f'{v:.5g}' for v in box)}" if box else "")
    return f"<figure>{shown}<figcaption>{escape(text)}</figcaption></figure>"


def _thumbnail(path: str, box: tuple[float, ...] | None, known: tuple | None, data: bytes | None) -> Image.Image:
    size, boxes = known or (None, [])
    try:
        image = read_rgb(path, size, data=data, scale=True)
    except UserError:
        image, boxes, box = read_rgb(path, None, data=data), [], None  # of another shape: the boxes are nowhere
    picture = Image.fromarray(image)
    scale = _THUMB / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(picture)
    for corners in boxes:
        canvas.rectangle(_ordered([v * scale for v in corners]), outline=(80, 160, 255))
    if box is not None:
        x, y, w, h = (max(-1e4, min(1e4, v * scale)) for v in box)
        canvas.rectangle(_ordered([x, y, x + w, y + h]), outline=(230, 40, 40), width=2)
        if max(abs(w), abs(h)) < _SEEN:  # a ring around what is too small to be seen
            cx, cy = x + w / 2, y + h / 2
            canvas.ellipse([cx - _SEEN, cy - _SEEN, cx + _SEEN, cy + _SEEN], outline=(230, 40, 40), width=2)
    return picture


def _ordered(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
