"""Escaped markup and small SVG charts, for report.py: standard library only, a chart is a string.

Colours and dashes are classes of report.css, so that one drawing serves light, dark and paper. No
chart tells anything by colour alone: bars are filled or outlined, curves are dashed, bars and cells
carry their figures, alarms are triangles.
"""

import html
import math
import re

# characters that no HTML file may hold
NO_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
MINUS = str.maketrans("-", "\u2212")


# ------------------------------------------------------------------------------------------- markup

class Markup(str):
    """HTML that is escaped already; only `tag` and `join` make it."""


def escape(text):
    """Any text as HTML text or attribute value.

    Beside HTML's own five characters, backtick and pipe are written as references, for whoever
    pastes the source into Markdown; what no HTML file may hold becomes U+FFFD.
    """
    escaped = html.escape(NO_HTML.sub("\ufffd", text), quote=True)
    return escaped.replace("`", "&#96;").replace("|", "&#124;")


def tag(name, /, *content, **attributes):
    """<name attributes>content</name> as Markup.

    name        of the element
    content     its parts; what is not Markup is escaped, None is left out
    attributes  class_ is class, stroke_width is stroke-width; a float is written with two decimals,
                None is left out
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(attribute_text(value))}"'
        for key, value in attributes.items() if value is not None)
    if name in ("img", "meta"):
        return Markup(f"<{name}{pairs}>")
    return Markup(f"<{name}{pairs}>{join(content)}</{name}>")


def attribute_text(value):
    """The text of an attribute's value; a float has two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def join(parts):
    """The parts one after the other, as Markup; what is not Markup is escaped, None left out."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part))
                          for part in parts if part is not None))


def number(value):
    """A finite number as float, else None; so is one beyond 1e300, which no axis could hold."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def show(value, digits=2, missing="\u2013"):
    """A value with so many decimals, or `missing` where it is no finite number."""
    value = number(value)
    return missing if value is None else f"{value:.{digits}f}".translate(MINUS)


def concise(value):
    """A number with four digits."""
    return f"{value:.4g}".translate(MINUS)


def short(name, limit=46):
    """A name of at most `limit` characters."""
    return name if len(name) <= limit else name[:limit - 1] + "\u2026"


def svg(width, height, title, description, parts, **attributes):
    """A drawing that scales with its column.

    width, height       of its coordinates
    title, description  what a screen reader says of it
    parts               Markup
    attributes          of the element, as `tag` takes them
    """
    return tag("svg", tag("title", title), tag("desc", description), *parts,
               viewBox=f"0 0 {width} {height}", role="img", **attributes)


def text(x, y, content, class_=None, anchor=None):
    """A text of a drawing at (x, y); anchor: start (None), middle or end."""
    return tag("text", content, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


# --------------------------------------------------------------------------------------------- bars

BARS_LEFT, BARS_SPAN = 8, 262  # where 0 is, and how far 1 is from it


def at_share(value):
    """The x of a value in 0..1, outside of which it is cut."""
    return BARS_LEFT + BARS_SPAN * min(max(value, 0), 1)


def bars(title, rows, paper=True):
    """Bars of values in 0..1; outside of it a bar is cut and its figure is not.

    title  of the drawing
    rows   [(label, ours, the paper's, (low, high) of ours or None)], values None where there are
           none
    paper  whether the paper's are drawn, outlined below ours, which are filled
    """
    step = 47 if paper else 34
    parts, said = [], []
    for tick in (0, 0.5, 1):
        parts += [tag("line", x1=at_share(tick), x2=at_share(tick), y1=24, y2=28 + step * len(rows),
                      class_="grid"),
                  text(at_share(tick), 18, f"{tick:g}", "small", "middle")]
    for i, (label, ours, theirs, interval) in enumerate(rows):
        y = 41 + step * i
        parts.append(text(BARS_LEFT, y, short(label)))
        parts += one_bar("ours", ours, y + 5, "not run", interval)
        sentence = f"{label}: ours {show(ours, 2, 'not run')}"
        if paper:
            parts += one_bar("paper", theirs, y + 18, "not in the paper")
            sentence += f", the paper's {show(theirs, 2, 'none')}"
        said.append(sentence)
    return svg(340, 34 + step * len(rows), title, "; ".join(said), parts)


def one_bar(kind, value, top, missing, interval=None):
    """A bar with its figure, a list of Markup.

    kind      class of the bar
    value     in 0..1, None where there is none
    top       y of its upper edge
    missing   what is said where there is none
    interval  (low, high) of a whisker; None: none
    """
    parts, value, end = [], number(value), BARS_LEFT
    if value is not None:
        end = at_share(value)
        parts.append(tag("rect", x=BARS_LEFT, y=top, width=end - BARS_LEFT, height=11, class_=kind))
    if interval:
        low, high = map(at_share, interval)
        end, middle = max(end, high), top + 5.5
        path = (f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8"
                f"M{high:.1f} {middle - 4}v8")
        # the halo makes it visible on the bar too
        parts += [tag("path", d=path, class_="halo"), tag("path", d=path, class_="whisker")]
    parts.append(text(end + 5, top + 9.5, show(value, 2, missing), "small"))
    return parts


# ------------------------------------------------------------------------------------------- matrix

def matrix(title, names, values):
    """A square of values in -1..1: the deeper the hue the larger the value; negative ones have an
    outline.

    title   of the drawing
    names   of the rows, and of the columns
    values  rows of values, None where undefined
    Raises ValueError if it is no square of the names.
    """
    size, left, top = 38, 112, 26
    parts, said = [], []
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        y = top + size * i
        parts += [text(left - 24, y + 23, short(name, 14), None, "end"),
                  text(left - 8, y + 23, i + 1, None, "end"),
                  text(left + size * (i + 0.5), top - 8, i + 1, None, "middle")]
        for j, (other, value) in enumerate(zip(names, row, strict=True)):
            value, x = number(value), left + size * j
            depth = min(abs(value or 0), 1.0)
            kind = "negative" if (value or 0) < 0 else "cell"
            parts += [tag("rect", x=x + 1, y=y + 1, width=size - 2, height=size - 2,
                          fill_opacity=depth, class_=kind),
                      text(x + size / 2, y + 23, show(value),
                           "value strong" if depth > 0.55 else "value", "middle")]
            if i < j:
                said.append(f"{name} with {other}: {show(value, 2, 'undefined')}")
    width, height = left + size * len(names) + 2, top + size * len(names) + 2
    return svg(width, height, title, "; ".join(said), parts,
               style=f"min-width:{left + 30 * len(names)}px;max-width:{width}px")


# ------------------------------------------------------------------------------------------- curves

def ticks(low, high, log=False, most=6):
    """Round values within low..high, at most `most`; for a logarithmic axis with `log`."""
    if log:
        return log_ticks(low, high, most)
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if (high - low) / (m * unit) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * k for k in range(first, last + 1)]


def log_ticks(low, high, most):
    """1, 2 and 5 times the powers of 10 within low..high; fewer where they are more than `most`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4), ((1,), 8)):
        powers = [10.0 ** e for e in range(first, last + 1) if e % every == 0]
        values = [m * power for power in powers for m in steps
                  if low <= m * power * (1 + 1e-9) and m * power <= high * (1 + 1e-9)]
        if len(values) <= most:
            break
    return values


class Axes:
    """The coordinates of a drawing of curves.

    xs, ys  all finite values, at least one of each
    log     whether the y axis is logarithmic
    """
    left, right, top, bottom = 50, 328, 12, 190

    def __init__(self, xs, ys, log):
        self.first, self.last, self.log = min(xs), max(xs), log
        self.low, self.high = min(ys), max(ys)
        if self.low == self.high:
            margin = 0.5 * abs(self.low or 1)
            self.low, self.high = self.low - margin, self.high + margin

    def x(self, value):
        """Where an x value is."""
        share = 0.5
        if self.last > self.first:
            share = (value - self.first) / (self.last - self.first)
        return self.left + (self.right - self.left) * share

    def y(self, value):
        """Where a y value is."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.bottom - (self.bottom - self.top) * share

    def draw(self, x_name):
        """The grid and its figures, a list of Markup."""
        parts = []
        for value in ticks(self.low, self.high, self.log):
            y = self.y(value)
            parts += [tag("line", x1=self.left, x2=self.right, y1=y, y2=y, class_="grid"),
                      text(self.left - 5, y + 4, concise(value), "small", "end")]
        for value in ticks(self.first, self.last) if self.last > self.first else [self.first]:
            at = min(self.x(value), self.right - 6)
            parts.append(text(at, self.bottom + 16, f"{value:g}", "small", "middle"))
        name = x_name + (" (values on a log scale)" if self.log else "")
        return [*parts, text(self.right, self.bottom + 30, name, "small", "end")]


def lines(title, series, styles, x_name="step", level=None, alarms=None, allow_log=True):
    """Curves over one axis, their key below.

    title      of the drawing
    series     {name: [(x, y)]}; a curve is broken where y is no finite number
    styles     {name: 0..9}, the class s0..s9 of its colour and dash
    x_name     name of the x axis
    level      (name, y) to compare with; None: none
    alarms     {name: [x]}, marked by triangles
    allow_log  whether the y axis is logarithmic where all values are positive and the largest is
               more than ten times the smallest
    """
    series = {name: [(x, number(y)) for x, y in line] for name, line in series.items()}
    level_name, level_y = level or (None, None)
    xs = [x for line in series.values() for x, _ in line]
    ys = [y for line in series.values() for _, y in line if y is not None]
    ys += [level_y] if level else []
    if not xs or not ys:
        return tag("p", "No finite value.", class_="left-out")
    axes = Axes(xs, ys, allow_log and min(ys) > 0 and max(ys) > 10 * min(ys))
    parts, key, said = axes.draw(x_name), [], []
    if level:
        path = f"M{axes.left} {axes.y(level_y):.1f}H{axes.right}"
        parts.append(tag("path", d=path, class_="threshold"))
    for name, line in series.items():
        class_, y_at = f"line s{styles[name]}", dict(line)
        parts.append(tag("path", d=curve(line, axes), class_=class_))
        for x in (alarms or {}).get(name, ()):
            if y_at.get(x) is not None:
                triangle = f"M{axes.x(x):.1f} {axes.y(y_at[x]) - 5:.1f}l5 9h-10z"
                parts.append(tag("path", d=triangle, class_="alarm"))
        finite = [y for _, y in line if y is not None]
        ends = f"{concise(finite[0])} to {concise(finite[-1])}" if finite else "no finite value"
        said.append(f"{name}: {ends}")
        key.append(tag("li", sample(class_), f" {name} ", tag("span", ends, class_="small")))
    if level:
        key.append(tag("li", sample("threshold"), f" {level_name} {concise(level_y)}"))
    description = f"Over {x_name} {axes.first:g} to {axes.last:g}. " + "; ".join(said)
    return join([svg(340, 224, title, description, parts), tag("ul", *key, class_="legend")])


def curve(line, axes):
    """The path of [(x, y)], broken where y is None."""
    path, pen = "", "M"
    for x, y in line:
        if y is None:
            pen = "M"
        else:
            path, pen = f"{path}{pen}{axes.x(x):.1f} {axes.y(y):.1f}", "L"
    return path


def sample(class_):
    """A short piece of a curve, for the key."""
    return tag("svg", tag("path", d="M0 5H34", class_=class_), viewBox="0 0 34 10", class_="key",
               aria_hidden="true")


# ---------------------------------------------------------------------------------- what holds them

def panels(*drawn):
    """(heading, drawing) pairs as figures, side by side where there is room."""
    figures = (tag("figure", tag("figcaption", heading), drawing) for heading, drawing in drawn)
    return tag("div", *figures, class_="panels")


def table(name, head, rows):
    """A table, which scrolls within itself where it is wide.

    name  what a screen reader says of it
    head  names of the columns
    rows  rows of cells, of which the first one names the row
    """
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells))
            for first, *cells in rows]
    return scroll(name, tag("table", header, tag("tbody", *body)))


def scroll(name, content):
    """Content that scrolls within itself; name: what a screen reader says of it."""
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)
