"""Escaped markup and small SVG charts, for report.py: standard library only, a chart is a string.

Colours and dashes are classes of report.css, so that one drawing serves light, dark and paper. No chart tells anything by colour
alone: bars are filled or outlined, curves are dashed, bars and cells carry their figures, alarms are triangles.
"""

import html
import math
import re

NO_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # characters that no HTML file may hold
MINUS = str.maketrans("-", "\u2212")


class Markup(str):
    """HTML that is escaped already; only `tag` and `join` make it."""


def escape(text):
    """Any text as HTML text or attribute value. Beside HTML's own five characters, backtick and pipe are written as references, for whoever
    pastes the source into Markdown; what no HTML file may hold becomes U+FFFD."""
    return html.escape(NO_HTML.sub("\ufffd", text), quote=True).replace("`", "&#96;").replace("|", "&#124;")


def tag(name, /, *content, **attributes):
    """<name attributes>content</name>. Content that is not Markup is escaped; None is left out, of content and of attributes.
    class_ is class, stroke_width is stroke-width; a float is written with two decimals."""
    written = lambda value: f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{escape(written(value))}"' for key, value in attributes.items() if value is not None]
    opening = name + "".join(pairs)
    return Markup(f"<{opening}>" if name in ("img", "meta") else f"<{opening}>{join(content)}</{name}>")


def join(parts):
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts if part is not None))


def number(value):
    """A finite number as float, else None; so is one beyond 1e300, which no axis could hold."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def show(value, digits=2, missing="\u2013"):
    value = number(value)
    return missing if value is None else f"{value:.{digits}f}".translate(MINUS)


def concise(value):
    return f"{value:.4g}".translate(MINUS)


def short(name, limit=46):
    return name if len(name) <= limit else name[:limit - 1] + "\u2026"


def svg(width, height, title, description, parts, **attributes):
    """A drawing that scales with its column; title and description are what a screen reader says of it."""
    return tag("svg", tag("title", title), tag("desc", description), *parts, viewBox=f"0 0 {width} {height}", role="img", **attributes)


def text(x, y, content, class_=None, anchor=None):
    return tag("text", content, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def bars(title, rows, paper=True):
    """Values in 0..1, outside of which a bar is cut and its figure not. rows: [(label, ours, the paper's, (low, high) of ours or None)],
    values None where there are none. Ours is filled, the paper's outlined below it, or not drawn at all if not `paper`."""
    left, span, step = 8, 262, 47 if paper else 34
    at = lambda value: left + span * min(max(value, 0), 1)
    parts, said = [], []
    for tick in (0, 0.5, 1):
        parts += [tag("line", x1=at(tick), x2=at(tick), y1=24, y2=28 + step * len(rows), class_="grid"),
                  text(at(tick), 18, f"{tick:g}", "small", "middle")]
    for i, (label, ours, theirs, interval) in enumerate(rows):
        y = 41 + step * i
        parts.append(text(left, y, short(label)))
        said.append(f"{label}: ours {show(ours, 2, 'not run')}" + (f", the paper's {show(theirs, 2, 'none')}" if paper else ""))
        for kind, value, top, missing in (("ours", ours, y + 5, "not run"), ("paper", theirs, y + 18, "not in the paper"))[:1 + paper]:
            value, end = number(value), left
            if value is not None:
                end = at(value)
                parts.append(tag("rect", x=left, y=top, width=end - left, height=11, class_=kind))
            if kind == "ours" and interval:
                low, high = map(at, interval)
                end, middle = max(end, high), top + 5.5
                whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
                parts += [tag("path", d=whisker, class_="halo"), tag("path", d=whisker, class_="whisker")]  # to be seen on the bar too
            parts.append(text(end + 5, top + 9.5, show(value, 2, missing), "small"))
    return svg(340, 34 + step * len(rows), title, "; ".join(said), parts)


def matrix(title, names, values):
    """A square of values in -1..1, None where undefined. The deeper the hue the larger the value; negative ones have an outline.
    Raises ValueError if it is no square of the names."""
    cell, left, top = 38, 112, 26
    parts, said = [], []
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        parts += [text(left - 24, top + cell * i + 23, short(name, 14), None, "end"), text(left - 8, top + cell * i + 23, i + 1, None, "end"),
                  text(left + cell * (i + 0.5), top - 8, i + 1, None, "middle")]
        for j, (other, value) in enumerate(zip(names, row, strict=True)):
            value, x, y = number(value), left + cell * j, top + cell * i
            depth = min(abs(value or 0), 1.0)
            kind = "negative" if (value or 0) < 0 else "cell"
            parts += [tag("rect", x=x + 1, y=y + 1, width=cell - 2, height=cell - 2, fill_opacity=depth, class_=kind),
                      text(x + cell / 2, y + 23, show(value), "value strong" if depth > 0.55 else "value", "middle")]
            said += [f"{name} with {other}: {show(value, 2, 'undefined')}"] if i < j else []
    width = left + cell * len(names) + 2
    return svg(width, top + cell * len(names) + 2, title, "; ".join(said), parts, style=f"min-width:{left + 30 * len(names)}px;max-width:{width}px")


def ticks(low, high, log=False, most=6):
    """Round values within low..high, at most `most`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for steps, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4), ((1,), 8)):
            values = [m * 10.0 ** e for e in range(first, last + 1) if e % every == 0 for m in steps if low <= m * 10.0 ** e * (1 + 1e-9) and
                      m * 10.0 ** e <= high * (1 + 1e-9)]
            if len(values) <= most:
                break
        return values
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if (high - low) / (m * unit) <= most - 1)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def lines(title, series, styles, x_name="step", level=None, alarms=None, allow_log=True):
    """Curves over one axis, their key below. series: {name: [(x, y)]}, a curve is broken where y is no finite number; styles: {name: 0..9},
    the class s0..s9 of its colour and dash; level: (name, y) to compare with; alarms: {name: [x]} are marked by triangles.
    With allow_log the y axis is logarithmic where all values are positive and the largest is more than ten times the smallest."""
    series = {name: [(x, number(y)) for x, y in line] for name, line in series.items()}
    ys = [y for line in series.values() for _, y in line if y is not None] + ([level[1]] if level else [])
    xs = [x for line in series.values() for x, _ in line]
    if not xs or not ys:
        return tag("p", "No finite value.", class_="left-out")
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)
    log = allow_log and low > 0 and high > 10 * low
    if low == high:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    scale = math.log if log else float
    left, right, top, bottom = 50, 328, 12, 190
    at_x = lambda x: left + (right - left) * ((x - first) / (last - first) if last > first else 0.5)
    at_y = lambda y: bottom - (bottom - top) * (scale(y) - scale(low)) / (scale(high) - scale(low))
    parts, key, said = [], [], []
    for y in ticks(low, high, log):
        parts += [tag("line", x1=left, x2=right, y1=at_y(y), y2=at_y(y), class_="grid"), text(left - 5, at_y(y) + 4, concise(y), "small", "end")]
    for x in ticks(first, last) if last > first else [first]:
        parts.append(text(min(at_x(x), right - 6), bottom + 16, f"{x:g}", "small", "middle"))
    parts.append(text(right, bottom + 30, x_name + (" (values on a log scale)" if log else ""), "small", "end"))
    sample = lambda class_: tag("svg", tag("path", d="M0 5H34", class_=class_), viewBox="0 0 34 10", class_="key", aria_hidden="true")
    if level:
        parts.append(tag("path", d=f"M{left} {at_y(level[1]):.1f}H{right}", class_="threshold"))
    for name, line in series.items():
        path, pen, here = "", "M", dict(line)
        for x, y in line:
            path, pen = (path, "M") if y is None else (f"{path}{pen}{at_x(x):.1f} {at_y(y):.1f}", "L")
        parts.append(tag("path", d=path, class_=f"line s{styles[name]}"))
        parts += [tag("path", d=f"M{at_x(x):.1f} {at_y(here[x]) - 5:.1f}l5 9h-10z", class_="alarm")
                  for x in (alarms or {}).get(name, ()) if here.get(x) is not None]
        finite = [y for _, y in line if y is not None]
        ends = f"{concise(finite[0])} to {concise(finite[-1])}" if finite else "no finite value"
        said.append(f"{name}: {ends}")
        key.append(tag("li", sample(f"line s{styles[name]}"), f" {name} ", tag("span", ends, class_="small")))
    if level:
        key.append(tag("li", sample("threshold"), f" {level[0]} {concise(level[1])}"))
    return join([svg(340, 224, title, f"Over {x_name} {first:g} to {last:g}. " + "; ".join(said), parts), tag("ul", *key, class_="legend")])


def panels(*drawn):
    """(heading, drawing) -> figures that stand side by side where there is room."""
    return tag("div", *(tag("figure", tag("figcaption", heading), drawing) for heading, drawing in drawn), class_="panels")


def table(name, head, rows):
    """The first cell of each row names it. A wide table scrolls within itself."""
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = tag("tbody", *(tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows))
    return scroll(name, tag("table", header, body))


def scroll(name, content):
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)
