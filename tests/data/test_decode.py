"""Awkward images: what people keep in their folders, and what attackers send."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visformer.data import MAX_PIXELS, ImageError, open_image
from visformer.data.decode import IMAGE_SUFFIXES, to_mode


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0):
    return image.getpixel((x, y))


def gradient(size: int = 64) -> Image.Image:
    x = np.linspace(0, 255, size)
    return Image.fromarray(
        np.stack([np.add.outer(x, 0 * x), np.add.outer(0 * x, x), np.full((size, size), 60.0)], -1).astype("uint8")
    )


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize(
    "source_mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV", "La", "RGBa"]
)
def test_every_mode_becomes_the_one_asked_for(source_mode, channels, mode):
    image = Image.new(source_mode, (5, 4))
    result = to_mode(image, channels)
    assert result.mode == mode and result.size == (5, 4)


def test_path_bytes_and_file_are_the_same(tmp_path):
    data = encoded(gradient(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(gradient()))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        image = open_image(encoded(Image.fromarray(values), format), channels=1)
        assert np.asarray(image).tolist() == [[0, 1, 128, 255]]


def test_sixteen_bit_big_endian_tiff():
    values = np.array([[0, 65535, 32896]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert np.asarray(to_mode(image, 1)).tolist() == [[0, 255, 128]]


def test_sixteen_bit_pgm():
    data = b"P5 3 1 65535\n" + struct.pack(">3H", 0, 32896, 65535)
    assert np.asarray(open_image(data, 1)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    "values, expected",
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.4, 255.0], [0, 100, 255]), ([-3.0, 0.0, 65535.0], [0, 0, 255])],
)
def test_float_tiff(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert np.asarray(open_image(data, 1)).tolist() == [expected]


def test_float_with_nan_and_infinity():
    image = Image.fromarray(np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert np.asarray(to_mode(image, 1)).tolist() == [[0, 0, 255]]


def test_thirty_two_bit_integers():
    image = Image.fromarray(np.array([[0, 1 << 30, (1 << 31) - 1]], dtype=np.int32))
    assert np.asarray(to_mode(image, 1)).tolist() == [[0, 128, 255]]


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(open_image(encoded(image, "PNG"))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_alpha_is_laid_on_white(format, options):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    result = open_image(encoded(image, format, **options))
    assert (pixel(result), pixel(result, 1)) == ((255, 0, 0), (255, 255, 255))
    assert pixel(open_image(encoded(image, format, **options), channels=4), 1)[3] == 0


def test_half_transparent_black_is_grey():
    image = open_image(encoded(Image.new("LA", (1, 1), (0, 128)), "PNG"))
    assert pixel(image) == (127, 127, 127)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_transparency(format):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 0, 0, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    result = open_image(encoded(image, format, transparency=1))
    assert (pixel(result), pixel(result, 1)) == ((0, 0, 255), (255, 255, 255))


def test_palette_with_partial_transparency():
    image = Image.new("P", (1, 1))
    image.putpalette([0, 0, 0] * 256)
    assert pixel(open_image(encoded(image, "PNG", transparency=bytes([128] * 256)))) == (127, 127, 127)


def test_transparent_colour_of_an_rgb_png():
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    result = open_image(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert (pixel(result), pixel(result, 1)) == ((9, 9, 9), (255, 255, 255))


def test_cmyk_jpeg_keeps_its_colours():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red, green, blue = pixel(open_image(encoded(image, "JPEG")))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG", "TIFF"):
        result = open_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif))
        assert result.size == (48, 32)
        assert pixel(result, 2, 2)[0] > 200 and pixel(result, 45, 2)[0] < 50 and pixel(result, 2, 29)[0] < 50


def test_broken_exif_does_not_matter():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(data).size == (64, 64)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(open_image(data)) == (255, 0, 0) or pixel(open_image(data))[0] > 250


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_file(tmp_path, format, share):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(image, format)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_truncated_jpeg_says_so():
    data = encoded(gradient(), "JPEG")
    with pytest.raises(ImageError, match="cut short"):
        open_image(data[: len(data) // 2])


def test_text_renamed_to_jpg(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not a picture")
    with pytest.raises(ImageError, match=r"notes\.jpg: not an image"):
        open_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_no_image_at_all(data):
    with pytest.raises(ImageError):
        open_image(data)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many 1-bit pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000])
def test_png_bomb_is_refused_on_its_header(side, recwarn):
    with pytest.raises(ImageError, match=f"{MAX_PIXELS:,}"):
        open_image(bomb(side, side))


def test_image_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("cut short", "a.jpg")))
    assert (error.reason, error.name, str(error), error.exit_code) == ("cut short", "a.jpg", "a.jpg: cut short", 1)


def test_suffixes_are_lower_case():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(data):
    """Whatever happens to the bytes of a file, the answer is an image or an `ImageError`."""
    format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    content = bytearray(encoded(gradient(16), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(content))
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
