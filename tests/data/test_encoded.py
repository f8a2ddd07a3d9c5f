"""`Encoded`: decoding only what a crop needs gives the pixels of decoding everything."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visformer.data import MAX_PIXELS, ImageError, image_ops, open_image
from visformer.data.decode import read_file
from visformer.data.encoded import Encoded

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours with the 1/f spectrum of nature."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(width, height)
    planes = []
    for strength in (50, 14, 9):
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**1.2
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(strength * plane / plane.std())
    light, red, blue = planes
    pixels = np.stack([light + red, light - red / 2, light - blue], axis=2) + 118
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **{"quality": 90} | options if format == "JPEG" else options)
    return buffer.getvalue()


def cropped(data: bytes, channels: int, left: int, top: int, width: int, height: int) -> np.ndarray:
    """The crop after decoding everything."""
    return image_ops.from_pillow(open_image(data, channels))[top : top + height, left : left + width]


@st.composite
def crops(draw, width: int, height: int):
    crop_w, crop_h = draw(st.integers(1, width)), draw(st.integers(1, height))
    return draw(st.integers(0, width - crop_w)), draw(st.integers(0, height - crop_h)), crop_w, crop_h


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 90), st.integers(1, 90), st.sampled_from([0, 1, 2]), st.sampled_from(["L", "RGB"]))
def test_a_crop_of_a_jpeg_is_that_of_the_whole_bit_for_bit(data, width, height, subsampling, mode):
    image = photograph(90, 90).resize((width, height)).convert(mode)
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    options |= data.draw(st.sampled_from([{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}]))
    content = encoded(image, **options)
    whole = Encoded(content)
    assert (whole.width, whole.height) == (width, height)
    for _ in range(4):
        box = data.draw(crops(width, height))
        result = whole.crop(*box)
        assert result.flags.owndata and result.flags.c_contiguous
        assert np.array_equal(result, cropped(content, 3, *box))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 2])
def test_upright_by_exif(orientation, reduction):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(96, 64), exif=exif)
    image = Encoded(content)
    upright = open_image(content)
    assert (image.width, image.height) == upright.size
    result = image.crop(16, 8, 40, 32, reduction)
    expected = np.asarray(upright.crop((16, 8, 56, 40)).reduce(reduction)).astype(int)
    assert result.shape == expected.shape and np.abs(result - expected).mean() < (3 if reduction > 1 else 1e-9)


OTHERS = [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("JPEG", "L"),
    ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"),
]  # fmt: skip


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("format, mode", OTHERS)
def test_every_other_kind_is_as_open_image_has_it(format, mode, channels):
    content = encoded(
        photograph(40, 30).convert("L").convert(mode) if "I" in mode else photograph(40, 30).convert(mode), format
    )
    image = Encoded(content, channels)
    assert (image.width, image.height) == (40, 30)
    assert np.array_equal(image.crop(3, 4, 20, 10), cropped(content, channels, 3, 4, 20, 10))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_colour_jpeg_in_other_channels(channels):
    content = encoded(photograph(40, 30))
    assert np.array_equal(Encoded(content, channels).crop(0, 0, 40, 30), cropped(content, channels, 0, 0, 40, 30))


def test_the_reduction_keeps_half_as_many_pixels_again_as_are_needed():
    image = Encoded(encoded(photograph(300, 240)))
    assert image.reduction(300, 240, (80, 100)) == 2
    assert image.reduction(299, 240, (80, 100)) == 1
    assert image.reduction(300, 239, (80, 100)) == 1
    assert image.reduction(300, 240, (20, 25)) == 8
    assert image.reduction(300, 239, (20, 25)) == 4
    assert Encoded(encoded(photograph(300, 240), "PNG")).reduction(300, 240, (20, 25)) == 1


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(60, 200), st.integers(60, 200), st.sampled_from([2, 4, 8]))
def test_a_reduced_crop_has_enough_pixels(data, width, height, reduction):
    image = Encoded(encoded(photograph(200, 200).resize((width, height))))
    left, top, crop_w, crop_h = data.draw(crops(width, height))
    pixels = image.crop(left, top, crop_w, crop_h, reduction)
    for count, side in zip(pixels.shape[:2], (crop_h, crop_w), strict=True):
        assert side // reduction <= count <= -(-side // reduction) + 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_decode_looks_like_the_full_one(reduction):
    """Mean difference in levels between the model's inputs from a full and from the coarsest reduced decode.

    It is less than what the choice between two filters for resizing makes.
    """
    side, crop = 64, 96 * reduction
    by_decode, by_filter = [], []
    for seed in range(4):
        image = Encoded(encoded(photograph(crop + 40, crop + 40, seed)))
        assert image.reduction(crop, crop, (side, side)) == reduction
        full, small = (image.crop(8, 16, crop, crop, by) for by in (1, reduction))
        bicubic, bilinear, reduced = (
            image_ops.resize(pixels, (side, side), how).astype(int)
            for pixels, how in (
                (full, Image.Resampling.BICUBIC), (full, Image.Resampling.BILINEAR), (small, Image.Resampling.BICUBIC)
            )
        )  # fmt: skip
        by_decode.append(np.abs(bicubic - reduced).mean())
        by_filter.append(np.abs(bicubic - bilinear).mean())
    assert np.mean(by_decode) < 1.6 and np.mean(by_decode) < 0.8 * np.mean(by_filter)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_whatever_is_cropped(share):
    content = encoded(photograph(80, 60))
    for box in ((0, 0, 8, 8), (0, 0, 80, 60), (70, 50, 5, 5)):
        with pytest.raises(ImageError):
            Encoded(content[: int(len(content) * share)]).crop(*box)


def test_a_header_that_is_too_large_is_refused():
    content = bytearray(encoded(photograph(16, 16)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match=f"{MAX_PIXELS:,}"):
        Encoded(bytes(content))


def test_no_image_and_no_file(tmp_path):
    for content in (b"", b"\xff\xd8\xff", b"text", b"\xff\xd8\xff\xe0\x00\x10JFIF"):
        with pytest.raises(ImageError):
            Encoded(content)
    with pytest.raises(ImageError, match="no such file"):
        read_file(tmp_path / "none.jpg")
    (tmp_path / "a.jpg").write_bytes(b"abc")
    assert read_file(tmp_path / "a.jpg") == b"abc"


def test_images_do_not_share_their_pixels():
    first, second = (Encoded(encoded(photograph(48, 32, seed))) for seed in (1, 2))
    pixels = first.crop(0, 0, 48, 32)
    before = pixels.copy()
    second.crop(0, 0, 48, 32)
    assert np.array_equal(pixels, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_pixels_or_an_image_error(data):
    content = bytearray(encoded(photograph(32, 24), progressive=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = Encoded(bytes(content))
        width, height = min(image.width, 20), min(image.height, 10)
        reduction = data.draw(st.sampled_from([1, 2]))
        pixels = image.crop(0, 0, width, height, reduction)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and min(pixels.shape) > 0
