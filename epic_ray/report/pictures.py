"""One explanation as one picture: the prediction, the sum behind it, a row of photos for each channel.

Layout is measured in units of 1/168 of a tile's side, so that a page drawn with larger tiles is the same page, larger.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from epic_ray.report.overlays import check_box, colour_table, heat_overlay, outline

__all__ = ["ChannelRow", "ExplanationPicture", "Tile", "draw_explanation", "elide", "heat_overlay", "outline"]

# blue and vermilion are told apart by every common kind of colour vision (Okabe and Ito); always beside a word or sign
INK, GREY, LINE, PANEL = "#1b1f24", "#626a75", "#d5d9df", "#eceef1"
BLUE, ORANGE = "#0067a5", "#b84e00"

TILE, GAP, MARGIN = 168, 14, 32
INFO_WIDTH, EXPLAINED_GAP = 204, 34
CHART_WIDTH, CHART_LINE = 420, 21
HEADER_IMAGE, MIN_WIDTH = 196, 1040
CAPTION_HEIGHT = 36
PIXEL_ART_PX = 64  # pictures up to this side keep their pixels visible when enlarged

SIGN_WORDS = {
    "positive": "positive prototypes: this channel fires high here",
    "negative": "negative prototypes: this channel fires low here",
}
LEGEND = (
    "share: what the channel adds to the logit, exactly. score: its weight times its mean activation, where positive. "
    "purity: how far the peak cell belongs to this channel alone, from −1 to 1."
)


@dataclass(frozen=True)
class Tile:
    """One image with one channel's activation.

    `image` is the upright RGB original, or None where the file has vanished. `heat` (H, W) is the activation over the
    cells, strong = large also for negative prototypes; values below 0 show as none. Both boxes are (x0, y0, x1, y1) in
    pixels of the original: the region that the H x W grid covers, and the peak cell (None where it lies in padding,
    outside the image). `caption` is
    "class · purity · file name".
    """

    image: Image.Image | None
    heat: np.ndarray | None
    grid_box_xyxy_px: tuple[float, float, float, float]
    peak_box_xyxy_px: tuple[float, float, float, float] | None
    caption: str


@dataclass(frozen=True)
class ChannelRow:
    """One channel's part in the prediction, its place in the image and its prototypes, rank 1 first."""

    channel: int
    sign: Literal["positive", "negative"]
    share: float
    score: float
    purity: float
    explained: Tile
    prototypes: tuple[Tile, ...]


@dataclass(frozen=True)
class ExplanationPicture:
    """What a page shows. `rest` is what all channels not shown add: logit == bias + rest + the rows' shares."""

    image_id: str
    image: Image.Image
    predicted: str
    label: str | None
    logit: float
    probability: float
    bias: float
    rest: float
    rows: tuple[ChannelRow, ...]
    footer: str
    tolerance: float = 1e-3
    """What the sum may miss the logit by, over 1 + |logit|: more than rounding only in lower precision."""


def draw_explanation(explanation: ExplanationPicture, tile_px: int = TILE) -> Image.Image:
    """The page as an RGB picture: header with the sum of shares, one row a channel, legend and footer.

    Raises ValueError where the shares, the rest and the bias do not add up to the logit (within its tolerance), where
    `tile_px` is below 64, or where a heat or a box cannot be drawn.
    """
    if tile_px < 64:
        raise ValueError(f"tile_px is {tile_px}; captions need tiles of at least 64 px")
    parts = explanation.bias + explanation.rest + sum(row.share for row in explanation.rows)
    tolerance = explanation.tolerance * (1 + abs(explanation.logit))
    if not (np.isfinite(explanation.logit) and abs(explanation.logit - parts) <= tolerance):
        raise ValueError(
            f"{explanation.image_id}: bias, rest and shares add up to {parts:.6g}, the logit is {explanation.logit:.6g}"
        )
    columns = max((len(row.prototypes) for row in explanation.rows), default=0)
    tiles_width = INFO_WIDTH + TILE + EXPLAINED_GAP + columns * (TILE + GAP) - GAP
    width, scale = max(MIN_WIDTH, 2 * MARGIN + tiles_width), tile_px / TILE
    sections = [_draw_header(explanation, width, scale)]
    if explanation.rows:
        sections.append(_draw_headings(width, scale, with_prototypes=columns > 0))
    sections += [_draw_row(row, explanation.logit, width, scale) for row in explanation.rows]
    sections.append(_draw_footer(explanation.footer, width, scale))
    return _stack(sections)


def elide(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """The text on one line no wider than `width_px`, its middle replaced by … where it is too long.

    Line breaks and other control characters become spaces. Empty where not even … fits.
    """
    text = _printable(text)
    if font.getlength(text) <= width_px:
        return text
    low, high = 0, len(text) - 1  # characters that may stay
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(_keep(text, middle)) <= width_px else (low, middle - 1)
    # joined letters make the width not quite monotonic in their number
    while low > 0 and font.getlength(_keep(text, low)) > width_px:
        low -= 1
    shortened = _keep(text, low)
    return shortened if font.getlength(shortened) <= width_px else ""


# ---------------------------------------------------------------------------------------------- sections
class _Sheet:
    """A white strip of the page; places and sizes in units, 1/168 of a tile's side."""

    def __init__(self, width: float, height: float, scale: float):
        self.scale = scale
        self.picture = Image.new("RGB", (self.px(width), self.px(height)), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def px(self, units: float) -> int:
        return round(units * self.scale)

    def font(self, size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
        return _font(max(self.px(size), 6), bold)

    def write(self, x: float, y: float, width: float, text: str, size: float, colour=INK, bold=False, right=False):
        """One line of text, elided to `width` and clipped to its own line."""
        font = self.font(size, bold)
        line = elide(text, font, self.px(width))
        ascent, descent = font.getmetrics()
        mask = Image.new("L", (max(self.px(width), 1), ascent + descent), 0)
        left = mask.width - font.getlength(line) if right else 0
        ImageDraw.Draw(mask).text((left, ascent), line, font=font, fill=255, anchor="ls")
        self.picture.paste(Image.new("RGB", mask.size, colour), (self.px(x), self.px(y)), mask)

    def write_lines(self, x: float, y: float, width: float, lines: Sequence[str], size: float, **style) -> float:
        """The y below the lines."""
        for line in lines:
            self.write(x, y, width, line, size, **style)
            y += 1.35 * size
        return y

    def wrap(self, text: str, width: float, size: float, most: int, bold: bool = False) -> list[str]:
        """At most `most` lines of at most `width`; what is left over is elided into the last."""
        font, lines = self.font(size, bold), [""]
        for word in _printable(text).split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and len(lines) < most and font.getlength(longer) > self.px(width):
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def paste(self, picture: Image.Image, x: float, y: float) -> None:
        self.picture.paste(picture, (self.px(x), self.px(y)))

    def bar(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """A filled rectangle, at least one pixel wide and high."""
        left, top = self.px(min(x0, x1)), self.px(y0)
        self.draw.rectangle((left, top, max(self.px(max(x0, x1)) - 1, left), max(self.px(y1) - 1, top)), fill=colour)


def _draw_header(explanation: ExplanationPicture, width: float, scale: float) -> Image.Image:
    chart_height = CHART_LINE * (len(explanation.rows) + 3) + 30
    sheet = _Sheet(width, 2 * MARGIN + max(HEADER_IMAGE, chart_height), scale)
    photo = _plain(explanation.image, sheet.px(HEADER_IMAGE))
    sheet.paste(photo, MARGIN, MARGIN)
    x = MARGIN + photo.width / scale + 26
    _write_prediction(sheet, explanation, x, width - MARGIN - CHART_WIDTH - 30 - x)
    _draw_sum(sheet, explanation, width - MARGIN - CHART_WIDTH, MARGIN)
    return sheet.picture


def _write_prediction(sheet: _Sheet, explanation: ExplanationPicture, x: float, width: float) -> None:
    if explanation.label is None:
        verdict, colour = "true label unknown", GREY
    elif explanation.label == explanation.predicted:
        verdict, colour = f"✓ right: the true label is {explanation.label}", BLUE
    else:
        verdict, colour = f"✗ wrong: the true label is {explanation.label}", ORANGE
    sheet.write(x, MARGIN, width, "predicted", 13, GREY)
    fits = sheet.font(30, bold=True).getlength(_printable(explanation.predicted)) <= sheet.px(width)
    sheet.write(x, MARGIN + 18, width, explanation.predicted, 30 if fits else 20, bold=True)
    lines = sheet.wrap(verdict, width, 15, most=2, bold=True)
    y = sheet.write_lines(x, MARGIN + 62, width, lines, 15, colour=colour, bold=True)
    sheet.write(x, y + 8, width, f"probability {100 * explanation.probability:.1f} %", 15)
    sheet.write(x, y + 30, width, f"logit {_signed(explanation.logit)}", 15)
    sheet.write(x, y + 58, width, explanation.image_id, 12, GREY)


def _draw_sum(sheet: _Sheet, explanation: ExplanationPicture, x: float, y: float) -> None:
    """A bar for each part, starting where the one above ended; the last, the logit, from 0 to their sum."""
    parts = [(f"channel {row.channel}", row.share) for row in explanation.rows]
    parts += [("all other channels", explanation.rest), ("bias", explanation.bias)]
    ends = np.concatenate([[0.0], np.cumsum([value for _, value in parts])])
    low, span = ends.min(), max(np.ptp(ends), 1e-12)
    label_width, value_width = 140, 64
    left, bars_width = x + label_width + 10, CHART_WIDTH - label_width - value_width - 20
    place = [left + bars_width * (end - low) / span for end in [*ends, explanation.logit]]
    zero = place[0]
    sheet.write(left, y, CHART_WIDTH, "how the logit adds up", 13, GREY)
    y += 26
    sheet.bar(zero, y, zero + 1 / sheet.scale, y + CHART_LINE * (len(parts) + 1), LINE)
    for index, (name, value) in enumerate(parts):
        colour = BLUE if value >= 0 else ORANGE
        sheet.write(x, y, label_width, name, 13, right=True)
        sheet.bar(place[index], y + 3, place[index + 1], y + CHART_LINE - 4, colour)
        sheet.bar(place[index + 1], y + 3, place[index + 1] + 1 / sheet.scale, y + CHART_LINE + 3, GREY)
        sheet.write(x + CHART_WIDTH - value_width, y, value_width, _signed(value), 13, colour, right=True)
        y += CHART_LINE
    sheet.write(x, y, label_width, "logit", 13, bold=True, right=True)
    sheet.bar(zero, y + 3, place[-1], y + CHART_LINE - 4, INK)
    logit = _signed(explanation.logit)
    sheet.write(x + CHART_WIDTH - value_width, y, value_width, logit, 13, bold=True, right=True)


def _draw_headings(width: float, scale: float, with_prototypes: bool) -> Image.Image:
    sheet = _Sheet(width, 40, scale)
    sheet.bar(MARGIN, 0, width - MARGIN, 1, LINE)
    x = MARGIN + INFO_WIDTH
    sheet.write(x, 14, TILE, "this image", 13, GREY)
    if with_prototypes:
        x += TILE + EXPLAINED_GAP
        sheet.write(x, 14, width - MARGIN - x, "prototypes of the channel, the strongest first", 13, GREY)
    return sheet.picture


def _draw_row(row: ChannelRow, logit: float, width: float, scale: float) -> Image.Image:
    sheet = _Sheet(width, TILE + CAPTION_HEIGHT + 26, scale)
    _write_channel(sheet, row, logit)
    x = MARGIN + INFO_WIDTH
    _place_tile(sheet, row.explained, x)
    x += TILE + EXPLAINED_GAP
    sheet.bar(x - EXPLAINED_GAP / 2, 0, x - EXPLAINED_GAP / 2 + 1, TILE + CAPTION_HEIGHT, LINE)
    for tile in row.prototypes:
        _place_tile(sheet, tile, x)
        x += TILE + GAP
    if not row.prototypes:
        sheet.write(x, TILE / 2 - 8, width - MARGIN - x, "no prototypes", 13, GREY)
    return sheet.picture


def _write_channel(sheet: _Sheet, row: ChannelRow, logit: float) -> None:
    width = INFO_WIDTH - 18
    sheet.write(MARGIN, 0, width, f"channel {row.channel}", 19, bold=True)
    words = sheet.wrap(SIGN_WORDS[row.sign], width, 12, 3)
    y = 12 + sheet.write_lines(MARGIN, 28, width, words, 12, colour=GREY)
    colour = BLUE if row.share >= 0 else ORANGE
    sheet.write(MARGIN, y, width, f"share {_signed(row.share)}", 15, colour, bold=True)
    y += 21
    if logit > 0:  # a percentage of a negative sum misleads
        percent = f"{100 * row.share / logit:.0f} % of the logit".replace("-", "−")
        sheet.write(MARGIN, y, width, percent, 12, colour)
        y += 18
    numbers = [f"score {_signed(row.score)}", f"purity {row.purity:.2f}".replace("-", "−")]
    sheet.write_lines(MARGIN, y + 4, width, numbers, 13)


def _draw_footer(footer: str, width: float, scale: float) -> Image.Image:
    inner = width - 2 * MARGIN
    measure = _Sheet(1, 1, scale)
    legend, lines = measure.wrap(LEGEND, inner, 12, 3), measure.wrap(footer, inner, 12, 4)
    sheet = _Sheet(width, 62 + 1.35 * 12 * (len(legend) + len(lines)) + MARGIN, scale)
    sheet.bar(MARGIN, 0, width - MARGIN, 1, LINE)
    ramp = colour_table()[None, 64:].round().astype(np.uint8)
    sheet.paste(Image.fromarray(ramp).resize((sheet.px(90), sheet.px(11))), MARGIN, 18)
    text = "weak to strong, each picture on its own scale"
    sheet.write(MARGIN + 102, 15, 310, text, 12, GREY)
    swatch = Image.new("RGB", (sheet.px(17), sheet.px(17)), "#8d949e")
    edges = (swatch.width * 0.2, swatch.height * 0.2, swatch.width * 0.8, swatch.height * 0.8)
    sheet.paste(outline(swatch, edges), MARGIN + 422, 15)
    sheet.write(MARGIN + 448, 15, 300, "the peak cell: where the channel is strongest", 12, GREY)
    y = sheet.write_lines(MARGIN, 40, inner, legend, 12, colour=GREY)
    sheet.write_lines(MARGIN, y + 6, inner, lines, 12, colour=GREY)
    return sheet.picture


def _stack(sections: Sequence[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (sections[0].width, sum(section.height for section in sections)), "white")
    y = 0
    for section in sections:
        page.paste(section, (0, y))
        y += section.height
    return page


# -------------------------------------------------------------------------------------------------- tiles
def _place_tile(sheet: _Sheet, tile: Tile, x: float) -> None:
    """The tile at the top of the sheet, its caption in two lines below."""
    sheet.paste(_draw_tile(tile, sheet), x, 0)
    name, _, detail = tile.caption.partition(" · ")
    lead, separator, file_name = detail.rpartition(" · ")
    lead += separator
    sheet.write(x, TILE + 5, TILE, name, 12.5)
    # the purity stays whole; only the file's name gives way
    room = sheet.px(TILE) - sheet.font(11).getlength(_printable(lead))
    sheet.write(x, TILE + 21, TILE, lead + elide(file_name, sheet.font(11), room), 11, GREY)


def _draw_tile(tile: Tile, sheet: _Sheet) -> Image.Image:
    """A square picture: the region that the grid covers, letterboxed, with heat and peak cell."""
    side = sheet.px(TILE)
    square = Image.new("RGB", (side, side), PANEL)
    if tile.image is None:
        label = _Sheet(TILE, TILE, sheet.scale)
        label.bar(0, 0, TILE, TILE, PANEL)
        label.write(54, TILE / 2 - 10, TILE - 54, "missing", 15, GREY, bold=True)
        return label.picture
    check_box(tile.grid_box_xyxy_px)
    view = tile.grid_box_xyxy_px
    if tile.peak_box_xyxy_px is not None:
        check_box(tile.peak_box_xyxy_px)
        view = _union(view, tile.peak_box_xyxy_px)
    zoom = side / max(view[2] - view[0], view[3] - view[1])
    photo = _cut(tile.image, view, zoom)
    if tile.heat is not None:
        photo = heat_overlay(photo, tile.heat, _zoomed(tile.grid_box_xyxy_px, view, zoom))
    if tile.peak_box_xyxy_px is not None:
        photo = outline(photo, _zoomed(tile.peak_box_xyxy_px, view, zoom), max(sheet.px(3), 3))
    square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    return square


def _cut(image: Image.Image, view: tuple[float, float, float, float], zoom: float) -> Image.Image:
    """The region `view` of the image, enlarged by `zoom`; where it reaches outside the image, grey."""
    size = max(round((view[2] - view[0]) * zoom), 1), max(round((view[3] - view[1]) * zoom), 1)
    photo = Image.new("RGB", size, LINE)
    inside = max(view[0], 0), max(view[1], 0), min(view[2], image.width), min(view[3], image.height)
    if inside[0] < inside[2] and inside[1] < inside[3]:
        x0, y0, x1, y1 = (round(edge) for edge in _zoomed(inside, view, zoom))
        piece = image.convert("RGB").resize((max(x1 - x0, 1), max(y1 - y0, 1)), _resampling(image), box=inside)
        photo.paste(piece, (x0, y0))
    return photo


def _plain(image: Image.Image, side_px: int) -> Image.Image:
    """The whole image, enlarged or reduced to a longer side of `side_px`."""
    zoom = side_px / max(image.size)
    size = max(round(image.width * zoom), 1), max(round(image.height * zoom), 1)
    return image.convert("RGB").resize(size, _resampling(image))


def _resampling(image: Image.Image) -> Image.Resampling:
    return Image.Resampling.NEAREST if max(image.size) <= PIXEL_ART_PX else Image.Resampling.LANCZOS


def _zoomed(box: Sequence[float], view: Sequence[float], zoom: float) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return (x0 - view[0]) * zoom, (y0 - view[1]) * zoom, (x1 - view[0]) * zoom, (y1 - view[1]) * zoom


def _union(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float, float]:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


# --------------------------------------------------------------------------------------------------- text
@lru_cache
def _font(size_px: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size_px)


def _printable(text: str) -> str:
    """The text on one line, with line breaks as spaces and bytes that are no text as a replacement mark."""
    marks = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}
    return "".join(marks.get(unicodedata.category(letter), letter) for letter in text)


def _keep(text: str, count: int) -> str:
    """`count` of the text's characters around an ellipsis, most of them from the end: file names differ there."""
    head = (2 * count) // 5
    return text[:head] + "…" + text[len(text) - (count - head) :]


def _signed(value: float) -> str:
    """A number with its sign, as +1.23 or −1.23."""
    return (f"{value:+.2f}" if abs(value) < 1e5 else f"{value:+.2e}").replace("-", "−")
