"""Pages of explanations: everything in its place, nothing cut off, and the photo under the right cell."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from epic_ray.report import pictures
from epic_ray.report.pictures import (
    ChannelRow,
    ExplanationPicture,
    Tile,
    draw_explanation,
    elide,
    heat_overlay,
    outline,
)

GREEN = (0, 200, 0)
AWKWARD = "".join(
    ["class ", "\n\t", "كنيسة", "šípek", "教会", "🦊👩‍👩‍👧", "\udcff", "e\u0301\u0302\u0303" * 5, "x" * 90]
)


def cell_box(grid, shape, row, column):
    x0, y0, x1, y1 = grid
    width, height = (x1 - x0) / shape[1], (y1 - y0) / shape[0]
    return x0 + column * width, y0 + row * height, x0 + (column + 1) * width, y0 + (row + 1) * height


def one_hot(shape, row, column):
    heat = np.zeros(shape)
    heat[row, column] = 3.0
    return heat


def plain_tile(size=(224, 224), caption="tench · purity 0.41 · n01440764_1234.JPEG", **changes):
    grid = (0.0, 0.0, float(size[0]), float(size[1]))
    tile = Tile(Image.new("RGB", size, "#444444"), None, grid, cell_box(grid, (7, 7), 3, 3), caption)
    return replace(tile, **changes)


def row_of(explained=None, prototypes=(), share=1.0, **changes):
    row = ChannelRow(113, "positive", share, share, 0.41, explained or plain_tile(), tuple(prototypes))
    return replace(row, **changes)


def page_of(rows=(), **changes):
    rest = changes.pop("rest", 0.5)
    picture = ExplanationPicture(
        image_id="val/a.png",
        image=Image.new("RGB", (224, 224), "#444444"),
        predicted="tench",
        label="tench",
        logit=rest + 0.25 + sum(row.share for row in rows),
        probability=0.9,
        bias=0.25,
        rest=rest,
        rows=tuple(rows),
        footer="resnet18 · run photos · basis after",
    )
    return replace(picture, **changes)


def pixels(page):
    return np.asarray(page).astype(int)


def bounding_box(mask):
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


# ------------------------------------------------------------------------------------------------ the page
def test_each_row_makes_the_page_taller_by_the_same_amount():
    heights = [draw_explanation(page_of([row_of()] * count)).height for count in (1, 2, 3)]
    assert heights[2] - heights[1] == heights[1] - heights[0] >= pictures.TILE


def test_prototypes_make_the_page_wider_and_none_is_fine():
    widths = [draw_explanation(page_of([row_of(prototypes=[plain_tile()] * n)])).width for n in (0, 5, 6)]
    assert widths[0] == pictures.MIN_WIDTH
    assert widths[2] - widths[1] == pictures.TILE + pictures.GAP


def test_a_page_without_channels_still_shows_the_prediction():
    page = draw_explanation(page_of())
    assert page.mode == "RGB"
    assert (pixels(page) < 128).any()


def test_larger_tiles_make_the_same_page_larger():
    explanation = page_of([row_of(prototypes=[plain_tile()] * 5)])
    small, large = draw_explanation(explanation, 168), draw_explanation(explanation, 336)
    assert large.width == 2 * small.width
    assert abs(large.height - 2 * small.height) <= 8


@pytest.mark.parametrize("logit", [0.0, 1.3, float("nan"), float("inf")])
def test_shares_that_do_not_add_up_to_the_logit_are_refused(logit):
    with pytest.raises(ValueError, match=r"val/a\.png"):
        draw_explanation(page_of([row_of(share=1.0)], logit=logit))


def test_a_rounding_difference_in_the_sum_is_accepted():
    draw_explanation(page_of([row_of(share=8.25)], logit=9.0 + 0.009))


def test_tiles_too_small_for_captions_are_refused():
    with pytest.raises(ValueError, match="tile_px"):
        draw_explanation(page_of(), tile_px=63)


@pytest.mark.parametrize(
    ("label", "colour", "absent"),
    [
        ("tench", pictures.BLUE, pictures.ORANGE),
        ("church", pictures.ORANGE, pictures.BLUE),
        (None, None, pictures.BLUE),
    ],
)
def test_right_and_wrong_predictions_differ_in_colour(label, colour, absent):
    page = draw_explanation(page_of(label=label))
    header = page.crop((260, 0, page.width - pictures.MARGIN - pictures.CHART_WIDTH, 200))
    colours = {rgb for _, rgb in header.getcolors(1 << 20)}
    assert colour is None or ImageColor.getrgb(colour) in colours
    assert ImageColor.getrgb(absent) not in colours


def test_bars_are_as_long_as_their_shares():
    page = draw_explanation(page_of([row_of(share=2.0), row_of(share=-1.0)], rest=0.75))
    chart = pixels(page.crop((page.width - pictures.MARGIN - 276, 0, page.width - pictures.MARGIN - 70, 250)))
    blue, orange, ink = (
        (chart == ImageColor.getrgb(colour)).all(axis=2).sum(axis=1)
        for colour in (pictures.BLUE, pictures.ORANGE, pictures.INK)
    )
    per_unit = blue.max() / 2.0
    assert per_unit > 30
    assert orange.max() == pytest.approx(1.0 * per_unit, abs=2)
    assert ink.max() == pytest.approx(2.0 * per_unit, abs=2)  # the logit: 2 - 1 + 0.75 + 0.25


@settings(deadline=None, max_examples=15)
@given(name=st.text(max_size=120), share=st.floats(-1e6, 1e6))
@example(name=AWKWARD, share=-1e6)
def test_no_name_or_number_runs_into_its_neighbour_or_the_margin(name, share):
    tile = plain_tile(caption=f"{name} · purity 0.41 · {name}.jpg")
    rows = [row_of(tile, [tile, tile], share=share), row_of(tile, [plain_tile(caption=name)], sign="negative")]
    page = draw_explanation(page_of(rows, predicted=name, label=f"not {name}", image_id=name, footer=f"{name} " * 9))
    white = (pixels(page) == 255).all(axis=2)
    assert white[:, : pictures.MARGIN].all()
    assert white[:, -pictures.MARGIN :].all()
    first_row = 2 * pictures.MARGIN + pictures.HEADER_IMAGE + 40
    rows_white = white[first_row : first_row + 2 * (pictures.TILE + pictures.CAPTION_HEIGHT + 26)]
    gap = pictures.MARGIN + pictures.INFO_WIDTH + 2 * pictures.TILE + pictures.EXPLAINED_GAP
    assert rows_white[:, gap : gap + pictures.GAP].all()
    assert rows_white[:, gap - pictures.TILE - 14 : gap - pictures.TILE].all()
    assert rows_white[:, pictures.MARGIN + pictures.INFO_WIDTH - 10 : pictures.MARGIN + pictures.INFO_WIDTH].all()


def test_a_long_name_is_shortened_and_not_cut_off():
    name, font = "a class name that nobody would print on one line", pictures._font(12, False)
    long, short = (page_of([row_of(plain_tile(caption=text))]) for text in (name, elide(name, font, pictures.TILE)))
    assert draw_explanation(long) == draw_explanation(short) != draw_explanation(page_of([row_of()]))


# ------------------------------------------------------------------------------------------------- the tiles
def test_the_peak_outline_hugs_the_peak_cell_of_a_panorama():
    panorama = Image.new("RGB", (2000, 500), "black")
    grid = (750.0, 0.0, 1250.0, 500.0)
    peak = cell_box(grid, (5, 5), 1, 3)
    panorama.paste(GREEN, tuple(round(edge) for edge in peak))
    header_only = Image.new("RGB", (50, 50), "white")
    page = draw_explanation(page_of([row_of(Tile(panorama, None, grid, peak, "a"))], image=header_only))
    shown = pixels(page)
    x0, y0, x1, y1 = bounding_box((shown[:, :, 1] > 100) & (shown[:, :, 0] < 50) & (shown[:, :, 2] < 50))
    assert x1 - x0 == pytest.approx(pictures.TILE / 5, abs=2)
    assert y1 - y0 == pytest.approx(pictures.TILE / 5, abs=2)
    middle_x, middle_y = (x0 + x1) // 2, (y0 + y1) // 2
    strokes = [shown[middle_y, x0 - 4 : x0], shown[middle_y, x1 : x1 + 4]]
    strokes += [shown[y0 - 4 : y0, middle_x], shown[y1 : y1 + 4, middle_x]]
    assert all((stroke == 255).all(axis=1).any() for stroke in strokes)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 5), (6, 6), (6, 0)])
def test_heat_lies_where_the_cell_is_on_the_page(row, column):
    def heat_centre(row, column):
        warm = draw_explanation(page_of([row_of(plain_tile(heat=one_hot((7, 7), row, column)))]))
        change = np.abs(pixels(warm) - cold).sum(axis=2).astype(float)
        ys, xs = np.nonzero(change > 0.8 * change.max())
        return xs.mean(), ys.mean()

    # the stroke of the peak box covers what lies below it, so it stands where no heat is tried
    cold = pixels(draw_explanation(page_of([row_of(plain_tile())])))
    (x, y), (x_start, y_start) = heat_centre(row, column), heat_centre(0, 0)
    cell = pictures.TILE / 7
    assert x - x_start == pytest.approx(column * cell, abs=cell / 2)
    assert y - y_start == pytest.approx(row * cell, abs=cell / 2)


def test_a_vanished_file_is_a_labelled_grey_tile():
    missing = plain_tile(image=None)
    page = draw_explanation(page_of([row_of(missing)]))
    present = draw_explanation(page_of([row_of(plain_tile())]))
    assert page.size == present.size
    left, top, right, bottom = bounding_box((pixels(page) != pixels(present)).any(axis=2))
    assert (right - left, bottom - top) == (pictures.TILE, pictures.TILE)
    tile = pixels(page.crop((left, top, right, bottom)))
    panel = ImageColor.getrgb(pictures.PANEL)
    assert (tile[:20] == panel).all()
    assert (tile[70:100].min(axis=(0, 1)) < 150).all()  # the word


def test_small_pictures_keep_their_pixels_crisp():
    checks = Image.fromarray((np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    page = draw_explanation(page_of(image=checks))
    side = pictures.HEADER_IMAGE
    photo = page.crop((pictures.MARGIN, pictures.MARGIN, pictures.MARGIN + side, pictures.MARGIN + side))
    assert {rgb for _, rgb in photo.getcolors()} == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("size", [(2000, 500), (300, 900), (5, 700), (1, 1), (32, 32)])
def test_pictures_of_any_shape_fill_their_tile(size):
    tile = plain_tile(size, heat=np.eye(7))
    page = draw_explanation(page_of([row_of(tile, [tile])], image=tile.image))
    assert page.width == pictures.MIN_WIDTH


def test_a_grid_that_reaches_outside_the_image_is_shown_whole():
    tile = plain_tile(grid_box_xyxy_px=(-100.0, -50.0, 400.0, 300.0), heat=np.ones((3, 4)))
    draw_explanation(page_of([row_of(tile)]))


# ----------------------------------------------------------------------------------------------- the helpers
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    grid=st.sampled_from([(0, 0, 90, 120), (10.5, 20, 80, 110.25), (-30, 0, 90, 170)]),
)
def test_the_hottest_pixel_lies_in_the_hottest_cell(shape, place, grid):
    row, column = int(place[0] * shape[0]), int(place[1] * shape[1])
    black = Image.new("RGB", (90, 120), "black")
    x0, y0, x1, y1 = cell_box(grid, shape, row, column)
    brightness = pixels(heat_overlay(black, one_hot(shape, row, column), grid)).sum(axis=2)
    inside = brightness[max(round(y0), 0) : max(round(y1), 0), max(round(x0), 0) : max(round(x1), 0)]
    if inside.size:
        assert inside.max() == brightness.max() > 0


def test_heat_leaves_the_photo_alone_outside_the_grid_and_where_there_is_none():
    photo = Image.new("RGB", (60, 60), "#336699")
    warm = pixels(heat_overlay(photo, np.ones((2, 2)), (10, 20, 40, 50)))
    changed = (warm != pixels(photo)).any(axis=2)
    assert bounding_box(changed) == (10, 20, 40, 50)
    assert heat_overlay(photo, -np.ones((2, 2)), (0, 0, 60, 60)) == photo
    assert heat_overlay(photo, np.zeros((2, 2)), (0, 0, 60, 60)) == photo


def test_the_photo_stays_visible_under_the_strongest_heat():
    stripes = Image.fromarray(np.tile(np.repeat([0, 255], 8), (32, 2)).astype(np.uint8)).convert("RGB")
    warm = pixels(heat_overlay(stripes, np.ones((1, 1)), (0, 0, 32, 32)))
    assert (np.abs(warm[:, 4] - warm[:, 12]) > 60).all()


@pytest.mark.parametrize("heat", [np.ones(4), np.ones((0, 3)), np.full((2, 2), np.nan), np.full((2, 2), np.inf)])
def test_a_heat_that_is_no_map_is_refused(heat):
    with pytest.raises(ValueError, match="finite"):
        heat_overlay(Image.new("RGB", (8, 8)), heat, (0, 0, 8, 8))


@pytest.mark.parametrize("box", [(0, 0, 0, 8), (5, 0, 2, 8), (0, 0, float("nan"), 8)])
def test_a_box_without_area_is_refused(box):
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="box"):
        outline(photo, box)
    with pytest.raises(ValueError, match="box"):
        heat_overlay(photo, np.ones((2, 2)), box)


@settings(deadline=None, max_examples=60)
@given(
    x0=st.floats(-20, 70), y0=st.floats(-20, 50), width=st.floats(6, 120), height=st.floats(6, 90)
)  # some reach outside
def test_the_outline_is_whole_and_leaves_the_inside_of_the_box_alone(x0, y0, width, height):
    photo = Image.new("RGB", (80, 60), "#808080")
    box = (x0, y0, min(x0 + width, 79), min(y0 + height, 59)) if x0 + width > 0 and y0 + height > 0 else (0, 0, 6, 6)
    framed = pixels(outline(photo, box))
    changed = (framed != 128).any(axis=2)
    left, top, right, bottom = bounding_box((framed == 255).all(axis=2))
    assert changed[top, left:right].all()
    assert changed[bottom - 1, left:right].all()
    assert changed[top:bottom, left].all()
    assert changed[top:bottom, right - 1].all()
    inner = framed[max(round(box[1]), 3) : min(round(box[3]), 57), max(round(box[0]), 3) : min(round(box[2]), 77)]
    assert (inner == 128).all()


@pytest.mark.parametrize("colour", ["black", "white", "#808080"])
def test_the_outline_shows_on_any_photo(colour):
    photo = Image.new("RGB", (40, 40), colour)
    assert np.abs(pixels(outline(photo, (10, 10, 30, 30))) - pixels(photo)).max() >= 127


@settings(deadline=None, max_examples=150)
@example(text=AWKWARD, width=168, bold=True)
@given(text=st.text(max_size=200), width=st.integers(0, 300), bold=st.booleans())
def test_an_elided_text_is_never_wider_than_its_place(text, width, bold):
    font = pictures._font(11, bold)
    shown = elide(text, font, width)
    assert font.getlength(shown) <= width
    assert "\n" not in shown


def test_elision_takes_the_middle_and_leaves_short_names_whole():
    font = pictures._font(11, False)
    assert elide("tench", font, 168) == "tench"
    shown = elide("ILSVRC2012_val_00000293.JPEG", font, 100)
    head, tail = shown.split("…")
    assert "ILSVRC2012_val_00000293.JPEG".startswith(head)
    assert tail.endswith("3.JPEG")
    assert font.getlength(shown) > 80


def test_bytes_that_are_no_text_and_line_breaks_show_as_marks_and_spaces():
    assert elide("a\udcffb\nc\td", pictures._font(11, False), 168) == "a\ufffdb c d"
